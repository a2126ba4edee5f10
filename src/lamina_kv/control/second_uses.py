"""Chunks that a second request has used, or computed again, for tiers that keep only those, and for
stores that may have lost them: one that was emptied gets back what engines have near and use.

A tier that keeps only what several use is not offered a chunk when it is saved, because nobody
knows then whether anybody else will want it. It is offered the chunk when that is known, if the
chunk is near then. A request that computes anew what near has given up is known by
:class:`~lamina_kv.tiers.reuse.Ghosts`, and its chunks are offered when they are saved, see
:meth:`~lamina_kv.control.lanes.Lane.saved`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from lamina_kv.control.lanes import Lane
from lamina_kv.control.offers import Offer
from lamina_kv.control.requests import RequestRecord
from lamina_kv.control.shape import ChunkShape
from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.reuse import Use
from lamina_kv.tiers.slots import SlotIndex

LOOKS = 256
"""Chunks that are looked at for one plan: a quarter of a millisecond with one tier."""

MOST_WAITING = 256
"""Prefixes that wait to be looked at. Beyond that the oldest are forgotten: what is used by so many
will be used again."""


@dataclass(slots=True)
class _Prefix:
    """Chunks ``start..end`` of a request that another request has had, too.

    Attributes:
        groups: the request's keys by group.
        use: the request's use of them.
        start: the first that was not looked at.
        end: the first behind them.
    """

    groups: Sequence[Sequence[ChunkKey]]
    use: Use
    start: int
    end: int


class SecondUses:
    """See the module. A part of the planner.

    Args:
        shape: groups of chunks.
        near: the near tier.
        lanes: tiers that are offered what is used again.
    """

    def __init__(self, shape: ChunkShape, near: SlotIndex, lanes: Sequence[Lane]) -> None:
        self._shape = shape
        self._near = near
        self._lanes = lanes
        self._waiting: deque[_Prefix] = deque(maxlen=MOST_WAITING)

    @property
    def pending(self) -> bool:
        """Whether the next plan has something to offer."""
        if not self._waiting:
            return False
        prefix = self._waiting[0]
        return not any(self._near.fills(keys[prefix.start]) for keys in prefix.groups)

    def found(self, record: RequestRecord, offer: Offer) -> None:
        """A request begins with what others have computed: the engine has it, or it is loaded."""
        chunk, tokens = self._shape.chunk_tokens, offer.floor + offer.loaded
        end = -(-tokens // chunk) if offer.loaded else tokens // chunk
        record.considered = max(record.considered, end)
        self.add(record, 0, end)

    def add(self, record: RequestRecord, start: int, end: int) -> None:
        """Another request than this one has saved the chunks ``start..end`` of this one."""
        wanted = record.view.regard.keep and record.chain.epoch.lasting
        if not self._lanes or start >= end or not wanted:
            return
        groups = record.chain.groups
        last = self._waiting[-1] if self._waiting else None
        if last is not None and last.groups is groups and last.end == start:
            last.end = end
        else:
            self._waiting.append(_Prefix(groups, record.known_use, start, end))

    def offer(self) -> None:
        """Offer the tiers some of what waits, beginnings first; the rest with later plans. What is
        still being saved is waited for."""
        looks = LOOKS
        while self._waiting and looks > 0:
            prefix = self._waiting[0]
            while prefix.start < prefix.end and looks > 0:
                for group, keys in enumerate(prefix.groups):
                    key = keys[prefix.start]
                    looks -= 1
                    if self._near.fills(key):
                        return
                    if self._near.slot(key) is not None:
                        standing = self._shape.standing(
                            prefix.groups, group, prefix.start, prefix.use, False
                        )
                        for lane in self._lanes:
                            lane.offer(key, standing)
                prefix.start += 1
            if prefix.start >= prefix.end:
                self._waiting.popleft()
