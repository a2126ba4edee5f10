"""Promise 1: the output with Lamina is the output without it.

Two dozen prompts of every kind run cold and then from Lamina's host tier, all at once (so that
requests share prefixes within a step) and one by one, against the same vLLM without a connector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from engine.driver import Ask, EngineSpec, Fleet, differences
from engine.models import Checkpoints
from engine.workload import loadable, mixed_prompts

pytestmark = pytest.mark.engine

PROMPTS = mixed_prompts(7, count=24)
ASKS = [Ask(tokens) for tokens in PROMPTS]
HOST = {"capacity": "192MiB"}

EAGER: dict[str, object] = {}
CHUNKED = {"max_num_batched_tokens": 96, "max_num_seqs": 16}
COMPILED = {"enforce_eager": False}
NO_FAULTS: dict[str, float] = {}


def expect_same_answers(
    fleet: Fleet,
    model: Path,
    options: Mapping[str, object],
    load: Mapping[str, object],
    faults: Mapping[str, float] = NO_FAULTS,
    *,
    asynchronous: bool = True,
    without: Mapping[str, object] | None = None,
) -> None:
    """``without``: options of the engine without Lamina, where they are others."""
    plain = options if without is None else without
    expected = fleet.answers(EngineSpec(model, options=plain), ASKS)
    load = {"min_tokens": 1, **load}  # a chunk of which the engine has half is loaded by half
    spec = EngineSpec(model, {"host": HOST, "load": load}, options, faults=faults)
    engine = fleet.get(replace(spec, asynchronous=asynchronous))

    assert not differences(engine.generate(ASKS), expected)
    engine.forget()
    before = engine.metrics()
    together = engine.generate(ASKS)
    after = engine.metrics()
    assert not differences(together, expected)
    # A request may find more in the engine itself, from another one of the same step.
    assert all(a.cached >= loadable(len(p)) for a, p in zip(together, PROMPTS, strict=True))
    assert after.since(before, "lamina_load_bytes_total") > 0

    one_by_one = []
    for ask in ASKS:
        engine.forget()
        one_by_one.append(engine.ask(ask))
    assert not differences(one_by_one, expected)
    assert [answer.cached for answer in one_by_one] == [loadable(len(p)) for p in PROMPTS]
    assert engine.metrics().total("lamina_failures_total") == 0


@pytest.mark.parametrize(
    "load_ahead", [1, "auto", *(pytest.param(rows, marks=pytest.mark.slow) for rows in (2, 99))]
)
@pytest.mark.parametrize("mode", ["layerwise", "parked"])
def test_eager(llama: Path, fleet: Fleet, mode: str, load_ahead: object) -> None:
    expect_same_answers(fleet, llama, EAGER, {"mode": mode, "load_ahead": load_ahead})


def test_by_default(llama: Path, fleet: Fleet) -> None:
    expect_same_answers(fleet, llama, EAGER, {})


@pytest.mark.parametrize(
    "mode",
    [
        "layerwise",
        pytest.param("parked", marks=pytest.mark.slow),
        pytest.param("auto", marks=pytest.mark.slow),
    ],
)
def test_prefill_in_chunks(llama: Path, fleet: Fleet, mode: str) -> None:
    expect_same_answers(fleet, llama, CHUNKED, {"mode": mode})


@pytest.mark.parametrize("mode", ["layerwise", "parked"])
def test_loads_slower_than_the_model(llama: Path, fleet: Fleet, mode: str) -> None:
    load = {"mode": mode, "load_ahead": 2}
    expect_same_answers(fleet, llama, EAGER, load, {"slow_loads": 0.003})


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(EAGER, marks=pytest.mark.slow, id="eager"),
        pytest.param(CHUNKED, id="chunked"),
    ],
)
@pytest.mark.parametrize("mode", ["layerwise", pytest.param("parked", marks=pytest.mark.slow)])
def test_planned_when_the_last_step_has_ended(
    llama: Path, fleet: Fleet, mode: str, options: dict[str, object]
) -> None:
    expect_same_answers(fleet, llama, options, {"mode": mode}, asynchronous=False)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["layerwise", pytest.param("parked", marks=pytest.mark.soak)])
def test_compiled(llama: Path, fleet: Fleet, mode: str) -> None:
    """To compile the model takes 20 s. The one without Lamina need not be: answers are compared
    with a tolerance for how arithmetic rounds."""
    expect_same_answers(fleet, llama, COMPILED, {"mode": mode}, without=EAGER)


def test_experts(checkpoints: Checkpoints, fleet: Fleet) -> None:
    expect_same_answers(fleet, checkpoints.model("qwen3-moe"), EAGER, {})
