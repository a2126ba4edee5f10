"""Guards what is learnt of how long prompts take."""

from __future__ import annotations

import random

import pytest

from lamina_kv.push.proxy.routing.pace import HALF_LIFE, Line, first_known
from push_proxy.pools import Clock


def line(each: float, base: float, *lengths: int, noise: float = 0.0) -> Line:
    learnt = Line(Clock())
    rng = random.Random(2)
    for length in lengths:
        learnt.learn(length, (base + each * length) * rng.uniform(1 - noise, 1 + noise))
    return learnt


def test_what_every_prompt_costs_and_what_each_token_adds() -> None:
    learnt = line(0.001, 0.2, *range(100, 2000, 100), noise=0.05)
    assert learnt.seconds(1000) == pytest.approx(1.2, rel=0.1)
    assert learnt.seconds(1000, 3000) == pytest.approx(4.2, rel=0.1)
    assert learnt.tokens_per_second == pytest.approx(1000, rel=0.1)


def test_prompts_of_one_length_say_something_of_others() -> None:
    assert line(0.001, 0.0, *[500] * 20).seconds(1000) == pytest.approx(1.0)


def test_little_is_not_believed() -> None:
    assert line(0.001, 0.0, 1, 2).seconds(1) is None
    short = line(0.001, 0.0, *range(20))
    assert short.seconds(10_000) is None
    other = line(0.002, 0.0, *range(1000, 5000, 100))
    assert first_known(10_000, 0, (short, other)) == pytest.approx(20.0)
    assert first_known(10, 0, (short, other)) == pytest.approx(0.01)
    assert first_known(10, 0, ()) is None


def test_an_engine_that_is_slower_today_is_seen() -> None:
    clock = Clock()
    learnt = Line(clock)
    for seconds in (1.0, 3.0):
        for _ in range(200):
            learnt.learn(1000, seconds)
    assert learnt.seconds(1000) == pytest.approx(3.0, rel=0.1)
    clock.now += 10 * HALF_LIFE
    assert learnt.seconds(1000) is None


def test_one_that_was_held_up_changes_little() -> None:
    learnt = line(0.001, 0.0, *[1000] * 50)
    learnt.learn(1000, 3600.0)
    assert learnt.seconds(1000) < 1.2
