"""Guards what an engine does that only saves to its tiers, or only loads from them: it takes part
in pushes as any other, on either side."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from driven_planner import BLOCK, CHUNK, Engine, View, prompt

from lamina_kv.control.requests import BoundaryState, PushParameters
from lamina_kv.control.shape import ChunkShape
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.keys import prompt_digest
from lamina_kv.plan import LoadMode
from lamina_kv.push.cards import EngineCard, RankCard, RowCard
from lamina_kv.push.letters import Letter, Opened
from lamina_kv.push.messages import Announce, Attempt, BlockTable, Bound

PREFILL = "10.0.0.1:9300"
TOKENS = prompt(3 * CHUNK + 5)


def card(name: str, groups: Sequence[Group] = (Group(GroupKind.FULL, BLOCK),)) -> EngineCard:
    kinds = tuple((group.kind.value, group.block_tokens, 0) for group in groups)
    rows = (RowCard(0, 64, 64, 1, tuple(range(len(groups)))),)
    return EngineCard(name, b"model", False, kinds, (RankCard(0, b"", 1000, rows),))


def engine(*, loads: bool, saves: bool, shape: ChunkShape | None = None) -> Engine:
    groups = shape.groups if shape is not None else (Group(GroupKind.FULL, BLOCK),)
    return Engine({"push": {}}, loads=loads, saves=saves, card=card("me", groups), shape=shape)


def test_who_loads_from_no_tier_is_pushed_to() -> None:
    decode = engine(loads=False, saves=True)
    decode.save(View("before", TOKENS))
    view = View("a", TOKENS, first_block=100)
    view.push = PushParameters("push", PREFILL)
    hit = decode.planner.lookup(view, 0)
    assert (hit.tokens, hit.mode) == (len(TOKENS) - 1, LoadMode.PARKED)
    decode.planner.admitted("a", hit.tokens)
    *_, letter = decode.pushes.drain_letters()
    assert isinstance(letter.message, Announce)
    assert (letter.message.start, letter.message.end) == (0, len(TOKENS) - 1)
    plan = decode.step()
    assert len(plan.push.receives) == 1
    assert not plan.loads, "its tiers are not to be read"


def test_who_loads_from_no_tier_loads_from_none() -> None:
    producer = engine(loads=False, saves=True)
    plan = producer.save(View("before", TOKENS))
    assert len(plan.saves) > 0
    again = View("a", TOKENS, first_block=100)
    producer.planner.arrived(again)
    assert producer.planner.lookup(again, 0).tokens == 0
    producer.planner.admitted("a", 0)
    readings = producer.readings()
    assert readings.counters["loads_skipped", ("role",)] == 1
    assert ("lookups", ()) not in readings.counters


@pytest.mark.parametrize("saves", [True, False])
def test_who_saves_to_no_tier_prefills_for_others(saves: bool) -> None:
    groups = (Group(GroupKind.FULL, BLOCK), Group(GroupKind.STATE, CHUNK))
    shape = ChunkShape(CHUNK, groups, 0)
    prefill = engine(loads=True, saves=saves, shape=shape)
    end = 3 * CHUNK
    full, state = list(range(1, 8)), [9]
    view = View("a", TOKENS, tables={0: full, 1: state})
    view.push = PushParameters("push", None)
    prefill.planner.lookup(view, 0)
    prefill.planner.admitted("a", 0)
    tables = (BlockTable(0, tuple(range(21, 27))), BlockTable(2, (29,)))
    announce = Announce(Attempt("push", 1), prompt_digest(TOKENS, b"", b""), 0, end, 60.0, tables)
    prefill.pushes.take_news([Opened("d", "d", card("d", groups)), Letter("d", announce)])
    assert Bound(Attempt("push", 1)) in [m.message for m in prefill.pushes.drain_letters()]
    states = [BoundaryState("a", 1, 9, end)]
    plan = prefill.planner.plan_step([("a", 0, end)], forward=True, states=states)
    (order,) = plan.push.orders
    assert order.last
    assert {part.group: part.sources for part in order.pages} == {0: (1, 2, 3, 4, 5, 6), 1: (9,)}
    assert bool(plan.saves) is saves
