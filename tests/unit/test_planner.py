"""Control plans loads and saves that are right, leases what they read, and believes no failure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from driven_planner import (
    CHUNK,
    CHUNK_BYTES,
    FAR,
    Engine,
    View,
    drops,
    keys_of,
    outward,
    pages_of,
    prompt,
)

from lamina_kv.control.push.pushes import Pushes
from lamina_kv.control.saving import SavePlanner
from lamina_kv.control.shape import ChunkShape
from lamina_kv.control.transfers import Kind, Transfer
from lamina_kv.keys import CHECKPOINT, Epoch
from lamina_kv.plan import NEAR, LoadMode, Outcome, Receipt, TransferReceipt


def test_what_was_saved_is_hit_by_the_same_prefix() -> None:
    engine = Engine()
    plan = engine.save(View("a", prompt(100)))
    assert [order.blocks for order in plan.saves] == [(1, 2), (3, 4), (5, 6)]
    assert engine.planner.lookup(View("b", prompt(100)), 0).tokens == 96
    assert engine.planner.lookup(View("c", prompt(70)), 0).tokens == 64
    assert engine.planner.lookup(View("d", prompt(100, seed=1)), 0).tokens == 0


def test_at_least_one_token_is_left_to_compute() -> None:
    engine = Engine()
    engine.save(View("a", prompt(96)))
    assert engine.planner.lookup(View("b", prompt(96)), 0).tokens == 80
    assert engine.planner.lookup(View("c", prompt(97)), 0).tokens == 96
    assert engine.planner.lookup(View("d", prompt(96), recompute_tokens=17), 0).tokens == 64


@pytest.mark.parametrize(
    "change",
    [{"root_extra": b"salt"}, {"extras": {0: b"image"}}],
)
def test_salts_adapters_and_images_keep_requests_apart(change: dict[str, object]) -> None:
    engine = Engine()
    engine.save(View("a", prompt(100)))
    assert engine.planner.lookup(View("b", prompt(100), **change), 0).tokens == 0  # type: ignore[arg-type]


def test_any_block_boundary_may_be_the_floor() -> None:
    engine = Engine({"load": {"min_tokens": 0}})
    engine.save(View("a", prompt(100)))
    view = View("b", prompt(100), first_block=50)
    assert engine.planner.lookup(view, 16).tokens == 80
    engine.planner.admitted("b", 80)
    (order,) = engine.step(("b", 100)).loads
    first, second, third = engine.slots("b")
    assert pages_of(order) == [
        (first, 1, 51),
        (second, 0, 52),
        (second, 1, 53),
        (third, 0, 54),
        (third, 1, 55),
    ]


def test_a_hit_that_ends_inside_a_chunk_loads_part_of_it() -> None:
    engine = Engine()
    engine.save(View("a", prompt(96)))
    engine.planner.lookup(View("b", prompt(96), first_block=50), 0)
    engine.planner.admitted("b", 80)
    (order,) = engine.step(("b", 96)).loads
    assert pages_of(order)[-1] == (engine.slots("b")[-1], 0, 54)


def test_a_chunk_is_invisible_until_every_rank_has_it() -> None:
    engine = Engine(ranks=2)
    view = View("a", prompt(40))
    engine.planner.lookup(view, 0)
    engine.planner.admitted("a", 0)
    (order,) = engine.step(("a", 40)).saves
    engine.answer(order.transfer, ranks=[0])
    engine.answer(order.transfer, ranks=[0])
    assert engine.planner.lookup(View("b", prompt(40)), 0).tokens == 0
    assert engine.pool.held == {1, 2}
    engine.answer(order.transfer, ranks=[1])
    assert engine.planner.lookup(View("b", prompt(40)), 0).tokens == 32
    assert engine.pool.held == set()


def test_a_save_that_fails_on_one_rank_is_seen_by_none() -> None:
    engine = Engine(ranks=2)
    engine.planner.lookup(View("a", prompt(40)), 0)
    engine.planner.admitted("a", 0)
    (order,) = engine.step(("a", 40)).saves
    engine.answer(order.transfer, ranks=[0])
    engine.answer(order.transfer, ranks=[1], outcome=Outcome.FAILED)
    assert engine.planner.lookup(View("b", prompt(40)), 0).tokens == 0
    assert engine.pool.held == set()
    assert engine.count("failures", NEAR, "save_test") == 1


def test_blocks_are_leased_from_the_plan_until_they_are_read() -> None:
    engine = Engine()
    engine.planner.lookup(View("a", prompt(70)), 0)
    engine.planner.admitted("a", 0)
    first, second = engine.step(("a", 70)).saves
    assert engine.pool.held == {1, 2, 3, 4}
    engine.planner.finished("a", 70, [range(1, 6)])
    assert engine.pool.held == {1, 2, 3, 4}
    engine.answer(first.transfer)
    assert engine.pool.held == {3, 4}
    engine.answer(second.transfer)
    assert engine.pool.held == set()


def test_a_chunk_is_saved_once_its_last_token_is_computed_and_never_again() -> None:
    engine = Engine()
    view = View("a", prompt(100))
    engine.planner.lookup(view, 0)
    engine.planner.admitted("a", 0)
    assert len(engine.step(("a", 31)).saves) == 0
    assert len(engine.step(("a", 40)).saves) == 1
    assert len(engine.step(("a", 60)).saves) == 0
    assert len(engine.step(("a", 100)).saves) == 2
    assert len(engine.step(("a", 101)).saves) == 0


def test_draft_tokens_are_not_saved() -> None:
    engine = Engine()
    view = View("a", prompt(30))
    engine.planner.lookup(view, 0)
    engine.planner.admitted("a", 0)
    engine.step(("a", 30))
    view.token_ids.append(7)
    # Five drafts run with the one confirmed token: 36 computed, 31 of them known to stay.
    assert engine.step(("a", 36)).saves == ()
    view.token_ids.extend([8, 9])
    assert len(engine.step(("a", 38)).saves) == 1


def test_generated_tokens_are_saved_only_if_wanted() -> None:
    for setting, saved in (("all", 2), ("prompt", 1)):
        engine = Engine({"save": {"tokens": setting}})
        view = View("a", prompt(70), num_prompt_tokens=40)
        assert len(engine.save(view).saves) == saved


def test_over_the_bound_fewer_saves_are_planned_and_made_up_for_later() -> None:
    engine = Engine({"save": {"max_inflight": 2 * CHUNK_BYTES}})
    view = View("a", prompt(200))
    engine.planner.lookup(view, 0)
    engine.planner.admitted("a", 0)
    first = engine.step(("a", 200)).saves
    assert len(first) == 2
    assert len(engine.step(("a", 200)).saves) == 0
    engine.answer(*(o.transfer for o in first))
    assert [o.blocks for o in engine.step(("a", 200)).saves] == [(5, 6), (7, 8)]
    engine.planner.finished("a", 200, [view.blocks()])
    readings = engine.readings().counters
    assert readings["saves_held_back", ("max_inflight",)] == 2
    assert readings["saves_dropped", ()] == 2


def test_a_host_tier_full_of_leased_slots_saves_nothing_and_fails_nothing() -> None:
    engine = Engine(near_slots=1)
    engine.planner.lookup(View("a", prompt(70)), 0)
    engine.planner.admitted("a", 0)
    assert len(engine.step(("a", 70)).saves) == 1
    assert engine.count("saves_held_back", "host_in_use") == 1


def test_a_load_holds_its_slots_until_it_is_over() -> None:
    engine = Engine(near_slots=2)
    engine.save(View("a", prompt(70)))
    engine.planner.lookup(View("b", prompt(70), first_block=50), 0)
    engine.planner.admitted("b", 64)
    (load,) = engine.step(("b", 70)).loads
    engine.planner.lookup(View("c", prompt(70, seed=2)), 0)
    engine.planner.admitted("c", 0)
    assert engine.step(("c", 70)).saves == ()
    engine.answer(load.transfer)
    assert len(engine.step(("c", 70)).saves) == 2


def test_alone_a_load_is_layerwise_beside_others_it_is_parked() -> None:
    engine = Engine({"load": {"when": "always"}})
    engine.save(View("a", prompt(70)))
    assert engine.planner.lookup(View("b", prompt(70)), 0).mode is LoadMode.LAYERWISE
    engine.planner.admitted("b", 64)
    assert engine.planner.lookup(View("c", prompt(70)), 0).mode is LoadMode.PARKED


@pytest.mark.parametrize("mode", ["layerwise", "parked"])
def test_a_configured_mode_is_obeyed(mode: str) -> None:
    engine = Engine({"load": {"mode": mode}})
    engine.save(View("a", prompt(70)))
    assert engine.planner.lookup(View("b", prompt(70)), 0).mode.value == mode


def test_below_the_minimum_nothing_is_loaded() -> None:
    engine = Engine({"load": {"min_tokens": 65}})
    engine.save(View("a", prompt(100)))
    assert engine.planner.lookup(View("b", prompt(70)), 0).tokens == 0
    engine.planner.admitted("b", 0)
    assert engine.count("loads_skipped", "below_min_tokens") == 1
    assert engine.planner.lookup(View("c", prompt(100)), 0).tokens == 96


def test_what_was_computed_on_a_failed_load_never_becomes_visible() -> None:
    engine = Engine({"load": {"mode": "layerwise"}})
    engine.save(View("a", prompt(70)))
    engine.planner.lookup(View("b", prompt(100), first_block=50), 0)
    engine.planner.admitted("b", 64)
    plan = engine.step(("b", 100))
    later = View("c", prompt(40, seed=3), first_block=80)
    engine.planner.lookup(later, 0)
    engine.planner.admitted("c", 0)
    after = engine.step(("c", 40))
    engine.planner.receive(
        [
            Receipt(
                0,
                (
                    TransferReceipt(plan.saves[0].transfer, Outcome.DONE),
                    TransferReceipt(plan.loads[0].transfer, Outcome.FAILED, reason="test"),
                    TransferReceipt(after.saves[0].transfer, Outcome.DONE),
                ),
            )
        ]
    )
    assert engine.planner.lookup(View("d", prompt(100)), 0).tokens == 64
    assert engine.planner.lookup(View("e", prompt(40, seed=3)), 0).tokens == 0
    assert engine.pool.held == set()


def test_after_a_failed_load_the_recomputed_chunks_are_saved_again() -> None:
    engine = Engine({"load": {"mode": "layerwise"}})
    engine.save(View("a", prompt(70)))
    engine.planner.lookup(View("b", prompt(100), first_block=50), 0)
    engine.planner.admitted("b", 64)
    plan = engine.step(("b", 100))
    (load,), (save,) = plan.loads, plan.saves
    failed = TransferReceipt(load.transfer, Outcome.FAILED, reason="test")
    saved = TransferReceipt(save.transfer, Outcome.DONE)
    engine.planner.receive([Receipt(0, (saved, failed))])
    assert [o.blocks for o in engine.step(("b", 100)).saves] == [(54, 55)]
    assert engine.count("failures", NEAR, "load_test") == 1


def test_a_preempted_request_is_looked_up_anew_and_stale_receipts_change_nothing() -> None:
    engine = Engine()
    engine.save(View("a", prompt(70)))
    view = View("b", prompt(70), first_block=50)
    engine.planner.lookup(view, 0)
    engine.planner.admitted("b", 64)
    (old,) = engine.step(("b", 70)).loads
    view.first_block = 80
    assert engine.planner.lookup(view, 0).tokens == 64
    engine.planner.admitted("b", 64)
    (new,) = engine.step(("b", 70)).loads
    assert new.transfer != old.transfer
    assert [block for _, _, block in pages_of(new)] == [80, 81, 82, 83]
    engine.answer(old.transfer, outcome=Outcome.FAILED)
    engine.answer(old.transfer, outcome=Outcome.FAILED)
    engine.answer(new.transfer)
    assert not engine.planner.has_work


def test_a_call_after_a_parked_load_does_not_count_as_a_second_admission() -> None:
    engine = Engine()
    engine.save(View("a", prompt(70)))
    engine.readings()
    engine.planner.lookup(View("b", prompt(70)), 0)
    engine.planner.admitted("b", 64)
    engine.planner.admitted("b", 0)
    engine.step(("b", 70))
    engine.planner.finished("b", 70, [()])
    readings = engine.readings().counters
    assert readings["lookups", ()] == 1
    assert ("loads_skipped", ("declined_by_engine",)) not in readings


def test_a_repeated_lookup_sees_what_has_become_visible_and_what_is_gone() -> None:
    engine = Engine(near_slots=3)
    waiting = View("w", prompt(100))
    assert engine.planner.lookup(waiting, 0).tokens == 0
    engine.save(View("a", prompt(40)))
    assert engine.planner.lookup(waiting, 0).tokens == 32
    engine.save(View("b", prompt(100)))
    assert engine.planner.lookup(waiting, 0).tokens == 96
    engine.save(View("c", prompt(70, seed=1)))
    assert engine.planner.lookup(waiting, 0).tokens == 32


def test_of_a_prompt_that_grew_what_was_only_far_before_is_far_still() -> None:
    """Of its first chunk no token could be brought, because one is left to compute."""
    shape = ChunkShape.uniform(CHUNK, CHUNK)
    engine = Engine(far_slots=8, shape=shape)
    engine.save(View("a", prompt(2 * CHUNK + 1)))
    engine.write_all()
    engine.near.drop(keys_of(prompt(CHUNK))[0])
    session = View("b", prompt(CHUNK), first_block=50)
    assert engine.planner.lookup(session, 0).tokens == 0
    session.token_ids += prompt(2 * CHUNK + 1)[CHUNK:]
    assert engine.lookup(session).tokens == 2 * CHUNK
    assert engine.planner.hit_sources("b") == {FAR: CHUNK, NEAR: CHUNK}


def test_what_is_saved_is_moved_outward_and_found_there() -> None:
    engine = Engine(far_slots=8)
    engine.save(View("a", prompt(70)))
    plan = engine.step()
    assert [(move.near, move.far) for move in outward(plan)] == [(0, 0), (1, 1)]
    assert engine.planner.has_work
    engine.answer(*(move.transfer for move in outward(plan)))
    assert not engine.planner.has_work
    engine.forget_near()
    view = View("b", prompt(70), first_block=50)
    assert engine.planner.lookup(view, 0).ask_again
    assert engine.lookup(view).tokens == 64
    assert engine.planner.hit_sources("b") == {FAR: 64}
    engine.planner.admitted("b", 64)
    plan = engine.step(("b", 70))
    assert len(plan.loads) == 1
    assert plan.saves == (), "it is near by now"
    engine.answer(plan.loads[0].transfer)
    assert outward(engine.step()) == (), "and still there"


def test_moves_outward_are_bounded_and_the_rest_follows() -> None:
    engine = Engine(far_slots=8, far={"max_inflight": 2 * CHUNK_BYTES})
    engine.save(View("a", prompt(100)))
    assert len(outward(engine.settle_moves())) == 2
    assert engine.planner.has_work
    assert len(outward(engine.settle_moves())) == 1
    assert not engine.planner.has_work


def test_a_tier_that_hangs_does_not_keep_the_engine_awake() -> None:
    engine = Engine(far_slots=8, far={"max_inflight": CHUNK_BYTES})
    engine.save(View("a", prompt(100)))
    (hanging,) = outward(engine.step())
    assert engine.planner.has_work
    engine.wait(31)
    assert not engine.planner.has_work
    engine.answer(hanging.transfer)
    assert engine.planner.has_work
    assert len(outward(engine.settle_moves())) == 1


def test_a_write_that_fails_leaves_the_near_copy_and_frees_both_slots() -> None:
    engine = Engine(far_slots=8)
    engine.save(View("a", prompt(40)))
    (write,) = outward(engine.step())
    assert engine.near.leased == 1
    engine.answer(write.transfer, outcome=Outcome.FAILED)
    assert engine.near.leased == 0
    assert engine.planner.lookup(View("b", prompt(40)), 0).tokens == 32
    (again,) = outward(engine.step())
    engine.answer(again.transfer, outcome=Outcome.FAILED)
    assert engine.near.leased == 0
    assert drops(engine.step()) == (again.far,)
    assert engine.far.used == 0
    assert engine.count("failures", FAR, "write_test") == 2


def test_only_what_every_rank_found_in_a_tier_is_hit() -> None:
    keys = keys_of(prompt(70))
    stored = [dict(zip(slots, keys, strict=True)) for slots in ((0, 1), (0, 3))]
    engine = Engine(ranks=2, far_slots=8, stored=stored)
    assert engine.lookup(View("b", prompt(70)), 0).tokens == 32
    engine = Engine(ranks=2, far_slots=8, stored=stored)
    assert drops(engine.step()) == (1, 3)


def test_a_reset_begins_an_epoch_and_deletes_nothing() -> None:
    engine = Engine(far_slots=8)
    engine.save(View("a", prompt(70)))
    engine.write_all()
    engine.planner.lookup(View("b", prompt(70, seed=2), first_block=50), 0)
    engine.planner.admitted("b", 0)
    saves = engine.step(("b", 70)).saves
    engine.planner.reset()
    engine.answer(*(o.transfer for o in saves))
    assert engine.planner.lookup(View("c", prompt(70)), 0).tokens == 0
    assert engine.planner.lookup(View("d", prompt(70, seed=2)), 0).tokens == 0
    assert drops(engine.step()) == ()
    assert engine.pool.held == set()
    engine.planner.begin(CHECKPOINT)
    assert engine.planner.lookup(View("e", prompt(70)), 0).tokens == 64
    # Nobody knows which weights had computed what was on its way.
    assert engine.planner.lookup(View("f", prompt(70, seed=2)), 0).tokens == 0


def test_a_save_that_survives_a_change_of_weights_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SavePlanner, "_poison", lambda saving, transfer: None)
    with pytest.raises(AssertionError, match="64 == 0"):
        test_a_reset_begins_an_epoch_and_deletes_nothing()


@pytest.mark.parametrize(("epoch", "written"), [(Epoch("v2"), 2), (Epoch(run="1"), 0)])
def test_only_chunks_of_weights_with_a_name_are_moved_outward(epoch: Epoch, written: int) -> None:
    engine = Engine(far_slots=8)
    engine.planner.begin(epoch)
    engine.save(View("a", prompt(70)))
    assert len(outward(engine.settle_moves())) == written
    engine.planner.reset()
    assert engine.planner.lookup(View("b", prompt(70)), 0).tokens == 0
    engine.planner.begin(epoch)
    assert engine.planner.lookup(View("c", prompt(70)), 0).tokens == 64


def test_an_epoch_without_a_name_that_lasts_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Epoch, "lasting", True)
    with pytest.raises(AssertionError, match="2 == 0"):
        test_only_chunks_of_weights_with_a_name_are_moved_outward(Epoch(run="1"), 0)


def test_two_resets_are_two_epochs_and_those_of_another_process_are_others() -> None:
    epochs = set()
    for _ in range(2):
        engine = Engine()
        for _ in range(2):
            engine.planner.reset()
            epochs.add(engine.planner.epoch)
    assert len(epochs) == 4
    assert not any(epoch.lasting for epoch in epochs)


@pytest.mark.parametrize("how", ["waiting", "preempted"])
def test_a_request_that_outlives_its_weights_is_saved_for_the_new_ones(how: str) -> None:
    engine, view = Engine(), View("a", prompt(70))
    engine.planner.arrived(view)
    if how == "preempted":
        engine.planner.admitted("a", engine.planner.lookup(view, 0).tokens)
        engine.answer(*(o.transfer for o in engine.step(("a", 70)).saves))
    engine.planner.reset()
    engine.save(view)
    assert engine.planner.lookup(View("b", prompt(70)), 0).tokens == 64
    engine.planner.begin(CHECKPOINT)
    found = engine.planner.lookup(View("c", prompt(70)), 0).tokens
    assert found == (64 if how == "preempted" else 0)


def test_an_overdue_save_lets_go_of_its_blocks_and_is_never_shown() -> None:
    engine = Engine()
    engine.planner.lookup(View("a", prompt(40)), 0)
    engine.planner.admitted("a", 0)
    (order,) = engine.step(("a", 40)).saves
    engine.wait(31)
    assert engine.pool.held == set()
    assert not engine.planner.has_work
    engine.answer(order.transfer)
    assert engine.planner.lookup(View("b", prompt(40)), 0).tokens == 0


def test_a_request_that_ends_saves_its_last_whole_chunk() -> None:
    engine = Engine()
    view = View("a", prompt(60))
    engine.planner.lookup(view, 0)
    engine.planner.admitted("a", 0)
    engine.answer(*(o.transfer for o in engine.step(("a", 60)).saves))
    view.token_ids.extend(range(5))
    engine.planner.finished("a", 64, [view.blocks()])
    assert engine.planner.has_work
    assert [o.blocks for o in engine.step().saves] == [(3, 4)]


def start(engine: Engine, view: View) -> None:
    engine.planner.lookup(view, 0)
    engine.planner.admitted(view.request_id, 0)


def test_a_barred_request_keeps_nothing_until_it_gets_other_blocks() -> None:
    engine = Engine()
    mine, other, waiting = (View(n, prompt(70, seed=i), first_block=1 + 50 * i)
                            for i, n in enumerate(("a", "b", "c")))  # fmt: skip
    start(engine, mine)
    start(engine, other)
    engine.planner.arrived(waiting)
    saves = engine.step(("a", 70), ("b", 32)).saves
    engine.planner.bar(["a", "c", "nobody"])
    assert len(engine.step(("b", 70)).saves) == 1
    start(engine, waiting)
    assert len(engine.step(("c", 70)).saves) == 2
    engine.answer(*(save.transfer for save in saves))
    engine.step(("a", 70))
    assert engine.planner.lookup(View("d", prompt(70)), 0).tokens == 0, "not shown"
    start(engine, mine)
    assert len(engine.step(("a", 70)).saves) == 2


@pytest.mark.parametrize("how", ["weights", "an adapter", "an adapter, preempted"])
def test_what_several_weights_have_computed_is_not_pushed(how: str) -> None:
    engine, view, barred = Engine(), View("a", prompt(70)), []
    start(engine, view)
    pushes = SimpleNamespace(bar=lambda record: barred.append(record.view.request_id))
    engine.planner.pushes = cast(Pushes, pushes)
    if how == "weights":
        engine.planner.reset()
    elif how == "an adapter":
        engine.planner.bar(["a"])
    else:
        engine.planner.lookup(View("a", prompt(70), root_extra=b"new"), 0)
    assert barred == ["a"]


def test_a_tier_smaller_than_a_chunk_is_an_error_at_the_start() -> None:
    with pytest.raises(ValueError, match=r"host\.capacity"):
        Engine({}, near_slots=0)


def test_a_reset_does_not_bring_back_what_running_requests_computed_before_it() -> None:
    engine = Engine()
    view = View("a", prompt(70))
    engine.planner.lookup(view, 0)
    engine.planner.admitted("a", 0)
    engine.answer(*(o.transfer for o in engine.step(("a", 70)).saves))
    engine.planner.reset()
    view.token_ids.extend(range(40))
    assert engine.step(("a", 110)).saves == ()
    engine.planner.finished("a", 110, [view.blocks()])
    assert engine.step().saves == ()
    # Preempted and computed anew, it may be saved again.
    again = View("b", prompt(70), first_block=50)
    engine.planner.lookup(again, 0)
    engine.planner.admitted("b", 0)
    engine.planner.reset()
    engine.planner.lookup(again, 0)
    engine.planner.admitted("b", 0)
    assert len(engine.step(("b", 70)).saves) == 2


def test_a_load_that_was_only_late_loses_no_chunk_but_is_not_asked_for_again() -> None:
    engine = Engine({"load": {"mode": "parked"}})
    engine.save(View("a", prompt(70)))
    view = View("b", prompt(70), first_block=50)
    engine.planner.lookup(view, 0)
    engine.planner.admitted("b", 64)
    (load,) = engine.step().loads
    engine.answer(load.transfer, outcome=Outcome.FAILED)
    assert engine.planner.lookup(view, 0).tokens == 0
    engine.planner.admitted("b", 0)
    assert engine.count("loads_skipped", "failed_before") == 1
    assert engine.planner.lookup(View("c", prompt(70)), 0).tokens == 64


def test_a_failed_parked_load_casts_no_doubt_on_what_others_computed() -> None:
    engine = Engine({"load": {"mode": "parked"}})
    engine.save(View("a", prompt(70)))
    engine.planner.lookup(View("b", prompt(70), first_block=50), 0)
    engine.planner.admitted("b", 64)
    engine.planner.lookup(View("c", prompt(40, seed=1)), 0)
    engine.planner.admitted("c", 0)
    plan = engine.step(("c", 40))
    engine.answer(plan.loads[0].transfer, outcome=Outcome.FAILED)
    engine.answer(plan.saves[0].transfer)
    assert engine.planner.lookup(View("d", prompt(40, seed=1)), 0).tokens == 32


def test_a_load_that_failed_in_the_engines_eyes_keeps_saves_from_being_seen() -> None:
    engine = Engine()
    engine.planner.lookup(View("a", prompt(40)), 0)
    engine.planner.admitted("a", 0)
    (order,) = engine.step(("a", 40)).saves
    engine.planner.distrust()
    engine.answer(order.transfer)
    assert engine.planner.lookup(View("b", prompt(40)), 0).tokens == 0
    assert len(engine.step(("a", 41)).saves) == 1


def test_what_is_distrusted_is_saved_anew_although_the_step_completes_nothing() -> None:
    engine = Engine()
    engine.planner.lookup(View("a", prompt(60), num_prompt_tokens=10), 0)
    engine.planner.admitted("a", 0)
    (order,) = engine.step(("a", 40)).saves
    for computed in (41, 42):
        assert not engine.step(("a", computed)).saves
    engine.planner.distrust()
    (anew,) = engine.step(("a", 43)).saves
    engine.answer(order.transfer, anew.transfer)
    assert engine.planner.lookup(View("b", prompt(60)), 0).tokens == 32


def test_a_prefill_ends_with_the_step_behind_it_although_that_completes_nothing() -> None:
    """Of a request that was preempted all is computed again, what it had generated, too."""
    engine, view = Engine(), View("a", prompt(100), num_prompt_tokens=10)
    engine.planner.lookup(view, 0)
    engine.planner.admitted("a", 0)
    engine.step(("a", 100))
    engine.planner.lookup(view, 0)
    engine.planner.admitted("a", 0)
    view.token_ids.append(7)
    for seconds, start, computed in ((0, 0, 60), (1, 60, 101), (1, 101, 102), (100, 102, 103)):
        engine.now += seconds
        engine.planner.plan_step([("a", start, computed)], forward=True)
        view.token_ids += [7] * (computed == 101)
    assert engine.planner.costs.prefill_seconds(0, 101) == pytest.approx(2.0, rel=0.3)


def test_a_request_for_which_nothing_may_be_loaded_is_still_saved() -> None:
    engine = Engine()
    engine.save(View("a", prompt(40)))
    view = View("b", prompt(70), first_block=50)
    assert engine.planner.lookup(view, 0, declined="not_this_one").tokens == 0
    engine.planner.admitted("b", 0)
    assert engine.count("loads_skipped", "not_this_one") == 1
    assert [o.blocks for o in engine.step(("b", 70)).saves] == [(52, 53)]


def test_what_waits_to_be_written_is_bounded() -> None:
    engine = Engine(near_slots=3, far_slots=50, far={"max_inflight": CHUNK_BYTES})
    engine.save(View("a", prompt(40)))
    engine.step()
    for seed in range(1, 6):
        engine.save(View(f"r{seed}", prompt(40, seed=seed)))
    engine.planner.gauges()
    readings = engine.readings()
    assert readings.gauges["write_backlog", ()] <= 3
    assert readings.counters["writes_skipped", (FAR, "evicted")] >= 2


def test_a_reset_while_a_push_is_under_way() -> None:
    engine = Engine()
    engine.save(View("a", prompt(100)))
    for kind in (Kind.PUSH, Kind.RECEIVE):
        engine.planner._books.transfers.open(Transfer(kind, "p", step=0, expires=1e9, size=0))
    engine.planner.reset()
    assert engine.planner.lookup(View("b", prompt(100)), 0).tokens == 0
