"""``lamina-kv push-proxy``: the rendezvous between prefill and decode engines."""

from __future__ import annotations

import ipaddress
import logging
import resource
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import typer

from lamina_kv.push.proxy.routing.events.places import EventPlaces, read_event_places
from lamina_kv.push.proxy.settings import PrefillAddress, Settings, SettingsError, server_url

log = logging.getLogger("lamina_kv.push.proxy")

_KEEP_ALIVE = 30


@dataclass(frozen=True, slots=True)
class Listening:
    """Where and how the server listens.

    Attributes:
        host: address of an interface.
        port: TCP's.
        drain_seconds: how long requests may go on once it is asked to end.
        certificate: the server's, for ``https``; None for ``http``.
        key: of it; None if it stands in the same file.
    """

    host: str
    port: int
    drain_seconds: int
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if self.key is not None and self.certificate is None:
            raise SettingsError(("--tls-key: there is no --tls-cert to which it could belong",))


@contextmanager
def errors() -> Iterator[None]:
    """Tells plainly why settings cannot work, and exits with 2."""
    try:
        yield
    except SettingsError as error:
        for problem in error.problems:
            typer.echo(f"lamina-kv push-proxy: {problem}", err=True)
        raise typer.Exit(2) from error


def prefill_addresses(options: list[str]) -> tuple[PrefillAddress, ...]:
    """What ``--prefill`` was given: a URL, a comma and a push address each."""
    pairs = [option.partition(",") for option in options]
    return tuple(PrefillAddress(url.strip(), push.strip()) for url, _, push in pairs)


def event_places(options: list[str]) -> EventPlaces:
    """What ``--kv-events`` was given.

    Raises:
        SettingsError: if one is not as it must be.
    """
    try:
        places = read_event_places(options)
    except ValueError as error:
        raise SettingsError((f"--kv-events: {error}",)) from error
    return EventPlaces(places.port, {server_url(url): at for url, at in places.hosts.items()})


Word = TypeVar("Word", bound=StrEnum)


def word(kind: type[Word], option: str, given: str) -> Word:
    """What an option that takes one of several words was given; underscores may be dashes.

    Raises:
        SettingsError: if it is none of them.
    """
    try:
        return kind(given.replace("-", "_"))
    except ValueError as error:
        words = ", ".join(kind)
        raise SettingsError((f"--{option}: {given!r} is none of {words}",)) from error


def run(settings: Settings, listening: Listening) -> None:
    """Serve until SIGINT or SIGTERM; requests that are under way then may go on for a while.

    Raises:
        typer.Exit: with 1, if the server cannot start, or what it needs is not installed.
    """
    try:
        import uvicorn

        from lamina_kv.push.proxy.app import create_app
    except ModuleNotFoundError as error:
        typer.echo(
            f"lamina-kv push-proxy needs {error.name}: pip install 'lamina-kv[proxy]'", err=True
        )
        raise typer.Exit(1) from error
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if settings.token is None and not _is_loopback(listening.host):
        log.warning("there is no token: whoever can reach %s may ask", listening.host)
    raise_file_limit()
    with errors():
        application = create_app(settings)
        _check_certificate(listening)
    server = uvicorn.Server(
        uvicorn.Config(
            application,
            host=listening.host,
            port=listening.port,
            # httptools, which uvicorn prefers, takes headers without end, and before any token.
            http="h11",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=listening.drain_seconds,
            ssl_certfile=listening.certificate,
            ssl_keyfile=listening.key,
        )
    )
    server.run()


def raise_file_limit() -> None:
    """Let the process open as many files as it may. A request takes three connections. The usual
    1,024 are used up by 340 requests, which then look like engines that cannot be reached."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # as it is, then
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _check_certificate(listening: Listening) -> None:
    if listening.certificate is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            listening.certificate, listening.key
        )
    except OSError as error:
        files = f"{listening.certificate}, {listening.key or 'no --tls-key'}"
        raise SettingsError((f"--tls-cert: {files}: {error.strerror or error}",)) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
