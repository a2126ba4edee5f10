"""Guards: what is kept is found by the weights that computed it and by no others, in whichever
order an operator pauses, replaces weights, names them, resets and goes on.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from driven_planner import Engine, View, prompt
from torch import nn

from lamina.engines.vllm.weights import WeightsWatch, weigh_model
from lamina.keys import CHECKPOINT

LENGTH, HIT = 70, 64


class Served:
    """A planner, and weights that are replaced under it."""

    def __init__(self) -> None:
        self.engine = Engine(disk_slots=50)
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
        self.engine.settle_writes()
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
