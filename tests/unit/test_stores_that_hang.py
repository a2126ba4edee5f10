"""A store that hangs costs a request that loads whatever it can one timeout, whatever is known of
the store and whatever waits in front of it there."""

from __future__ import annotations

import pytest
from driven_planner import CHUNK, Engine, View, asks, inward, keys_of, prompt

from lamina_kv.plan import Move, Outcome, StepPlan, TierName, TierReport, TransferId

KEYED = TierName("keyed")
TIMEOUT = 2.0
"""Of a call of the store."""
READERS = 2
"""Threads that call it."""
STEP = 0.01
SLACK = 10 * STEP


def engine() -> Engine:
    """An engine with a store of others, which no number of failures takes out of use."""
    store = {"kind": "valkey", "name": KEYED, "url": "valkey://store", "timeout": TIMEOUT}
    settings = {
        "tiers": [store],
        "load": {"when": "always", "deadline": 30},
        "breaker": {"failures": 1000},
    }
    return Engine(settings, tiers=[TierReport(KEYED)])


class Hanging:
    """Calls of a store that hangs: each keeps a thread until it fails, a chunk at a time."""

    def __init__(self, driven: Engine) -> None:
        self._driven = driven
        self._waiting: list[TransferId] = []
        self._running: list[tuple[float, TransferId]] = []

    def take(self, plan: StepPlan) -> None:
        """Carry out what a plan orders, questions first; fail what has taken too long."""
        over = [call for call in self._running if call[0] <= self._driven.now]
        self._running = [call for call in self._running if call not in over]
        reason = {"outcome": Outcome.FAILED, "reason": "late"}
        self._driven.answer(*(transfer for _, transfer in over), **reason)  # type: ignore[arg-type]
        self._waiting[:0] = [ask.transfer for ask in asks(plan)]
        self._waiting += [move.transfer for move in inward(plan)]
        while self._waiting and len(self._running) < READERS:
            self._running.append((self._driven.now + TIMEOUT, self._waiting.pop(0)))


def promise(driven: Engine, tokens: list[int]) -> None:
    """The store says that it has the chunks of a prompt."""
    for key in keys_of(tokens):
        driven.planner._books.catalog.far[KEYED].index.filled(key)


def ordered() -> tuple[Engine, View, tuple[Move, ...]]:
    """An engine with a request for three chunks that the store has, and the moves for it."""
    driven, tokens = engine(), prompt(3 * CHUNK + 1)
    promise(driven, tokens)
    view = View("a", tokens)
    assert driven.planner.lookup(view, 0).ask_again
    return driven, view, inward(driven.step())


def waits(driven: Engine, hanging: Hanging, view: View) -> float:
    """Seconds for which a request is told to ask again."""
    began = driven.now
    while driven.planner.lookup(view, 0).ask_again:
        hanging.take(driven.step())
        driven.now += STEP
        assert driven.now < began + 100, "it waits for ever"
    return driven.now - began


@pytest.mark.parametrize("promised", [0, 3, 8], ids=["nothing", "a part", "all"])
def test_a_request_waits_for_one_timeout(promised: int) -> None:
    """For an answer, for chunks that were promised, or for an answer and then for chunks."""
    driven, tokens = engine(), prompt(8 * CHUNK + 1)
    promise(driven, tokens[: promised * CHUNK])
    assert waits(driven, Hanging(driven), View("a", tokens)) <= TIMEOUT + SLACK


def test_who_comes_behind_calls_that_hang_waits_no_longer() -> None:
    driven = engine()
    hanging = Hanging(driven)
    prompts = [prompt(8 * CHUNK + 1, seed=seed) for seed in range(4)]
    for tokens in prompts[:2]:
        promise(driven, tokens)
    views = [View(f"request {number}", tokens) for number, tokens in enumerate(prompts)]
    assert all(driven.planner.lookup(view, 0).ask_again for view in views)
    assert max(waits(driven, hanging, view) for view in views) <= TIMEOUT + SLACK


def test_a_tier_that_brings_chunks_late_is_waited_for() -> None:
    """Each call takes nearly as long as it may, and there are several one after the other."""
    driven, view, moves = ordered()
    for move in moves:
        driven.now += 0.9 * TIMEOUT
        driven.step()
        assert driven.planner.lookup(view, 0).ask_again
        driven.answer(move.transfer, seconds=0.9 * TIMEOUT)
    assert driven.planner.lookup(view, 0).tokens == 3 * CHUNK


def test_what_a_long_step_holds_up_is_waited_for() -> None:
    driven, view, moves = ordered()
    driven.now += 3 * TIMEOUT
    assert driven.planner.lookup(view, 0).ask_again
    driven.answer(*(move.transfer for move in moves))
    assert driven.planner.lookup(view, 0).tokens == 3 * CHUNK


def test_what_a_long_step_holds_up_behind_another_chunk_is_waited_for() -> None:
    """What was ordered when the last chunk came is perhaps carried out a step later."""
    driven, view, (first, *others) = ordered()
    for _ in range(3):
        driven.step()
    driven.answer(first.transfer, seconds=STEP)
    driven.step()
    driven.now += 3 * TIMEOUT
    assert driven.planner.lookup(view, 0).ask_again
    driven.answer(*(move.transfer for move in others))
    assert driven.planner.lookup(view, 0).tokens == 3 * CHUNK
