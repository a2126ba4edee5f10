"""Ports for servers that are started by others than who chooses their ports."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from pathlib import Path

_USUAL = range(10_000, 1 << 16)
"""What is left to anybody who asks for it; below are ports that have names."""

_LEAST = 1000
"""Ports that there have to be outside of the ephemeral ones if these are to be left alone."""

_reserved: list[socket.socket] = []
"""What keeps others from being given the same ports; closed when the process ends."""


def free_port() -> int:
    """A port at which nobody listens, and that nobody who asks here, in whatever process, is given
    again before this process has ended.

    It is not one of those that Linux gives to connections, and to whoever binds port 0: between the
    choice of a port and the start of a server that takes half a minute there are many of both.

    Raises:
        OSError: if there is none.
    """
    for port in _ports():
        if (reservation := _reserve(port)) is not None:
            _reserved.append(reservation)
            return port
    raise OSError("every port of this machine is in use")


def _ports() -> Iterator[int]:
    """In an order that is another one each time: a port that was just given up may have
    connections left that are still being closed."""
    ephemeral = _ephemeral()
    lasting = [port for port in _USUAL if port not in ephemeral]
    ports = lasting if len(lasting) >= _LEAST else list(_USUAL)
    first = random.SystemRandom().randrange(len(ports))
    yield from ports[first:]
    yield from ports[:first]


def _ephemeral() -> range:
    try:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    except OSError:
        return range(0)
    return range(int(low), int(high) + 1)


def _reserve(port: int) -> socket.socket | None:
    """What reserves a port while it is open, if nobody else has reserved or uses it."""
    # Linux keeps these names for as long as the socket is open, and for each network by itself.
    reservation = socket.socket(socket.AF_UNIX)
    try:
        reservation.bind(f"\0lamina-port-{port}")
        with socket.create_server(("", port)):
            pass
    except OSError:
        reservation.close()
        return None
    return reservation
