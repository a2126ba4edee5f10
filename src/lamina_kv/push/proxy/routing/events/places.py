"""Where engines publish their events, as ``--kv-events`` says it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class EventPlaces:
    """See the module. Rank N publishes at the port of rank 0 plus N.

    Attributes:
        port: at which every engine publishes, on the host of its URL; 0 if it does not.
        hosts: ``HOST:PORT`` of the engines that have one of their own, by their URL.
    """

    port: int = 0
    hosts: Mapping[str, str] = field(default_factory=dict)

    def endpoint(self, url: str, rank: int) -> str:
        """Where one rank publishes, as ZMQ has it; empty if nowhere.

        Args:
            url: of the engine's server.
            rank: its number.
        """
        if url in self.hosts:
            host, _, port = self.hosts[url].rpartition(":")
        else:
            host, port = urlsplit(url).hostname or "", str(self.port)
            host = f"[{host}]" if ":" in host else host
        return f"tcp://{host}:{int(port) + rank}" if int(port) else ""


def read_event_places(given: Iterable[str]) -> EventPlaces:
    """What ``--kv-events`` was given: ``PORT`` for all engines, ``URL,HOST:PORT`` for one.

    Raises:
        ValueError: if one is neither; it says so.
    """
    port, hosts = 0, {}
    for option in given:
        url, comma, host = option.partition(",")
        digits = (host if comma else url).rpartition(":")[2].strip()
        wrong = not digits.isascii() or not digits.isdecimal() or not 0 < int(digits[:6]) < 1 << 16
        if wrong or (comma and not host.strip().rpartition(":")[0]) or (":" in url and not comma):
            raise ValueError(f"{option!r} is neither PORT nor URL,HOST:PORT")
        if comma:
            hosts[url.strip()] = host.strip().removeprefix("tcp://")
        else:
            port = int(digits)
    return EventPlaces(port, hosts)
