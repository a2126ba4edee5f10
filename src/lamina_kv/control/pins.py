"""Chunks that stay near because a request waits for them: those that are there are pinned, the
others will be as soon as they arrive. However many requests want a chunk, it takes one slot."""

from __future__ import annotations

from collections.abc import Container

from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.slots import SlotIndex


class Pins(Container[ChunkKey]):
    """See the module.

    Args:
        near: the near tier.
        share: pins of several requests take at most its slots divided by this, and one slot if
            there is any.
        spare: those of a single request leave its slots divided by this.
    """

    def __init__(self, near: SlotIndex, share: int, spare: int) -> None:
        self._near = near
        self._share = share
        self._spare = spare
        self._wants: dict[ChunkKey, int] = {}  # requests that want each chunk
        self._slots: dict[ChunkKey, int] = {}  # leased, of those that are near

    def __len__(self) -> int:
        """Slots that pins take, now or soon."""
        return len(self._wants)

    def __contains__(self, key: object) -> bool:
        return key in self._wants

    @property
    def most(self) -> int:
        """Slots that pins of several requests may take."""
        capacity = self._near.capacity
        return max(1, capacity // self._share) if capacity else 0

    @property
    def most_of_one(self) -> int:
        """Slots that pins may take if a single request wants all of it: a prompt that fits into the
        tier is to be served whole."""
        capacity = self._near.capacity
        return max(self.most, capacity - capacity // self._spare)

    def has_room(self, key: ChunkKey, *, alone: bool) -> bool:
        """Whether one more request may want a chunk.

        Args:
            key: the chunk.
            alone: whether that request has all pins that there are, and may have more than its
                share.
        """
        most = self.most_of_one if alone else self.most
        return key in self._wants or len(self._wants) < most

    def is_wanted_once(self, key: ChunkKey) -> bool:
        """Whether a chunk's slot would be free if one request did not want it any more."""
        return self._wants[key] == 1

    def add(self, key: ChunkKey) -> None:
        """One more request wants a chunk, which is near or on its way there."""
        self._wants[key] = self._wants.get(key, 0) + 1
        self.arrived(key)

    def arrived(self, key: ChunkKey) -> None:
        """A chunk may have arrived: pin it if it is wanted."""
        if key in self._wants and key not in self._slots and self._near.slot(key) is not None:
            self._slots[key] = self._near.hold(key)

    def remove(self, key: ChunkKey) -> None:
        """One request less wants a chunk."""
        left = self._wants[key] - 1
        if left:
            self._wants[key] = left
            return
        del self._wants[key]
        if (slot := self._slots.pop(key, None)) is not None:
            self._near.release(slot)
