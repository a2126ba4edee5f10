"""C: the mover on every layout, by kernel and by copy engine, byte by byte against the model."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from gpu.lab import Engine, Lab
from gpu.pages import Ids, Layout, PageModel, layouts, pattern
from gpu.plan import Bench
from gpu.report import Bound, Row
from lamina_kv.data.movers.crossover import Way
from lamina_kv.data.near import NearSlab

COPIES = 4
"""Of a layout: loads and saves in turn, all of some rows and some pages."""


def run(bench: Bench[Lab]) -> Generator[Row, None, None]:
    """See the module."""
    yield from check(bench, layouts(large=bench.lab.is_large))


def check(bench: Bench[Lab], which: Iterable[Layout]) -> Generator[Row, None, None]:
    """Check some layouts."""
    for layout in which:
        wrong = differing_bytes(bench.lab, layout)
        yield Row(f"wrong bytes: {layout.name}", wrong, "B", Bound(0))


def differing_bytes(lab: Lab, layout: Layout, seed: int = 0) -> int:
    """Copy pages of a layout by each way, and count the bytes that are wrong behind all copies of
    one.

    Args:
        lab: where.
        layout: the cache and the slab.
        seed: which rows and pages.
    """
    rng = np.random.default_rng(seed)
    geometry = layout.geometry
    engine = lab.open(geometry)
    try:
        near = NearSlab(geometry, layout.slots * geometry.object_bytes, engine.mover.allocate_host)
        last = np.array([near.page_count - 1], np.int64)
        engine.mover.await_near(near, last)
        content = pattern(geometry.allocation_bytes[0], rng)
        near.memory.copy_(torch.from_numpy(pattern(near.memory.numel(), rng)))
        engine.write(0, content)
        model = PageModel(geometry, content, near.memory.numpy())
        wrong = 0
        for way in Way:
            with lab.way(way):
                _copy(engine, near, model, rng)
            wrong += model.differing(engine.read(0), near.memory.numpy())
        return wrong
    finally:
        engine.close()


def _copy(engine: Engine, near: NearSlab, model: PageModel, rng: np.random.Generator) -> None:
    geometry, mover = near.geometry, engine.mover
    distinct = list({row.offset: index for index, row in enumerate(geometry.rows)}.values())
    amount = min(geometry.num_blocks, near.page_count, 64)
    with ThreadPoolExecutor(2, initializer=mover.enter_thread) as threads:
        for turn in range(COPIES):
            # The first and the last pages, since offsets are largest there.
            pages, blocks = (
                _some(near.page_count, amount, rng),
                _some(geometry.num_blocks, amount, rng),
            )
            rows = [int(row) for row in rng.permutation(distinct)]
            half = amount // 2
            # Two threads at once: other rows, other pages on either side.
            jobs = [
                (rows[:1], pages[:half], blocks[:half], bool(turn % 2)),
                (rows[1:], pages[half:], blocks[half:], not turn % 2),
            ]
            with engine.computing():
                after = mover.fence_compute()
            fences = []
            for some, held, there, to_engine in jobs:
                pairs = mover.pairs(near, held, there)
                call = mover.load if to_engine else mover.save
                fences.append(threads.submit(call, some, pairs, after))
                model.copy(some, held, there, to_engine=to_engine)
            for fence in fences:
                fence.result().wait()


def _some(count: int, amount: int, rng: np.random.Generator) -> Ids:
    """Distinct ids below ``count``, the first and the last of all among them."""
    ends = [0, count - 1][:amount]
    between = 1 + rng.permutation(max(0, min(count - 2, 1 << 20)))[: max(0, amount - 2)]
    chosen = np.array([*dict.fromkeys(ends), *between], np.int64)[:amount]
    return rng.permutation(chosen)
