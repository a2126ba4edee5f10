"""The simulator sees what it is there to see: Lamina, broken on purpose in many ways, is caught
each time, and what is caught is named.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

import pytest

from broken_devices import (
    a_load_comes_before_the_engines_own_copies,
    a_load_does_not_wait_for_the_model,
    a_load_of_a_step_is_over_when_it_is_launched,
    a_parked_load_has_arrived_when_it_is_launched,
    a_save_does_not_wait_for_the_model,
    a_save_is_over_when_it_is_launched,
    the_first_piece_of_a_row_is_as_good_as_the_last,
    the_model_does_not_wait_for_a_load,
    what_a_copy_has_launched_before_it_failed_is_forgotten,
    what_was_launched_is_forgotten_when_a_load_is_given_up,
)
from broken_tiers import (
    a_far_slot_is_not_held_while_it_is_read,
    a_late_move_has_lost_its_near_slot,
    a_move_inward_that_failed_counts,
    a_move_outward_that_failed_counts,
    a_near_slot_is_not_held_while_it_is_written_from,
    a_wait_for_answers_has_no_end,
    a_wait_for_moves_has_no_end,
    answers_are_not_listened_to,
    any_chunk_is_as_good,
    any_ranks_part_is_as_good,
    fates_are_not_looked_at,
    more_moves_than_are_allowed,
    nobody_is_asked,
    only_what_is_near_is_found,
    ranks_need_not_agree,
    slots_are_dropped_behind_writes,
    those_who_have_ended_are_not_forgotten,
    what_came_near_is_counted_twice,
    what_is_damaged_is_kept,
    what_is_far_is_loaded,
    what_is_gone_is_hoped_for,
    what_is_not_lasting_is_moved,
    what_is_pinned_stays_pinned,
    what_is_read_is_not_verified,
    what_is_written_is_not_sealed,
)
from broken_transfers import identities_are_used_again, one_rank_is_enough
from lamina_kv.control.hits import HitFinder
from lamina_kv.control.leases import BlockLease, LeaseBook
from lamina_kv.control.loading import LoadEnd, LoadPlanner
from lamina_kv.control.planner import Planner
from lamina_kv.control.reporting.prompts import PromptMeter
from lamina_kv.control.reporting.residency import Residency
from lamina_kv.control.requests import RequestRecord
from lamina_kv.control.saving import SavePlanner
from lamina_kv.control.sharing import SharedLoads
from lamina_kv.control.transfers import Transfer, TransferTable
from lamina_kv.data import load_pipeline
from lamina_kv.data.executor import Executor, Outcomes
from lamina_kv.data.load_pipeline import LoadRun
from lamina_kv.engines.hand_off import HandOff, Phase, Resumption
from lamina_kv.geometry import Group
from lamina_kv.keys import ChunkChain
from lamina_kv.plan import ChunkKey, Outcome, SaveOrder, StepPlan, TransferReceipt
from lamina_kv.tiers.slots import SlotIndex
from simulator.content import Violation
from simulator.engine import Simulator
from simulator.faults import Weather
from simulator.history import run_crowd, run_history, run_return
from simulator.options import Far, Options, Sort
from simulator.pool import EnginePool, LeasedPool
from simulator.virtual import World
from simulator.watch import Watch

SEEDS = 60
STEPS = 300

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "lamina_kv")


# -- Lamina, broken ------------------------------------------------------------------------------


def saved_blocks_are_not_leased(patch: Patch) -> None:
    patch.setattr(LeaseBook, "take", lambda book, blocks: BlockLease(None, blocks))


def leases_are_kept(patch: Patch) -> None:
    patch.setattr(BlockLease, "release", lambda lease: None)


def leases_are_released_twice(patch: Patch) -> None:
    patch.setattr(BlockLease, "release", lambda lease: lease._book.give_back(lease.blocks))


def one_failed_rank_ends_it_for_all(patch: Patch) -> None:
    apply = Transfer.apply

    def first(transfer: Transfer, rank: int, item: TransferReceipt) -> bool:
        if item.outcome is Outcome.FAILED and rank in transfer.moving:
            transfer.moving = {rank}
        return apply(transfer, rank, item)

    patch.setattr(Transfer, "apply", first)


def a_change_of_weights_begins_nothing(patch: Patch) -> None:
    begin = Planner.begin
    patch.setattr(Planner, "begin", lambda planner, epoch: begin(planner, planner.epoch))


def waiting_requests_keep_the_keys_of_old_weights(patch: Patch) -> None:
    patch.setattr(RequestRecord, "rename", lambda record, chain: None)


def overdue_saves_are_believed(patch: Patch) -> None:
    overdue = Planner._mark_overdue

    def unpoisoned(planner: Planner) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(planner._saving, "_poison", lambda transfer: None)
            overdue(planner)

    patch.setattr(Planner, "_mark_overdue", unpoisoned)


def overdue_transfers_keep_the_engine_awake(patch: Patch) -> None:
    patch.setattr(TransferTable, "pending", property(lambda table: bool(table._live)))


def slots_are_not_leased(patch: Patch) -> None:
    patch.setattr(SlotIndex, "lease", lambda tier, slot: None)
    patch.setattr(SlotIndex, "release", lambda tier, slot: None)


def a_dropped_slot_is_free_at_once(patch: Patch) -> None:
    patch.setattr(SlotIndex, "_retire", lambda tier, slot: tier._free.append(slot))


def one_token_more_is_saved(patch: Patch) -> None:
    complete = SavePlanner._complete_chunks

    def more(saving: SavePlanner, record: RequestRecord, computed: int) -> int:
        return complete(saving, record, computed + 1)

    patch.setattr(SavePlanner, "_complete_chunks", more)


def nothing_is_left_to_compute(patch: Patch) -> None:
    find = HitFinder.find

    def whole(hits: HitFinder, record: RequestRecord, floor: int, *, far: bool) -> object:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(record.view, "recompute_tokens", 0)
            return find(hits, record, floor, far=far)

    patch.setattr(HitFinder, "find", whole)


def salts_are_not_looked_at(patch: Patch) -> None:
    patch.setattr(
        "lamina_kv.control.planner.ChunkChain",
        lambda namespace, size, extra, *rest: ChunkChain(namespace, size, b"", *rest),
    )


def more_is_saved_than_is_allowed(patch: Patch) -> None:
    refusal = SavePlanner._refusal

    def unbounded(saving: SavePlanner) -> str | None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(saving._transfers, "bytes_in_flight", lambda kind: 0)
            return refusal(saving)

    patch.setattr(SavePlanner, "_refusal", unbounded)


def requests_that_end_while_loading_are_kept(patch: Patch) -> None:
    settle = Planner._settle_load

    def kept(planner: Planner, transfer: Transfer) -> list[LoadEnd]:
        record = planner._requests.get(transfer.request_id)
        ends = settle(planner, transfer)
        if record is not None and record.ended:
            planner._requests[transfer.request_id] = record
        return ends

    patch.setattr(Planner, "_settle_load", kept)


def a_load_that_was_given_up_writes_all_the_same(patch: Patch) -> None:
    def admit(run: LoadRun) -> bool:
        run._writing += 1
        return True

    patch.setattr(LoadRun, "_admit", admit)


def a_row_is_not_waited_for(patch: Patch) -> None:
    wait = LoadRun.wait

    def hasty(run: LoadRun, row: int) -> object:
        return None if row == 0 else wait(run, row)

    patch.setattr(LoadRun, "wait", hasty)


def a_deadline_is_not_looked_at(patch: Patch) -> None:
    patch.setattr(LoadRun, "expired", False)


def a_failed_load_wakes_nobody(patch: Patch) -> None:
    collect = Executor.collect

    def silent(executor: Executor) -> Outcomes:
        outcomes = collect(executor)
        return replace(outcomes, arrived=outcomes.arrived - outcomes.failed)

    patch.setattr(Executor, "collect", silent)


def rows_are_saved_before_they_are_written(patch: Patch) -> None:
    begin = Executor.begin_step

    def hasty(executor: Executor, plan: StepPlan) -> None:
        begin(executor, plan)
        if executor._saves is not None:
            executor._saves.row_written(0)

    patch.setattr(Executor, "begin_step", hasty)


def loaded_blocks_are_not_leased(patch: Patch) -> None:
    make = LoadPlanner.__init__

    def without(loading: LoadPlanner, *args: object, leases_loads: bool, **others: object) -> None:
        make(loading, *args, leases_loads=False, **others)  # type: ignore[arg-type]

    patch.setattr(LoadPlanner, "__init__", without)


def a_parked_request_runs_at_once(patch: Patch) -> None:
    take = HandOff.take_ready

    def hasty(hand_off: HandOff) -> list[Resumption]:
        for entry in hand_off._entries.values():
            if entry.phase is Phase.PARKED:
                entry.phase = Phase.READY
        return take(hand_off)

    patch.setattr(HandOff, "take_ready", hasty)


def a_failed_load_counts(patch: Patch) -> None:
    settle = Planner._settle_load

    def optimistic(planner: Planner, transfer: Transfer) -> list[LoadEnd]:
        return [replace(end, failed=False) for end in settle(planner, transfer)]

    patch.setattr(Planner, "_settle_load", optimistic)


def a_load_begins_before_its_boundary(patch: Patch) -> None:
    patch.setattr(HandOff, "_round_up", lambda hand_off, floor: floor - floor % hand_off._boundary)


def a_ring_is_read_when_the_next_step_is_over(patch: Patch) -> None:
    def ordinary(*order: Any) -> SaveOrder:
        return SaveOrder(*order[:-1])

    patch.setattr("lamina_kv.control.saving.SaveOrder", ordinary)


def a_ring_is_believed_to_hold_more(patch: Patch) -> None:
    def first_kept(group: Group, computed: int) -> int:
        return max(0, computed - 2 * group.window)

    patch.setattr(Group, "first_kept", first_kept)


def half_a_window_is_enough(patch: Patch) -> None:
    def first_token(group: Group, end: int) -> int:
        return max(0, end - group.window // 2)

    patch.setattr(Group, "first_token", first_token)


def a_prompt_is_counted_each_time_it_gets_blocks(patch: Patch) -> None:
    admitted = Planner.admitted

    def counted(planner: Planner, request_id: str, loaded: int) -> None:
        admitted(planner, request_id, loaded)
        record = planner._requests[request_id]
        planner._prompts.count(record, record.view.num_prompt_tokens)

    patch.setattr(Planner, "admitted", counted)


def what_a_request_had_before_it_was_preempted_counts(patch: Patch) -> None:
    patch.setattr(PromptMeter, "interrupted", lambda prompts, record: None)


def what_is_evicted_is_not_told(patch: Patch) -> None:
    lose = SlotIndex._lose

    def silently(index: SlotIndex, key: ChunkKey, *, remembered: bool = False) -> int:
        told, index.on_change = index.on_change, None
        slot = lose(index, key, remembered=remembered)
        index.on_change = told
        return slot

    patch.setattr(SlotIndex, "_lose", silently)


def what_other_weights_have_left_is_told(patch: Patch) -> None:
    patch.setattr(Residency, "begin", lambda residency, epoch: None)


def labels_end_with_their_requests(patch: Patch) -> None:
    def forget(residency: Residency, entry: Any) -> None:
        if not entry.users and not entry.tiers:  # it may still be on its way to a tier
            residency._entries.pop(entry.key, None)
            residency._told.pop(entry.label.name, None)

    patch.setattr(Residency, "_forget_if_unused", forget)


def labels_never_end(patch: Patch) -> None:
    patch.setattr(Residency, "_forget_if_unused", lambda residency, entry: None)


@dataclass(frozen=True)
class Case:
    """How Lamina is broken, and what is to be said of it.

    Attributes:
        broken: breaks it.
        said: a pattern.
        options: an engine that it shows on soon; None for any.
        weather: likewise.
    """

    broken: Callable[[Patch], None]
    said: str
    options: Options | None = None
    weather: Weather | None = None


ASYNC = Options(asynchronous=True, mode="layerwise", prefix_caching=False)
LAYERWISE = Options(ranks=2, mode="layerwise", prefix_caching=False)
PARKED = Options(mode="parked", prefix_caching=False, host_slots=12, chunk_blocks=1)
PIECES = Options(mode="parked", prefix_caching=False, piece_chunks=1, host_slots=12)
HAND_OFF = Options(hand_off=True, prefix_caching=False, blocks=28)
HAND_OFF_PARKED = replace(HAND_OFF, mode="parked", host_slots=12, chunk_blocks=1)
RING = replace(HAND_OFF, ring_blocks=4)
SLOW = Weather(slow=0.2, hang=0.02)
FAR_SLOW = Weather(far_slow=0.5)

DEVICE = Options(device=True, mode="layerwise", prefix_caching=False, asynchronous=True)
DEVICE_PARKED = replace(DEVICE, mode="parked", host_slots=12, chunk_blocks=1)

SLOTS = replace(LAYERWISE, host_slots=12, tiers=(Far("slots", Sort.SLOTS),))
FEW_SLOTS = replace(SLOTS, host_slots=6, tiers=(Far("slots", Sort.SLOTS, room=12),))
ONE_BY_ONE = replace(SLOTS, tiers=(Far("slots", Sort.SLOTS, batch=1),))
KEYS = replace(LAYERWISE, host_slots=12, tiers=(Far("keys", Sort.KEYS),))
BOTH = replace(LAYERWISE, host_slots=12, tiers=SLOTS.tiers + KEYS.tiers)

CASES = [
    Case(saved_blocks_are_not_leased, "is reused while save"),
    Case(leases_are_kept, "there are still|nothing has moved|would step for ever"),
    Case(leases_are_released_twice, "released twice"),
    Case(one_rank_is_enough, "host shows a chunk|is reused while save", LAYERWISE),
    Case(
        one_failed_rank_ends_it_for_all,
        "is given to|is written by a load|released twice",
        replace(PARKED, ranks=2),
        Weather(error=0.2, slow=0.1),
    ),
    Case(identities_are_used_again, "host shows a chunk|is reused while save", LAYERWISE),
    Case(a_change_of_weights_begins_nothing, "host shows a chunk|it should be|a wrong token"),
    Case(waiting_requests_keep_the_keys_of_old_weights, "host shows a chunk|it should be"),
    Case(overdue_saves_are_believed, "is reused while save|host shows a chunk"),
    Case(overdue_transfers_keep_the_engine_awake, "step for ever", None, Weather(hang=0.1)),
    Case(slots_are_not_leased, "is given to", PARKED, SLOW),
    Case(a_dropped_slot_is_free_at_once, "is given to", PARKED, SLOW),
    Case(one_token_more_is_saved, "host shows a chunk"),
    Case(nothing_is_left_to_compute, "it should be"),
    Case(salts_are_not_looked_at, "host shows a chunk|it should be"),
    Case(more_is_saved_than_is_allowed, "saves are in flight"),
    Case(requests_that_end_while_loading_are_kept, "there are still requests"),
    Case(a_load_that_was_given_up_writes_all_the_same, "is written by a load", PIECES, SLOW),
    Case(a_row_is_not_waited_for, "a wrong token", LAYERWISE),
    Case(a_deadline_is_not_looked_at, "still under way", PARKED, SLOW),
    Case(a_failed_load_wakes_nobody, "nothing has moved", PARKED, Weather(error=0.1)),
    Case(rows_are_saved_before_they_are_written, "host shows a chunk", Options(saves_by_rows=True)),
    Case(loaded_blocks_are_not_leased, "is written by a load", HAND_OFF_PARKED, SLOW),
    Case(a_parked_request_runs_at_once, "a wrong token", HAND_OFF_PARKED, SLOW),
    Case(a_failed_load_counts, "a wrong token", HAND_OFF_PARKED, Weather(error=0.1)),
    Case(
        a_load_begins_before_its_boundary,
        "it should be",
        replace(HAND_OFF, prefix_caching=True, boundary_blocks=3),
    ),
    Case(a_ring_is_read_when_the_next_step_is_over, "host shows a chunk", RING),
    Case(a_ring_is_believed_to_hold_more, "host shows a chunk", RING),
    Case(half_a_window_is_enough, "it should be|a wrong token", RING),
    Case(a_prompt_is_counted_each_time_it_gets_blocks, "is counted twice|are counted as"),
    Case(
        what_a_request_had_before_it_was_preempted_counts,
        "are counted as",
        Options(blocks=28, budget=12, max_running=6),
    ),
    # a device that runs behind
    Case(a_save_does_not_wait_for_the_model, "host shows a chunk", DEVICE),
    Case(the_model_does_not_wait_for_a_load, "a wrong token", DEVICE),
    Case(a_load_does_not_wait_for_the_model, "a wrong token", DEVICE),
    Case(a_load_comes_before_the_engines_own_copies, "a wrong token", DEVICE),
    Case(a_save_is_over_when_it_is_launched, "host shows a chunk", DEVICE),
    Case(saved_blocks_are_not_leased, "is reused while save|host shows a chunk", DEVICE),
    Case(a_load_of_a_step_is_over_when_it_is_launched, "was reported as over", DEVICE),
    Case(a_parked_load_has_arrived_when_it_is_launched, "was reported as over", DEVICE_PARKED),
    Case(
        what_was_launched_is_forgotten_when_a_load_is_given_up,
        "was reported as over",
        replace(DEVICE_PARKED, deadline=0.005),
    ),
    Case(
        what_a_copy_has_launched_before_it_failed_is_forgotten,
        "was reported as over|has lost it",
        DEVICE_PARKED,
        Weather(error=0.2),
    ),
    Case(
        the_first_piece_of_a_row_is_as_good_as_the_last,
        "a wrong token",
        replace(DEVICE, piece_chunks=1, chunk_blocks=1),
    ),
    # far tiers
    Case(what_is_read_is_not_verified, "host shows a chunk", SLOTS, Weather(wrong=0.3)),
    Case(any_chunk_is_as_good, "host shows a chunk", KEYS, Weather(wrong=0.5)),
    Case(any_ranks_part_is_as_good, "host shows a chunk", KEYS, Weather(wrong=0.5)),
    Case(what_is_written_is_not_sealed, "does not verify", SLOTS),
    Case(fates_are_not_looked_at, "host shows a chunk", KEYS, Weather(gone=0.2)),
    Case(
        slots_are_dropped_behind_writes,
        "cannot read",
        ONE_BY_ONE,
        Weather(unread=0.5, far_slow=0.7),
    ),
    Case(a_near_slot_is_not_held_while_it_is_written_from, "is given to", SLOTS, FAR_SLOW),
    Case(a_late_move_has_lost_its_near_slot, "is given to", KEYS, Weather(far_hang=0.1)),
    Case(a_far_slot_is_not_held_while_it_is_read, "is given to", FEW_SLOTS, FAR_SLOW),
    Case(what_is_pinned_stays_pinned, "leases on slots", SLOTS),
    Case(more_moves_than_are_allowed, "the bound is", KEYS),
    Case(a_move_inward_that_failed_counts, "host shows a chunk", KEYS, Weather(unread=0.3)),
    Case(a_move_outward_that_failed_counts, "cannot read", SLOTS, Weather(refused=0.3)),
    Case(what_is_gone_is_hoped_for, "is moved from it again", KEYS, Weather(gone=0.3)),
    Case(what_is_damaged_is_kept, "is moved from it again", SLOTS, Weather(wrong=0.3)),
    Case(ranks_need_not_agree, "cannot read", SLOTS, Weather(far_hang=0.1)),
    Case(what_is_not_lasting_is_moved, "weights without a name", BOTH),
    Case(a_wait_for_moves_has_no_end, "is told to ask again", KEYS, Weather(far_hang=0.1)),
    Case(a_wait_for_answers_has_no_end, "is told to ask again", KEYS, Weather(far_hang=0.1)),
    Case(those_who_have_ended_are_not_forgotten, "there are still|step for ever", SLOTS),
    Case(what_is_far_is_loaded, "it should be|is credited with", SLOTS),
    Case(what_came_near_is_counted_twice, "is credited with", SLOTS),
    # what is told of tiers
    Case(what_is_evicted_is_not_told, "told of and not there", SLOTS),
    Case(what_other_weights_have_left_is_told, "told of"),
    Case(labels_end_with_their_requests, "there and not told of", SLOTS, SLOW),
    Case(labels_never_end, "have labels that no tier holds"),
]


def run_histories(case: Case) -> None:
    for seed in range(SEEDS):
        run_history(seed, STEPS, options=case.options, weather=case.weather)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.broken.__name__)
def test_a_broken_promise_is_seen(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.broken(monkeypatch)
    with pytest.raises(Violation, match=case.said):
        run_histories(case)


# -- crowds ------------------------------------------------------------------------------------


def everybody_loads_for_itself(patch: Patch) -> None:
    patch.setattr(SharedLoads, "joins", lambda shared, *arguments: False)


def those_who_wait_are_never_told(patch: Patch) -> None:
    patch.setattr(SharedLoads, "end", lambda shared, load, now, *, well: None)
    patch.setattr(SharedLoads, "waits", lambda shared, record, *_: record.wait.load is not None)


@pytest.mark.parametrize("hand_off", [False, True])
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (everybody_loads_for_itself, "chunks were loaded of a document of"),
        (those_who_wait_are_never_told, "nothing has moved"),
    ],
)
def test_a_crowd_that_is_not_served_is_seen(
    broken: Callable[[Patch], None], said: str, hand_off: bool, monkeypatch: Patch
) -> None:
    broken(monkeypatch)
    with pytest.raises(Violation, match=said):
        run_crowds(hand_off)


def run_crowds(hand_off: bool) -> None:
    for seed in range(SEEDS):
        run_crowd(seed, hand_off=hand_off)


@pytest.mark.parametrize(
    "broken", [answers_are_not_listened_to, nobody_is_asked, only_what_is_near_is_found]
)
def test_a_return_that_finds_nothing_is_seen(
    broken: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    broken(monkeypatch)
    with pytest.raises(Violation, match=r"were found again|step for ever|nothing has moved"):
        run_returns()


def run_returns() -> None:
    for seed in range(SEEDS):
        run_return(seed, sorts=[Sort.KEYS])


# -- the simulator itself ------------------------------------------------------------------------


def test_a_seed_is_a_history() -> None:
    assert run_history(7, STEPS) == run_history(7, STEPS)


def test_histories_are_eventful() -> None:
    counts = sum((run_history(seed, STEPS) for seed in range(12)), Counter[str]())
    for event in (
        "parked loads", "layerwise loads", "saves", "failed loads", "cut", "arrived", "abort",
        "preempt", "complete", "reset", "change weights", "moves outward", "moves inward", "asks",
        "drops", "damage",
    ):  # fmt: skip
        assert counts[event] > 0, event


def test_an_engine_that_does_not_open_leaves_nothing_virtual(monkeypatch: Patch) -> None:
    def refuse(watch: Watch) -> None:
        raise Violation("no")

    monkeypatch.setattr(Watch, "_check_contents", refuse)
    with pytest.raises(Violation, match="no"):
        Simulator(0, Options()).__enter__()
    assert load_pipeline.time is time


def test_a_wrong_byte_is_named() -> None:
    with Simulator(0, Options()) as simulator:
        simulator.submit(range(20), 5)
        simulator.submit(range(100, 120), 5)
        simulator.step()
        (pages,) = (rank.pages for rank in simulator._ranks)
        first, second = (r.blocks() for r in simulator._scheduler.running)
        pages.memory[second[1]] = pages.memory[first[2]]
        with pytest.raises(Violation, match=r"r2 read token 4 in row 0 .* token 8 of r1 "):
            simulator.step()


def test_a_write_beside_the_pages_is_seen() -> None:
    with Simulator(0, Options()) as simulator:
        simulator._ranks[0].pages.memory[3, -1] = 0
        with pytest.raises(Violation, match="gaps between blocks"):
            simulator.drain()


def test_blocks_are_reused_as_vllm_does() -> None:
    pool = EnginePool(6, True, lambda block: None)
    assert pool.take(5) == [1, 2, 3, 4, 5]
    pool.remember(1, 11)
    pool.remember(2, 12)
    pool.release([2, 4, 1, 5])
    assert pool.find(12) == 2
    assert pool.take(3) == [4, 5, 2]
    assert (pool.find(11), pool.find(12)) == (1, None)
    with pytest.raises(Violation, match="freed more often"):
        pool.release([4, 4])


def test_a_lease_on_nobodys_block_is_seen() -> None:
    leased = LeasedPool(EnginePool(6, True, lambda block: None))
    with pytest.raises(Violation, match="nobody holds"):
        leased.hold([3])


def test_virtual_time_passes_when_nothing_is_left_to_run() -> None:
    delays = [0.0, 5.0, float("inf")]
    world = World(Random(0), lambda name: delays.pop(0))
    pool = world._make_pool("save", 3)
    done: list[int] = []
    for number in range(3):
        pool.submit((0, number), partial(done.append, number), pytest.fail)
    start = world.now
    assert world.wait(lambda: len(done) == 2, 60.0)
    assert (sorted(done), world.now - start) == ([0, 1], 5.0)
    assert not world.wait(lambda: len(done) == 3, 60.0)
    assert world.now - start == 65.0
    with pytest.raises(Violation, match="without a deadline"):
        world.wait(lambda: len(done) == 3, float("inf"))
    world.hurry()
    world.settle()
    assert len(done) == 3


def test_a_job_that_stalls_goes_on_behind_the_back_of_those_who_wait() -> None:
    world = World(Random(0), lambda name: 5.0)
    pool = world._make_pool("load", 1)
    said: list[str] = []

    def job() -> None:
        said.append("begins")
        world.stall()
        said.append("goes on")

    pool.submit((0, 0), job, pytest.fail)
    assert not world.wait(lambda: len(said) == 2, 1.0)
    said.append("is given up")
    assert world.wait(lambda: len(said) == 3, 10.0)
    assert said == ["begins", "is given up", "goes on"]
