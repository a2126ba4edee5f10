"""Guards: what is kept is found by the weights that computed it and by no others, in whichever
order an operator pauses, replaces weights, names them, resets and goes on.
"""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from driven_planner import Engine, View, prompt
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.v1.engine.core import EngineCore

from lamina_kv.engines.vllm.adapters import Adapters
from lamina_kv.engines.vllm.core_loop import CoreLoop
from lamina_kv.engines.vllm.scheduler_side import SchedulerSide
from lamina_kv.engines.vllm.weights import (
    Watch,
    WeightsWatch,
    _weights,
    watch_engine_core,
    weigh_model,
)
from lamina_kv.keys import CHECKPOINT

LENGTH, HIT = 70, 64


class Served:
    """A planner, and weights that are replaced under it."""

    def __init__(self) -> None:
        self.engine = Engine(far_slots=50)
        self.watch = WeightsWatch(self.engine.planner)
        self.weights = "checkpoint"
        self.weighed = 0

    def weigh(self) -> str | None:
        self.weighed += 1
        return self.weights

    def pause(self) -> None:
        self.watch.pausing(self.weigh)
        self.watch.was_reset(void=True)

    def reset(self, *, void: bool = True) -> None:
        self.watch.was_reset(void=void)

    def named(self, name: str) -> None:
        self.watch.named(name, self.weigh)

    def ask(self, seed: int = 1) -> int:
        """Tokens of a prompt that are found; then it is computed and kept."""
        self.watch.request()
        view = View(f"r{seed}", prompt(LENGTH, seed=seed))
        found = self.engine.planner.lookup(view, 0).tokens
        self.watch.computed()
        self.engine.save(view)
        self.engine.write_all()
        return found


def test_a_pause_that_keeps_the_weights_keeps_what_they_computed() -> None:
    served = Served()
    served.ask()
    served.pause()
    assert served.ask() == HIT
    assert served.engine.planner.epoch == CHECKPOINT


def test_weights_that_were_replaced_during_a_pause_find_nothing() -> None:
    served = Served()
    served.ask()
    served.pause()
    served.weights = "others"
    assert served.ask() == 0
    assert served.ask() == HIT
    assert not served.engine.planner.epoch.lasting


def test_weights_that_come_back_in_a_later_pause_are_not_taken_for_those_before_it() -> None:
    """The epoch between had weights, and chunks, of its own."""
    served = Served()
    served.ask()
    served.pause()
    served.weights = "others"
    served.ask()
    served.pause()
    assert served.ask() == HIT, "nothing was replaced in the second pause"
    served.pause()
    served.weights = "checkpoint"
    assert served.ask() == 0


def test_several_pauses_in_a_row_are_one() -> None:
    served = Served()
    served.ask()
    served.pause()
    served.weights = "others"
    served.pause()
    served.weights = "checkpoint"
    assert served.ask() == HIT


def test_a_reset_without_a_pause_finds_nothing_whatever_the_weights_are() -> None:
    served = Served()
    served.ask()
    served.reset()
    assert served.ask() == 0
    served.pause()
    served.reset()
    assert served.ask() == 0


def test_a_pause_that_failed_says_nothing_of_a_later_reset() -> None:
    served = Served()
    served.ask()
    served.watch.pausing(served.weigh)
    served.watch.paused()
    served.reset()
    assert served.ask() == 0


def test_a_pause_of_an_engine_that_sleeps_and_that_failed_says_nothing_of_a_later_reset() -> None:
    served = Served()
    served.ask()
    served.pause()
    served.watch.pausing_asleep()
    served.watch.paused()
    served.reset()
    assert served.ask() == 0


def test_weights_that_cannot_be_weighed_are_others() -> None:
    served = Served()
    served.ask()
    served.watch.pausing(lambda: None)
    served.reset()
    assert served.ask() == 0


def test_weights_have_the_name_that_they_are_given_before_anything_is_computed() -> None:
    served = Served()
    served.ask()
    for weights in ("v2", "v3"):
        served.pause()
        served.weights = weights
        served.named(weights)
        assert served.ask() == 0
        assert served.engine.planner.epoch.lasting
    served.pause()
    served.weights = "v2"
    served.named("v2")
    assert served.ask() == HIT


