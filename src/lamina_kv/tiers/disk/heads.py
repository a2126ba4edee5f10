"""The heads of a slab: which chunk is in which slot, and when each was used last.

Memory has all of them, 40 bytes a slot, and the slab's tables have a copy. A head is a promise and
no proof: whoever reads an object verifies it. So heads may be lost, damaged or ahead of their
objects, and that costs chunks and no more. Each has a check of its own, over its slot, too: garbage
names nothing, nor does a head in the wrong place.

One thread changes heads. Others look things up meanwhile, without a lock.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lamina_kv.keys import KEY_BYTES
from lamina_kv.plan import StoredChunks, marks_of
from lamina_kv.tiers.disk.data import Slab
from lamina_kv.tiers.disk.layout import GROUP, HEAD_BYTES, USED_BYTES, Integers
from lamina_kv.tiers.disk.tables import Table

Keys = npt.NDArray[np.uint8]
"""Keys, shape ``(n, KEY_BYTES)``."""

Words = npt.NDArray[np.uint64]

RECENCY_SECONDS = 60.0
"""Seconds for which last uses may wait to be written; a process that is killed loses them. Only the
order of eviction after a restart depends on them."""

# A head, little-endian: 20 bytes of key, 4 of length, 8 of check. As words of 8 bytes:
_KEY_WORDS = 3
_LENGTH_SHIFT = np.uint64(8 * (KEY_BYTES - 16))
_KEY_END = np.uint64((1 << int(_LENGTH_SHIFT)) - 1)
_MAX_LENGTH = (1 << 32) - 1
# Arbitrary (digits of pi) and odd, so that no change of a single word goes unseen.
_FACTORS = (0x243F6A8885A308D3, 0x13198A2E03707345, 0xA4093822299F31D1)
_SLOT_FACTOR = 0x082EFA98EC4E6C89
_SIZE_FACTOR = 0x452821E638D01377


@dataclass(frozen=True, slots=True)
class Summary:
    """Heads in a few numbers.

    Attributes:
        chunks: how many chunks they name.
        row_bytes: bytes of these chunks' rows.
        oldest: when the chunk that was not used for longest was used, in seconds since the epoch; 0
            if there is no chunk.
        newest: when a chunk was used last.
        damaged: heads that make no sense; each may have named a chunk.
        lost: heads of objects that are not in the file.
    """

    chunks: int
    row_bytes: int
    oldest: float
    newest: float
    damaged: int
    lost: int


class Heads:
    """See the module. Made with what a slab's tables say; what they do not say is empty.

    Args:
        slab: the slab. It may be shorter than its layout.

    Attributes:
        damaged: heads that made no sense, or could not be read. They name nothing.
        lost: heads of objects that are not in the file. They name nothing, either.
    """

    def __init__(self, slab: Slab) -> None:
        self._slab = slab
        self._used = Table(slab, np.float64, USED_BYTES, 0)
        self._heads = Table(slab, np.uint64, HEAD_BYTES, GROUP * USED_BYTES)
        self._held = np.zeros(len(self._heads.values), np.bool_)
        self._recency_due = time.monotonic() + RECENCY_SECONDS
        self.damaged = GROUP * len(self._heads.unread)
        self.lost = 0
        self._sift()

    def __len__(self) -> int:
        """Chunks that can be read."""
        return int(np.count_nonzero(self._held))

    # -- looking up --------------------------------------------------------------------------------

    def holds(self, slots: Integers, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which slots hold the chunk that is expected there.

        Args:
            slots: shape ``(n,)``.
            keys: the chunks' keys.
        """
        same: npt.NDArray[np.bool_] = (self._key_words(slots) == _words(keys)).all(axis=1)
        return self._held[slots] & same

    def stored(self, *, keys: bool) -> StoredChunks:
        """Every chunk that can be read.

        Args:
            keys: whether whole keys and last uses are wanted, or marks are enough.
        """
        slots = np.flatnonzero(self._held)
        whole = self._heads.values.view(np.uint8)[slots, :KEY_BYTES]
        places, marks = slots.astype(np.int32), marks_of(whole)
        if not keys:
            return StoredChunks(places, marks)
        return StoredChunks(places, marks, whole, self._used.values[slots, 0])

    def summary(self) -> Summary:
        """See :class:`Summary`."""
        slots = np.flatnonzero(self._held)
        lengths = self._heads.values[slots, _KEY_WORDS - 1] >> _LENGTH_SHIFT
        used = self._used.values[slots, 0]
        oldest, newest = (float(used.min()), float(used.max())) if slots.size else (0.0, 0.0)
        return Summary(len(slots), int(lengths.sum()), oldest, newest, self.damaged, self.lost)

    # -- changing ----------------------------------------------------------------------------------

    def erase(self, slots: Integers) -> None:
        """These slots hold nothing: in memory from now on, on the disk with the next
        :meth:`write`."""
        self._held[slots] = False
        named = slots[(self._heads.values[slots] != 0).any(axis=1)]
        self._heads.values[named] = 0
        self._heads.mark(named)

    def enter(
        self,
        slots: Integers,
        keys: Keys,
        lengths: Integers,
        used: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """Name what is in slots. Nobody finds it before :meth:`show`.

        Args:
            slots: shape ``(n,)``.
            keys: the chunks' keys.
            lengths: bytes of the chunks' rows, shape ``(n,)``.
            used: when they were used last, in seconds since the epoch; None for now.
        """
        words = np.zeros((len(slots), _KEY_WORDS + 1), np.uint64)
        words[:, :_KEY_WORDS] = _words(keys)
        lengths = np.minimum(lengths, _MAX_LENGTH)
        words[:, _KEY_WORDS - 1] |= lengths.astype(np.uint64) << _LENGTH_SHIFT
        words[:, _KEY_WORDS] = self._checks(words, slots)
        self._heads.values[slots] = words
        self._heads.mark(slots)
        self.touch(slots)
        if used is not None:
            self._used.values[slots, 0] = used

    def show(self, slots: Integers) -> None:
        """What was entered can be read from now on."""
        self._held[slots] = True

    def touch(self, slots: Integers) -> None:
        """What these slots hold was of use just now."""
        self._used.values[slots] = time.time()
        self._used.mark(slots)

    def write(self, entered: Integers | None = None) -> int:
        """Write what has changed; not durable before the slab is synced.

        Args:
            entered: slots whose last use is to be written, too. That of others may wait.

        Returns:
            0, or the errno of the first failure. What was not written is with the next call.
        """
        error = self._heads.write()
        if entered is not None:
            error = error or self._used.write(entered)
        if self.recency_is_due:
            self.write_recency()
        return error

    @property
    def recency_is_due(self) -> bool:
        """Whether last uses have waited for long enough."""
        return time.monotonic() >= self._recency_due

    def write_recency(self) -> None:
        """Write last uses that have waited; best effort."""
        self._used.write()
        self._recency_due = time.monotonic() + RECENCY_SECONDS

    # -- inside ------------------------------------------------------------------------------------

    def _sift(self) -> None:
        """Find out which heads name something, and erase the others."""
        layout, heads = self._slab.layout, self._heads.values
        slots = np.arange(len(heads))
        sound = heads[:, _KEY_WORDS] == self._checks(heads, slots)
        within = slots < layout.slots
        whole = layout.objects(slots) + layout.object_bytes <= self._slab.size
        named = (heads != 0).any(axis=1)
        self.damaged += int(np.count_nonzero(named & within & ~sound))
        self.lost += int(np.count_nonzero(sound & within & ~whole))
        self._held[:] = sound & within & whole
        self.erase(slots[named & ~self._held])
        used = self._used.values
        used[:] = np.clip(np.nan_to_num(used), 0, time.time())
        self._held[self._surpassed()] = False

    def _surpassed(self) -> Integers:
        """Slots whose chunk is in another slot, too, which was used later: control may give a chunk
        a second slot before the first is needed for something else."""
        slots = np.flatnonzero(self._held)
        words = self._key_words(slots)
        # Sorted by their first words, equal keys are neighbours.
        order = np.lexsort((self._used.values[slots, 0], words[:, 0]))
        words, slots = words[order], slots[order]
        same: npt.NDArray[np.bool_] = (words[1:] == words[:-1]).all(axis=1)
        surpassed: Integers = slots[:-1][same]
        return surpassed

    def _key_words(self, slots: Integers) -> Words:
        words: Words = self._heads.values[slots, :_KEY_WORDS]
        words[:, -1] &= _KEY_END
        return words

    def _checks(self, words: Words, slots: Integers) -> Words:
        """What the last word of each head must be."""
        size = self._slab.layout.object_bytes * _SIZE_FACTOR & (1 << 64) - 1
        checks: Words = (slots + 1).astype(np.uint64) * np.uint64(_SLOT_FACTOR) + np.uint64(size)
        for word, factor in enumerate(_FACTORS):
            checks += words[:, word] * np.uint64(factor)
        return checks


def _words(keys: Keys) -> Words:
    """Keys as the words of a head."""
    padded = np.zeros((len(keys), 8 * _KEY_WORDS), np.uint8)
    padded[:, :KEY_BYTES] = keys
    words: Words = padded.view(np.uint64)
    return words
