"""What a waiting request needs comes nearer meanwhile, from disk to host memory: the first
come first, never more than there is room for, and nothing for those that wait no longer."""

from __future__ import annotations

import pytest
from driven_planner import BLOCK, CHUNK, CHUNK_BYTES, Engine, View, prompt

from lamina.keys import CHECKPOINT
from lamina.plan import FetchOrder, LoadMode, Outcome, TierName


def on_disk(engine: Engine, tokens: list[int]) -> None:
    """Let a prompt be on disk, and not in host memory."""
    engine.save(View("writer", tokens))
    while engine.planner.has_work:
        engine.settle_writes()
    engine.planner._catalog.host.clear()


def fetching(**settings: object) -> Engine:
    disk = {"path": "/store", "capacity": "1GiB", **settings}
    return Engine({"disk": disk, "load": {"when": "always"}}, host_slots=12, disk_slots=100)


def answer(engine: Engine, *orders: FetchOrder, outcome: Outcome = Outcome.DONE) -> None:
    engine.answer(*(order.transfer for order in orders), outcome=outcome)


def test_what_a_waiting_request_needs_is_in_the_host_when_it_runs() -> None:
    engine, tokens = fetching(), prompt(4 * CHUNK + 1)
    on_disk(engine, tokens)
    view = View("waiting", tokens)
    engine.planner.arrived(view)
    orders = engine.step().fetches
    assert len(orders) == 4
    assert engine.planner.has_work
    answer(engine, *orders)
    assert not engine.planner.has_work
    hit = engine.planner.lookup(view, 0)
    engine.planner.admitted("waiting", hit.tokens)
    (load,) = engine.step().loads
    assert {chunk.tier for chunk in load.chunks} == {TierName.HOST}
    assert load.mode is LoadMode.LAYERWISE
    assert engine.count("fetch_bytes") == 4 * CHUNK_BYTES


def test_a_request_that_was_looked_up_before_runs_from_the_host_all_the_same() -> None:
    engine, tokens = fetching(), prompt(4 * CHUNK + 1)
    on_disk(engine, tokens)
    view = View("waiting", tokens)
    engine.planner.arrived(view)
    assert engine.planner.lookup(view, 0).mode is LoadMode.LAYERWISE
    answer(engine, *engine.step().fetches)
    engine.planner.lookup(view, 0)
    assert engine.planner.hit_sources("waiting") == {TierName.HOST: 4 * CHUNK}


def test_what_is_in_the_host_is_not_fetched() -> None:
    engine, tokens = fetching(), prompt(4 * CHUNK + 1)
    on_disk(engine, tokens)
    engine.save(View("half", tokens[: 2 * CHUNK + 1]))
    engine.planner.arrived(View("waiting", tokens))
    assert len(engine.step().fetches) == 2


def test_a_host_that_is_full_for_a_while_costs_a_request_nothing_of_its_fetch() -> None:
    engine, tokens = fetching(), prompt(4 * CHUNK + 1)
    on_disk(engine, tokens)
    host = engine.planner._catalog.host
    for number in range(host.slots):  # everything is being read
        key = bytes([number]) * 32
        slot = host.reserve(key)
        assert slot is not None
        host.publish(key)
        host.lease(slot)
    engine.planner.arrived(View("waiting", tokens))
    assert not engine.step().fetches
    for slot in range(host.slots):
        host.release(slot)
    assert len(engine.step().fetches) == 4


def test_two_that_need_the_same_fetch_it_once() -> None:
    engine, tokens = fetching(), prompt(2 * CHUNK + 1)
    on_disk(engine, tokens)
    engine.planner.arrived(View("one", tokens))
    engine.planner.arrived(View("other", tokens))
    assert len(engine.step().fetches) == 2


def test_no_more_are_on_their_way_than_there_is_room_for() -> None:
    engine, tokens = fetching(fetch_ahead=2 * CHUNK_BYTES), prompt(5 * CHUNK + 1)
    on_disk(engine, tokens)
    engine.planner.arrived(View("waiting", tokens))
    first = engine.step().fetches
    assert (len(first), len(engine.step().fetches)) == (2, 0)
    answer(engine, first[0])
    assert len(engine.step().fetches) == 1


