"""The hand-off between an engine's own scheduler and its loads: every rule of it, every invariant
and every bug of ATOM's that could come back here, each as a history.

``i1`` to ``i14`` are ATOM's invariants, letters and numbers its bugs. The same rules under random
histories are in ``tests/property/test_histories.py``.
"""

from __future__ import annotations

import pytest
from driven_planner import (
    BLOCK,
    CHUNK,
    CHUNK_BYTES,
    Engine,
    View,
    blocks_of,
    inward,
    keys_of,
    prompt,
)

from lamina_kv.engines.hand_off import Admission, HandOff, HandOffError, Phase, Resumption
from lamina_kv.plan import NEAR, LoadMode, LoadOrder, Move, Outcome

CHUNKS = 3
TOKENS = prompt(CHUNKS * CHUNK + 8)
HIT = CHUNKS * CHUNK


class Scheduler:
    """A hand-off whose engine has, near or far, the whole chunks of :data:`TOKENS`."""

    def __init__(
        self,
        extra: dict[str, object] | None = None,
        *,
        ranks: int = 1,
        boundary: int = BLOCK,
        limit: int = 8,
        mode: str = "parked",
        far: bool = False,
    ) -> None:
        load = {"mode": mode, **(extra or {})}
        stored = dict(enumerate(keys_of(TOKENS)))
        slots = {"far_slots": 8, "stored": stored} if far else {}
        self.engine = Engine({"load": load}, ranks=ranks, leases_loads=True, **slots)  # type: ignore[arg-type]
        if not far:
            self.engine.save(View("first", TOKENS))
        self.planner = self.engine.planner
        self.hand_off = HandOff(self.planner, boundary=boundary, limit=limit)

    def park(self, view: View, floor: int = 0) -> LoadOrder:
        """Admit a request that is parked; returns the order that the next plan has for it."""
        assert self.hand_off.admit(view, floor).phase is Phase.PARKED
        orders = self.hand_off.plan([], forward=False).loads
        return next(order for order in orders if order.request_id == view.request_id)

    def answer(self, order: LoadOrder, *ranks: int, outcome: Outcome = Outcome.DONE) -> None:
        """Ranks say what has become of a load; all of them if none is named."""
        engine = self.engine
        planner, engine.planner = engine.planner, self.hand_off  # type: ignore[assignment]
        engine.answer(order.transfer, outcome=outcome, ranks=ranks or None)
        engine.planner = planner

    @property
    def leases(self) -> int:
        return self.engine.leases


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


# -- the decision --------------------------------------------------------------------------------


def test_a_look_promises_what_an_admission_takes_and_leases_nothing(scheduler: Scheduler) -> None:
    view = View("a", TOKENS)
    assert scheduler.hand_off.look(view, 0) == HIT
    assert scheduler.leases == 0
    assert scheduler.hand_off.phase("a") is Phase.WAITING
    assert scheduler.hand_off.admit(view, 0) == Admission(Phase.PARKED, HIT)


