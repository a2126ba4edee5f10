"""transformers' continuous batching on two ranks, each with half of the heads: the answers are
those without Lamina, what was computed is not computed again, and no rank keeps anything back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.models import Checkpoints

pytestmark = pytest.mark.engine

RANKS = 2
PATIENCE = 600.0
"""Seconds after which ranks that have not ended hang."""

SOON = 100.0
"""Less than any rank waits for another one by itself."""

Order = tuple[str, dict[str, object]]
"""What to do, as a function of :mod:`engine.batching_rank`, and its arguments."""


@dataclass
class Outcome:
    """What a rank has come to.

    Attributes:
        status: of its process.
        results: of each order; none if it did not get to the end.
        said: what it has printed.
    """

    status: int
    results: list[Any]
    said: str


def run_ranks(
    model: Path,
    folder: Path,
    orders: Sequence[Order],
    *,
    share: bool = True,
    patience: float = PATIENCE,
) -> list[Outcome]:
    """Have ranks carry out orders.

    Args:
        model: the checkpoint.
        folder: is made.
        orders: what to do.
        share: whether they share the model, or each has one of its own.
        patience: seconds that they may take.
    """
    folder.mkdir()
    runs = {"model": str(model), "share": share, "runs": list(orders)}
    (folder / "orders.json").write_text(json.dumps(runs))
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),  # the package that this process tests, too
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "HF_HUB_OFFLINE": "1",
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "engine.batching_rank", str(folder), str(rank), str(RANKS)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [child.communicate(timeout=patience)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    results = [folder / f"{rank}.json" for rank in range(RANKS)]
    return [
        Outcome(child.returncode, json.loads(result.read_text()) if result.exists() else [], words)
        for child, result, words in zip(children, results, said, strict=True)
    ]


def check(record: Any, without: Any, most: float = 0.2) -> None:
    """As for one rank, in ``test_transformers.py``."""
    assert record["answers"] == without["answers"]
    again, again_without = (r["computed"] - r["fewest"] for r in (record, without))
    assert again_without > 1000
    assert again <= most * again_without, record["figures"]
    assert record["figures"][-1].get("hit_tokens disk", 0) > 0


def workloads(folder: Path, seeds: Sequence[int]) -> list[Order]:
    """Each without Lamina and with it."""
    orders: list[Order] = []
    for seed in seeds:
        disk = {"kind": "disk", "path": str(folder / f"store-{seed}"), "capacity": "256MiB"}
        orders += [
            ("conversations", {"seed": seed, "tier": None}),
            ("conversations", {"seed": seed, "tier": disk}),
        ]
    return orders


def live_through_in_ranks(model: Path, folder: Path, seeds: Sequence[int], most: float) -> None:
    first, second = run_ranks(model, folder / "ranks", workloads(folder, seeds))
    assert (first.status, second.status) == (0, 0), first.said + second.said
    runs = zip(first.results[::2], first.results[1::2], second.results[1::2], strict=True)
    for without, record, left in runs:
        check(record, without, most)
        assert left == [{}, {}]


@pytest.mark.slow
def test_conversations_on_two_ranks(llama: Path, tmp_path: Path) -> None:
    live_through_in_ranks(llama, tmp_path, [0], 0.2)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "most"), [("llama", 0.2), ("sliding-window", 0.5), ("interleaved-windows", 0.5)]
)
def test_more_conversations_on_two_ranks(
    checkpoints: Checkpoints, tmp_path: Path, name: str, most: float
) -> None:
    live_through_in_ranks(checkpoints.model(name), tmp_path, range(1, 5), most)


@pytest.mark.slow
def test_requests_that_are_cancelled_together(llama: Path, tmp_path: Path) -> None:
    """The library keeps their names in a set, whose order is another one on each rank."""
    lamina = {
        "chunk_tokens": 16,
        "load": {"mode": "parked", "when": "always"},
        "host": {"capacity": "64MiB"},
    }
    first, second = run_ranks(llama, tmp_path / "ranks", [("cancellations", {"lamina": lamina})])
    assert (first.status, second.status) == (0, 0), first.said + second.said
    assert first.results[0]["left"] == second.results[0] == {}
    assert all(len(answer) == 48 for turn in first.results[0]["answers"] for answer in turn)


def test_a_rank_that_dies_is_not_waited_for(llama: Path, tmp_path: Path) -> None:
    lamina = {"host": {"capacity": "64MiB"}}
    orders: list[Order] = [("death", {"lamina": lamina})]
    first, second = run_ranks(llama, tmp_path / "ranks", orders, patience=SOON)
    assert second.status < 0
    assert first.status == 0, first.said
    assert "rank 0 has no news of the others, after a step" in first.results[0]


@pytest.mark.soak
def test_two_engines_of_one_job_share_a_store(llama: Path, tmp_path: Path) -> None:
    """Each has all heads, and a shard of its own."""
    orders = workloads(tmp_path, [0])
    for outcome in run_ranks(llama, tmp_path / "ranks", orders, share=False):
        assert outcome.status == 0, outcome.said
        without, record = outcome.results
        check(record, without)
