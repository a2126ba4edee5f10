"""Promise: a mover moves exactly the pages it is told to, whatever the cache looks like.

Random caches (page sizes, strides, offsets, several allocations, rows that share bytes) and random
histories of loads and saves are run against a byte-by-byte model of them. Every byte of every
allocation and of the near slab is compared, so padding between pages and blocks that were not
named are watched too. The CUDA mover's kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_kv.data.movers import Mover, cpu, make_mover
from lamina_kv.data.movers.row_table import RowTable
from lamina_kv.data.near import NearSlab
from lamina_kv.geometry import CacheGeometry, Row

Ids = npt.NDArray[np.int64]
PAGE_BYTES = st.one_of(
    st.integers(1, 300), st.sampled_from([1000, 4096, 4608, 16384, 18432, 20000, 32784])
)


@dataclass(frozen=True)
class Copy:
    """One load or save of some rows."""

    rows: tuple[int, ...]
    is_load: bool
    pages: Ids
    blocks: Ids


@dataclass(frozen=True)
class History:
    """A cache, how many slots the near tier has, and what is done."""

    geometry: CacheGeometry
    slots: int
    copies: tuple[Copy, ...]
    seed: int


@st.composite
def allocations(draw: st.DrawFn, index: int, num_blocks: int) -> tuple[list[Row], int]:
    """Rows of one allocation, one after the other or interleaved, and its size in bytes."""
    offset = draw(st.integers(0, 40))
    pages = draw(st.lists(PAGE_BYTES, min_size=1, max_size=3))
    gaps = [draw(st.sampled_from([0, 0, 1, 24, 256])) for _ in pages]
    if draw(st.booleans()):  # as in most models
        alike = draw(st.integers(1, 6))
        pages, gaps = alike * pages[:1], alike * gaps[:1]
    rows = []
    if draw(st.booleans()):
        for page, gap in zip(pages, gaps, strict=True):
            rows.append(Row((), index, offset, page + gap, page))
            offset += num_blocks * (page + gap)
    else:
        stride = sum(pages) + sum(gaps)
        for page, gap in zip(pages, gaps, strict=True):
            rows.append(Row((), index, offset, stride, page))
            offset += page + gap
        offset += (num_blocks - 1) * stride
    if draw(st.booleans()):
        rows.append(rows[0])
    return rows, offset + draw(st.integers(0, 9))


@st.composite
def ids(draw: st.DrawFn, count: int, amount: int, distinct: bool) -> Ids:
    """Page ids: neighbours in order or in reverse, some runs, or anything."""
    run = np.arange(amount) + draw(st.integers(0, count - amount))
    kind = draw(st.sampled_from(["run", "reverse", "runs", "any", "repeated"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "run":
        return run
    if kind == "reverse":
        return run[::-1].copy()
    if kind == "runs":
        return np.roll(np.sort(rng.permutation(count)[:amount]), amount // 2)
    if kind == "repeated" and not distinct:
        return rng.integers(0, count, amount)
    return rng.permutation(count)[:amount]


def some_of(rows: list[Row]) -> st.SearchStrategy[tuple[int, ...]]:
    """Rows in any order, no two of which share bytes."""
    indices = st.integers(0, len(rows) - 1)
    return st.lists(indices, min_size=1, unique_by=rows.__getitem__).map(tuple)


@st.composite
def histories(draw: st.DrawFn, most_blocks: int = 40) -> History:
    """A cache and what is done to it."""
    num_blocks = draw(st.integers(1, most_blocks))
    rows: list[Row] = []
    sizes: list[int] = []
    for index in range(draw(st.integers(1, 2))):
        more, size = draw(allocations(index, num_blocks))
        rows += more
        sizes.append(size)
    per_slot = draw(st.sampled_from([1, 2, 4, 16]))
    slots = draw(st.integers(1, max(1, most_blocks // per_slot)))
    near_pages = slots * per_slot
    copies = []
    for _ in range(draw(st.integers(1, 4))):
        is_load = draw(st.booleans())
        amount = draw(st.integers(0, min(num_blocks, near_pages)))
        copies.append(
            Copy(
                rows=draw(some_of(rows)),
                is_load=is_load,
                pages=draw(ids(near_pages, amount, distinct=not is_load)),
                blocks=draw(ids(num_blocks, amount, distinct=is_load)),
            )
        )
    geometry = CacheGeometry(tuple(rows), num_blocks, 16, 16 * per_slot, tuple(sizes))
    return History(geometry, slots, tuple(copies), draw(st.integers(0, 2**32 - 1)))


def replay(history: History, copy: Callable[[Copy, list[torch.Tensor], NearSlab], None]) -> None:
    """Carry out a history with ``copy`` and with the model, and compare every byte."""
    rng = np.random.default_rng(history.seed)
    geometry = history.geometry
    engine = [
        torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
        for size in geometry.allocation_bytes
    ]
    near = NearSlab(geometry, history.slots * geometry.object_bytes, torch_zeros)
    near.memory.copy_(torch.from_numpy(rng.integers(0, 256, len(near.memory), dtype=np.uint8)))
    engine_model = [tensor.numpy().copy() for tensor in engine]
    memory = near.memory.numpy().copy()
    for step in history.copies:
        copy(step, engine, near)
        pages = list(zip(step.pages.tolist(), step.blocks.tolist(), strict=True))
        for index, (page, block) in itertools.product(step.rows, pages):
            row = geometry.rows[index]
            cache = engine_model[row.allocation]
            start = row.offset + block * row.block_stride
            slot, place = divmod(page, geometry.blocks_per_chunk)
            held = slot * geometry.object_bytes + geometry.extent_offsets[index]
            held += place * row.page_bytes
            if step.is_load:
                cache[start : start + row.page_bytes] = memory[held : held + row.page_bytes]
            else:
                memory[held : held + row.page_bytes] = cache[start : start + row.page_bytes]
    for tensor, model in zip([*engine, near.memory], [*engine_model, memory], strict=True):
        np.testing.assert_array_equal(tensor.numpy(), model)


def torch_zeros(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


@settings(deadline=None)
@given(
    histories(),
    st.sampled_from([1, 2048, cpu.TILE_BYTES]),
    st.sampled_from([1, cpu.LEAST_UNIT]),
    st.sampled_from([1, 2048, cpu.APART_BYTES]),
)
def test_the_cpu_mover_moves_those_pages_and_no_other_byte(
    history: History, tile: int, unit: int, apart: int
) -> None:
    mover: list[Mover] = []

    def copy(step: Copy, engine: list[torch.Tensor], near: NearSlab) -> None:
        if not mover:
            mover.append(make_mover(history.geometry, engine))
        after = mover[0].fence_compute()
        pairs = mover[0].pairs(near, step.pages, step.blocks)
        assert (mover[0].load if step.is_load else mover[0].save)(step.rows, pairs, after).passed()

    with patch.multiple(cpu, TILE_BYTES=tile, LEAST_UNIT=unit, APART_BYTES=apart):
        replay(history, copy)


@pytest.fixture(scope="module")
def page_copy() -> Iterator[ModuleType]:
    pytest.importorskip("triton", reason="Triton's interpreter needs the package triton")
    name = "lamina_kv.data.movers.page_copy"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRITON_INTERPRET", "1")
        patched.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(name)
        sys.modules.pop(name)


@settings(deadline=None)
@given(
    history=histories(most_blocks=8),
    tile=st.sampled_from([1024, 16384]),
    programs=st.sampled_from([1, 3, 32]),
)
def test_the_kernel_moves_those_pages_and_no_other_byte(
    page_copy: ModuleType, history: History, tile: int, programs: int
) -> None:
    def copy(step: Copy, engine: list[torch.Tensor], near: NearSlab) -> None:
        rows = history.geometry.rows
        addresses = [engine[row.allocation].data_ptr() + row.offset for row in rows]
        table = RowTable(history.geometry, addresses)
        pairs = torch.from_numpy(np.stack((step.pages, step.blocks), axis=1))
        entries = torch.from_numpy(table.entries)
        for part in table.ranges(step.rows):
            page_copy.copy_pages(near.memory, entries, part, pairs, to_engine=step.is_load)

    programs_of = {"LOAD_PROGRAMS": programs, "SAVE_PROGRAMS": programs}
    with patch.multiple(page_copy, TILE_BYTES=tile, **programs_of):
        replay(history, copy)
