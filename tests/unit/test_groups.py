"""Models with several kinds of cache: a hit ends where every group has what it needs, each group
loads no more than that, and a state is kept only where it really stands.
"""

from __future__ import annotations

import pytest
from driven_planner import BLOCK, CHUNK, Engine, View, blocks_of, pages_of, prompt

from lamina_kv.control.requests import BoundaryState
from lamina_kv.control.shape import ChunkShape
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.plan import ChunkKey, LoadOrder, Outcome, SaveOrder, StepPlan

NONE = 0
FULL, WINDOW, STATE, IN_PLACE = (
    Group(GroupKind.FULL, BLOCK),
    Group(GroupKind.WINDOW, BLOCK, window=CHUNK + 1),
    Group(GroupKind.STATE, CHUNK),
    Group(GroupKind.STATE, CHUNK, in_place=True),
)
CHUNKS = 4
TOKENS = prompt(CHUNKS * CHUNK + 8)
ROOM = 100


def view(name: str, tokens: list[int] = TOKENS, **tables: list[int]) -> View:
    """A request whose blocks of group *g* are numbered from ``ROOM * (g + 1)``."""
    blocks = len(tokens) // BLOCK + 1
    found = {g: list(range(ROOM * (g + 1), ROOM * (g + 1) + blocks)) for g in range(3)}
    found |= {int(group.removeprefix("g")): table for group, table in tables.items()}
    return View(name, tokens, tables=found)


def engine_of(*groups: Group) -> Engine:
    return Engine(shape=ChunkShape(CHUNK, groups, NONE))


def compute(
    engine: Engine, request: View, *states: tuple[int, int, int], computed: int | None = None
) -> StepPlan:
    """Compute a request in one step, in which vLLM hands over ``states`` (group, block, end)."""
    name = request.request_id
    engine.planner.lookup(request, 0)
    engine.planner.admitted(name, 0)
    plan = engine.planner.plan_step(
        [(name, 0, len(request.token_ids) if computed is None else computed)],
        forward=True,
        states=[BoundaryState(name, *state) for state in states],
    )
    engine.answer(*(order.transfer for order in plan.saves))
    return plan


def load(engine: Engine, request: View, floor: int = 0) -> tuple[int, LoadOrder | None]:
    """Tokens hit beyond ``floor``, and what is loaded for them."""
    offer = engine.lookup(request, floor)
    engine.planner.admitted(request.request_id, offer.tokens)
    loads = engine.step().loads
    return offer.tokens, loads[0] if loads else None


def blocks(order: LoadOrder | None, group: int) -> list[int]:
    """Engine blocks of one group that are loaded."""
    return [] if order is None else blocks_of(order, group)


def key(engine: Engine, request_id: str, group: int, index: int) -> ChunkKey:
    """Of a request's chunk."""
    return engine.planner._requests[request_id].known_keys()[group][index]


def drop(engine: Engine, group: int, index: int) -> None:
    """Near loses a chunk of the first request."""
    assert engine.near.drop(key(engine, "a", group, index)) is not None


