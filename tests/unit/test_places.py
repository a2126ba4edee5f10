"""Groups that cut the same memory into blocks of different sizes: a row finds the pages of each."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from lamina_kv.config import LoadConfig
from lamina_kv.data.executor import Executor, Tiers
from lamina_kv.data.movers.base import make_mover
from lamina_kv.data.near import NearSlab
from lamina_kv.geometry import CacheGeometry, Place, Row
from lamina_kv.plan import (
    LoadMode,
    LoadOrder,
    Outcome,
    PageMap,
    SaveOrder,
    StepPlan,
    TransferId,
)

PAGE, PAGES = 64, 30
SECOND = 100
"""Blocks of the second group are numbered from here. They have three pages, of which the rows take
the first and the third; blocks of the first group have two."""
GEOMETRY = CacheGeometry(
    rows=(
        Row(("a", "b"), 0, 0, PAGE, PAGE, (0, 1), places=(Place(2, 0), Place(3, -3 * SECOND))),
        Row(("c", "d"), 0, 0, PAGE, PAGE, (0, 1), places=(Place(2, 1), Place(3, 2 - 3 * SECOND))),
    ),
    num_blocks=PAGES,
    block_tokens=16,
    chunk_tokens=32,
    allocation_bytes=(PAGES * PAGE,),
)
BLOCKS = ((3, 1), (SECOND + 7, SECOND + 4))
HELD = ({6, 7, 2, 3}, {21, 23, 12, 14})
"""Pages of these blocks, by group."""


@pytest.mark.parametrize("overwritten", [False, True])
def test_every_group_is_saved_from_its_own_pages_and_loaded_into_them(overwritten: bool) -> None:
    cache = torch.randint(0, 256, (PAGES * PAGE,), dtype=torch.uint8)
    mover = make_mover(GEOMETRY, [cache])
    near = NearSlab(GEOMETRY, 4 * GEOMETRY.object_bytes, mover.allocate_host)
    executor = Executor(rank=0, tiers=Tiers(near), mover=mover, config=LoadConfig())

    layers = [layer for row in GEOMETRY.rows for layer in row.layers]

    def run(plan: StepPlan) -> None:
        executor.begin_step(plan)
        executor.start_loads()
        for layer in layers:
            executor.wait_layer(layer)
        executor.end_step()
        outcomes: list[Outcome] = []
        while len(outcomes) < 2:
            outcomes += [item.outcome for item in executor.collect().receipt.transfers]
            time.sleep(0.001)
        assert outcomes == [Outcome.DONE] * 2

    saves = [
        SaveOrder(TransferId(group), "r", group, BLOCKS[group], group, overwritten)
        for group in range(2)
    ]
    run(StepPlan(1, saves=tuple(saves)))
    before = cache.view(PAGES, PAGE).clone()
    cache.zero_()
    near_pages = np.arange(4, dtype=np.int32).reshape(2, 2)
    loads = [
        LoadOrder(
            TransferId(2 + group),
            f"r{group}",
            LoadMode.LAYERWISE,
            (PageMap(group, near_pages[group], np.array(BLOCKS[group], np.int32)),),
            30.0,
        )
        for group in range(2)
    ]
    run(StepPlan(2, loads=tuple(loads)))
    executor.close()
    after = cache.view(PAGES, PAGE)
    for page in range(PAGES):
        expected = before[page] if page in HELD[0] | HELD[1] else torch.zeros(PAGE)
        assert torch.equal(after[page].float(), expected.float()), page


def test_every_group_of_a_row_has_a_place() -> None:
    with pytest.raises(ValueError, match="has 1 places for 2 groups"):
        Row(("a",), 0, 0, PAGE, PAGE, (0, 1), places=(Place(1, 0),))
