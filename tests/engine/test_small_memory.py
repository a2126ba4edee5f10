"""What does not quite fit into host memory loses its ends: its beginnings are found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.driver import Ask, Engine, EngineSpec, Start
from engine.workload import CHUNK, prompt

pytestmark = pytest.mark.engine

CHUNK_BYTES = CHUNK * 4 * 2 * 2 * 32 * 4
TIGHT = {"host": {"capacity": "3MiB"}}
NOT_KEPT = {"lamina": {"keep": False}}
"""For those who only look what is there."""


def slots_of(engine: Engine) -> int:
    """Slots of host memory, once something was saved."""
    return int(engine.metrics().total("lamina_tier_capacity_bytes", tier="host")) // CHUNK_BYTES


def found(engine: Engine, prompts: list[tuple[int, ...]]) -> int:
    """Chunks that prompts find when they come again, one after the other."""
    chunks = 0
    for tokens in prompts:
        engine.forget()
        chunks += engine.ask(Ask(tokens, max_tokens=1, transfer=NOT_KEPT)).cached // CHUNK
    return chunks


def test_a_prompt_that_is_too_long(llama: Path, start: Start) -> None:
    engine = start(EngineSpec(llama, TIGHT))
    tokens = prompt(1, 30 * CHUNK + 5)
    engine.ask(Ask(tokens, max_tokens=1))
    slots = slots_of(engine)
    assert 15 < slots < 28
    assert found(engine, [tokens]) >= slots - 2


def test_prompts_at_once(llama: Path, start: Start) -> None:
    engine = start(EngineSpec(llama, TIGHT))
    prompts = [prompt(10 + number, 8 * CHUNK + 5) for number in range(4)]
    engine.generate([Ask(tokens, max_tokens=4) for tokens in prompts])
    slots = slots_of(engine)
    assert 15 < slots < 28
    assert found(engine, prompts) >= slots - 2
