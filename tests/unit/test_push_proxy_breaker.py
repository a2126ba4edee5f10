"""Guards how an engine that fails is left alone, for how long, and how it comes back."""

from __future__ import annotations

import asyncio

import pytest

from lamina_kv.push.proxy.breaker import MAX_PAUSE, BreakerState, CircuitBreaker
from lamina_kv.push.proxy.engines import Engine, Role
from lamina_kv.push.proxy.routing.ranks import Work
from lamina_kv.push.proxy.settings import PrefillAddress, Settings

CLOSED, OPEN, PROBATION = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.PROBATION


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_only_failures_in_a_row_open_it(clock: Clock) -> None:
    breaker = CircuitBreaker(3, 10, clock)
    for _ in range(5):
        assert [breaker.failed(), breaker.failed()] == [0, 0]
        breaker.succeeded()
    assert breaker.state is CLOSED
    assert [breaker.failed(), breaker.failed(), breaker.failed()] == [0, 0, 10]
    assert breaker.state is OPEN


def test_what_was_sent_before_it_opened_does_not_count(clock: Clock) -> None:
    breaker = CircuitBreaker(1, 10, clock)
    breaker.failed()
    breaker.succeeded()
    assert breaker.state is OPEN
    assert breaker.failed() == 0
    clock.now += 10
    assert breaker.state is PROBATION


def test_every_failure_on_probation_doubles_the_pause_up_to_a_limit(clock: Clock) -> None:
    breaker = CircuitBreaker(2, 7, clock)
    breaker.failed()
    pauses = []
    for _ in range(6):
        pauses.append(breaker.failed())
        clock.now += pauses[-1] - 0.01
        assert breaker.state is OPEN
        clock.now += 0.01
        assert breaker.state is PROBATION
    assert pauses == [7, 14, 28, 56, MAX_PAUSE, MAX_PAUSE]
    breaker.succeeded()
    assert breaker.state is CLOSED
    assert [breaker.failed(), breaker.failed()] == [0, 7]


def test_an_engine_on_probation_is_sent_one_request_at_a_time(clock: Clock) -> None:
    async def scenario() -> None:
        settings = Settings(
            prefill=(PrefillAddress("http://p", "p:1"),),
            decode=("http://d",),
            breaker_failures=1,
            breaker_pause=10,
        )
        engine = Engine(Role.DECODE, "http://d", "", settings, clock)
        engine.healthy = True
        (rank,) = engine.ranks
        with engine.visit(rank, Work(5, 5)):  # an old one, that goes on meanwhile
            assert engine.usable
            engine.failed("why")
            assert not engine.usable
            clock.now += 10
            assert engine.usable
            with engine.visit(rank, Work(7, 7)):
                assert not engine.usable
                assert engine.outstanding == 2
            assert engine.usable  # it has ended without a verdict
            with engine.visit(rank, Work(7, 7)):
                engine.succeeded()
                assert engine.usable
        assert engine.load == 0
        await engine.close()

    asyncio.run(scenario())
