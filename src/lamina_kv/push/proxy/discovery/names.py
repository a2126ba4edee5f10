"""Engines behind a name of DNS: each of its addresses is one, those of IPv4 if there are any."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass

from lamina_kv.push.addresses import join_address
from lamina_kv.push.proxy.discovery.places import Found, Place, SourceError, one_family
from lamina_kv.push.proxy.engines import Role

INTERVAL = 5.0
"""Seconds between two questions: what resolvers keep names of pods for."""
_ANSWER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Names:
    """A name that several engines share, such as that of a headless Service.

    Attributes:
        role: of all of them.
        scheme: of their URLs.
        host: the name.
        port: of their servers.
        path: of their URLs.
        push_port: of their ``push.listen``; None for decode engines.
        interval: seconds between two questions.
    """

    role: Role
    scheme: str
    host: str
    port: int
    path: str = ""
    push_port: int | None = None
    interval: float = INTERVAL

    async def watch(self, found: Found) -> None:
        """See :class:`Source`. A name that has no address any more, or cannot be looked up, keeps
        the ones that it had: health checks tell which of them still serve."""
        while True:
            try:
                places = await self._look_up()
            except (OSError, UnicodeError, TimeoutError) as error:
                reason = str(error) or "no answer"
                raise SourceError(f"{self.host} cannot be looked up: {reason}") from error
            found(places)
            await asyncio.sleep(self.interval)

    async def _look_up(self) -> tuple[Place, ...]:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_ANSWER_SECONDS):
            answers = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        hosts = one_family(str(address[0]) for *_, address in answers)
        return tuple(
            Place(
                self.role,
                f"{self.scheme}://{join_address(host, self.port)}{self.path}",
                join_address(host, self.push_port) if self.push_port is not None else "",
                self.host if self.scheme == "https" else "",
            )
            for host in hosts
        )
