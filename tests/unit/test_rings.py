"""Windows in place: a request has a ring of blocks for one, in which its own next steps overwrite
what has left the window. What is saved of it is what a step leaves whole, before the next one.
"""

from __future__ import annotations

import pytest
from driven_planner import BLOCK, CHUNK, Engine, View, outward, prompt

from lamina_kv.control.shape import ChunkShape
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.plan import SaveOrder, StepPlan

WINDOW = 2 * CHUNK
FULL = Group(GroupKind.FULL, BLOCK)
RING = Group(GroupKind.WINDOW, BLOCK, WINDOW, in_place=True)
TOKENS = prompt(4 * CHUNK + 8)


def engine_of(*groups: Group, far_slots: int = 0) -> Engine:
    return Engine(
        {"load": {"when": "always"}},
        shape=ChunkShape(CHUNK, groups, 0),
        far_slots=far_slots,
        leases_loads=True,
    )


def view(name: str, tokens: list[int] = TOKENS, first: int = 200) -> View:
    """A request whose ring begins with block ``first``."""
    count, ring = len(tokens) // BLOCK + 1, WINDOW // BLOCK
    tables = {0: list(range(100, 100 + count)), 1: [first + i % ring for i in range(count)]}
    return View(name, tokens, tables=tables)


def admit(engine: Engine, request: View) -> int:
    tokens = engine.lookup(request).tokens
    engine.planner.admitted(request.request_id, tokens)
    return tokens


def step(engine: Engine, name: str, start: int, end: int) -> StepPlan:
    plan = engine.planner.plan_step([(name, start, end)], forward=True)
    engine.answer(*(order.transfer for order in plan.saves))
    return plan


def rings(plan: StepPlan) -> list[SaveOrder]:
    return [order for order in plan.saves if order.group == 1]


def compute(engine: Engine, request: View, *ends: int) -> list[SaveOrder]:
    """Compute a request in steps with these ends, and end it; what is saved of its ring."""
    admit(engine, request)
    name, start, saved = request.request_id, 0, []
    for end in ends:
        saved += rings(step(engine, name, start, end))
        start = end
    engine.planner.finished(name, start, [request.blocks(0), request.blocks(1)])
    last = engine.step()
    engine.answer(*(order.transfer for order in (*last.saves, *outward(last))))
    return saved + rings(last)


def load(engine: Engine, request: View) -> tuple[int, list[tuple[int, tuple[int, ...]]]]:
    """Tokens hit, and for each chunk that is loaded into the ring for them its near slot and its
    blocks."""
    tokens = admit(engine, request)
    chunks: dict[int, tuple[int, ...]] = {}
    for order in engine.step().loads:
        for pages in order.pages:
            if pages.group == 1:
                for near, block in zip(pages.near.tolist(), pages.blocks.tolist(), strict=True):
                    slot = near // (CHUNK // BLOCK)
                    chunks[slot] = (*chunks.get(slot, ()), block)
    return tokens, list(chunks.items())


def test_what_a_step_completes_is_saved_before_the_next() -> None:
    engine = engine_of(FULL, RING)
    admit(engine, view("a"))
    plan = step(engine, "a", 0, 2 * CHUNK)
    assert plan.saves
    assert not rings(plan), "its step has not run"
    assert engine.pool.held >= {200, 201, 202, 203}
    plan = step(engine, "a", 2 * CHUNK, 2 * CHUNK + 1)
    assert [order.blocks for order in rings(plan)] == [(200, 201), (202, 203)]
    assert all(order.overwritten for order in rings(plan))
    assert not any(order.overwritten for order in plan.saves if order.group == 0)
    assert not engine.pool.held
    assert not rings(step(engine, "a", 2 * CHUNK + 1, 2 * CHUNK + 2))


def test_what_a_step_has_overwritten_is_not_saved() -> None:
    """136 tokens in one step: the ring has the last 64, of chunks 96..128 and parts of others."""
    (saved,) = compute(engine_of(FULL, RING), view("a"), len(TOKENS))
    assert saved.blocks == (202, 203)


