"""vLLM's calls to reset its caches and to pause succeed whatever Lamina holds and begin an epoch:
nothing of before is found, and no more is deleted than what was on its way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.driver import SMALL, Answer, Ask, EngineSpec, Start, differences
from engine.workload import CHUNK, loadable, prompt

pytestmark = pytest.mark.engine

ASK = Ask(prompt(41, 4 * CHUNK + 1))
LATER = Ask(prompt(42, 4 * CHUNK + 1))
WHOLE = loadable(len(ASK.tokens))


def test_reset(llama: Path, start: Start, tmp_path: Path) -> None:
    lamina = {
        **SMALL,
        "tiers": [{"kind": "disk", "path": str(tmp_path / "store"), "capacity": "32MiB"}],
    }
    engine = start(EngineSpec(llama, lamina))
    first = engine.ask(ASK)
    engine.forget()
    assert engine.ask(ASK).cached == WHOLE
    assert engine.metrics().total("lamina_tier_used_bytes", tier="disk") > 0

    engine.forget_all()
    metrics = engine.metrics()
    assert metrics.total("lamina_tier_used_bytes", tier="host") > 0
    assert metrics.total("lamina_tier_used_bytes", tier="disk") > 0
    again = engine.ask(ASK)
    assert (again.cached, again.samples) == (0, first.samples)
    engine.forget()
    assert engine.ask(ASK).cached == WHOLE, "what is saved after a reset is found"


def test_a_restart_finds_what_its_checkpoint_had_saved_and_nothing_else(
    llama: Path, start: Start, tmp_path: Path
) -> None:
    lamina = {
        **SMALL,
        "tiers": [{"kind": "disk", "path": str(tmp_path / "store"), "capacity": "32MiB"}],
    }
    spec = EngineSpec(llama, lamina)
    engine = start(spec)
    engine.ask(ASK)
    engine.drain()
    engine.forget_all()
    engine.ask(LATER)
    engine.close()
    engine = start(spec)
    assert engine.reset(everywhere=True)  # before any step, and so before any rank has reported
    assert engine.ask(ASK).cached == 0
    engine.close()
    engine = start(spec)
    assert engine.ask(LATER).cached == 0
    assert engine.ask(ASK).cached == WHOLE


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "a-step-ahead"])
def test_resets_and_a_pause_while_saves_are_slow(
    llama: Path, start: Start, asynchronous: bool
) -> None:
    """Every way to void a cache, each while blocks are still being read, and weights that are
    replaced in place in between: nothing of the old ones is found."""
    faults = {"slow_saves": 0.1}
    engine = start(EngineSpec(llama, SMALL, faults=faults, asynchronous=asynchronous))
    asks = [Ask(prompt(seed, 3 * CHUNK - 1), max_tokens=2) for seed in (42, 43)]

    def run() -> list[Answer]:
        """Until all have answered, and no step longer."""
        names = engine.submit(asks)
        answers: dict[str, Answer] = {}
        while len(answers) < len(asks):
            answers |= {answer.name: answer for answer in engine.step()}
        assert engine.metrics().total("lamina_transfers", direction="save") > 0
        assert [answers[name].cached for name in names] == [0, 0]
        return [answers[name] for name in names]

    first = run()
    assert engine.reset(everywhere=False), "vLLM did not reset its prefix cache"
    (name,) = engine.submit([Ask(prompt(44, 2 * CHUNK), max_tokens=40)])
    while not engine.progress()[name]:
        engine.step()
    assert engine.reset(everywhere=True, running=True)
    engine.abort([name])

    engine.in_workers(replace_weights)
    second = run()
    engine.pause("abort")
    engine.resume()
    engine.in_workers(replace_weights)
    third = run()
    assert differences(second, first), "weights make no difference"
    assert differences(third, second), "weights make no difference"
    engine.drain()
    assert engine.metrics().total("lamina_leased_blocks") == 0
    engine.forget()
    again = engine.generate(asks)
    assert [answer.cached for answer in again] == [loadable(len(ask.tokens)) for ask in asks]
    assert not differences(again, third), "what is saved after a reset is found"
    engine.forget_all()
    assert not differences(third, engine.generate(asks)), "old weights had a part in it"


def replace_weights(worker: Any) -> None:
    """What a trainer does; runs in a worker of vLLM."""
    for weight in worker.model_runner.model.parameters():
        if weight.ndim > 1:
            weight.data.copy_(weight.data.roll(1, 0))
