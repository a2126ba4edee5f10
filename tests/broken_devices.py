"""Rules of a device that runs behind its host, broken on purpose, for the simulated engine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lamina_kv.data.executor import Executor
from lamina_kv.data.load_pipeline import LoadRun
from lamina_kv.data.loads import Load
from lamina_kv.data.movers.base import Pairs
from lamina_kv.data.movers.cpu import PassedFence
from lamina_kv.data.movers.cuda import CudaMover
from lamina_kv.data.movers.device_fence import CopyFence
from lamina_kv.data.movers.fences import CopyFailed, Fence
from lamina_kv.plan import StepPlan

Patch = pytest.MonkeyPatch


def a_save_does_not_wait_for_the_model(patch: Patch) -> None:
    save = CudaMover.save

    def hasty(
        mover: CudaMover, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = False
    ) -> Fence:
        return save(mover, rows, pairs, PassedFence(), urgent=urgent)

    patch.setattr(CudaMover, "save", hasty)


def the_model_does_not_wait_for_a_load(patch: Patch) -> None:
    patch.setattr(CudaMover, "hold_compute", lambda mover, fence: None)


def a_load_does_not_wait_for_the_model(patch: Patch) -> None:
    load = CudaMover.load

    def hasty(
        mover: CudaMover, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool
    ) -> Fence:
        return load(mover, rows, pairs, PassedFence(), urgent=urgent)

    patch.setattr(CudaMover, "load", hasty)


def a_load_comes_before_the_engines_own_copies(patch: Patch) -> None:
    begin = Executor.begin_step

    def hasty(executor: Executor, plan: StepPlan) -> None:
        begin(executor, plan)
        executor.start_loads()

    patch.setattr(Executor, "begin_step", hasty)


def a_save_is_over_when_it_is_launched(patch: Patch) -> None:
    save = CudaMover.save

    def hasty(
        mover: CudaMover, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = False
    ) -> Fence:
        save(mover, rows, pairs, after, urgent=urgent)
        return PassedFence()

    patch.setattr(CudaMover, "save", hasty)


def a_load_of_a_step_is_over_when_it_is_launched(patch: Patch) -> None:
    patch.setattr(LoadRun, "landed", property(lambda run: not (run._writing or run._missing)))


def a_parked_load_has_arrived_when_it_is_launched(patch: Patch) -> None:
    def hasty(run: LoadRun, row: int, load: Load, fence: Fence, size: int, began: float) -> None:
        run._piece_over(row, load, wrote=True)

    patch.setattr(LoadRun, "_await", hasty)


def what_was_launched_is_forgotten_when_a_load_is_given_up(patch: Patch) -> None:
    landed = LoadRun.landed.fget
    assert landed is not None

    def hasty(run: LoadRun) -> bool:
        return bool(run._given_up) or landed(run)

    patch.setattr(LoadRun, "landed", property(hasty))


def what_a_copy_has_launched_before_it_failed_is_forgotten(patch: Patch) -> None:
    passed = property(lambda error: PassedFence(), lambda *_: None)
    patch.setattr(CopyFailed, "launched", passed, raising=False)


def the_first_piece_of_a_row_is_as_good_as_the_last(patch: Patch) -> None:
    patch.setattr(CopyFence, "join", lambda fence, other: fence)
