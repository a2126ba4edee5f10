"""Guards the checksums of the disk tier: any change of a byte, an order or a key is noticed, and
the values are those of the CRC-32 that every system has.
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.data.tiers.disk_checksum import agree, checksum, key_tags
from lamina.keys import KEY_BYTES

shapes = st.tuples(st.integers(0, 9), st.sampled_from([1, 7, 512, 5000, 70_000]))


def extents(shape: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sums(data: np.ndarray) -> np.ndarray:
    return np.array([checksum(extent) for extent in data], np.uint32)


@settings(deadline=None)
@given(shapes, st.integers(0, 99))
def test_sound_extents_agree_with_their_crc(shape: tuple[int, int], seed: int) -> None:
    data = extents(shape, seed)
    assert sums(data).tolist() == [zlib.crc32(extent) for extent in data]
    assert agree(data, sums(data)).tolist() == [True] * shape[0]


@settings(deadline=None)
@given(shapes.filter(lambda shape: shape[0] > 0), st.integers(0, 99), st.data())
def test_a_flipped_bit_is_found_where_it_is(
    shape: tuple[int, int], seed: int, draw: st.DataObject
) -> None:
    data = extents(shape, seed)
    expected = sums(data)
    bad = draw.draw(st.sets(st.integers(0, shape[0] - 1), min_size=1))
    for extent in bad:
        at = draw.draw(st.integers(0, shape[1] - 1))
        data[extent, at] ^= 1 << draw.draw(st.integers(0, 7))
    assert np.flatnonzero(~agree(data, expected)).tolist() == sorted(bad)


def test_extents_in_another_order_are_found() -> None:
    data = extents((4, 4096), 0)
    expected = sums(data)
    data[[1, 2]] = data[[2, 1]]
    assert agree(data, expected).tolist() == [True, False, False, True]


@pytest.mark.parametrize("at", [0, KEY_BYTES // 2, KEY_BYTES - 1])
def test_every_part_of_a_key_is_mixed_in(at: int) -> None:
    keys = extents((2, KEY_BYTES), 1)
    keys[1] = keys[0]
    keys[1, at] ^= 1
    first, second = key_tags(keys)
    assert first != second