@pytest.mark.parametrize("more", [1, BLOCK, CHUNK])
def test_steps_that_do_not_reach_round_the_ring_lose_nothing(more: int) -> None:
    ends = [*range(more, len(TOKENS), more), len(TOKENS)]
    saved = compute(engine_of(FULL, RING), view("a"), *ends)
    assert [order.blocks for order in saved] == 2 * [(200, 201), (202, 203)]
    assert len({order.slot for order in saved}) == 4


@pytest.mark.parametrize("how", ["preempted", "reset", "distrusted"])
def test_what_is_worth_nothing_is_let_go(how: str) -> None:
    engine = engine_of(FULL, RING)
    request = view("a")
    admit(engine, request)
    step(engine, "a", 0, 2 * CHUNK)
    engine.spoil(request, how)
    assert not rings(engine.step())
    assert not engine.pool.held


def test_what_was_computed_before_a_reset_is_not_saved_after_it() -> None:
    engine = engine_of(FULL, RING)
    admit(engine, view("a"))
    engine.planner.reset()
    step(engine, "a", 0, CHUNK)
    assert not rings(step(engine, "a", CHUNK, CHUNK + 1))
    assert not engine.pool.held


@pytest.mark.parametrize("groups", [(FULL, RING), (RING, RING)], ids=["mixed", "alone"])
@pytest.mark.parametrize(
    ("end", "targets"),
    [
        (CHUNK, [(300, 301)]),
        (2 * CHUNK, [(300, 301), (302, 303)]),
        (3 * CHUNK, [(302, 303), (300, 301)]),
        (4 * CHUNK, [(300, 301), (302, 303)]),
    ],
)
def test_a_hit_fills_the_ring(
    groups: tuple[Group, ...], end: int, targets: list[tuple[int, ...]]
) -> None:
    """Each token goes to its place in the ring, also before that is full."""
    engine = engine_of(*groups)
    saved = compute(engine, view("a"), *range(CHUNK, len(TOKENS), CHUNK), len(TOKENS))
    tokens, chunks = load(engine, view("b", TOKENS[: end + 1], first=300))
    assert tokens == end
    slots = [order.slot for order in saved][end // CHUNK - len(targets) : end // CHUNK]
    assert chunks == list(zip(slots, targets, strict=True))


def test_a_hit_ends_where_the_whole_window_before_it_is_kept() -> None:
    engine = engine_of(FULL, RING)
    compute(engine, view("a"), 3 * CHUNK, len(TOKENS))  # of the first step chunk 0 is overwritten
    assert load(engine, view("b"))[0] == 4 * CHUNK
    other = TOKENS[: 2 * CHUNK + 8]
    assert load(engine, view("c", other))[0] == 0


def test_two_requests_with_the_same_prefix_save_it_once() -> None:
    engine = engine_of(FULL, RING)
    for name, first in (("a", 200), ("b", 300)):
        admit(engine, view(name, first=first))
    both = [("a", 0, CHUNK), ("b", 0, CHUNK)]
    plan = engine.planner.plan_step(both, forward=True)
    engine.answer(*(order.transfer for order in plan.saves))
    saved = rings(step(engine, "a", CHUNK, CHUNK + 1))
    assert [order.blocks for order in saved] == [(200, 201)]
    assert not engine.pool.held


def test_what_comes_from_a_far_tier_is_near_and_not_saved_again() -> None:
    engine = engine_of(FULL, RING, far_slots=100)
    compute(engine, view("a"), *range(CHUNK, len(TOKENS), CHUNK), len(TOKENS))
    engine.write_all()
    engine.forget_near()
    tokens, chunks = load(engine, view("b", first=300))
    assert (tokens, [blocks for _, blocks in chunks]) == (4 * CHUNK, [(300, 301), (302, 303)])
    assert not step(engine, "b", 4 * CHUNK, 4 * CHUNK + 1).saves
    assert not step(engine, "b", 4 * CHUNK + 1, 4 * CHUNK + 2).saves


def test_what_a_step_that_failed_was_to_complete_is_not_saved() -> None:
    engine, request = engine_of(FULL, RING), view("a")
    admit(engine, request)
    engine.planner.plan_step([("a", 0, 2 * CHUNK)], forward=True)
    engine.planner.finished("a", 0, [])
    assert not engine.planner.plan_step([], forward=False).saves
    assert engine.pool.held == {100, 101, 102, 103}, "of the step itself, which is yet to be ended"
