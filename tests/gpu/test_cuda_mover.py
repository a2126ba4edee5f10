"""Promise: on a GPU, the CUDA mover moves exactly the pages it is told to.

The histories of the property test, with the real mover on real memory. No test of this file has
run yet: there was no GPU.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lamina_kv.data.movers.base import make_mover
from lamina_kv.data.near import NearSlab
from property.test_movers_properties import Copy, History, histories, replay

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and finds none"),
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs the package triton"),
]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(histories())
def test_the_cuda_mover_moves_those_pages_and_no_other_byte(history: History) -> None:
    def copy(step: Copy, engine: list[torch.Tensor], near: NearSlab) -> None:
        there = [tensor.cuda() for tensor in engine]
        mover = make_mover(history.geometry, there)
        try:
            pinned = NearSlab(history.geometry, near.memory.numel(), mover.allocate_host)
            mover.await_near(pinned, np.array([pinned.page_count - 1], np.int64))
            pinned.memory.copy_(near.memory)
            pairs = mover.pairs(pinned, step.pages, step.blocks)
            call = mover.load if step.is_load else mover.save
            call(step.rows, pairs, mover.fence_compute()).wait()
            near.memory.copy_(pinned.memory)
            for tensor, moved in zip(engine, there, strict=True):
                tensor.copy_(moved)
        finally:
            mover.close()

    replay(history, copy)
