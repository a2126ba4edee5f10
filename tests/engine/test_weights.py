"""vLLM's weights change while it serves: what others computed is not found, and theirs is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.driver import SMALL, Ask, Engine, EngineSpec, Start
from engine.workload import CHUNK, loadable, prompt

pytestmark = pytest.mark.engine

ASK = Ask(prompt(43, 4 * CHUNK + 1))
WHOLE = loadable(len(ASK.tokens))


def other_weights(worker: Any, number: int) -> None:
    """Replace the weights of a worker in place; back again with ``-number``."""
    embedding = worker.model_runner.get_model().model.embed_tokens.weight.data
    embedding.copy_(embedding.roll(number, 0))


def update(engine: Engine, number: int, name: str = "") -> None:
    """As ``pause``, ``update_weights``, ``finish_weight_update(name)``, ``resume`` do."""
    engine.drain()
    engine.core("pause_scheduler", "keep", True)
    engine.in_workers(other_weights, number)
    if name:
        engine.core("set_weight_version", name)
    engine.core("resume_scheduler")


def test_weights_that_change(llama: Path, start: Start, tmp_path: Path) -> None:
    lamina = {
        **SMALL,
        "tiers": [{"kind": "disk", "path": str(tmp_path / "store"), "capacity": "32MiB"}],
    }
    spec = EngineSpec(llama, lamina)
    engine = start(spec)
    old = engine.ask(ASK)
    update(engine, 1)
    new = engine.ask(ASK)
    assert new.cached == 0
    assert new.samples != old.samples
    update(engine, 1, "second")
    second = engine.ask(ASK)
    assert second.cached == 0
    assert second.samples not in (old.samples, new.samples)
    engine.drain()
    engine.close()

    engine = start(spec)
    again = engine.ask(ASK)
    assert (again.cached, again.samples) == (WHOLE, old.samples)
    update(engine, 2, "second")
    again = engine.ask(ASK)
    assert (again.cached, again.samples) == (WHOLE, second.samples)


def test_a_sleep_that_keeps_the_weights_keeps_the_store(llama: Path, start: Start) -> None:
    engine = start(EngineSpec(llama, SMALL))
    engine.ask(ASK)
    for level in (0, 1, 2):
        engine.drain()
        if level:
            engine.core("sleep", level, "keep")
            engine.core("wake_up")
        else:
            engine.core("pause_scheduler", "keep", True)
            engine.core("resume_scheduler")
        assert engine.ask(ASK).cached == (WHOLE if level < 2 else 0)
