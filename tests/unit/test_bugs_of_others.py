"""Bugs that other systems of this kind have shipped, each as the history that shows it.

The number is the one under which it was fixed or reported there. ``docs/reliability.md`` lists
these, and those whose history is a test elsewhere.
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
    outward,
    prompt,
)

from lamina_kv.plan import LoadMode, Outcome, Receipt, TransferReceipt

CHUNKS = 3
TOKENS = prompt(CHUNKS * CHUNK + 8)


@pytest.fixture
def engine() -> Engine:
    """An engine whose host tier holds the whole chunks of :data:`TOKENS`."""
    engine = Engine()
    engine.save(View("first", TOKENS))
    return engine


def start_load(engine: Engine, view: View, floor: int = 0) -> None:
    hit = engine.planner.lookup(view, floor)
    engine.planner.admitted(view.request_id, hit.tokens)


def test_atom_2175_an_abort_between_lookup_and_allocation_leaves_no_pin(engine: Engine) -> None:
    """There, the pin of the lookup leaked and kept the engine awake."""
    assert engine.planner.lookup(View("gone", TOKENS), 0).tokens == CHUNKS * CHUNK
    assert engine.leases == 0
    engine.planner.finished("gone", 0, [])
    assert not engine.planner.has_work
    assert not engine.planner._requests


def test_atom_1026_the_floor_is_that_of_the_allocation_and_not_of_an_earlier_lookup(
    engine: Engine,
) -> None:
    """There, a load decided on floor 0 overwrote blocks that the engine had found meanwhile."""
    view = View("waits", TOKENS)
    assert engine.planner.lookup(view, 0).tokens == CHUNKS * CHUNK
    hit = engine.planner.lookup(view, CHUNK + BLOCK)
    engine.planner.admitted("waits", hit.tokens)
    (order,) = engine.step().loads
    first = view.first_block + (CHUNK + BLOCK) // BLOCK
    assert blocks_of(order) == list(range(first, view.first_block + CHUNKS * CHUNK // BLOCK))


def test_atom_2146_a_load_that_was_promised_is_ordered_though_nothing_runs(engine: Engine) -> None:
    """There, a parked request waited for a load that no step ever carried."""
    planner = engine.planner
    other = View("other", prompt(CHUNK + 1, seed=9), first_block=50)
    planner.lookup(other, 0)
    planner.admitted("other", 0)
    start_load(engine, View("parked", TOKENS))
    assert planner.has_work
    plan = engine.step()
    assert [order.mode for order in plan.loads] == [LoadMode.PARKED]
    assert planner.has_work, "the receipt has yet to come"


def test_atom_1882_a_request_wakes_only_when_the_last_rank_has_ended(engine: Engine) -> None:
    """There, the first rank that failed woke it while others still wrote into its blocks."""
    engine = Engine(ranks=3)
    engine.save(View("first", TOKENS))
    start_load(engine, View("a", TOKENS))
    (order,) = engine.step().loads
    engine.answer(order.transfer, outcome=Outcome.FAILED, ranks=[1])
    engine.answer(order.transfer, ranks=[0])
    assert engine.planner._books.transfers.get(order.transfer) is not None
    assert engine.leases == CHUNKS
    engine.answer(order.transfer, ranks=[2])
    assert engine.planner._books.transfers.get(order.transfer) is None
    assert engine.leases == 0


def test_atom_1882_the_last_save_is_reported_though_no_request_is_left() -> None:
    """There, the loops were gated on the scheduler having requests."""
    engine = Engine()
    view = View("last", TOKENS)
    start_load(engine, view)
    plan = engine.step(("last", len(TOKENS)))
    engine.planner.finished("last", len(TOKENS), [view.blocks()])
    assert engine.planner.has_work
    engine.answer(*(order.transfer for order in plan.saves))
    assert not engine.planner.has_work
    assert engine.planner.lookup(View("next", TOKENS), 0).tokens == CHUNKS * CHUNK


def test_atom_g_a_preempted_request_loads_what_it_had_generated_too(engine: Engine) -> None:
    """There, the resume counted from the prompt and skipped generated tokens."""
    view = View("long", TOKENS[:40])
    start_load(engine, view)
    view.token_ids = prompt(CHUNKS * CHUNK + 8)  # it has generated past two more chunks
    plan = engine.step(("long", len(view.token_ids) - 1))
    engine.answer(*(o.transfer for o in (*plan.loads, *plan.saves)))
    hit = engine.planner.lookup(view, 0)  # preempted, and back
    assert hit.tokens == CHUNKS * CHUNK
    assert view.num_prompt_tokens == 40


def test_atom_h_an_old_epochs_end_does_not_end_the_new_load(engine: Engine) -> None:
    """There, a second load was taken for ended because the first one had been."""
    view = View("twice", TOKENS)
    start_load(engine, view)
    (first,) = engine.step().loads
    engine.answer(first.transfer, outcome=Outcome.FAILED)
    engine.planner.finished("twice", 0, [])
    again = View("twice", TOKENS)  # the name comes back
    start_load(engine, again)
    (second,) = engine.step().loads
    engine.answer(first.transfer)
    assert engine.planner._requests["twice"].load == second.transfer
    assert engine.leases == CHUNKS
    engine.planner.finished("twice", 0, [])
    engine.answer(second.transfer)
    assert engine.leases == 0
    assert not engine.planner._requests


def test_atom_i_a_prompt_of_whole_chunks_that_is_wholly_kept_is_loaded_but_for_its_end(
    engine: Engine,
) -> None:
    """There, such a hit moved all of its bytes and then always failed."""
    view = View("whole", TOKENS[: CHUNKS * CHUNK])
    start_load(engine, view)
    (order,) = engine.step().loads
    tokens = len(blocks_of(order)) * BLOCK
    assert tokens == engine.planner.lookup(View("same", view.token_ids), 0).tokens
    assert tokens == CHUNKS * CHUNK - BLOCK
    engine.answer(order.transfer)
    assert not engine.planner._requests["whole"].delivery.failed


def test_atom_2132_a_save_that_failed_leaves_no_hole_that_is_taken_for_a_chunk() -> None:
    """There, the watermark had moved on, and the prefix was believed to be whole."""
    engine = Engine()
    view = View("holes", TOKENS)
    start_load(engine, view)
    plan = engine.step(("holes", len(TOKENS)))
    keys, (first, *others) = engine.keys(plan), plan.saves
    engine.answer(first.transfer, outcome=Outcome.FAILED)
    engine.answer(*(order.transfer for order in others))
    assert engine.planner.lookup(View("next", TOKENS), 0).tokens == 0
    engine.planner.admitted("next", 0)
    again = engine.step(("next", len(TOKENS)))
    assert engine.keys(again) == keys[:1], "only what is missing is saved"


def test_atom_2201_saves_that_are_not_reported_do_not_pile_up() -> None:
    """There, 141 saves were pending at a concurrency of 96."""
    engine = Engine({"save": {"max_inflight": 4 * CHUNK_BYTES}})
    for seed in range(50):
        view = View(f"r{seed}", prompt(2 * CHUNK + 1, seed), first_block=1 + 10 * seed)
        start_load(engine, view)
        engine.step((view.request_id, len(view.token_ids)))
        assert len(engine.planner._books.transfers) <= 4


def test_atom_2261_a_rank_that_never_reports_does_not_hold_blocks_for_ever() -> None:
    """There, a lost report of one rank pinned blocks until nothing could run."""
    engine = Engine(ranks=2)
    view = View("pinned", TOKENS)
    start_load(engine, view)
    plan = engine.step(("pinned", len(TOKENS)))
    engine.answer(*(order.transfer for order in plan.saves), ranks=[0])
    engine.planner.finished("pinned", len(TOKENS), [view.blocks()])
    assert engine.pool.held
    engine.wait(31)
    assert not engine.pool.held
    assert not engine.planner.has_work
    assert engine.planner.lookup(View("next", TOKENS), 0).tokens == 0


def test_atom_1807_what_was_parked_is_counted_once_however_it_ends() -> None:
    """There, parked requests were counted at one place and uncounted at another."""
    engine = Engine({"load": {"mode": "parked"}})
    engine.save(View("first", TOKENS))
    other = View("other", prompt(CHUNK + 1, seed=9), first_block=50)
    start_load(engine, other)
    for name, outcome in (("good", Outcome.DONE), ("bad", Outcome.FAILED), ("gone", Outcome.DONE)):
        start_load(engine, View(name, TOKENS))
        (order,) = (o for o in engine.step().loads if o.request_id == name)
        assert order.mode is LoadMode.PARKED
        if name == "gone":
            engine.planner.finished(name, 0, [])
            engine.answer(order.transfer, outcome=outcome)
        else:
            engine.answer(order.transfer, outcome=outcome)
            engine.planner.admitted(name, 0)  # as vLLM calls it again when it resumes
            engine.planner.finished(name, 0, [])
    engine.planner.finished("other", 0, [])
    readings = engine.readings().counters
    assert readings["lookups", ()] == 5  # with the one that filled the tier
    assert not engine.planner._requests


def test_ucm_1088_a_block_that_falls_out_of_a_window_is_held_until_it_is_read() -> None:
    """There, freeing was delayed for whole requests, but a sliding window recycles the blocks of
    one that is running."""
    engine = Engine()
    view = View("window", TOKENS)
    start_load(engine, view)
    plan = engine.step(("window", len(TOKENS)))
    read = {block for order in plan.saves for block in order.blocks}
    engine.pool.hold(sorted(read))  # the request's own reference ...
    engine.pool.free(sorted(read))  # ... which the window gives up while it runs
    assert engine.pool.held == read
    engine.answer(plan.saves[0].transfer)
    assert engine.pool.held == read - set(plan.saves[0].blocks)


def test_ucm_1035_nothing_computed_on_a_failed_load_is_kept() -> None:
    """There, it was saved under good keys in the same step."""
    engine = Engine({"load": {"mode": "layerwise"}})
    engine.save(View("first", TOKENS))
    tokens = [*TOKENS[: 2 * CHUNK], *prompt(2 * CHUNK, seed=4)]
    view = View("poison", tokens)
    start_load(engine, view)
    plan = engine.step(("poison", len(tokens)))
    (load,) = plan.loads
    assert load.mode is LoadMode.LAYERWISE
    keys = engine.keys(plan)
    saved = [TransferReceipt(order.transfer, Outcome.DONE) for order in plan.saves]
    failed = TransferReceipt(load.transfer, Outcome.FAILED, reason="test")
    engine.planner.receive([Receipt(0, (*saved, failed))])
    assert engine.planner.lookup(View("next", tokens), 0).tokens <= 2 * CHUNK
    assert keys
    assert not any(engine.near.holds(key) for key in keys)


def test_ucm_1007_after_a_failed_load_saving_starts_again_at_the_valid_prefix(
    engine: Engine,
) -> None:
    """There, the count of processed tokens stayed ahead: more keys than blocks."""
    view = View("again", [*TOKENS[: CHUNKS * CHUNK], *prompt(CHUNK, seed=4)])
    start_load(engine, view)
    (load,) = engine.step().loads
    engine.answer(load.transfer, outcome=Outcome.FAILED)
    engine.near.drop(keys_of(TOKENS)[1])
    plan = engine.step(("again", view.num_tokens))
    _, second, _, fourth = keys_of(view.token_ids)
    assert engine.keys(plan) == [second, fourth]
    assert all(len(order.blocks) == CHUNK // BLOCK for order in plan.saves)


def test_lmcache_2106_a_receipt_that_comes_twice_or_late_loses_no_wakeup(engine: Engine) -> None:
    """There, requests hung on completions that were taken for others."""
    start_load(engine, View("a", TOKENS))
    (order,) = engine.step().loads
    stranger = TransferReceipt(type(order.transfer)(10_000), Outcome.DONE)
    good = TransferReceipt(order.transfer, Outcome.DONE)
    for items in ((stranger,), (good, good), (good,), (stranger, good)):
        engine.planner.receive([Receipt(0, items)])
    assert engine.planner._requests["a"].load is None
    assert engine.leases == 0
    assert not engine.planner.has_work


def test_vllm_45388_a_tier_that_never_answers_ends_every_wait() -> None:
    """There, and in others, a lookup or load waited without bound."""
    engine = Engine(far_slots=8, stored=dict(enumerate(keys_of(TOKENS))))
    view = View("waits", TOKENS)
    assert engine.planner.lookup(view, 0).ask_again
    assert inward(engine.step())
    for _ in range(3):
        engine.now += 10
        engine.planner.lookup(view, 0)
    offer = engine.planner.lookup(view, 0)
    assert (offer.tokens, offer.ask_again) == (0, False)
    engine.step()
    assert not engine.planner.has_work, "the engine is not kept awake"


def test_vllm_54779_a_tier_holds_what_it_was_given_and_no_more() -> None:
    """There, the store on disk grew without bound."""
    engine = Engine(far_slots=4)
    for seed in range(30):
        engine.save(View(f"s{seed}", prompt(2 * CHUNK + 1, seed)))
        assert all(move.far < 4 for move in outward(engine.settle_moves()))
        assert engine.far.used <= 4


def test_atom_1026_a_chunk_that_one_rank_lacks_is_not_promised_by_the_others() -> None:
    """There, ranks looked for themselves, and one promised what another could not keep."""
    engine = Engine(ranks=2)
    start_load(engine, View("c", TOKENS))
    plan = engine.step(("c", len(TOKENS)))
    engine.answer(*(order.transfer for order in plan.saves), ranks=[0])
    assert engine.planner.lookup(View("d", TOKENS), 0).tokens == 0
    assert engine.near.used == CHUNKS
