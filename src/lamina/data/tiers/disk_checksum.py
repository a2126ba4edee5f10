"""Checksums of row extents: one call for any number of extents that lie end to end.

A checksum is the CRC-32 of an extent, mixed with the key of its chunk. CRCs join: those of many
extents give the CRC of all their bytes in a row, without reading the bytes. So a whole row is
verified by one call that holds no interpreter lock, and only a row that is damaged is looked at
extent by extent. A CRC-32 finds every damage that fits in 32 bits and every pair of flipped bits,
and misses one in 2**32 of all others.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from isal.isal_zlib import crc32, crc32_combine

from lamina.keys import KEY_BYTES

Checksums = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]


def checksum(extent: Bytes) -> int:
    """The CRC-32 of one extent, not mixed with a key."""
    return crc32(extent)


def key_tags(keys: Bytes) -> Checksums:
    """What is mixed (XOR) into the checksums of chunks, so that those of one chunk never hold
    for another.

    Args:
        keys: shape ``(n, KEY_BYTES)``.

    Returns:
        Shape ``(n,)``.
    """
    words = np.ascontiguousarray(keys).view(np.dtype("<u4"))
    tags: Checksums = np.bitwise_xor.reduce(words.reshape(-1, KEY_BYTES // 4), axis=1)
    return tags


def agree(extents: Bytes, expected: Checksums) -> npt.NDArray[np.bool_]:
    """Which extents have the checksum that is expected of them.

    Args:
        extents: shape ``(n, bytes)``, C-contiguous.
        expected: their CRC-32s, not mixed with keys, shape ``(n,)``.

    Returns:
        Shape ``(n,)``.
    """
    joined = 0
    for one in expected.tolist():
        joined = crc32_combine(joined, one, extents.shape[1])
    if crc32(extents) == joined:
        return np.ones(len(extents), np.bool_)
    found = np.array([crc32(extent) for extent in extents], np.uint32)
    return np.equal(found, expected)
