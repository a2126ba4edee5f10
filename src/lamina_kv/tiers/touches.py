"""Uses of chunks that a store has yet to hear of, so that it knows them when it is opened again.

Chunks are mostly used from near. A store that heard of its own reads only would give up first what
everybody uses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.contract import End

MOST_TOLD = 256
"""Uses that one plan tells a store of: some 10 kB on the way to each rank."""

MOST_KEPT = 256
"""Requests whose uses wait to be told. Beyond that the oldest are forgotten."""


class Touches:
    """See the module. Of a prefix the store hears from its end to its beginning, which is then the
    youngest."""

    def __init__(self) -> None:
        self._waiting: deque[Iterator[ChunkKey]] = deque(maxlen=MOST_KEPT)

    def add(self, chain: Sequence[ChunkKey], ends: Sequence[End] = ()) -> None:
        """A request has used a prefix; arguments as those of
        :meth:`~lamina_kv.tiers.contract.Index.use_prefix`."""
        self._waiting.append(_backward(chain, len(chain), ends))

    def take(self, place_of: Callable[[ChunkKey], int | None]) -> tuple[tuple[ChunkKey, int], ...]:
        """Chunks and their places, :data:`MOST_TOLD` at most; the rest by later calls.

        Args:
            place_of: where a chunk is; None if it is not here.
        """
        told: dict[ChunkKey, int] = {}
        left = MOST_TOLD
        while self._waiting and left:
            for key in islice(self._waiting[0], left):
                left -= 1
                if (place := place_of(key)) is not None:
                    told.pop(key, None)
                    told[key] = place
            if left:
                self._waiting.popleft()
        return tuple(told.items())


def _backward(chain: Sequence[ChunkKey], end: int, ends: Sequence[End]) -> Iterator[ChunkKey]:
    for key, _ in ends:
        yield key
    for index in range(end - 1, -1, -1):
        yield chain[index]
