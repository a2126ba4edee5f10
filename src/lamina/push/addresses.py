"""Addresses of prefill engines, as configurations and requests write them."""

from __future__ import annotations

from collections.abc import Iterable


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; an IPv6 address stands in brackets.

    Raises:
        ValueError: if it is not of that form.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 <= int(port) < 1 << 16):
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_among(address: str, peers: Iterable[str]) -> bool:
    """Whether a list names an address, or its host alone. Names are compared as they are written,
    and not looked up: who answers for a name may change.

    Args:
        address: ``HOST:PORT``.
        peers: ``HOST:PORT`` or ``HOST``.
    """
    host, port = split_address(address.lower())
    for peer in peers:
        try:
            allowed, only = split_address(peer.lower())
        except ValueError:
            allowed, only = peer.lower().removeprefix("[").removesuffix("]"), port
        if (allowed, only) == (host, port):
            return True
    return False
