"""Chunks on their way near: one move each, however many requests want the chunk.

A chunk whose move hangs is still listed here, so that it is not ordered a second time. Near does
not list it any more, so that it can be saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from lamina_kv.control.books import Books
from lamina_kv.control.lanes import Lane
from lamina_kv.control.transfers import Transfer
from lamina_kv.plan import ChunkKey, TierName
from lamina_kv.tiers.reuse import Use


@dataclass(slots=True)
class Fetch:
    """A move of one chunk near.

    Attributes:
        transfer: the move.
        ended: control's clock when it had ended, or was overdue; -1 before that.
    """

    transfer: Transfer
    ended: float = -1.0


class Fetches(Container[ChunkKey]):
    """See the module. A part of :class:`~lamina_kv.control.moving.MovePlanner`.

    Args:
        books: what the parts of the planner share.
    """

    def __init__(self, books: Books) -> None:
        self._books = books
        self._moves: dict[ChunkKey, Fetch] = {}
        # Moves that do not hang, and chunks that waiting requests want, by their tier; and how
        # many of each.
        self._expected: dict[ChunkKey, TierName] = {}
        self._counts: Counter[TierName] = Counter()

    def __contains__(self, key: object) -> bool:
        """Whether a move of a chunk has not ended, even if it hangs."""
        return key in self._moves

    def get(self, key: ChunkKey) -> Fetch | None:
        """The move of a chunk that has not ended."""
        return self._moves.get(key)

    def order(self, lane: Lane, request_id: str, key: ChunkKey, use: Use) -> Fetch | None:
        """Order a move of a chunk that has none; None if near has no room for it."""
        transfer = lane.fetch(request_id, key, use)
        if transfer is None:
            return None
        self.expect(key, lane.far.name)
        fetch = self._moves[key] = Fetch(transfer)
        return fetch

    # -- the queue in front of a request -----------------------------------------------------

    def expect(self, key: ChunkKey, name: TierName) -> None:
        """A chunk will come from a tier."""
        if key not in self._expected:
            self._expected[key] = name
            self._counts[name] += 1

    def unexpect(self, key: ChunkKey) -> None:
        """A chunk will not come, or has come."""
        if (name := self._expected.pop(key, None)) is not None:
            self._counts[name] -= 1

    def bytes_without(self, groups: Sequence[Sequence[ChunkKey]]) -> Mapping[TierName, int]:
        """Bytes that will come near, by their tier, all ranks.

        Args:
            groups: per group, keys of chunks that do not count.
        """
        if not self._expected:
            return {}
        others = self._counts.copy()
        for keys in groups:
            for key in keys:
                if (name := self._expected.get(key)) is not None:
                    others[name] -= 1
        return {name: count * self._books.moved_bytes for name, count in others.items()}

    # -- outcomes ----------------------------------------------------------------------------

    def overdue(self, lane: Lane, transfer: Transfer) -> None:
        """A move has not ended in time."""
        (key,) = transfer.keys
        lane.overdue(transfer)
        self._moves[key].ended = self._books.clock.now
        self.unexpect(key)

    def ended(self, lane: Lane, transfer: Transfer) -> None:
        """A move has ended on every rank."""
        (key,) = transfer.keys
        fetch = self._moves.pop(key)
        lane.fetched(transfer)
        if not transfer.overdue:
            fetch.ended = self._books.clock.tick()
            self.unexpect(key)
