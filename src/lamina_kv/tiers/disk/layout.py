"""Where in a slab is what: one file for a rank's chunks and for what says which they are.

::

    4 KiB                       the label: what the file is, and how large an object is
    group 0   8 KiB             when each of its 1,024 slots was used last
              32 KiB            the head of each slot: which chunk is in it
              1,024 objects     the chunks
    group 1   ...

Tables and objects are in one file, so that one ``fdatasync`` makes both durable. Tables stand
beside their objects, so that a slab grows and shrinks at its end.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import numpy.typing as npt

from lamina_kv.geometry import DIRECT_IO_ALIGNMENT
from lamina_kv.quantities import size_of

Integers = npt.NDArray[np.int64]

BLOCK = DIRECT_IO_ALIGNMENT
"""Bytes of a block of a table. Tables are read and written in whole blocks."""

GROUP = 1024
"""Slots in a group. Its tables are 40 KiB in a row, and a million chunks have 977 of them."""

USED_BYTES = 8
"""Bytes a slot in the first table of a group: when it was used last."""

HEAD_BYTES = 32
"""Bytes a slot in the second table of a group: its head."""

TABLE_BYTES = GROUP * (USED_BYTES + HEAD_BYTES)
"""Bytes of a group's tables."""

_LABEL = struct.Struct("<16sIIQQ")
_CHECK = struct.Struct("<I")
_MAGIC = b"lamina slab"
_VERSION = 2


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of one slab.

    Attributes:
        object_bytes: bytes of one chunk's object, a multiple of :data:`BLOCK`.
        slots: chunks that fit.
    """

    object_bytes: int
    slots: int

    def __str__(self) -> str:
        return f"{self.slots} chunks of {size_of(self.object_bytes)}"

    @property
    def groups(self) -> int:
        """Groups, the last of which may be short."""
        return -(-self.slots // GROUP)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return BLOCK + self.groups * TABLE_BYTES + self.slots * self.object_bytes

    def objects(self, slots: Integers) -> Integers:
        """Where the objects of slots begin, in bytes from the start of the file."""
        tables = (slots // GROUP + 1) * TABLE_BYTES
        return BLOCK + tables + slots * self.object_bytes

    def tables(self, groups: Integers) -> Integers:
        """Where the tables of groups begin, in bytes from the start of the file."""
        return BLOCK + groups * (TABLE_BYTES + GROUP * self.object_bytes)


def encode_label(layout: Layout) -> bytes:
    """The first block of a slab. It is for whoever looks at the file without its configuration."""
    label = _LABEL.pack(_MAGIC, _VERSION, 0, layout.object_bytes, layout.slots)
    return (label + _CHECK.pack(crc32(label))).ljust(BLOCK, b"\0")


def decode_label(block: bytes) -> Layout | None:
    """What the first block of a slab says; None if that makes no sense."""
    label, check = block[: _LABEL.size], block[_LABEL.size : _LABEL.size + _CHECK.size]
    if check != _CHECK.pack(crc32(label)):
        return None
    magic, version, _, object_bytes, slots = _LABEL.unpack(label)
    if magic.rstrip(b"\0") != _MAGIC or version != _VERSION:
        return None
    return Layout(object_bytes, slots)
