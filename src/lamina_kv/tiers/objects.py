"""A chunk's object: a header of 64 bytes, then the chunk's rows one after the other.

::

    0   4   magic
    4   2   version
    6   2   zero (flags: a codec, one day)
    8   20  key
    28  4   shard: which rank's part of the chunk
    32  8   length of the rows in bytes
    40  16  zero
    56  4   CRC-32 of the rows
    60  4   CRC-32 of the header before this field

The object is the same near and in every far tier, so that a move is one read or one write.
One checksum is bound to key and shard by the header's own: bytes of another chunk, or of another
rank, never verify.
"""

from __future__ import annotations

import mmap
import struct

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from lamina_kv.geometry import OBJECT_HEADER_BYTES, align_up
from lamina_kv.keys import KEY_BYTES
from lamina_kv.plan import ChunkKey

MAGIC = b"LmKV"
VERSION = 1

_HEADER = struct.Struct(f"<4sHH{KEY_BYTES}sIQ16xI")
_SUM = struct.Struct("<I")
_LENGTH = struct.Struct("<Q")
_LENGTH_AT = 32
_SHARD = struct.Struct("<I")
_SHARD_AT = 28
assert _HEADER.size + _SUM.size == OBJECT_HEADER_BYTES

Object = npt.NDArray[np.uint8]
"""A chunk's object: one-dimensional, C-contiguous uint8, at least header and rows long."""


def aligned_memory(size: int) -> Object:
    """A uint8 array of ``size`` bytes that starts at a page, fit for direct I/O."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, align_up(max(size, 1)), flags), np.uint8)[:size]


def seal(chunk: Object, key: ChunkKey, shard: int, length: int) -> None:
    """Write the header of a chunk whose rows are in place. Releases the GIL for most of its time.

    Args:
        chunk: the object.
        key: the chunk's key.
        shard: which rank's part it is.
        length: bytes of the rows.
    """
    header = _header_of(chunk, key, shard, length)
    chunk[:OBJECT_HEADER_BYTES] = np.frombuffer(header, np.uint8)


def verify(chunk: Object, key: ChunkKey, shard: int, length: int) -> bool:
    """Whether an object is that chunk, whole. Releases the GIL for most of its time. Arguments as
    for :func:`seal`."""
    return chunk[:OBJECT_HEADER_BYTES].tobytes() == _header_of(chunk, key, shard, length)


def _header_of(chunk: Object, key: ChunkKey, shard: int, length: int) -> bytes:
    """The header that belongs to the rows of an object. Arguments as for :func:`seal`."""
    rows = chunk[OBJECT_HEADER_BYTES : OBJECT_HEADER_BYTES + length]
    header = _HEADER.pack(MAGIC, VERSION, 0, key, shard, length, isal_zlib.crc32(rows))
    return header + _SUM.pack(isal_zlib.crc32(header))


def is_whole(chunk: Object, key: ChunkKey, shard: int) -> bool:
    """Whether an object is that chunk, of whatever length its header says. Arguments as for
    :func:`seal`."""
    return len(chunk) > OBJECT_HEADER_BYTES and verify(chunk, key, shard, row_bytes(chunk))


def shard_of(chunk: Object) -> int:
    """Which rank's part an object's header says that it is. Nothing of it is verified."""
    (shard,) = _SHARD.unpack_from(chunk[:OBJECT_HEADER_BYTES].tobytes(), _SHARD_AT)
    return int(shard)


def row_bytes(chunk: Object) -> int:
    """The length of its rows that an object's header tells. Nothing of it is verified; no more
    than there is room for in ``chunk``."""
    (length,) = _LENGTH.unpack_from(chunk[:OBJECT_HEADER_BYTES].tobytes(), _LENGTH_AT)
    return min(int(length), len(chunk) - OBJECT_HEADER_BYTES)