def test_a_name_is_no_epoch_while_the_cache_holds_what_others_computed() -> None:
    served = Served()
    served.ask()
    served.weights = "v2"
    served.named("v2")
    served.ask()
    assert not served.engine.planner.epoch.lasting
    served.reset()
    assert served.ask() == 0
    assert served.engine.planner.epoch.weights == "v2"


def test_a_name_does_not_pass_to_weights_that_were_given_none() -> None:
    served = Served()
    served.ask()
    served.weights = "v2"
    served.named("v2")
    served.reset()
    served.weights = "v3"
    served.ask()
    assert not served.engine.planner.epoch.lasting


def test_a_name_waits_for_a_reset_that_succeeds() -> None:
    served = Served()
    served.ask()
    served.weights = "v2"
    served.named("v2")
    served.reset(void=False)
    served.ask()
    assert not served.engine.planner.epoch.lasting
    served.named("v2")
    served.ask()
    assert not served.engine.planner.epoch.lasting
    served.reset()
    served.ask()
    assert served.engine.planner.epoch.weights == "v2"


def test_the_same_name_again_changes_nothing() -> None:
    served = Served()
    served.named("v2")
    served.ask()
    served.named("v2")
    assert served.ask() == HIT


def test_nothing_is_weighed_without_a_pause() -> None:
    served = Served()
    served.named("v2")
    served.ask()
    served.reset()
    served.ask()
    assert served.weighed == 0


def test_a_pause_of_an_engine_that_sleeps_weighs_nothing_and_changes_nothing() -> None:
    served = Served()
    served.ask()
    served.pause()
    weighed = served.weighed
    served.watch.pausing_asleep()
    served.reset()
    assert served.weighed == weighed
    assert served.ask() == HIT


def test_a_pause_of_an_engine_that_sleeps_brings_back_no_weights_that_were_dropped() -> None:
    served = Served()
    served.ask()
    served.reset()  # a sleep at level 2
    served.watch.pausing_asleep()
    served.reset()
    assert served.ask() == 0