def test_every_group_saves_its_own_blocks_under_its_own_keys() -> None:
    engine = engine_of(FULL, WINDOW)
    plan = compute(engine, view("a"))
    assert len(plan.saves) == len(engine.near.visible) == 2 * CHUNKS
    for group in (0, 1):
        assert {engine.near.slot(key(engine, "a", group, index)) for index in range(CHUNKS)} == {
            order.slot for order in plan.saves if order.group == group
        }
        saved = [block for o in plan.saves if o.group == group for block in o.blocks]
        first = ROOM * (group + 1)
        assert saved == list(range(first, first + CHUNKS * CHUNK // BLOCK))


def test_a_window_needs_only_its_end() -> None:
    engine = engine_of(FULL, WINDOW)
    compute(engine, view("a"))
    drop(engine, 1, 0)
    drop(engine, 1, 1)
    tokens, order = load(engine, view("b"))
    assert tokens == CHUNKS * CHUNK
    assert len(blocks(order, 0)) == CHUNKS * CHUNK // BLOCK
    # 33 tokens look back 32 from the next one: one chunk.
    assert blocks(order, 1) == [206, 207]


def test_a_hit_ends_where_the_window_before_it_is_whole() -> None:
    engine = engine_of(FULL, WINDOW)
    compute(engine, view("a"))
    drop(engine, 1, CHUNKS - 1)
    assert load(engine, view("b"))[0] == (CHUNKS - 1) * CHUNK


def test_what_the_engine_has_of_a_window_is_not_loaded_again() -> None:
    engine = engine_of(FULL, Group(GroupKind.WINDOW, BLOCK, window=2 * CHUNK))
    compute(engine, view("a"))
    tokens, order = load(engine, view("b"), floor=3 * CHUNK)
    assert tokens == CHUNK
    assert (blocks(order, 0), blocks(order, 1)) == ([106, 107], [206, 207])


def test_blocks_that_a_request_has_not_are_not_filled() -> None:
    """A window may begin in the middle of a chunk."""
    engine = engine_of(FULL, Group(GroupKind.WINDOW, BLOCK, window=BLOCK + CHUNK))
    compute(engine, view("a"))
    table = [NONE] * 5 + [205, 206, 207, 208]
    _, order = load(engine, view("b", g1=table))
    assert order is not None
    assert [pages[1:] for pages in pages_of(order, 1)] == [(1, 205), (0, 206), (1, 207)]


def test_a_window_without_full_attention_beside_it() -> None:
    engine = engine_of(WINDOW)
    compute(engine, view("a"))
    for index in range(CHUNKS - 1):
        drop(engine, 0, index)
    assert load(engine, view("b"))[0] == CHUNKS * CHUNK


def test_what_has_left_the_window_before_there_was_room_is_not_saved() -> None:
    plan = compute(engine_of(FULL, WINDOW), view("a", g1=[NONE] * 4 + list(range(204, 209))))
    saved = [order.blocks for order in plan.saves if order.group == 1]
    assert saved == [(204, 205), (206, 207)]


# -- states --------------------------------------------------------------------------------------


def test_a_hit_ends_at_a_boundary_that_has_a_state() -> None:
    engine = engine_of(FULL, STATE)
    plan = compute(engine, view("a"), (1, 250, 2 * CHUNK))
    assert [order.blocks for order in plan.saves if order.group == 1] == [(250,)]
    tokens, order = load(engine, view("b", g1=[301, 302]))
    assert tokens == 2 * CHUNK
    assert blocks(order, 1) == [301, 302], "the kept one and the running one"
    assert order is not None
    slot = engine.near.slot(key(engine, "b", 1, 1))
    assert [pages[:2] for pages in pages_of(order, 1)] == [(slot, 0), (slot, 0)]


def test_without_a_state_there_is_no_hit() -> None:
    engine = engine_of(FULL, STATE)
    compute(engine, view("a"))
    assert load(engine, view("b")) == (0, None)


def test_one_state_is_loaded_and_it_is_the_last() -> None:
    engine = engine_of(FULL, STATE)
    plan = compute(engine, view("a"), *((1, 250 + i, (i + 1) * CHUNK) for i in range(CHUNKS)))
    states = [order for order in plan.saves if order.group == 1]
    _, order = load(engine, view("b", g1=[300]))
    assert order is not None
    assert pages_of(order, 1) == [(states[-1].slot, 0, 300)]


def test_the_hit_is_cut_before_it_is_looked_for() -> None:
    """The state behind the last token knows the token that must be computed again."""
    engine = engine_of(FULL, STATE)
    whole = TOKENS[: 3 * CHUNK]
    compute(engine, view("a", whole), *((1, 250 + i, (i + 1) * CHUNK) for i in range(3)))
    assert load(engine, view("b", whole, g1=[300]))[0] == 2 * CHUNK


@pytest.mark.parametrize("end", [CHUNK - 1, CHUNK + BLOCK, 2 * CHUNK + 1])
def test_a_state_off_a_boundary_is_not_kept(end: int) -> None:
    plan = compute(engine_of(FULL, STATE), view("a"), (1, 250, end))
    assert not [order for order in plan.saves if order.group == 1]


def test_a_state_of_tokens_that_are_not_confirmed_is_not_kept() -> None:
    """Drafts run ahead of what is known."""
    request = view("a", TOKENS[: 2 * CHUNK - 1])
    plan = compute(engine_of(FULL, STATE), request, (1, 250, 2 * CHUNK), computed=2 * CHUNK)
    assert not [order for order in plan.saves if order.group == 1]


def test_a_state_is_read_under_a_lease() -> None:
    engine = engine_of(FULL, STATE)
    request = view("a")
    engine.planner.lookup(request, 0)
    engine.planner.admitted("a", 0)
    plan = engine.planner.plan_step(
        [("a", 0, CHUNK)], forward=True, states=[BoundaryState("a", 1, 250, CHUNK)]
    )
    assert 250 in engine.pool.held
    engine.answer(*(order.transfer for order in plan.saves))
    assert not engine.pool.held


def test_a_longer_hit_is_found_when_its_state_arrives() -> None:
    engine = engine_of(FULL, STATE)
    compute(engine, view("a"), (1, 250, CHUNK))
    waiting = view("w", g1=[300])
    assert engine.planner.lookup(waiting, 0).tokens == CHUNK
    compute(engine, view("c"), (1, 251, 3 * CHUNK))
    assert engine.planner.lookup(waiting, 0).tokens == 3 * CHUNK


def test_a_state_is_kept_once_its_last_token_is_known() -> None:
    """An engine that plans a step ahead does not know it yet. The block is not written again."""
    engine = engine_of(FULL, STATE)
    request = view("a", TOKENS[: 2 * CHUNK - 1])
    plan = compute(engine, request, (1, 250, 2 * CHUNK), computed=2 * CHUNK)
    assert not [order for order in plan.saves if order.group == 1]
    assert 250 in engine.pool.held
    request.token_ids = TOKENS[: 2 * CHUNK]
    (state,) = (o for o in engine.step(("a", 2 * CHUNK + 1)).saves if o.group == 1)
    assert state.blocks == (250,)
    engine.answer(state.transfer)
    assert 250 not in engine.pool.held


@pytest.mark.parametrize("how", ["aborted", "preempted", "reset"])
def test_a_state_whose_last_token_is_never_known_is_let_go(how: str) -> None:
    engine = engine_of(FULL, STATE)
    request = view("a", TOKENS[: 2 * CHUNK - 1])
    plan = compute(engine, request, (1, 250, 2 * CHUNK), computed=2 * CHUNK)
    if how == "aborted":
        engine.planner.finished("a", 0, [[], []])
    elif how == "preempted":
        engine.planner.lookup(request, 0)
    else:
        engine.planner.reset()
    engine.step()
    assert 250 not in engine.pool.held
    assert plan.saves


# -- states in place -----------------------------------------------------------------------------


def states_of(plan: StepPlan) -> list[SaveOrder]:
    return [order for order in plan.saves if order.group == 1]


def test_a_state_in_place_is_saved_before_the_next_step() -> None:
    engine = engine_of(FULL, IN_PLACE)
    plan = compute(engine, view("a"), (1, 250, 2 * CHUNK), computed=2 * CHUNK)
    assert plan.saves
    assert not states_of(plan), "its step has not run"
    assert 250 in engine.pool.held
    plan = engine.step(("a", 3 * CHUNK))
    (state,) = states_of(plan)
    assert (state.blocks, state.overwritten) == ((250,), True)
    assert not any(order.overwritten for order in plan.saves if order.group == 0)
    engine.answer(state.transfer)
    assert 250 not in engine.pool.held
    assert not states_of(engine.step(("a", 3 * CHUNK + 1)))
    engine.planner.finished("a", 0, [[], []])
    tokens, order = load(engine, view("b", g1=[300]))
    assert tokens == 2 * CHUNK
    assert blocks(order, 1) == [300]


def test_a_state_in_place_is_lost_with_the_next_step() -> None:
    """Its last token is not known when its only chance to be read comes."""
    engine = engine_of(FULL, IN_PLACE)
    request = view("a", TOKENS[: 2 * CHUNK - 1])
    compute(engine, request, (1, 250, 2 * CHUNK), computed=2 * CHUNK)
    assert not states_of(engine.step(("a", 2 * CHUNK + 1)))
    assert 250 not in engine.pool.held
    request.token_ids = TOKENS
    assert not states_of(engine.step(("a", 2 * CHUNK + 2)))


def test_a_state_in_place_is_saved_once_its_last_token_is_known() -> None:
    """An engine that plans a step ahead knows it when the next one is planned."""
    engine = engine_of(FULL, IN_PLACE)
    request = view("a", TOKENS[: 2 * CHUNK - 1])
    compute(engine, request, (1, 250, 2 * CHUNK), computed=2 * CHUNK)
    request.token_ids = TOKENS[: 2 * CHUNK]
    (state,) = states_of(engine.step(("a", 2 * CHUNK + 1)))
    assert state.blocks == (250,)


def test_a_state_in_place_is_not_lost_when_another_request_ends() -> None:
    """An engine that plans a step ahead says one request's tokens after another."""
    engine = engine_of(FULL, IN_PLACE)
    compute(engine, view("b", prompt(CHUNK + 3, 1)))
    request = view("a", TOKENS[: 2 * CHUNK - 1])
    compute(engine, request, (1, 250, 2 * CHUNK), computed=2 * CHUNK)
    engine.planner.finished("b", CHUNK + 3, [[], []])
    request.token_ids = TOKENS[: 2 * CHUNK]
    (state,) = states_of(engine.step(("a", 2 * CHUNK + 1)))
    assert state.blocks == (250,)


@pytest.mark.parametrize("end", [CHUNK - 1, CHUNK + BLOCK, 2 * CHUNK + 1])
def test_a_state_in_place_off_a_boundary_is_not_kept(end: int) -> None:
    engine = engine_of(FULL, IN_PLACE)
    compute(engine, view("a"), (1, 250, end), computed=end)
    assert 250 not in engine.pool.held
    assert not states_of(engine.step(("a", end + 1)))


def test_the_state_in_place_of_a_request_that_ends_on_it_is_saved() -> None:
    engine = engine_of(FULL, IN_PLACE)
    compute(engine, view("a"), (1, 250, 2 * CHUNK), computed=2 * CHUNK)
    engine.planner.finished("a", 2 * CHUNK, [[], []])
    assert engine.planner.has_work
    assert 250 in engine.pool.held, "the engine frees it now"
    (state,) = states_of(engine.step())
    assert (state.blocks, state.overwritten) == ((250,), True)


@pytest.mark.parametrize("how", ["preempted", "reset", "distrusted"])
def test_a_state_in_place_that_is_worth_nothing_is_let_go(how: str) -> None:
    engine = engine_of(FULL, IN_PLACE)
    request = view("a")
    compute(engine, request, (1, 250, 2 * CHUNK), computed=2 * CHUNK)
    engine.spoil(request, how)
    assert not states_of(engine.step())
    assert 250 not in engine.pool.held


def test_groups_with_blocks_of_different_sizes_are_loaded_to_the_same_token() -> None:
    engine = Engine(
        shape=ChunkShape(CHUNK, (FULL, Group(GroupKind.FULL, CHUNK)), NONE), near_slots=100
    )
    wide = [*range(200, 200 + CHUNKS + 1)]
    compute(engine, view("a", g1=wide))
    whole = TOKENS[: 3 * CHUNK]  # a whole hit is cut by a block, of which size there are two
    tokens, order = load(engine, view("b", whole, g1=wide))
    assert tokens == 2 * CHUNK
    assert len(blocks(order, 0)) * BLOCK == len(blocks(order, 1)) * CHUNK == tokens


def test_a_full_tier_gives_up_the_end_of_a_prefix_first_in_all_groups() -> None:
    engine = Engine(shape=ChunkShape(CHUNK, (FULL, WINDOW), NONE), near_slots=2 * CHUNKS)
    request = view("a")
    compute(engine, request)
    engine.planner.finished("a", 0, [[], []])
    compute(engine, view("other", prompt(2 * CHUNK + 1, seed=7)))
    assert engine.planner.lookup(view("b"), 0).tokens == 2 * CHUNK


class Counting(dict[ChunkKey, int]):
    """Counts looks."""

    looks = 0

    def __contains__(self, key: object) -> bool:
        self.looks += 1
        return super().__contains__(key)


def test_a_long_prompt_is_looked_up_once_though_nothing_sparse_is_there() -> None:
    """One step back for each chunk, not one search for each step back."""
    engine = Engine(shape=ChunkShape(CHUNK, (FULL, STATE), NONE), near_slots=500)
    tokens = prompt(400 * CHUNK + 1)
    compute(engine, view("a", tokens))
    visible = Counting(engine.near.visible)
    engine.near._visible = visible
    assert engine.planner.lookup(view("b", tokens), 0).tokens == 0
    assert 400 <= visible.looks < 4 * 400


# -- far -----------------------------------------------------------------------------------------


def far_engine(*groups: Group, near_slots: int = 100) -> Engine:
    """An engine that has computed request "a" and saved it; near has lost all of it."""
    settings = {"load": {"when": "always"}}
    shape = ChunkShape(CHUNK, groups, NONE)
    engine = Engine(settings, shape=shape, near_slots=100, far_slots=100)
    states = [(1, 250 + i, (i + 1) * CHUNK) for i in range(CHUNKS)] if STATE in groups else []
    compute(engine, view("a"), *states)
    engine.write_all()
    if near_slots < 100:
        # As a new process with less memory finds it.
        stored = {slot: key for key, slot in engine.far.visible.items()}  # type: ignore[attr-defined]
        engine = Engine(settings, shape=shape, near_slots=near_slots, far_slots=100, stored=stored)
    engine.forget_near()
    return engine


@pytest.mark.parametrize("sparse", [WINDOW, STATE, Group(GroupKind.WINDOW, BLOCK, 2 * CHUNK)])
def test_no_more_of_a_group_comes_near_than_is_needed(sparse: Group) -> None:
    engine = far_engine(FULL, sparse)
    request = view("b", g1=[300] if sparse is STATE else list(range(200, 209)))
    assert engine.planner.lookup(request, 0).ask_again
    moved = engine.settle_moves().tiers[0].inward
    assert len(moved) == CHUNKS + (2 if sparse.window == 2 * CHUNK else 1)
    tokens, order = load(engine, request)
    assert tokens == CHUNKS * CHUNK
    assert len(blocks(order, 0)) == CHUNKS * CHUNK // BLOCK


@pytest.mark.parametrize("sparse", [WINDOW, STATE])
def test_what_is_only_needed_at_the_end_comes_near_though_all_else_is_there(
    sparse: Group,
) -> None:
    engine = far_engine(FULL, sparse)
    request = view("b", g1=[300] if sparse is STATE else list(range(200, 209)))
    tokens, order = load(engine, request)
    assert order is not None
    assert tokens == CHUNKS * CHUNK
    engine.answer(order.transfer)
    assert engine.near.drop(key(engine, "a", 1, CHUNKS - 1)) is not None
    again = view("c", g1=request.tables[1])
    assert engine.planner.lookup(again, 0).ask_again
    (move,) = engine.settle_moves().tiers[0].inward
    assert move.key == key(engine, "a", 1, CHUNKS - 1)
    assert load(engine, again)[0] == CHUNKS * CHUNK


@pytest.mark.parametrize("sparse", [WINDOW, STATE])
def test_a_hit_ends_at_a_boundary_that_has_come_near(sparse: Group) -> None:
    engine = far_engine(FULL, sparse)
    request = view("b", g1=[300] if sparse is STATE else list(range(200, 209)))
    assert engine.planner.lookup(request, 0).ask_again
    *others, last = engine.step().tiers[0].inward
    assert last.key == key(engine, "a", 1, CHUNKS - 1)
    engine.answer(*(move.transfer for move in others))
    engine.answer(last.transfer, outcome=Outcome.FAILED)
    tokens, order = load(engine, request)
    assert (tokens, order) == (0, None), "of no earlier boundary anything came near"


@pytest.mark.parametrize("sparse", [WINDOW, STATE])
def test_a_hit_larger_than_its_share_of_near_ends_at_an_earlier_boundary(sparse: Group) -> None:
    """Three slots: two chunks, and what is needed behind them."""
    engine = far_engine(FULL, sparse, near_slots=3)
    request = view("b", g1=[300] if sparse is STATE else list(range(200, 209)))
    tokens, order = load(engine, request)
    assert tokens == 2 * CHUNK
    assert len(blocks(order, 0)) == 2 * CHUNK // BLOCK
