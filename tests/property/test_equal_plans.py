"""What planners that must come to the same plans, one on each rank, cannot rest on: the order of a
set or of hashes, which is another one in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import pytest

from lamina_kv.control.planner import Planner
from simulator.history import run_history
from simulator.options import Options

SEEDS, STEPS = range(8), 400


def plans_of(seed: int, store: Path | None) -> str:
    """A hash of all plans of a random history."""
    digest = sha256()
    plan_step = Planner.plan_step

    def noted(planner: Planner, *args: Any, **kwargs: Any) -> Any:
        plan = plan_step(planner, *args, **kwargs)
        digest.update(repr(plan).encode())
        return plan

    random = Random(seed)
    options = Options.draw(random, disk=store is not None).with_hand_off(random)
    with patch.object(Planner, "plan_step", noted):
        run_history(seed, STEPS, store, options=options)
    return digest.hexdigest()


def plans_of_another_process(hash_seed: int, store: Path | None) -> list[str]:
    environment = os.environ | {
        "PYTHONHASHSEED": str(hash_seed),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    command = [sys.executable, __file__, *([str(store)] if store else [])]
    return subprocess.check_output(command, env=environment, text=True).split()


@pytest.mark.parametrize("disk", [pytest.param(False, marks=pytest.mark.soak), True])
def test_equal_histories_have_equal_plans_in_every_process(tmp_path: Path, disk: bool) -> None:
    stores = [tmp_path / name if disk else None for name in "ab"]
    first = plans_of_another_process(1, stores[0])
    assert len(set(first)) == len(SEEDS)
    assert first == plans_of_another_process(2, stores[1])


if __name__ == "__main__":
    for seed in SEEDS:
        parent = Path(sys.argv[1]) if len(sys.argv) > 1 else None
        print(plans_of(seed, parent and parent / str(seed)))
