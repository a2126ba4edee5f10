"""Which engine a request goes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lamina_kv.push.proxy.engines import Engine
from lamina_kv.push.proxy.requests import ApiRequest

REQUEST_BYTES = 1024
"""What a request weighs besides the bytes of its body."""


def weight(request: ApiRequest) -> int:
    """What a request adds to the load of the engine that it is sent to."""
    return REQUEST_BYTES + request.size


class Balancer(Protocol):
    """Chooses; called on the event loop, so it must not block."""

    def choose(self, engines: Sequence[Engine], request: ApiRequest) -> Engine:
        """One of ``engines``.

        Args:
            engines: of one role, at least one, all of them usable.
            request: what is to be sent there.
        """


class LeastLoaded:
    """The engine with the smallest load on each of its ranks; among equals the one with the fewest
    visits so far."""

    def choose(self, engines: Sequence[Engine], request: ApiRequest) -> Engine:
        """See :class:`Balancer`."""
        return min(
            engines,
            key=lambda engine: (
                engine.load / len(engine.ranks),
                engine.visits / len(engine.ranks),
            ),
        )
