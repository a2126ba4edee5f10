"""Who follows what is told of tiers has an exact picture of every tier that this engine owns. All
histories of ``test_histories.py`` look at that every 16 steps; here are long ones that evict, fail
and reset for certain."""

from __future__ import annotations

import logging
from dataclasses import replace
from random import Random

import pytest

from simulator.engine import Simulator
from simulator.faults import Weather
from simulator.history import Prompts, happen, turn
from simulator.options import Far, Options, Sort

REQUESTS = 1000
LONGEST = 100_000
"""Steps within which so many requests have come."""

ENGINE = Options(
    host_slots=12,
    tiers=(Far("slots", Sort.SLOTS, room=24), Far("keys", Sort.KEYS)),
    chunk_blocks=1,
    saves_in_flight=3,
    breaker_failures=3,
    mode="parked",
)
BAD = Weather(slow=0.1, error=0.05, refused=0.1, unread=0.1, gone=0.1, vanishes=0.05)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "lamina_kv")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [ENGINE, replace(ENGINE, ranks=2, asynchronous=True, prefix_caching=False)],
    ids=["one-rank", "two-ranks"],
)
def test_a_thousand_requests_with_evictions_failures_and_resets(options: Options) -> None:
    random = Random(options.ranks)
    prompts = Prompts(random, options.longest)
    with Simulator(options.ranks, options) as simulator:
        simulator.weather = BAD
        for _ in range(LONGEST):
            if simulator.counts["submit"] >= REQUESTS:
                break
            if random.random() < 0.01:
                turn(simulator, random)
            happen(simulator, random, prompts)
            simulator.step()
        simulator.drain()
        counts, told = simulator.counts, simulator._watch.subscriber.counts
    assert counts["submit"] == REQUESTS
    for event in ("reset", "change weights", "failed loads", "saves", "moves outward", "drops"):
        assert counts[event] > 0, event
    assert min(told.values()) > REQUESTS, told
