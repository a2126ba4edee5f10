"""Promises of every routing policy and of the placement, for random engines, loads and prefixes."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from lamina_kv.push.proxy.routing.cache_aware import FAITHFUL, SLACK, CacheAware
from lamina_kv.push.proxy.routing.pace import Line
from lamina_kv.push.proxy.routing.placement import FEW, Placement
from lamina_kv.push.proxy.routing.policies import make_policy
from lamina_kv.push.proxy.routing.prompt import Prompt
from lamina_kv.push.proxy.routing.words import (
    HELD,
    REQUEST_TOKENS,
    Candidate,
    Disaggregate,
    PolicyName,
    Reason,
    Why,
)

TOKENS = st.integers(0, 20_000)
LINES = st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 100)), max_size=30)
FACTORS = ("queued", "held", "requests")


@st.composite
def asked(draw: Any) -> tuple[Prompt, list[Candidate]]:
    """A prompt, and ranks that hold parts of it; at most one has answered the session."""
    prompt = Prompt(tokens=draw(st.integers(1, 20_000)), pushable=draw(st.booleans()))
    count = draw(st.integers(1, 6))
    sticky = draw(st.integers(-3, count - 1))
    candidates = [
        Candidate(
            cast(Any, SimpleNamespace(number=number, pace=Line(float))),
            hit=draw(st.integers(0, prompt.tokens - 1)) if draw(st.booleans()) else 0,
            queued=draw(TOKENS),
            held=draw(TOKENS),
            requests=draw(st.integers(0, 50)),
            crowd=draw(st.floats(0, 50)),
            full=draw(st.booleans()),
            visits=draw(st.integers(0, 99)),
            sticky=number == sticky,
        )
        for number in range(count)
    ]
    return prompt, candidates


@given(asked(), st.sampled_from(PolicyName))
def test_one_of_those_that_can_be_used(
    given_: tuple[Prompt, list[Candidate]], name: PolicyName
) -> None:
    prompt, candidates = given_
    choice = make_policy(name).choose(prompt, candidates)
    assert any(choice.candidate is candidate for candidate in candidates)


@given(asked(), st.sampled_from(PolicyName))
def test_a_full_one_only_if_all_are(
    given_: tuple[Prompt, list[Candidate]], name: PolicyName
) -> None:
    prompt, candidates = given_
    choice = make_policy(name).choose(prompt, candidates)
    if choice.candidate.full:
        assert all(candidate.full for candidate in candidates)


@given(asked(), st.integers(0, 9))
def test_a_session_stays_unless_its_rank_is_overloaded(
    given_: tuple[Prompt, list[Candidate]], seed: int
) -> None:
    prompt, candidates = given_
    choice = CacheAware(random.Random(seed)).choose(prompt, candidates)
    home = next((candidate for candidate in candidates if candidate.sticky), None)
    if home is None:
        assert choice.reason is not Reason.SESSION
        return
    roomy = [c for c in candidates if c.full is False]
    others = [c.load for c in (roomy or candidates)]
    overloaded = home.load - min(others) > FAITHFUL * prompt.tokens + SLACK
    if not overloaded and (not home.full or not roomy):
        assert choice.candidate is home


@given(asked(), st.integers(0, 9))
def test_nobody_waits_for_a_prefix_longer_than_it_is_worth(
    given_: tuple[Prompt, list[Candidate]], seed: int
) -> None:
    """So no rank starves, however many requests share a prefix that another one holds."""
    prompt, candidates = given_
    choice = CacheAware(random.Random(seed)).choose(prompt, candidates)
    if choice.reason is not Reason.PREFIX:
        return
    there = choice.candidate
    for other in candidates:
        if other.full <= there.full:
            saved = there.hit - other.hit
            more = sum(
                price * (getattr(there, name) - getattr(other, name))
                for name, price in zip(FACTORS, (1, HELD, REQUEST_TOKENS), strict=True)
            )
            assert more <= saved + 1e-6


@given(asked(), st.sampled_from(PolicyName), st.integers(20, 60))
def test_everybody_is_served_in_the_end(
    given_: tuple[Prompt, list[Candidate]], name: PolicyName, rounds: int
) -> None:
    """Requests that stay where they were sent raise the load there until others are chosen."""
    prompt, candidates = given_
    policy = make_policy(name)
    size = prompt.tokens
    idle = [Candidate(c.rank, hit=c.hit, sticky=False) for c in candidates[:3]]
    for _ in range(rounds * 3):
        choice = policy.choose(prompt, idle).candidate
        index = next(i for i, c in enumerate(idle) if c is choice)
        idle[index] = Candidate(
            choice.rank,
            hit=size - 1,
            held=choice.held + size,
            requests=choice.requests + 1,
            visits=choice.visits + 1,
        )
    assert all(candidate.visits for candidate in idle)


@given(asked(), st.sampled_from(Disaggregate), LINES, LINES, st.booleans())
def test_where_prompts_are_computed(
    given_: tuple[Prompt, list[Candidate]],
    mode: Disaggregate,
    local: list[tuple[int, float]],
    remote: list[tuple[int, float]],
    usable: bool,
) -> None:
    prompt, candidates = given_
    decode, prefill = candidates[0], candidates[-1] if usable else None
    placement = Placement(mode, float)
    for line, samples in ((placement.local, local), (placement.prefill, remote)):
        for tokens, seconds in samples:
            line.learn(tokens, seconds)
    why = placement.place(prompt, decode, prefill)
    if not prompt.pushable:
        assert why is Why.REQUEST
    elif mode is Disaggregate.NEVER:
        assert why is Why.NEVER
    elif prefill is None:
        assert why is Why.NO_PREFILL_ENGINE
    elif mode is Disaggregate.ALWAYS:
        assert why is Why.PUSHED
    elif prompt.tokens - decode.hit <= FEW:
        assert why in {Why.SHORT, Why.CACHED}
