"""vLLM's call to reset its caches begins an epoch: nothing of before is found, and no more is
deleted than what was on its way.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.driver import SMALL, Ask, EngineSpec, Start
from engine.workload import CHUNK, loadable, prompt

pytestmark = pytest.mark.engine

ASK = Ask(prompt(41, 4 * CHUNK + 1))
LATER = Ask(prompt(42, 4 * CHUNK + 1))
WHOLE = loadable(len(ASK.tokens))


def test_reset(llama: Path, start: Start, tmp_path: Path) -> None:
    lamina = {**SMALL, "disk": {"path": str(tmp_path / "store"), "capacity": "32MiB"}}
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
    lamina = {**SMALL, "disk": {"path": str(tmp_path / "store"), "capacity": "32MiB"}}
    spec = EngineSpec(llama, lamina)
    engine = start(spec)
    engine.ask(ASK)
    engine.drain()
    engine.forget_all()
    engine.ask(LATER)
    engine.close()
    engine = start(spec)
    assert engine.ask(LATER).cached == 0
    assert engine.ask(ASK).cached == WHOLE


def test_reset_while_saves_are_under_way(llama: Path, start: Start) -> None:
    engine = start(EngineSpec(llama, SMALL, faults={"slow_saves": 0.5}))
    engine.submit([Ask(ASK.tokens, max_tokens=1)])
    while not engine.metrics().total("lamina_transfers", direction="save"):
        engine.step()
    # vLLM does not empty its own cache while blocks are held, as for a running request.
    assert not engine.reset(everywhere=True)
    engine.drain()
    assert engine.metrics().total("lamina_leased_blocks") == 0
    engine.forget()
    assert engine.ask(ASK).cached == 0
