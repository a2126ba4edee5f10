"""Promises 1, 2 and 5 in transformers' continuous batching, on the real engine: the answers are
those without Lamina, what was computed is not computed again, and nothing is left behind."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.batching import Workload, live_through, load_model
from engine.models import Checkpoints

pytestmark = [pytest.mark.engine, pytest.mark.scaled]

FEW = 1
MANY = int(os.environ.get("LAMINA_SOAK_CONVERSATIONS", "4"))
"""Seeds for each model: twelve in all. Another hundred have never shown what these had not, and the
simulator drives the same hand-off through many more histories."""


@pytest.fixture(
    scope="module",
    params=[
        "llama",
        pytest.param("sliding-window", marks=pytest.mark.slow),
        pytest.param("interleaved-windows", marks=pytest.mark.slow),
    ],
)
def model(checkpoints: Checkpoints, request: pytest.FixtureRequest) -> Any:
    """All layers look at everything, all have a window, or some have."""
    return load_model(checkpoints.model(request.param))


def check(model: Any, store: Path, seed: int) -> None:
    workload, before = Workload.draw(seed), set(threading.enumerate())
    without = live_through(model, workload, None)
    disk = {"kind": "disk", "path": str(store), "capacity": "256MiB"}
    record = live_through(model, workload, workload.lamina | {"tiers": [disk]})
    assert record.answers == without.answers
    # A chunk of a ring can be saved at one moment only: if there is no room then, it is lost.
    most = 0.5 if getattr(model.config, "sliding_window", None) else 0.2
    assert record.recomputed <= most * without.recomputed, record.figures
    failures = [
        name
        for figures in record.figures
        for name, count in figures.items()
        if name.startswith("failures") and count
    ]
    assert not failures
    after_restart = record.figures[-1]
    assert after_restart.get("hit_tokens disk", 0) > 0, (
        "what is on disk is found by the next engine"
    )
    left = set(threading.enumerate()) - before
    assert not [thread.name for thread in left if thread.name.startswith("lamina")]


@pytest.mark.parametrize("seed", range(FEW))
def test_conversations_that_the_cache_does_not_hold(model: Any, tmp_path: Path, seed: int) -> None:
    check(model, tmp_path / "store", seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(FEW, MANY))
def test_many_more_conversations(model: Any, tmp_path: Path, seed: int) -> None:
    check(model, tmp_path / "store", seed)
