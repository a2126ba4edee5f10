"""Guards the tests beside it: a wrong page in the cache must be able to change an answer, and
what the driver reports must be what vLLM did.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.driver import TOLERANCE, Ask, EngineSpec, Fleet
from engine.models import SHAPES, Checkpoints
from engine.workload import BLOCK, CHUNK, loadable, mixed_prompts, prompt

pytestmark = pytest.mark.engine


@pytest.mark.slow
@pytest.mark.parametrize("model", [name for name in SHAPES if name != "mla"])
def test_one_early_token_changes_the_answer(
    checkpoints: Checkpoints, fleet: Fleet, model: str
) -> None:
    engine = fleet.get(EngineSpec(checkpoints.model(model), options=SHAPES[model].options))
    tokens = prompt(1, 600)
    changed = []
    for position in (0, 1, 70, 200, 400, 500):
        other = list(tokens)
        other[position] ^= 1
        changed.append(Ask(tuple(other)))
    answer = engine.ask(Ask(tokens))
    assert min(answer.distance(other) for other in engine.generate(changed)) > 10 * TOLERANCE


def test_rounding_does_not(llama: Path, fleet: Fleet) -> None:
    engine = fleet.get(EngineSpec(llama))
    ask = Ask(prompt(2, 500))
    first = engine.ask(ask)
    resumed = engine.ask(ask)
    engine.forget()
    again = engine.generate([Ask(prompt(3, 300)), ask])[1]
    assert (first.cached, resumed.cached, again.cached) == (0, 480, 0)
    assert max(first.distance(resumed), first.distance(again)) < TOLERANCE / 10


def test_digests_tell_blocks_apart(llama: Path, fleet: Fleet) -> None:
    engine = fleet.get(EngineSpec(llama))
    first = Ask(prompt(3, 3 * BLOCK))
    second = Ask(first.tokens[: 2 * BLOCK] + prompt(4, BLOCK))
    pages = []
    for ask in (first, second):
        engine.forget()
        (name,) = engine.submit([ask])
        while engine.progress()[name] == 0:
            engine.step()
        pages.append(engine.pages(name)[:3])
        engine.drain()
    assert pages[0][:2] == pages[1][:2]
    assert pages[0][2] != pages[1][2]
    assert len(set(pages[0])) == 3


def test_the_workload_has_every_kind_of_prompt() -> None:
    prompts = mixed_prompts(0)
    lengths = [len(tokens) for tokens in prompts]
    assert len(prompts) == 50
    assert any(length < CHUNK for length in lengths)
    assert any(length % CHUNK == 0 for length in lengths)
    assert any(length % CHUNK == 1 and length > CHUNK for length in lengths)
    beginnings = [tokens[:CHUNK] for tokens in prompts if len(tokens) >= CHUNK]
    assert len(set(beginnings)) < len(beginnings)
    assert loadable(2 * CHUNK) == 2 * CHUNK - BLOCK
    assert loadable(2 * CHUNK + 1) == 2 * CHUNK
    assert loadable(CHUNK - 1) == 0
