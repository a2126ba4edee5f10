"""Several prefill engines behind one address, as behind a service of Kubernetes: what one of them
says of itself is not taken for what another one does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lamina_kv.control.push.target import PushTarget
from lamina_kv.push.letters import Lost
from protocol.engine import Options, ProtocolViolationError, PushCase
from protocol.explore import explore
from protocol.world import FAULTS, HURRIES, Event, World, settle

FIRST, SECOND = PushCase(tokens=2), PushCase(prefill=1, tokens=2)
STATES = 800

HISTORY: tuple[Event, ...] = (
    # The first engine is told of one push.
    ("arrive_decode", 0),
    ("step_decode", 0),
    ("post", 0),
    ("accept", 0),
    ("read_decode", 0),
    # The second one has a prompt that waits for its destination.
    ("arrive_prefill", 1),
    ("step_prefill", 1),
    ("end_prefill", 1, "request1"),
    # The first one says goodbye. It is heard when the next announcement is ready to go.
    ("close_prefill", 0),
    ("arrive_decode", 1),
    ("step_decode", 0),
    ("read_decode", 0),
    ("post", 0),
    # So the second one gets that, and writes.
    ("accept", 0),
    ("read_decode", 0),
    ("read_prefill", 0),
    ("step_prefill", 1),
    # Control learns of both in its next step. The write takes longer than what has come may wait.
    ("step_decode", 0),
    ("step_decode", 0),
    ("second", 0),
    ("land", 1, 0, 0),
)


def after_the_history() -> World:
    kinds = frozenset({"close_prefill", "second"})
    world = World(Options((FIRST, SECOND), faults=kinds, budget=1, hurries=1, together=True))
    for event in HISTORY:
        world.run(event, fault=event[0] in kinds)
    return world


def test_a_goodbye_says_nothing_of_another_engine() -> None:
    world = after_the_history()
    stages = {name: request.stage for name, request in world.decodes[0].requests.items()}
    assert stages == {"request0": "recomputed", "request1": "parked"}
    settle(world)


def test_the_model_sees_if_a_goodbye_is_taken_for_everybodys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = PushTarget._lost

    def of_everything(target: PushTarget, item: Lost) -> None:
        lost(target, replace(item, announced=max(target._inbound, default=0)))

    monkeypatch.setattr(PushTarget, "_lost", of_everything)
    with pytest.raises(ProtocolViolationError, match="a write of 2 lands in block"):
        after_the_history()


@pytest.mark.parametrize(
    "kinds", ["close_prefill", pytest.param("break_decode crash_prefill", marks=pytest.mark.slow)]
)
def test_what_goes_wrong_behind_one_address(kinds: str) -> None:
    faults = frozenset(kinds.split()) | {"abort_decode"}
    assert faults <= FAULTS
    options = Options((FIRST, SECOND), faults=faults | HURRIES, budget=2, hurries=2, together=True)
    found = explore(options, limit=20 * STATES, wrong_later=STATES, seed=1)
    assert found.wrong_later >= STATES
