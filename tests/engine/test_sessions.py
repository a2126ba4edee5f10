"""Streaming sessions: a token that vLLM takes back when the next turn comes names nothing."""

from __future__ import annotations

import pytest

from engine.driver import SMALL, Ask, Engine, EngineSpec, Fleet, differences
from engine.models import SHAPES, Checkpoints
from engine.workload import Tokens, prompt

pytestmark = pytest.mark.engine

BLOCK = 32
LONGEST = 5
MODEL = "short-convolution"


def ends_on_a_boundary(plain: Engine, count: int) -> list[tuple[Tokens, Tokens]]:
    """Prompts and answers. An answer's last token is the last one of a block, and is not in the
    answer before: it ends a turn."""
    found = []
    for seed in range(200):
        before = 1 + seed % (LONGEST - 2)  # tokens of the answer that stay
        tokens = prompt(7000 + seed, BLOCK * (1 + seed % 3) + BLOCK - 1 - before)
        answer = plain.ask(Ask(tokens, max_tokens=before + 1)).samples[0]
        if answer[-1] not in answer[:-1]:
            found.append((tokens, tuple(answer)))
        if len(found) == count:
            return found
    raise AssertionError("no answer ends as it should")


def test_what_a_session_takes_back_is_not_found(checkpoints: Checkpoints, fleet: Fleet) -> None:
    model, options = checkpoints.model(MODEL), SHAPES[MODEL].options
    plain = fleet.get(EngineSpec(model, options=options))
    lamina = {**SMALL, "chunk_tokens": BLOCK, "load": {"min_tokens": 1}}
    engine = fleet.get(EngineSpec(model, lamina, options))
    asks = []
    for number, (tokens, answer) in enumerate(ends_on_a_boundary(plain, 6)):
        more = prompt(8000 + number, BLOCK + 9)
        said = engine.converse([tokens, more], [answer[-1:], ()], LONGEST)
        assert tuple(said[0]) == answer
        engine.forget()
        asks += [
            Ask((*tokens, *answer[:-1], *more, *said[1])),
            Ask((*tokens, *answer, *more)),
        ]
    expected = [plain.ask(ask) for ask in asks]
    answers = []
    for ask in asks:
        engine.forget()
        answers.append(engine.ask(ask))
    assert not differences(answers, expected)
    assert sum(answer.cached > 0 for answer in answers) >= len(asks) // 2
    assert engine.metrics().total("lamina_leased_blocks") == 0
