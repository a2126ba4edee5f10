"""What is kept of a prompt and its answer: as much as is configured, nothing where the client says
so, and never a token that a draft guessed and the model did not confirm.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.driver import SMALL, Answer, Ask, Engine, EngineSpec, Fleet, differences
from engine.workload import CHUNK, Tokens, prompt

pytestmark = pytest.mark.engine

FIRST_TURN = prompt(31, CHUNK + 36)
REPETITIVE = prompt(32, 12) * 12
DRAFTS = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
}


def two_turns(engine: Engine, first_prompt: Tokens, length: int) -> tuple[Answer, Answer, Tokens]:
    """Both answers and the second prompt, which continues the first answer."""
    first = engine.ask(Ask(first_prompt, max_tokens=length))
    second_prompt = first_prompt + first.tokens + prompt(33, 20)
    engine.forget()
    return first, engine.ask(Ask(second_prompt)), second_prompt


@pytest.mark.parametrize(
    ("kept", "hit"),
    [
        # The last token of an answer was never an input, so nothing of it is in the cache.
        ("all", (CHUNK + 36 + 160 - 1) // CHUNK * CHUNK),
        ("prompt", CHUNK),
    ],
)
def test_a_second_turn(llama: Path, fleet: Fleet, kept: str, hit: int) -> None:
    plain = fleet.get(EngineSpec(llama))
    expected = two_turns(plain, FIRST_TURN, 160)
    engine = fleet.get(EngineSpec(llama, {**SMALL, "save": {"tokens": kept}}))
    first, second, second_prompt = two_turns(engine, FIRST_TURN, 160)
    assert second_prompt == expected[2]
    assert not differences([first, second], expected[:2])
    assert second.cached == hit


def test_a_client_that_wants_nothing_kept(llama: Path, fleet: Fleet) -> None:
    """A client that says it wrongly is served as if it had said nothing."""
    tokens = prompt(34, 2 * CHUNK + 10)
    (expected,) = fleet.answers(EngineSpec(llama), [Ask(tokens)])
    engine = fleet.get(EngineSpec(llama, {**SMALL, "save": {"tokens": "all"}}))
    saved = []
    for keep in (False, "no", None):
        engine.forget()
        before = engine.metrics()
        answer = engine.ask(
            Ask(tokens, transfer={"lamina": {"keep": keep}} if keep is not None else None)
        )
        assert not differences([answer], [expected])
        after = engine.metrics()
        saved.append((answer.cached, after.since(before, "lamina_save_bytes_total") > 0))
    assert saved == [(0, False), (0, True), (2 * CHUNK, False)]


@pytest.mark.parametrize("mode", ["layerwise", pytest.param("parked", marks=pytest.mark.slow)])
def test_speculation(llama: Path, fleet: Fleet, mode: str) -> None:
    plain = fleet.get(EngineSpec(llama))
    expected = two_turns(plain, REPETITIVE, 200)
    engine = fleet.get(EngineSpec(llama, {**SMALL, "load": {"mode": mode}}, DRAFTS))
    before = engine.metrics()
    first, second, second_prompt = two_turns(engine, REPETITIVE, 200)
    after = engine.metrics()
    drafted = after.since(before, "vllm:spec_decode_num_draft_tokens_total")
    accepted = after.since(before, "vllm:spec_decode_num_accepted_tokens_total")
    assert 0 < accepted < drafted, "the prompt must make drafts of both kinds"
    assert second_prompt == expected[2]
    assert not differences([first, second], expected[:2])
    assert second.cached == (len(REPETITIVE) + 200 - 1) // CHUNK * CHUNK


def test_speculation_in_a_batch(llama: Path, fleet: Fleet) -> None:
    asks = [Ask(prompt(seed, 12) * (3 + seed), max_tokens=80) for seed in range(12)]
    expected = fleet.answers(EngineSpec(llama), asks)
    engine = fleet.get(EngineSpec(llama, SMALL, DRAFTS))
    assert not differences(engine.generate(asks), expected)
    engine.forget()
    again = engine.generate(asks)
    assert not differences(again, expected)
    assert sum(answer.cached for answer in again) > 0
