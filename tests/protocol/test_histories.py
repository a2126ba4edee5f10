"""Long random histories of several engines, pushes and kinds of groups keep the promises that
``test_exhaustive`` shows for short ones."""

from __future__ import annotations

import os
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lamina_kv.geometry import Group, GroupKind
from protocol.engine import BLOCK, Options, PushCase
from protocol.world import FAULTS, HURRIES, World, settle

pytestmark = pytest.mark.scaled

EXAMPLES = int(os.environ.get("LAMINA_PROTOCOL_HISTORIES", "60"))

FULL = Group(GroupKind.FULL, BLOCK)
WINDOW = Group(GroupKind.WINDOW, BLOCK, window=BLOCK + 1)
STATE = Group(GroupKind.STATE, BLOCK)


@st.composite
def cases(draw: st.DrawFn) -> PushCase:
    tokens = draw(st.integers(3, 8))
    hit = draw(st.sampled_from(("none", "none", "engine", "parked", "layerwise")))
    whole = (tokens - 1) // BLOCK
    return PushCase(
        prefill=draw(st.integers(0, 1)),
        decode=draw(st.integers(0, 1)),
        tokens=tokens,
        hit=hit,
        hit_tokens=draw(st.integers(1, whole)) * BLOCK if hit != "none" else 0,
        floor=draw(st.sampled_from((0, 0, 0, BLOCK))),
        misled=draw(st.integers(0, 9)) == 0,
    )


options = st.builds(
    Options,
    cases=st.lists(cases(), min_size=1, max_size=4).map(tuple),
    prefill_ranks=st.sampled_from((1, 1, 2)),
    decode_ranks=st.sampled_from((1, 1, 2)),
    groups=st.sampled_from(((FULL,), (FULL, WINDOW), (FULL, STATE), (FULL, WINDOW, STATE))),
    faults=st.just(FAULTS | HURRIES),
    budget=st.integers(0, 6),
    hurries=st.integers(0, 3),
    scarce=st.booleans(),
    replicated=st.booleans(),
    narrow=st.booleans(),
    chunk=st.sampled_from((2, 1, 3)),
    beside=st.booleans(),
)


class Histories(RuleBasedStateMachine):
    """A world to which anything happens that can, and then nothing bad any more."""

    @initialize(options=options)
    def begin(self, options: Options) -> None:
        self.world = World(options)

    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        events = [*self.world.normal(), *self.world.late()]
        if events:
            self.world.run(data.draw(st.sampled_from(events)))

    @precondition(lambda self: self.world.budget)
    @rule(data=st.data())
    def go_wrong(self, data: st.DataObject) -> None:
        if events := list(self.world.faults()):
            self.world.run(data.draw(st.sampled_from(events)), fault=True)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            settle(self.world)


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_histories_of_many_pushes() -> None:
    """Without a library that looks for small ones: a hundred events and more in each."""
    for seed in range(EXAMPLES):
        random = Random(seed)
        world = World(_draw(random))
        for _ in range(random.randrange(40, 200)):
            wrong = list(world.faults()) if random.random() < 0.08 else []
            events = wrong or [*world.normal(), *world.late()]
            if not events:
                break
            try:
                world.run(random.choice(events), fault=bool(wrong))
            except AssertionError as error:
                error.add_note(f"history {seed}")
                raise
        settle(world)


def _draw(random: Random) -> Options:
    pushes = []
    for _ in range(random.randrange(2, 7)):
        tokens = random.randrange(3, 9)
        hit = random.choice(("none", "none", "engine", "parked", "layerwise"))
        blocks = random.randrange(1, 1 + (tokens - 1) // BLOCK)
        pushes.append(
            PushCase(
                prefill=random.randrange(2),
                decode=random.randrange(2),
                tokens=tokens,
                hit=hit,
                hit_tokens=0 if hit == "none" else blocks * BLOCK,
                floor=random.choice((0, 0, BLOCK)),
                misled=random.random() < 0.1,
            )
        )
    return Options(
        cases=tuple(pushes),
        prefill_ranks=random.choice((1, 1, 2)),
        decode_ranks=random.choice((1, 1, 2)),
        groups=random.choice(((FULL,), (FULL, WINDOW), (FULL, STATE), (FULL, WINDOW, STATE))),
        faults=FAULTS | HURRIES,
        budget=random.randrange(7),
        hurries=random.randrange(4),
        scarce=random.random() < 0.3,
        replicated=random.random() < 0.3,
        narrow=random.random() < 0.3,
        chunk=random.choice((2, 2, 1, 3)),
        beside=random.random() < 0.5,
    )
