"""The Triton kernel of the CUDA mover: copy pages by id, between device and pinned host memory.

One launch copies all pages of a range of rows. Importing this module imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lamina_kv.data.movers.row_table import RowRange

TILE_BYTES = 16 << 10
"""Bytes that one program moves at a time: 256 threads, four accesses of 16 bytes each."""

LOAD_PROGRAMS, SAVE_PROGRAMS = 12, 8
"""Programs in one launch. They walk over all tiles, so that a copy as wide as the host link keeps
few multiprocessors from the model: a link of 64 GB/s and 2 µs needs 128 KiB in flight, 12 programs
have 192 KiB, and so few are known to fill such a link; not measured here. Saves are in no hurry."""

_WORDS: dict[int, Any] = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


@triton.jit(do_not_specialize=["first", "pages", "items"])
def _copy_tiles(
    near: tl.tensor,
    rows: tl.tensor,
    pairs: tl.tensor,
    first: tl.tensor,
    pages: tl.tensor,
    items: tl.tensor,
    block_stride: tl.tensor,
    page_bytes: tl.tensor,
    slot_bytes: tl.tensor,
    slot_pages: tl.tensor,
    tiles: tl.tensor,
    to_engine: tl.constexpr,
    alignment: tl.constexpr,
    word_type: tl.constexpr,
    word_bytes: tl.constexpr,
    tile_words: tl.constexpr,
    programs: tl.constexpr,
) -> None:
    # The compiler has to be told that what it reads from the table allows accesses of 16 bytes.
    for item in range(tl.program_id(0), items, programs):
        copy = item // tiles
        row = rows + 2 * (first + copy // pages)
        pair = pairs + 2 * (copy % pages)
        word = (item % tiles) * tile_words + tl.arange(0, tile_words)
        inside = word < page_bytes // word_bytes
        page = tl.load(pair)
        offset = page // slot_pages * slot_bytes + page % slot_pages * page_bytes
        held = (near + tl.load(row + 1) + offset).to(tl.pointer_type(word_type))
        there = tl.multiple_of(held, alignment) + word
        base = (tl.load(row) + tl.load(pair + 1) * block_stride).to(tl.pointer_type(word_type))
        here = tl.multiple_of(base, alignment) + word
        if to_engine:
            tl.store(here, tl.load(there, mask=inside), mask=inside)
        else:
            tl.store(there, tl.load(here, mask=inside), mask=inside)


def copy_pages(
    near: torch.Tensor,
    rows: torch.Tensor,
    part: RowRange,
    pairs: torch.Tensor,
    *,
    to_engine: bool,
) -> None:
    """Copy pages of neighbouring rows between the near slab and the engine.

    Runs on the current stream; the caller keeps every argument alive until it has run. Compiled
    on the first call for a shape of rows and a direction.

    Args:
        near: the near slab, uint8, at a multiple of 16 bytes; pinned host memory, which the
            launcher translates to its address on the device.
        rows: ``entries`` of a :class:`~lamina_kv.data.movers.row_table.RowTable`, on the device.
        part: which rows.
        pairs: int64, shape ``(pages, 2)``, on the device: near pages and the engine's pages, the
            targets distinct. Not checked: a wrong id is a wrong address.
        to_engine: the direction.
    """
    shape, pages = part.shape, pairs.shape[0]
    tiles = -(-shape.page_bytes // TILE_BYTES)
    word = min(shape.alignment, max(_WORDS))
    programs = LOAD_PROGRAMS if to_engine else SAVE_PROGRAMS
    _copy_tiles[(programs,)](
        near,
        rows,
        pairs,
        part.first,
        pages,
        part.count * pages * tiles,
        shape.block_stride,
        shape.page_bytes,
        shape.slot_bytes,
        shape.slot_pages,
        tiles,
        to_engine=to_engine,
        alignment=shape.alignment,
        word_type=_WORDS[word],
        word_bytes=word,
        tile_words=TILE_BYTES // word,
        programs=programs,
        num_warps=8,
    )
