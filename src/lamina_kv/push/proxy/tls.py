"""Certificates: what the proxy shows the engines, and whose it believes."""

from __future__ import annotations

import ssl

from lamina_kv.push.proxy.settings import EngineTls, SettingsError


def engine_context(tls: EngineTls) -> ssl.SSLContext | None:
    """How connections to engines are secured; None as usual, with the authorities that this machine
    believes.

    Args:
        tls: files.

    Raises:
        SettingsError: if one cannot be used.
    """
    if tls == EngineTls():
        return None
    context = ssl.create_default_context()
    if tls.ca is not None:
        try:
            # Of engines within a cluster nobody else is to be believed.
            context = ssl.create_default_context(cafile=tls.ca)
        except OSError as error:
            raise SettingsError((f"--engines-ca: {tls.ca}: {error.strerror or error}",)) from error
    if tls.certificate is not None:
        try:
            context.load_cert_chain(tls.certificate, tls.key)
        except OSError as error:
            files = f"{tls.certificate}, {tls.key or 'no --engines-cert-key'}"
            reason = error.strerror or error
            raise SettingsError((f"--engines-cert: {files}: {reason}",)) from error
    return context
