"""Too little memory, requests that go away, several samples of one prompt: answers stay what
they are without Lamina, and every block that was held is given back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from engine.driver import SMALL, Ask, Engine, EngineSpec, Fleet, Start, differences
from engine.workload import CHUNK, prompt

pytestmark = pytest.mark.engine

TIGHT = {"num_gpu_blocks_override": 40, "max_model_len": 1024}
"""Blocks for 1,248 tokens."""
CROWD = [Ask(prompt(50 + seed, 150 + 10 * seed), max_tokens=150) for seed in range(8)]


def expect_nothing_held(engine: Engine, free_blocks: int) -> None:
    metrics = engine.metrics()
    assert metrics.total("lamina_leased_blocks") == 0
    assert metrics.total("lamina_transfers") == 0
    assert metrics.total("lamina_bytes_in_flight") == 0
    assert engine.free_blocks() == free_blocks


@pytest.mark.parametrize(
    ("load", "faults", "asynchronous"),
    [
        ({"mode": "layerwise"}, {}, True),
        pytest.param({"mode": "parked"}, {}, False, marks=pytest.mark.slow),
        pytest.param({}, {"slow_saves": 0.005}, False, marks=pytest.mark.slow),
        ({"mode": "parked"}, {"slow_saves": 0.005, "slow_loads": 0.01}, True),
        pytest.param({"mode": "layerwise"}, {"slow_saves": 0.005}, True, marks=pytest.mark.slow),
        pytest.param({"mode": "parked"}, {"slow_loads": 0.01}, True, marks=pytest.mark.slow),
    ],
    ids=[
        "layerwise",
        "parked",
        "slow-saves",
        "slow-everything",
        "slow-saves-layerwise",
        "slow-loads",
    ],
)
def test_preemption(
    llama: Path,
    fleet: Fleet,
    start: Start,
    load: dict[str, object],
    faults: dict[str, float],
    asynchronous: bool,
) -> None:
    expected = fleet.answers(EngineSpec(llama), CROWD)
    spec = EngineSpec(llama, {**SMALL, "load": load}, TIGHT, faults=faults)
    engine = start(replace(spec, asynchronous=asynchronous))
    free = engine.free_blocks()
    for _ in range(2):
        assert not differences(engine.generate(CROWD), expected)
        expect_nothing_held(engine, free)
    metrics = engine.metrics()
    assert metrics.total("vllm:num_preemptions_total") > 0, "the cache must be too small"
    assert metrics.total("lamina_save_bytes_total") > 0
    assert metrics.total("lamina_hit_tokens_total", tier="host") > 0
    assert metrics.total("lamina_failures_total") == 0


def test_a_bound_on_saves_only_costs_hits(llama: Path, fleet: Fleet, start: Start) -> None:
    expected = fleet.answers(EngineSpec(llama), CROWD)
    lamina = {**SMALL, "save": {"max_inflight": "256KiB"}}
    engine = start(EngineSpec(llama, lamina, faults={"slow_saves": 0.02}))
    free = engine.free_blocks()
    assert not differences(engine.generate(CROWD), expected)
    assert engine.metrics().total("lamina_saves_held_back_total", reason="max_inflight") > 0
    expect_nothing_held(engine, free)


def start_a_slow_load(start: Start, llama: Path, mode: str) -> tuple[Engine, Sequence[str], int]:
    """An engine with two requests whose load has begun and is far from its end."""
    lamina = {**SMALL, "load": {"mode": mode, "load_ahead": 1}}
    engine = start(EngineSpec(llama, lamina, faults={"slow_loads": 0.2}))
    free = engine.free_blocks()
    engine.generate(CROWD)
    engine.forget()
    names = engine.submit(CROWD[:2])
    engine.step()
    return engine, names, free


@pytest.mark.slow
def test_abort_while_a_parked_load_is_under_way(llama: Path, fleet: Fleet, start: Start) -> None:
    expected = fleet.answers(EngineSpec(llama), CROWD)
    engine, (first, _), free = start_a_slow_load(start, llama, "parked")
    assert engine.metrics().total("lamina_transfers", direction="load") == 2
    engine.abort([first])
    # Blocks that the load still writes must not go to the next request.
    engine.submit(CROWD[2:])
    answers = sorted(engine.drain(), key=lambda answer: int(answer.name[1:]))
    assert not differences(answers, expected[1:])
    expect_nothing_held(engine, free)
    engine.forget()
    assert not differences(engine.generate(CROWD[:1]), expected[:1])


@pytest.mark.slow
def test_abort_of_everything(llama: Path, fleet: Fleet, start: Start) -> None:
    expected = fleet.answers(EngineSpec(llama), CROWD)
    engine, names, free = start_a_slow_load(start, llama, "parked")
    engine.abort(names)
    assert engine.drain() == []
    expect_nothing_held(engine, free)
    engine.forget()
    assert not differences(engine.generate(CROWD), expected)


def test_abort_after_the_prompt(llama: Path, fleet: Fleet, start: Start) -> None:
    """What an aborted request had computed is kept; nothing that it had not is."""
    expected = fleet.answers(EngineSpec(llama), CROWD)
    engine = start(EngineSpec(llama, SMALL, faults={"slow_saves": 0.05}))
    free = engine.free_blocks()
    names = engine.submit(CROWD)
    while min(engine.progress().values()) < 3:
        engine.step()
    engine.abort(names)
    engine.drain()
    expect_nothing_held(engine, free)
    engine.forget()
    again = engine.generate(CROWD)
    assert not differences(again, expected)
    assert [a.cached for a in again] == [len(ask.tokens) // CHUNK * CHUNK for ask in CROWD]


@pytest.mark.parametrize("mode", ["layerwise", "parked"])
def test_several_samples(llama: Path, fleet: Fleet, mode: str) -> None:
    asks = [Ask(prompt(60 + n, 300), n=n, seed=n, max_tokens=70) for n in (2, 3)]
    expected = fleet.answers(EngineSpec(llama), asks)
    assert [len(set(answer.samples)) for answer in expected] == [2, 3]
    engine = fleet.get(EngineSpec(llama, {**SMALL, "load": {"mode": mode}}))
    assert not differences(engine.generate(asks), expected)
    engine.forget()
    assert not differences(engine.generate(asks), expected)
    metrics = engine.metrics()
    assert metrics.total("lamina_leased_blocks") == 0
    assert metrics.total("lamina_hit_tokens_total", tier="host") > 0
