"""What is in the slots of a slab, in memory: arrays that are read without a lock, by every process
that maps them, and changed by one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lamina.data.shared_memory import MemoryFile, private_memory
from lamina.data.tiers.disk_aio import Integers
from lamina.data.tiers.disk_checksum import Bytes, Checksums, key_tags
from lamina.keys import KEY_BYTES
from lamina.plan import ChunkKey, StoredChunk


class ChunkTable:
    """See the module. Empty when it is made, unless ``file`` holds one already.

    Args:
        slots: slots of the slab.
        rows: extents of a chunk.
        file: memory to share it in; None for memory of this process alone.
        writable: whether this process may change it.

    Raises:
        OSError: if there is no memory for it.
        ValueError: if ``file`` holds a table of another size.
    """

    def __init__(
        self, slots: int, rows: int, file: MemoryFile | None = None, *, writable: bool = True
    ) -> None:
        fields = np.dtype(
            {
                "names": ["used", "sums", "keys", "held"],
                "formats": [
                    np.dtype((np.float64, slots)),
                    np.dtype((np.uint32, (slots, rows))),
                    np.dtype((np.uint8, (slots, KEY_BYTES))),
                    np.dtype((np.bool_, slots)),
                ],
            }
        )
        size = fields.itemsize
        memory = private_memory(size) if file is None else file.map(size, writable=writable)
        (table,) = np.frombuffer(memory, fields, 1)
        self._used: npt.NDArray[np.float64] = table["used"]
        self._sums: Checksums = table["sums"]
        self._keys: Bytes = table["keys"]
        self._held: npt.NDArray[np.bool_] = table["held"]

    def __len__(self) -> int:
        """Chunks that can be read."""
        return int(np.count_nonzero(self._held))

    def holds(self, slots: Integers, keys: Bytes) -> npt.NDArray[np.bool_]:
        """Which slots hold the key that is expected there.

        Args:
            slots: shape ``(n,)``.
            keys: shape ``(n, KEY_BYTES)``.
        """
        same: npt.NDArray[np.bool_] = (self._keys[slots] == keys).all(axis=1)
        return self._held[slots] & same

    def checksums(self, row: int, slots: Integers, keys: Bytes) -> Checksums:
        """The CRC-32s of one row's extents, if the slots hold these keys (see :meth:`holds`)."""
        mixed: Checksums = self._sums[slots, row]
        return mixed ^ key_tags(keys)

    def stored(self) -> tuple[StoredChunk, ...]:
        """Every chunk that can be read."""
        slots = np.flatnonzero(self._held)
        keys = self._keys[slots].tobytes()
        return tuple(
            StoredChunk(ChunkKey(keys[i * KEY_BYTES : (i + 1) * KEY_BYTES]), slot, used)
            for i, (slot, used) in enumerate(
                zip(slots.tolist(), self._used[slots].tolist(), strict=True)
            )
        )
