"""What one engine has computed another one answers from: two real engines on each real store, both
ways, and again after each was restarted. Answers are those of an engine without Lamina."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.driver import Answer, Ask, Engine, EngineSpec, Fleet, Start, differences
from engine.shared import EACH_STORE, STORES, Shared
from engine.workload import loadable, mixed_prompts

pytestmark = pytest.mark.engine

OURS, THEIRS = ([Ask(tokens) for tokens in mixed_prompts(seed, count=50)] for seed in (171, 172))
WRITTEN_AGAIN = 0.05
"""Of what the other engine has saved, at most."""
LOADED = 0.95
"""Of what the other engine has saved, at least."""
PATIENCE = 60.0


@pytest.fixture(scope="module", params=EACH_STORE)
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    with STORES[request.param](tmp_path_factory.mktemp(request.param)) as store:
        yield store


def written(engine: Engine, store: Shared) -> float:
    """Bytes that an engine has written to a store, once nothing is on its way there."""
    give_up = time.monotonic() + PATIENCE
    while True:
        engine.drain()
        metrics = engine.metrics()
        if not (metrics.total("lamina_transfers") or metrics.total("lamina_write_backlog")):
            return metrics.total("lamina_write_bytes_total", tier=store.name)
        assert time.monotonic() < give_up, "writes do not end"
        time.sleep(0.02)


def answer_from(
    engine: Engine, store: Shared, asks: list[Ask], expected: list[Answer], saved: float
) -> None:
    """Have an engine answer what it has never seen, and see where it had it from.

    Args:
        engine: the engine.
        store: where another one has saved all of it.
        asks: what to ask, all at once.
        expected: what an engine without Lamina answers.
        saved: bytes that the other engine has saved.
    """
    before = engine.metrics()
    answers = engine.generate(asks)
    assert not differences(answers, expected)
    now = engine.metrics()
    fetched = now.since(before, "lamina_fetch_bytes_total", tier=store.name)
    assert LOADED * saved <= fetched <= saved
    cached = sum(answer.cached for answer in answers)
    assert cached >= LOADED * sum(loadable(len(ask.tokens)) for ask in asks)
    assert now.total("lamina_failures_total") == 0


def test_each_of_two_engines_answers_from_what_the_other_has_saved(
    llama: Path, fleet: Fleet, start: Start, shared: Shared
) -> None:
    ours, theirs = (fleet.answers(EngineSpec(llama), asks) for asks in (OURS, THEIRS))
    spec = EngineSpec(llama, shared.lamina(), environment=shared.environment)
    first, second = start(spec), start(spec)

    assert not differences(first.generate(OURS), ours)
    saved = written(first, shared)
    answer_from(second, shared, OURS, ours, saved)
    assert written(second, shared) <= WRITTEN_AGAIN * saved, "what is there is not written again"

    assert not differences(second.generate(THEIRS), theirs)
    before = written(second, shared)
    answer_from(first, shared, THEIRS, theirs, before)

    first.close()
    first = start(spec)
    answer_from(first, shared, THEIRS, theirs, before)
    second.close()
    second = start(spec)
    answer_from(second, shared, OURS, ours, saved)
    for engine in (first, second):
        assert engine.metrics().total("lamina_leased_blocks") == 0
        engine.close()
