"""A table of a slab: one value a slot, whole in memory and in blocks on the disk."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from lamina_kv.tiers.disk.aio import Operation
from lamina_kv.tiers.disk.data import Slab, address_of
from lamina_kv.tiers.disk.layout import BLOCK, GROUP, Integers
from lamina_kv.tiers.objects import aligned_memory

T = TypeVar("T", np.float64, np.uint64)


class Table(Generic[T]):
    """See the module. One thread changes it; others read ``values`` meanwhile.

    Args:
        slab: the slab.
        type_: of one number.
        slot_bytes: bytes a slot.
        at: where the table begins in those of a group.

    Attributes:
        values: shape ``(slots, numbers a slot)``, slots up to a whole number of groups. Who changes
            any calls :meth:`mark`.
        unread: groups that could not be read. They are zero.
    """

    def __init__(self, slab: Slab, type_: type[T], slot_bytes: int, at: int) -> None:
        self._slab = slab
        self._at = at
        self._slot_bytes = slot_bytes
        groups = slab.layout.groups
        self._memory = aligned_memory(groups * GROUP * slot_bytes)
        self.values: npt.NDArray[T] = self._memory.view(type_).reshape(groups * GROUP, -1)
        self._ahead = np.zeros(len(self._memory) // BLOCK, np.bool_)
        self.unread = self._load()

    def mark(self, slots: Integers) -> None:
        """The values of these slots have changed."""
        self._ahead[slots * self._slot_bytes // BLOCK] = True

    def write(self, slots: Integers | None = None) -> int:
        """Write the blocks that have changed.

        Args:
            slots: only those of these slots.

        Returns:
            0, or the errno of the first failure. What was not written is with the next call.
        """
        if slots is None:
            blocks = np.flatnonzero(self._ahead)
        else:
            blocks = np.unique(slots * self._slot_bytes // BLOCK)
            blocks = blocks[self._ahead[blocks]]
        if not blocks.size:
            return 0
        in_group = GROUP * self._slot_bytes // BLOCK
        offsets = self._slab.layout.tables(blocks // in_group) + self._at
        offsets += blocks % in_group * BLOCK
        addresses = address_of(self._memory) + blocks * BLOCK
        errors = self._slab.move(Operation.WRITE, offsets, addresses, BLOCK)
        self._ahead[blocks] = errors != 0
        return int(errors[np.argmax(errors != 0)])

    def _load(self) -> Integers:
        """Read what the file has; behind its end all is zero."""
        size = GROUP * self._slot_bytes
        groups = np.arange(self._slab.layout.groups)
        offsets = self._slab.layout.tables(groups) + self._at
        there = groups[offsets + size <= self._slab.size]
        addresses = address_of(self._memory) + there * size
        errors = self._slab.move(Operation.READ, offsets[: len(there)], addresses, size)
        unread: Integers = there[errors != 0]
        self.values.reshape(len(groups), -1)[unread] = 0
        return unread
