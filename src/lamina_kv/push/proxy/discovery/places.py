"""What is known of an engine before it is asked anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from lamina_kv.push.proxy.engines import Role
from lamina_kv.push.proxy.exchanges import read_url
from lamina_kv.push.proxy.settings import url_problems


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine is. Two are equal if they are the same engine, drained or not.

    Attributes:
        role: what it is asked for.
        url: of its OpenAI server; as :func:`server_url` makes it.
        push: ``HOST:PORT`` of its rank 0 for pushes; empty for a decode engine.
        server_name: whose certificate it shows, if ``url`` has an address in place of a name.
        drain: whether it is to get no new requests.
    """

    role: Role
    url: str
    push: str = ""
    server_name: str = ""
    drain: bool = field(default=False, compare=False)


Found = Callable[[tuple[Place, ...]], None]
"""Called with all places that a source knows now."""


class SourceError(Exception):
    """A source cannot be asked. Says which, and why."""


class Source(Protocol):
    """Finds engines. Equal sources find the same ones."""

    @property
    def role(self) -> Role:
        """Of all engines that it finds."""

    async def watch(self, found: Found) -> None:
        """Report all places as soon as they are known, and whenever they change, until cancelled.

        Raises:
            SourceError: if it cannot be asked. What is known stays known, and it is begun anew:
                see :func:`~lamina_kv.push.proxy.discovery.watch.follow`.
        """


def one_family(hosts: Iterable[str]) -> list[str]:
    """One address for each host, where names and Services of two address families have two for
    each: those of IPv4 if there are any. Sorted."""
    addresses = {*hosts}
    return sorted({host for host in addresses if ":" not in host} or addresses)


def place_problems(url: str) -> Iterator[str]:
    """What is wrong with the URL of an engine's server, and whatever keeps the HTTP client from
    connecting there."""
    if found := [*url_problems(url)]:
        yield from found
        return
    try:
        read_url(url)
    except ValueError as error:
        yield f"{url!r} is not a URL: {error}"
