"""How much of the proxy's memory requests may take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Gauge

from lamina_kv.push.proxy.errors import Refusal

REQUEST_BYTES = 96 << 10
"""What a request takes besides its body: tasks, three connections, pieces of an answer. With 800
streams under way, the process had 84 KiB more for each. So requests without bodies are bounded,
too."""

COPIES = 3
"""How often a body is held that goes to two engines: as it came, and as each of them is sent it."""


class Share:
    """What one request holds.

    Args:
        memory: of which.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.size = 0

    def grow(self, size: int) -> None:
        """Hold so many bytes more.

        Raises:
            Refusal: 503, if all requests together would hold too much.
        """
        self._memory.take(size)
        self.size += size


class Memory:
    """See the module.

    Args:
        limit: bytes that all requests may hold.
        gauge: is told how many they hold.
    """

    def __init__(self, limit: int, gauge: Gauge) -> None:
        self._limit = limit
        self._gauge = gauge
        self._held = 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """A request's share, from its beginning to its end."""
        share = Share(self)
        share.grow(REQUEST_BYTES)
        try:
            yield share
        finally:
            self._hold(-share.size)

    def take(self, size: int) -> None:
        """See :meth:`Share.grow`."""
        if self._held + size > self._limit:
            raise Refusal(
                503, f"requests hold {self._held} of {self._limit} bytes: ask again later"
            )
        self._hold(size)

    def _hold(self, size: int) -> None:
        self._held += size
        self._gauge.set(self._held)
