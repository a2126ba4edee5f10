"""What all ranks have of a tier with slots when it is opened: a chunk counts where every rank has
it in the same slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lamina_kv.keys import KEY_BYTES
from lamina_kv.plan import ChunkKey, Int32s, StoredChunks

_BATCH = 1 << 16
"""Chunks whose keys are taken out of an array at a time, which bounds temporary lists."""


@dataclass(frozen=True, slots=True, eq=False)
class Agreed:
    """See the module.

    Attributes:
        slots: those with the same chunk on every rank, least recently used first; shape ``(n,)``.
        strays: slots in which some rank has a chunk that others have not; shape ``(m,)``.
        keys: of the chunks in ``slots``, where in :attr:`names` each is; shape ``(n,)``.
        names: keys of the first rank, shape ``(k, KEY_BYTES)``.
    """

    slots: Int32s
    strays: npt.NDArray[np.intp]
    keys: Int32s
    names: npt.NDArray[np.uint8]

    def chunks(self) -> Iterator[tuple[ChunkKey, int]]:
        """Keys and slots, least recently used first."""
        for begin in range(0, len(self.slots), _BATCH):
            batch = slice(begin, begin + _BATCH)
            names = self.names[self.keys[batch]].tobytes()
            for index, slot in enumerate(self.slots[batch].tolist()):
                yield ChunkKey(names[index * KEY_BYTES : (index + 1) * KEY_BYTES]), slot


def agree(ranks: Sequence[StoredChunks], slots: int) -> Agreed:
    """Compare what ranks have.

    Args:
        ranks: what each has; the first with keys and last uses.
        slots: how many slots all of them have. What lies beyond is left out.
    """
    first, *others = [_within(each, slots) for each in ranks]
    assert first.keys is not None, "the first rank sends keys"
    assert first.used is not None, "and when they were used"
    marks = np.zeros(slots, np.uint32)
    agreed, some = np.zeros(slots, bool), np.zeros(slots, bool)
    marks[first.slots] = first.marks
    agreed[first.slots] = some[first.slots] = True
    for other in others:
        same = np.zeros(slots, bool)
        same[other.slots] = marks[other.slots] == other.marks
        agreed &= same
        some[other.slots] = True
    order = np.argsort(first.used, kind="stable").astype(np.int32)
    order = order[agreed[first.slots[order]]]
    return Agreed(first.slots[order], np.flatnonzero(some & ~agreed), order, first.keys)


def _within(stored: StoredChunks, slots: int) -> StoredChunks:
    """The part of what a rank has that lies in the first ``slots`` slots; views, no copies."""
    end = int(np.searchsorted(stored.slots, slots))
    return StoredChunks(
        stored.slots[:end],
        stored.marks[:end],
        None if stored.keys is None else stored.keys[:end],
        None if stored.used is None else stored.used[:end],
    )