def test_the_decision_is_made_with_the_floor_of_the_allocation(scheduler: Scheduler) -> None:
    """i1 and atom 1026: there, a floor of 0 from the lookup overwrote blocks that were found."""
    view = View("a", TOKENS)
    assert scheduler.hand_off.look(view, 0) == HIT
    order = scheduler.park(view, floor=CHUNK + BLOCK)
    first = view.first_block + (CHUNK + BLOCK) // BLOCK
    assert blocks_of(order) == list(range(first, view.first_block + HIT // BLOCK))


def test_nothing_to_gain_is_not_loaded(scheduler: Scheduler) -> None:
    assert scheduler.hand_off.admit(View("a", TOKENS), HIT) == Admission(Phase.RUNNING, HIT)
    assert scheduler.hand_off.plan([("a", HIT, len(TOKENS))], forward=True).loads == ()


def test_less_than_the_minimum_is_not_loaded() -> None:
    scheduler = Scheduler({"min_tokens": HIT})
    assert scheduler.hand_off.admit(View("a", TOKENS), BLOCK) == Admission(Phase.RUNNING, BLOCK)
    assert scheduler.hand_off.admit(View("b", TOKENS), 0).phase is Phase.PARKED


def test_what_is_slower_than_computing_is_not_loaded(scheduler: Scheduler) -> None:
    costs = scheduler.planner.costs
    costs.computed(0, 1000, 0.001)
    costs.loaded(NEAR, CHUNK_BYTES, 60.0)
    assert scheduler.hand_off.look(View("a", TOKENS), 0) == 0
    assert scheduler.hand_off.admit(View("a", TOKENS), 0) == Admission(Phase.RUNNING, 0)


def test_what_the_engine_declines_is_computed(scheduler: Scheduler) -> None:
    admission = scheduler.hand_off.admit(View("a", TOKENS), 0, declined="half_of_its_blocks")
    assert admission == Admission(Phase.RUNNING, 0)


def test_a_fully_kept_prompt_still_computes_its_last_token(scheduler: Scheduler) -> None:
    """Bug i: there, such a hit moved all of its bytes and then always failed."""
    view = View("a", TOKENS[:HIT])
    assert scheduler.hand_off.admit(view, 0) == Admission(Phase.PARKED, HIT - BLOCK)
    one_more = View("b", TOKENS[: HIT + 1])
    assert scheduler.hand_off.admit(one_more, 0) == Admission(Phase.PARKED, HIT)


# -- far -----------------------------------------------------------------------------------------


def test_a_look_says_wait_until_what_is_far_has_come_near() -> None:
    scheduler = Scheduler(far=True)
    hand_off, view = scheduler.hand_off, View("a", TOKENS)
    assert hand_off.look(view, 0) is None
    scheduler.engine.settle_moves()
    assert hand_off.look(view, 0) == HIT
    assert hand_off.admit(view, 0) == Admission(Phase.PARKED, HIT)


@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize("boundary", [BLOCK, CHUNK])
def test_an_admission_never_waits(looked: bool, boundary: int) -> None:
    """It has blocks: what is far is computed."""
    scheduler = Scheduler(far=True, boundary=boundary)
    hand_off, view = scheduler.hand_off, View("a", TOKENS)
    moves: tuple[Move, ...] = ()
    if looked:
        assert hand_off.look(view, 0) is None
        moves = inward(scheduler.engine.step())
        assert moves
    assert hand_off.admit(view, BLOCK if boundary == CHUNK else 0).phase is Phase.RUNNING
    assert hand_off.plan([], forward=False).loads == ()
    hand_off.finished("a", 0)
    scheduler.engine.answer(*(move.transfer for move in moves))
    assert scheduler.leases == 0
    assert not hand_off.has_work


@pytest.mark.parametrize("looked", [False, True])
def test_an_admission_takes_what_is_near(looked: bool) -> None:
    scheduler = Scheduler(far=True)
    hand_off, near, view = scheduler.hand_off, scheduler.engine.near, View("a", TOKENS)
    first = keys_of(TOKENS)[0]
    near.room(first)
    near.filled(first)
    if looked:
        assert hand_off.look(view, 0) is None
    assert hand_off.admit(view, 0) == Admission(Phase.PARKED, CHUNK)
    (order,) = hand_off.plan([], forward=False).loads
    scheduler.answer(order)
    assert hand_off.take_ready() == [Resumption("a", CHUNK, 0)]
    assert scheduler.leases == 0


# -- boundaries ----------------------------------------------------------------------------------


def test_an_engine_that_loads_from_larger_boundaries_computes_to_the_next_one_first() -> None:
    """i2, atom's hand-off: the chunk that is cut there must end exactly at the boundary."""
    scheduler = Scheduler(boundary=CHUNK)
    hand_off, view = scheduler.hand_off, View("a", TOKENS)
    assert hand_off.admit(view, BLOCK) == Admission(Phase.RUNNING, BLOCK, until=CHUNK)
    assert hand_off.plan([("a", BLOCK, CHUNK)], forward=True).loads == ()
    assert hand_off.reached("a") == Admission(Phase.PARKED, HIT)
    (order,) = hand_off.plan([], forward=False).loads
    first = view.first_block + CHUNK // BLOCK
    assert blocks_of(order) == list(range(first, view.first_block + HIT // BLOCK))
    scheduler.answer(order)
    assert hand_off.take_ready() == [Resumption("a", HIT, CHUNK)]


def test_at_the_boundary_it_is_decided_again(scheduler: Scheduler) -> None:
    scheduler = Scheduler(boundary=CHUNK)
    hand_off = scheduler.hand_off
    assert hand_off.admit(View("a", TOKENS), BLOCK).until == CHUNK
    hand_off.plan([("a", BLOCK, CHUNK)], forward=True)
    hand_off.reset()
    assert hand_off.reached("a") == Admission(Phase.RUNNING, CHUNK)
    plan = hand_off.plan([("a", CHUNK, len(TOKENS))], forward=True)
    assert plan.loads == ()
    assert plan.saves == (), "other weights may have computed what it has up to the boundary"


def test_who_is_preempted_before_the_boundary_is_saved_like_anybody_then() -> None:
    scheduler = Scheduler(boundary=CHUNK)
    hand_off, view = scheduler.hand_off, View("a", TOKENS)
    assert hand_off.admit(view, BLOCK).until == CHUNK
    hand_off.plan([("a", BLOCK, CHUNK)], forward=True)
    hand_off.reset()
    hand_off.preempted("a")
    assert hand_off.admit(view, 0) == Admission(Phase.RUNNING, 0)
    assert len(hand_off.plan([("a", 0, len(TOKENS))], forward=True).saves) == CHUNKS


def test_any_floor_is_accepted(scheduler: Scheduler) -> None:
    hand_off = scheduler.hand_off
    assert hand_off.admit(View("a", TOKENS), 5) == Admission(Phase.RUNNING, 5, until=BLOCK)
    assert hand_off.admit(View("b", TOKENS), HIT + 1) == Admission(Phase.RUNNING, HIT + 1)
    assert hand_off.admit(View("c", TOKENS[:20]), 17) == Admission(Phase.RUNNING, 17)


def test_nobody_computes_past_the_boundary_nor_asks_for_one_that_was_not_set() -> None:
    scheduler = Scheduler(boundary=CHUNK)
    scheduler.hand_off.admit(View("a", TOKENS), BLOCK)
    with pytest.raises(HandOffError, match="a load begins at 32"):
        scheduler.hand_off.plan([("a", BLOCK, CHUNK + 1)], forward=True)
    with pytest.raises(HandOffError, match="was not told to stop"):
        scheduler.hand_off.reached("b")


# -- parked --------------------------------------------------------------------------------------


def test_a_parked_request_does_not_run(scheduler: Scheduler) -> None:
    scheduler.park(View("a", TOKENS))
    with pytest.raises(HandOffError, match="is scheduled, but it is parked"):
        scheduler.hand_off.plan([("a", HIT, HIT + 8)], forward=True)


def test_a_request_has_one_match_and_one_allocation(scheduler: Scheduler) -> None:
    """i3: there, a resumed request could be matched and allocated anew."""
    view = View("a", TOKENS)
    order = scheduler.park(view)
    for again in (scheduler.hand_off.look, scheduler.hand_off.admit):
        with pytest.raises(HandOffError, match="parked and has its blocks"):
            again(view, 0)
    scheduler.answer(order)
    assert scheduler.hand_off.take_ready() == [Resumption("a", HIT, 0)]
    with pytest.raises(HandOffError, match="running and has its blocks"):
        scheduler.hand_off.admit(view, 0)


def test_what_is_ready_is_taken_once_and_in_the_order_of_admission(scheduler: Scheduler) -> None:
    """i4."""
    orders = [scheduler.park(View(name, TOKENS, first_block=i)) for i, name in enumerate("abc")]
    for order in reversed(orders):
        scheduler.answer(order)
    assert [r.request_id for r in scheduler.hand_off.take_ready()] == ["a", "b", "c"]
    assert scheduler.hand_off.take_ready() == []


def test_parked_requests_count_once_however_they_end() -> None:
    """i5 and atom 1807: there, parked requests were counted at one place, uncounted at another."""
    scheduler = Scheduler(limit=2)
    hand_off = scheduler.hand_off
    for name, outcome in (("good", Outcome.DONE), ("bad", Outcome.FAILED), ("gone", Outcome.DONE)):
        order = scheduler.park(View(name, TOKENS))
        assert hand_off.has_room
        hand_off.admit(View("other", prompt(40, seed=9), first_block=50), 0)
        assert not hand_off.has_room
        if name == "gone":
            hand_off.finished(name, 0)
            assert hand_off.has_room, "it drains, and is nobody's any more"
        scheduler.answer(order, outcome=outcome)
        if name != "gone":
            assert not hand_off.has_room, "ready"
            assert len(hand_off.take_ready()) == 1
            assert not hand_off.has_room, "running"
            hand_off.finished(name, 0)
        hand_off.finished("other", 0)
        assert hand_off.count(*Phase) == 0


def test_a_load_has_ended_when_the_last_rank_has_said_so() -> None:
    """i6 and atom 1882: there, the first rank that failed woke the request; others still wrote."""
    scheduler = Scheduler(ranks=3)
    order = scheduler.park(View("a", TOKENS))
    scheduler.answer(order, 1, outcome=Outcome.FAILED)
    scheduler.answer(order, 0)
    assert scheduler.hand_off.phase("a") is Phase.PARKED
    assert scheduler.engine.pool.held == set(blocks_of(order))
    scheduler.answer(order, 2)
    assert scheduler.hand_off.take_ready() == [Resumption("a", 0, 0)]
    assert scheduler.leases == 0


def test_a_word_that_comes_twice_or_too_late_changes_nothing(scheduler: Scheduler) -> None:
    """i7 and bug h: there, a second load was taken for ended because the first one had been."""
    view = View("a", TOKENS)
    first = scheduler.park(view)
    scheduler.hand_off.preempted("a")
    second = scheduler.park(view)
    scheduler.answer(first)
    assert scheduler.hand_off.phase("a") is Phase.PARKED
    scheduler.answer(second)
    scheduler.answer(second, outcome=Outcome.FAILED)
    assert scheduler.hand_off.take_ready() == [Resumption("a", HIT, 0)]
    scheduler.answer(second)
    assert scheduler.hand_off.take_ready() == []
    assert scheduler.leases == 0


def test_a_failed_load_is_recomputed_into_the_same_blocks(scheduler: Scheduler) -> None:
    """i13, and what failed is not asked for again for ever."""
    view = View("a", TOKENS)
    order = scheduler.park(view, floor=BLOCK)
    scheduler.answer(order, outcome=Outcome.FAILED)
    assert scheduler.hand_off.take_ready() == [Resumption("a", BLOCK, BLOCK)]
    plan = scheduler.hand_off.plan([("a", BLOCK, len(TOKENS))], forward=True)
    assert plan.loads == ()
    scheduler.hand_off.preempted("a")
    assert scheduler.hand_off.admit(view, 0) == Admission(Phase.RUNNING, 0)


def test_no_token_is_lost_or_doubled_at_the_resume(scheduler: Scheduler) -> None:
    """Atom 1807, 1318: there, the first token after a load was thrown away."""
    scheduler.answer(scheduler.park(View("a", TOKENS)))
    (ready,) = scheduler.hand_off.take_ready()
    for wrong in (ready.start - 1, ready.start + 1):
        with pytest.raises(HandOffError, match="compute from there"):
            scheduler.hand_off.plan([("a", wrong, len(TOKENS))], forward=True)
    scheduler.hand_off.plan([("a", ready.start, len(TOKENS))], forward=True)


def test_what_was_loaded_is_named_for_the_engines_own_prefix_cache(scheduler: Scheduler) -> None:
    """i12, bug a, atom 1725: there, the same prefix was loaded again in every turn."""
    scheduler.answer(scheduler.park(View("a", TOKENS), floor=BLOCK))
    (ready,) = scheduler.hand_off.take_ready()
    assert (ready.floor, ready.start) == (BLOCK, HIT)


def test_what_was_hit_is_not_saved_again(scheduler: Scheduler) -> None:
    """i9, atom 2204."""
    scheduler.answer(scheduler.park(View("a", TOKENS)))
    scheduler.hand_off.take_ready()
    assert scheduler.hand_off.plan([("a", HIT, len(TOKENS))], forward=True).saves == ()
    scheduler.hand_off.finished("a", len(TOKENS), [View("a", TOKENS).blocks()])
    assert scheduler.hand_off.plan([], forward=False).saves == ()


def test_a_save_that_failed_moves_no_watermark(scheduler: Scheduler) -> None:
    """i9, atom 2204 and 2132: there, a hole capped every later hit."""
    hand_off, view = scheduler.hand_off, View("a", prompt(CHUNK + 1, seed=5))
    hand_off.admit(view, 0)
    plan = hand_off.plan([("a", 0, CHUNK + 1)], forward=True)
    keys = scheduler.engine.keys(plan)
    scheduler.engine.answer(plan.saves[0].transfer, outcome=Outcome.FAILED)
    assert hand_off.look(View("b", prompt(CHUNK + 8, seed=5)), 0) == 0
    hand_off.admit(View("c", prompt(CHUNK + 1, seed=5), first_block=30), 0)
    again = hand_off.plan([("c", 0, CHUNK + 1)], forward=True)
    assert scheduler.engine.keys(again) == keys


def test_loads_do_not_queue_behind_saves() -> None:
    """Atom 2053: there, both went through one executor and one bound."""
    scheduler = Scheduler()
    hand_off = scheduler.hand_off
    scheduler.planner._saving._bound = CHUNK_BYTES
    hand_off.admit(View("saves", prompt(4 * CHUNK + 1, seed=7), first_block=40), 0)
    assert len(hand_off.plan([("saves", 0, 4 * CHUNK + 1)], forward=True).saves) == 1
    hand_off.admit(View("a", TOKENS), 0)
    plan = hand_off.plan([("saves", 4 * CHUNK, 4 * CHUNK + 1)], forward=True)
    assert not plan.saves, "the bound is reached"
    assert [order.request_id for order in plan.loads] == ["a"]


# -- ends ----------------------------------------------------------------------------------------


def test_an_abort_while_parked_keeps_the_blocks_until_the_load_has_ended() -> None:
    """i8: there, they were freed, and somebody else's were written."""
    scheduler = Scheduler(ranks=2)
    order = scheduler.park(View("a", TOKENS))
    scheduler.hand_off.finished("a", 0)
    assert scheduler.hand_off.phase("a") is Phase.DRAINING
    scheduler.answer(order, 0)
    assert scheduler.engine.pool.held == set(blocks_of(order))
    assert scheduler.hand_off.has_work
    scheduler.answer(order, 1)
    assert scheduler.leases == 0
    assert scheduler.hand_off.phase("a") is Phase.WAITING
    assert not scheduler.hand_off.has_work
    assert not scheduler.planner._requests


def test_a_name_may_come_back_while_its_blocks_drain(scheduler: Scheduler) -> None:
    first = scheduler.park(View("a", TOKENS))
    scheduler.hand_off.finished("a", 0)
    second = scheduler.park(View("a", TOKENS, first_block=40))
    scheduler.answer(first)
    assert scheduler.hand_off.phase("a") is Phase.PARKED
    assert scheduler.engine.pool.held == set(blocks_of(second))
    scheduler.answer(second)
    assert len(scheduler.hand_off.take_ready()) == 1


def test_an_abort_before_admission_leaves_nothing(scheduler: Scheduler) -> None:
    """i10, atom 2175 and bug b: there, the pin of a lookup leaked and kept the engine awake."""
    assert scheduler.hand_off.look(View("a", TOKENS), 0) == HIT
    scheduler.hand_off.finished("a", 0)
    assert scheduler.leases == 0
    assert not scheduler.hand_off.has_work
    assert not scheduler.planner._requests


def test_an_abort_of_what_is_ready_frees_it(scheduler: Scheduler) -> None:
    scheduler.answer(scheduler.park(View("a", TOKENS)))
    scheduler.hand_off.finished("a", 0)
    assert scheduler.hand_off.take_ready() == []
    assert scheduler.leases == 0
    assert not scheduler.hand_off.has_work


def test_a_preempted_request_loads_what_it_had_generated_too(scheduler: Scheduler) -> None:
    """Bug g: there, the resume counted from the prompt and skipped generated tokens."""
    view = View("a", prompt(CHUNK + 1, seed=3), first_block=20)
    hand_off = scheduler.hand_off
    hand_off.admit(view, 0)
    view.token_ids = prompt(3 * CHUNK + 1, seed=3)
    saves = hand_off.plan([("a", 0, 3 * CHUNK)], forward=True).saves
    scheduler.engine.answer(*(save.transfer for save in saves))
    hand_off.preempted("a")
    assert hand_off.admit(view, 0) == Admission(Phase.PARKED, 3 * CHUNK)
    assert view.num_prompt_tokens == CHUNK + 1


def test_a_plan_without_a_forward_is_still_carried_out(scheduler: Scheduler) -> None:
    """i11, atom 1882 and 2146: there, orders of a step without requests were dropped."""
    scheduler.hand_off.admit(View("a", TOKENS), 0)
    assert scheduler.hand_off.has_work
    (order,) = scheduler.hand_off.plan([], forward=False).loads
    assert order.mode is LoadMode.PARKED
    assert scheduler.hand_off.has_work, "the receipt has yet to come"
    scheduler.answer(order)
    assert scheduler.hand_off.has_work, "somebody is ready"
    scheduler.hand_off.take_ready()
    assert not scheduler.hand_off.has_work


# -- in the step ---------------------------------------------------------------------------------


def test_what_is_loaded_in_the_step_runs_in_it() -> None:
    scheduler = Scheduler(mode="layerwise")
    hand_off = scheduler.hand_off
    assert hand_off.admit(View("a", TOKENS), 0) == Admission(Phase.RUNNING, HIT)
    (order,) = hand_off.plan([("a", HIT, len(TOKENS))], forward=True).loads
    assert order.mode is LoadMode.LAYERWISE
    scheduler.answer(order)
    assert hand_off.take_ready() == []
    assert hand_off.take_cut() == []


def test_a_load_that_fails_in_the_step_is_taken_back() -> None:
    """i14: what was computed on it does not count, and is not shown to anybody."""
    scheduler = Scheduler(mode="layerwise")
    hand_off, view = scheduler.hand_off, View("a", prompt(4 * CHUNK))
    hand_off.admit(view, BLOCK)
    plan = hand_off.plan([("a", HIT, 4 * CHUNK)], forward=True)
    scheduler.answer(plan.loads[0], outcome=Outcome.FAILED)
    scheduler.engine.answer(*(save.transfer for save in plan.saves))
    assert hand_off.take_cut() == [Resumption("a", BLOCK, BLOCK)]
    assert hand_off.take_cut() == []
    assert hand_off.look(View("b", prompt(4 * CHUNK + 1)), 0) == HIT
    with pytest.raises(HandOffError, match="compute from there"):
        hand_off.plan([("a", HIT, 4 * CHUNK)], forward=True)
    hand_off.plan([("a", BLOCK, 4 * CHUNK)], forward=True)


@pytest.mark.parametrize("bounds", [(0, 1), (16, 0)])
def test_bounds_are_positive(bounds: tuple[int, int]) -> None:
    boundary, limit = bounds
    with pytest.raises(ValueError, match="must be positive"):
        HandOff(Engine().planner, boundary=boundary, limit=limit)
