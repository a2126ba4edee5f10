"""Guards the order of vLLM's calls in a step: both orders that there are pass, and every call that
is left out, made twice or made elsewhere is an error that names it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from lamina_kv.engines.vllm.step_order import Call, StepOrder, StepOrderError
from lamina_kv.engines.vllm.version import (
    REQUIREMENT,
    SUPPORTED,
    UnsupportedVersion,
    check_version,
    is_supported,
)

BEGIN, START, END = Call.BEGIN, Call.START, Call.END
RESULTS = (Call.RESULTS, Call.ERRORS, Call.META)
LAYER = "wait_for_layer_load"

Step = Sequence[Call | str]

LOADED: Step = (BEGIN, START, LAYER, LAYER, END, *RESULTS)
"""A step with loads in it."""
SAVED: Step = (BEGIN, LAYER, LAYER, START, END, *RESULTS)
IDLE: Step = (BEGIN, START, END, *RESULTS)
"""A step without a forward, or one that is a full graph."""
DRAFTED: Step = (BEGIN, START, LAYER, LAYER, *RESULTS, LAYER, END)
"""With a draft model, of which vLLM asks for results first."""
DRAFTED_SAVED: Step = (BEGIN, LAYER, START, *RESULTS, LAYER, END)
STEPS = [LOADED, SAVED, IDLE, DRAFTED, DRAFTED_SAVED]


def run(order: StepOrder, *steps: Step) -> None:
    for step in steps:
        for call in step:
            if isinstance(call, str):
                order.layer(call)
            elif call is BEGIN:
                order.begins(loads=step in (LOADED, DRAFTED))
            else:
                order.makes(call)


@pytest.mark.parametrize("first", STEPS)
@pytest.mark.parametrize("second", STEPS)
def test_the_orders_that_vllm_has(first: Step, second: Step) -> None:
    run(StepOrder(), first, second, first)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("missing", [call for call in Call if call is not BEGIN])
def test_a_call_that_does_not_come(step: Step, missing: Call) -> None:
    """At the latest the next step finds it missing."""
    rest = [call for call in step if call is not missing]
    with pytest.raises(StepOrderError, match="where it is not expected"):
        run(StepOrder(), rest, step)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("twice", list(Call))
def test_a_call_that_comes_twice(step: Step, twice: Call) -> None:
    order = StepOrder()
    run(order, step[: step.index(twice) + 1])
    with pytest.raises(StepOrderError):
        order.begins(loads=False) if twice is BEGIN else order.makes(twice)


@pytest.mark.parametrize("step", STEPS)
def test_neighbours_that_are_swapped(step: Step) -> None:
    """But for a layer before the loads of a step that has none, and after its results."""
    allowed = {(START, LAYER), (LAYER, START), (LAYER, LAYER), (LAYER, Call.RESULTS)}
    allowed |= {(Call.META, LAYER), (Call.META, END), (START, Call.RESULTS)}
    for position, pair in enumerate(pairwise(step)):
        if pair in allowed:
            continue
        order = StepOrder()
        swapped = [*step[:position], pair[1], pair[0], *step[position + 2 :]]
        with pytest.raises(StepOrderError):
            run(order, swapped, IDLE)


def test_a_layer_before_the_loads_that_it_waits_for() -> None:
    order = StepOrder()
    order.begins(loads=True)
    with pytest.raises(StepOrderError, match="wait_for_layer_load"):
        order.layer(LAYER)


@pytest.mark.parametrize("step", [(), SAVED, (BEGIN, START, END)])
def test_a_layer_outside_of_a_forward(step: Step) -> None:
    order = StepOrder()
    run(order, step)
    with pytest.raises(StepOrderError, match="save_kv_layer"):
        order.layer("save_kv_layer")


def test_the_error_says_what_was_called_and_what_to_do() -> None:
    order = StepOrder()
    run(order, (BEGIN, START))
    with pytest.raises(StepOrderError) as caught:
        order.makes(Call.META)
    said = str(caught.value)
    assert "build_connector_worker_meta" in said
    assert "handle_preemptions, start_load_kv" in said
    assert all(version in said for version in SUPPORTED)
    assert "--kv-transfer-config" in said


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.33.2.post1", "0.33.0rc1"])
def test_versions_that_are_served(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize(
    "version", ["0.31.9", "0.34.0", "1.32.0", "0.3.2", "0.320.0", "dev", "", "0.34.0.dev1+g12"]
)
def test_versions_that_are_not(version: str) -> None:
    assert not is_supported(version)
    with pytest.raises(UnsupportedVersion) as caught:
        check_version(version)
    assert f"vllm{REQUIREMENT}" in str(caught.value)
    assert all(served in str(caught.value) for served in SUPPORTED)
