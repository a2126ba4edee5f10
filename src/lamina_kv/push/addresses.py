"""Addresses of prefill engines, as configurations and requests write them."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv6Address

MAX_ADDRESS = 255 + 6
"""Characters of an address: DNS allows 255 for a name, and a port has six with its colon. Requests
name addresses, and engines keep thousands of those."""


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; an IPv6 address stands in brackets.

    Raises:
        ValueError: if it is not of that form.
    """
    if len(address) > MAX_ADDRESS:
        raise ValueError(
            f"an address of {len(address)} characters, {address[:60]!r} …, is too long: "
            f"{MAX_ADDRESS} are allowed"
        )
    host, colon, port = address.rpartition(":")
    digits = port.isascii() and port.isdecimal() and len(port.lstrip("0")) <= 5
    if not (colon and host and digits and int(port) < 1 << 16):
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """``HOST:PORT``, as :func:`split_address` reads it: an IPv6 address gets brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def normalise(address: str) -> str:
    """One way to write ``HOST:PORT``, so that one prefill engine has one name. Names are not looked
    up: who answers for one may change.

    Raises:
        ValueError: if it is not of that form, or too long.
    """
    split_address(address)  # what is too long is not kept
    return _normalise(address)


@lru_cache(maxsize=4096)
def _normalise(address: str) -> str:
    host, port = split_address(address)
    return join_address(_normalise_host(host), port)


class Peers:
    """The prefill engines that requests may name.

    Args:
        listed: each by ``HOST:PORT``, or by its ``HOST`` for all ports; none for all.

    Raises:
        ValueError: if one is neither.
    """

    def __init__(self, listed: Iterable[str]) -> None:
        self._addresses: set[str] = set()
        self._hosts: set[str] = set()
        for peer in listed:
            try:
                split_address(peer)
            except ValueError:
                self._hosts.add(_normalise_host(peer.removeprefix("[").removesuffix("]")))
            else:
                self._addresses.add(normalise(peer))

    def allow(self, address: str) -> bool:
        """Whether requests may name it.

        Args:
            address: as :func:`normalise` writes it.
        """
        if not (self._addresses or self._hosts):
            return True
        return address in self._addresses or split_address(address)[0] in self._hosts


def _normalise_host(host: str) -> str:
    if not host or not (host.isascii() and host.isprintable()) or set(host) & set(" []/"):
        raise ValueError(f"{host[:300]!r} is not a host")
    if ":" in host:
        return str(IPv6Address(host))
    try:
        return socket.inet_ntoa(socket.inet_aton(host))  # 010.1 is one, too
    except OSError:
        return host.lower()