@pytest.mark.parametrize("how", ["a reset", "replaced in a pause", "replaced under a name"])
def test_what_is_not_found_any_more_is_said_once(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served()
    served.ask()
    if how == "replaced in a pause":
        served.pause()
    elif how == "replaced under a name":
        served.named("v2")
    if how != "replaced in a pause":
        served.reset()
    served.weights = "others"
    for seed in range(3):
        served.ask(seed)
    (said,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "weight_version" in said
    assert ("'v2'" in said) == (how == "replaced under a name")


def test_weights_that_are_named_after_a_reset_are_no_loss(
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = Served()
    served.ask()
    served.reset()
    served.named("v2")
    served.ask()
    served.pause()
    served.ask()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


class Executor:
    """VLLM's, as far as it weighs and sleeps."""

    def __init__(self) -> None:
        self.sleeping_tags: set[str] = set()
        self.weighed = 0
        self.broken = False

    def collective_rpc(self, method: object) -> list[str]:
        if self.broken:
            raise RuntimeError("a worker is gone")
        if method is weigh_model:
            assert "weights" not in self.sleeping_tags, "weights are read that are not mapped"
            self.weighed += 1
        return ["checkpoint"]

    def reset_mm_cache(self) -> None: ...

    def reset_encoder_cache(self) -> None: ...

    def sleep(self, level: int) -> None:
        self.sleeping_tags = {"weights", "kv_cache"}


class Scheduler:
    """VLLM's, as far as it is paused and reset."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def get_kv_connector(self) -> object:
        return SimpleNamespace(watch=self.watch)

    def finish_requests(self, requests: object, status: object) -> None: ...

    def set_pause_state(self, state: object) -> None: ...

    def reset_encoder_cache(self) -> None: ...

    def has_unfinished_requests(self) -> bool:
        return False

    def reset_prefix_cache(self, running: bool = False, connector: bool = False) -> bool:
        self.watch.weights.was_reset(void=True)
        return True


def core_of(served: Served) -> Any:
    core: Any = object.__new__(EngineCore)
    core.scheduler = Scheduler(Watch(served.watch, Adapters(None), CoreLoop()))
    core.model_executor, core.mm_receiver_cache = Executor(), None
    watch_engine_core()
    return core


@pytest.mark.parametrize("when", ["at once", "when the last request has ended"])
def test_a_sleep_that_failed_has_dropped_no_weights(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served()
    served.ask()
    core = core_of(served)
    core.model_executor.broken = True
    if when == "at once":
        with pytest.raises(RuntimeError, match="a worker is gone"):
            core.sleep(2)
    else:
        ended: Future[None] = Future()
        monkeypatch.setattr(core, "pause_scheduler", lambda **_: ended)
        slept = core.sleep(2)
        ended.set_exception(RuntimeError("a worker is gone"))
        assert slept.exception() is not None
        monkeypatch.undo()
    core.model_executor.broken = False
    core.pause_scheduler("abort", True)
    assert served.ask() == HIT


def test_an_engine_core_that_sleeps_is_not_weighed() -> None:
    served = Served()
    served.ask()
    core = core_of(served)
    core.sleep(1)
    assert core.model_executor.weighed == 1
    core.sleep(1)
    core.pause_scheduler("abort", True)
    assert core.model_executor.weighed == 1
    core.model_executor.sleeping_tags = set()
    assert served.ask() == HIT
    assert core.model_executor.weighed == 2


def believing(watch: WeightsWatch) -> None:
    if (promise := watch._promise) is not None and promise.due:
        watch._promise = None
        watch._planner.begin(promise.epoch)


@pytest.mark.parametrize(
    "case",
    [
        test_weights_that_were_replaced_during_a_pause_find_nothing,
        test_a_name_does_not_pass_to_weights_that_were_given_none,
    ],
)
def test_a_watch_that_does_not_weigh_is_seen(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightsWatch, "request", believing)
    with pytest.raises(AssertionError):
        case()


# -- scales --------------------------------------------------------------------------------------


class Runner:
    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3).half())
        self.draft: nn.Module | None = None

    def get_model(self) -> nn.Module:
        return self.model

    def get_draft_model(self) -> nn.Module | None:
        return self.draft


class Worker:
    def __init__(self) -> None:
        self.model_runner = Runner()


def test_equal_weights_weigh_the_same() -> None:
    assert weigh_model(Worker()) == weigh_model(Worker())


@pytest.mark.parametrize("how", ["a bit", "a place", "a buffer", "a draft", "the last byte"])
def test_other_weights_weigh_otherwise(how: str) -> None:
    worker = Worker()
    before = weigh_model(worker)
    model = worker.model_runner.model
    weight = model[0].weight.data
    if how == "a bit":
        weight[3, 3] = torch.nextafter(weight[3, 3], torch.tensor(9.0))
    elif how == "a place":
        weight[[0, 1]] = weight[[1, 0]]
    elif how == "a buffer":
        model[1].running_mean += 1
    elif how == "a draft":
        worker.model_runner.draft = nn.Linear(1, 1)
    else:
        model[2].bias.data[-1] += 1
    assert weigh_model(worker) != before


class Copies(TorchDispatchMode):
    """The most bytes of new memory that an operation has filled."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        mine = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in mine:
            self.most = max(self.most, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("how", ["whole", "transposed", "with gaps", "at an odd place", "one row"])
def test_no_tensor_is_copied_whole_to_be_weighed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina_kv.engines.vllm.weights._PART", 16)
    content = torch.arange(40 * 51, dtype=torch.int16)
    tensor = {
        "whole": content,
        "transposed": content.view(40, 51).t(),
        "with gaps": content.view(40, 51)[:, :50],
        "at an odd place": content[1:],
        "one row": content[::2][None],
    }[how]
    with Copies() as copies:
        before = list(_weights(tensor))
    assert 0 < copies.most <= 16 * 8
    for place in ((0, 0), (0, -1), (-1, -1)) if tensor.dim() > 1 else (0, 500, -1):
        tensor[place] += 1
        after = list(_weights(tensor))
        assert not torch.equal(torch.stack(before), torch.stack(after))
        before = after


def test_nothing_weighs_something() -> None:
    for shape in ((), (0,), (3, 0)):
        assert list(_weights(torch.zeros(shape)))


def test_every_lookup_asks_first_whether_the_weights_are_still_those() -> None:
    side: Any = object.__new__(SchedulerSide)
    asked: list[str] = []
    side.watch = SimpleNamespace(weights=SimpleNamespace(request=lambda: asked.append("weights")))
    side._planner = None
    assert side.lookup(SimpleNamespace(), 0) == (None, False), "before ranks have reported"
    assert asked == ["weights"]
