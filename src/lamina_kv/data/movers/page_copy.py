"""The Triton kernel of the CUDA mover: copy pages by id, between device and pinned host memory.

One launch copies all pages of a row. Both sides are plain addresses to the kernel: pinned memory
has the same address on the device as on the host. Importing this module imports Triton.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

TILE_BYTES = 16 << 10
"""Bytes that one program moves at a time: 256 threads, four accesses of 16 bytes each."""

PROGRAMS = 32
"""Programs in one launch. They walk over all tiles, so that a copy as wide as the host link keeps
few multiprocessors from the model: a link of 64 GB/s and 2 µs needs 128 KiB in flight, these have
512 KiB."""

_WORDS: dict[int, Any] = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


@triton.jit(do_not_specialize=["items"])
def _copy_tiles(
    source: tl.tensor,
    source_stride: tl.tensor,
    target: tl.tensor,
    target_stride: tl.tensor,
    pairs: tl.tensor,
    page_bytes: tl.tensor,
    tiles: tl.tensor,
    items: tl.tensor,
    word_type: tl.constexpr,
    word_bytes: tl.constexpr,
    tile_words: tl.constexpr,
    programs: tl.constexpr,
) -> None:
    # Strides stay in bytes and words are cast to late: that is how the compiler sees that
    # multiples of 16 allow accesses of 16 bytes.
    for item in range(tl.program_id(0), items, programs):
        page = item // tiles
        word = (item % tiles) * tile_words + tl.arange(0, tile_words)
        inside = word < page_bytes // word_bytes
        read = source + tl.load(pairs + 2 * page) * source_stride
        write = target + tl.load(pairs + 2 * page + 1) * target_stride
        words = tl.load(read.to(tl.pointer_type(word_type)) + word, mask=inside)
        tl.store(write.to(tl.pointer_type(word_type)) + word, words, mask=inside)


def copy_pages(
    source: torch.Tensor,
    source_stride: int,
    target: torch.Tensor,
    target_stride: int,
    pairs: torch.Tensor,
    page_bytes: int,
) -> None:
    """Copy page ``pairs[i, 0]`` of ``source`` to page ``pairs[i, 1]`` of ``target``.

    Runs on the current stream; the caller keeps every argument alive until it has run. Compiled
    on the first call for a combination of strides, page size and alignment.

    Args:
        source: uint8, begins at page 0; device memory or pinned host memory.
        source_stride: bytes from one page to the next.
        target: as ``source``; must not overlap the pages that are read.
        target_stride: bytes from one page to the next.
        pairs: int64, shape ``(pages, 2)``, on the device, the targets distinct. Not checked: a
            wrong id is a wrong address.
        page_bytes: bytes to copy of each page.
    """
    tiles = -(-page_bytes // TILE_BYTES)
    word = math.gcd(
        8, source.data_ptr(), source_stride, target.data_ptr(), target_stride, page_bytes
    )
    _copy_tiles[(PROGRAMS,)](
        source,
        source_stride,
        target,
        target_stride,
        pairs,
        page_bytes,
        tiles,
        pairs.shape[0] * tiles,
        word_type=_WORDS[word],
        word_bytes=word,
        tile_words=TILE_BYTES // word,
        programs=PROGRAMS,
        num_warps=8,
    )