def test_a_chunk_that_is_larger_than_the_bound_goes_alone() -> None:
    engine, tokens = fetching(fetch_ahead=CHUNK_BYTES // 2), prompt(3 * CHUNK + 1)
    on_disk(engine, tokens)
    engine.planner.arrived(View("waiting", tokens))
    assert len(engine.step().fetches) == 1


def test_those_who_came_last_leave_what_was_fetched_for_the_first() -> None:
    engine, first, last = fetching(), prompt(5 * CHUNK + 1), prompt(5 * CHUNK + 1, seed=1)
    on_disk(engine, first)
    on_disk(engine, last)
    engine.planner.arrived(View("first", first))
    engine.planner.arrived(View("last", last))
    orders = engine.step().fetches
    assert len(orders) == 6, "half of the host's slots"
    answer(engine, *orders)
    assert engine.step().fetches == ()
    hit = engine.planner.lookup(View("first", first), 0)
    engine.planner.admitted("first", hit.tokens)
    assert len(engine.step().fetches) == 4


@pytest.mark.parametrize("end", ["admitted", "finished"])
def test_nothing_more_is_fetched_for_one_that_waits_no_longer(end: str) -> None:
    engine, tokens = fetching(fetch_ahead=CHUNK_BYTES), prompt(4 * CHUNK + 1)
    on_disk(engine, tokens)
    view = View("waiting", tokens)
    engine.planner.arrived(view)
    (order,) = engine.step().fetches
    if end == "admitted":
        engine.planner.lookup(view, 4 * CHUNK)
        engine.planner.admitted("waiting", 0)
    else:
        engine.planner.finished("waiting", 0, [()])
    answer(engine, order)
    assert engine.step().fetches == ()
    assert not engine.planner.has_work


def test_a_damaged_chunk_is_forgotten_and_its_slot_comes_back() -> None:
    engine, tokens = fetching(), prompt(CHUNK + 1)
    on_disk(engine, tokens)
    engine.planner.arrived(View("waiting", tokens))
    (order,) = engine.step().fetches
    engine.answer(order.transfer, outcome=Outcome.FAILED, bad=(order.key,))
    plan = engine.step()
    assert plan.drop_disk == (order.disk_slot,)
    assert engine.planner.lookup(View("next", tokens), 0).tokens == 0
    assert engine.planner._catalog.host.used == 0
    assert engine.count("failures", "fetch_test") == 1


def test_what_comes_from_disk_is_not_found_after_a_reset() -> None:
    engine, tokens = fetching(), prompt(CHUNK + 1)
    on_disk(engine, tokens)
    engine.planner.arrived(View("waiting", tokens))
    orders = engine.step().fetches
    engine.planner.reset()
    answer(engine, *orders)
    assert engine.planner.lookup(View("next", tokens), 0).tokens == 0
    engine.planner.begin(CHECKPOINT)
    assert engine.planner.lookup(View("last", tokens), 0).tokens == CHUNK


def test_nothing_is_fetched_from_a_disk_that_is_out_of_use() -> None:
    engine, tokens = fetching(), prompt(4 * CHUNK + 1)
    on_disk(engine, tokens)
    for seed in range(3):
        engine.planner.arrived(View(f"waiting {seed}", tokens))
        answer(engine, *engine.step().fetches, outcome=Outcome.FAILED)
    engine.planner.arrived(View("after", tokens))
    assert engine.step().fetches == ()


def test_a_fetch_that_failed_takes_no_room() -> None:
    engine, tokens = fetching(), prompt(6 * CHUNK + 1)
    on_disk(engine, tokens)
    engine.planner.arrived(View("first", tokens))
    answer(engine, *engine.step().fetches, outcome=Outcome.FAILED)
    engine.planner.arrived(View("next", tokens))
    assert len(engine.step().fetches) == 6


def test_it_can_be_switched_off() -> None:
    engine, tokens = fetching(fetch_ahead=None), prompt(4 * CHUNK + 1)
    on_disk(engine, tokens)
    engine.planner.arrived(View("waiting", tokens))
    assert engine.step().fetches == ()


def test_half_a_chunk_at_the_end_is_fetched_whole() -> None:
    engine, tokens = fetching(), prompt(2 * CHUNK)
    on_disk(engine, tokens)
    view = View("waiting", tokens)  # one token is computed, so that half of a chunk is loaded
    engine.planner.arrived(view)
    assert len(engine.step().fetches) == 2
    assert engine.planner.lookup(view, 0).tokens == 2 * CHUNK - BLOCK


def test_a_fetch_that_had_to_wait_says_nothing_of_the_disk() -> None:
    engine, tokens = fetching(), prompt(3 * CHUNK + 1)
    on_disk(engine, tokens)
    engine.planner.arrived(View("waiting", tokens))
    engine.step()
    engine.wait(1000.0)
    assert engine.planner.lookup(View("next", tokens), 0).tokens == 3 * CHUNK


def test_an_adapter_that_was_loaded_anew_meanwhile_has_keys_of_its_own() -> None:
    engine, tokens = fetching(), prompt(2 * CHUNK + 1)
    on_disk(engine, tokens)
    engine.planner.arrived(View("waiting", tokens))
    assert engine.planner.lookup(View("waiting", tokens, root_extra=b"new"), 0).tokens == 0
