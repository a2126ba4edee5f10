"""vLLM's V2 model runner around the real connector, on a device that runs behind its host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf

import pytest

from engine.v2_step import CHUNK_BLOCKS, Forward, Work, Worker
from lamina.engines.vllm.layout import UnsupportedModel
from lamina.engines.vllm.step_order import StepOrderError
from lamina.plan import (
    ChunkKey,
    ChunkLoad,
    LoadMode,
    LoadOrder,
    Outcome,
    SaveOrder,
    StepPlan,
    TierName,
    TransferId,
)

pytestmark = pytest.mark.engine

KEY = ChunkKey(b"k" * 16)
SAVED, LOADED = tuple(range(1, 1 + CHUNK_BLOCKS)), tuple(range(5, 5 + CHUNK_BLOCKS))
STAMP, STALE = 7, 99
GOOD = dict.fromkeys(LOADED, STAMP)


def save(number: int = 1) -> SaveOrder:
    return SaveOrder(TransferId(number), "r", KEY, 0, SAVED)


def load(number: int = 2, mode: LoadMode = LoadMode.LAYERWISE) -> LoadOrder:
    chunk = ChunkLoad(KEY, TierName.HOST, 0, 0, LOADED)
    return LoadOrder(TransferId(number), "r", mode, (chunk,), inf)


Start = Callable[..., Worker]


@pytest.fixture
def start() -> Iterator[Start]:
    workers: list[Worker] = []
    with pytest.MonkeyPatch.context() as patch:

        def start(**options: object) -> Worker:
            workers.append(Worker(patch, **options))
            return workers[-1]

        yield start
        for worker in workers:
            worker.close()


def fill(worker: Worker) -> None:
    """A chunk is in the host tier, and other bytes are where it is to be loaded."""
    receipts = worker.step(StepPlan(0, saves=(save(),)), Work(writes=dict.fromkeys(SAVED, STAMP)))
    receipts += worker.settle(1 - len(receipts))
    assert [receipt.outcome for receipt in receipts] == [Outcome.DONE]
    worker.stamp(dict.fromkeys(LOADED, STALE))


def expect_loaded(worker: Worker, forward: Forward = Forward.EAGER) -> None:
    """A step with a load reads what was saved, however late the load stream is."""
    work = Work(reads=GOOD)
    works = [work, work] if forward is Forward.MICRO_BATCHES else work
    with worker.mover.loads.stopped():
        receipts = worker.step(StepPlan(0, loads=(load(),)), works, forward, draft=work)
        worker.compute.settle()
    assert worker.finish() == []
    receipts += worker.settle(1 - len(receipts))
    assert [receipt.outcome for receipt in receipts] == [Outcome.DONE]


def test_rows_are_there_when_layers_read_them(start: Start) -> None:
    worker = start()
    fill(worker)
    expect_loaded(worker)


def test_a_device_that_does_not_wait_is_seen_here(start: Start) -> None:
    """The harness itself: if nothing holds its stream, layers read what was there before."""
    worker = start()
    fill(worker)
    worker.mover.hold_compute = lambda fence: None
    with worker.mover.loads.stopped():
        worker.step(StepPlan(0, loads=(load(),)), Work(reads=GOOD))
        worker.compute.settle()
    assert len(worker.finish()) == len(worker.layers) * CHUNK_BLOCKS


def test_two_micro_batches_wait_for_the_rows_they_share(start: Start) -> None:
    worker = start(micro_batches=True)
    fill(worker)
    expect_loaded(worker, Forward.MICRO_BATCHES)


def test_a_row_is_saved_when_the_device_has_written_it(start: Start) -> None:
    worker = start()
    with worker.compute.stopped():  # all hooks have been called before a layer has run
        receipts = worker.step(
            StepPlan(0, saves=(save(),)), Work(writes=dict.fromkeys(SAVED, STAMP))
        )
    assert worker.settle(1 - len(receipts))[0].outcome is Outcome.DONE
    worker.stamp(dict.fromkeys(LOADED, STALE))
    expect_loaded(worker)


def test_a_full_graph_calls_no_hook_and_all_its_rows_are_saved(start: Start) -> None:
    worker = start()
    receipts = worker.step(
        StepPlan(0, saves=(save(),)),
        Work(writes=dict.fromkeys(SAVED, STAMP)),
        Forward.FULL_GRAPH,
    )
    assert worker.settle(1 - len(receipts))[0].outcome is Outcome.DONE
    worker.stamp(dict.fromkeys(LOADED, STALE))
    expect_loaded(worker)


def test_a_parked_load_runs_beside_a_full_graph(start: Start) -> None:
    worker = start()
    fill(worker)
    plan = StepPlan(0, loads=(load(mode=LoadMode.PARKED),), outstanding=True)
    receipts = worker.step(plan, Work(writes={0: 3}), Forward.FULL_GRAPH)
    receipts += worker.settle(1 - len(receipts))
    assert receipts[0].outcome is Outcome.DONE
    assert {stamp for block in LOADED for stamp in worker.pages("layer.0", block)} == {STAMP}


def test_drafts_wait_for_their_rows_and_theirs_are_saved_when_they_have_written(
    start: Start,
) -> None:
    """vLLM 0.32 runs drafts before the step ends, 0.33 after its results were collected."""
    worker = start(drafts=["draft.0"])
    written = Work(writes=dict.fromkeys(SAVED, STAMP))
    receipts = worker.step(StepPlan(0, saves=(save(),)), written, draft=written)
    assert worker.settle(1 - len(receipts))[0].outcome is Outcome.DONE
    worker.stamp(dict.fromkeys(LOADED, STALE))
    expect_loaded(worker)


def test_a_step_that_vllm_does_not_end_is_an_error(start: Start) -> None:
    worker = start()
    worker.begin(StepPlan(0))
    with pytest.raises(StepOrderError, match="handle_preemptions"):
        worker.begin(StepPlan(0))


def test_a_cache_that_the_network_knows_of_does_not_sleep(start: Start) -> None:
    """vLLM 0.32 does not ask, and would."""
    with pytest.raises(UnsupportedModel, match="push: does not go with --enable-sleep-mode"):
        start(lamina={"host": {"capacity": "1MiB"}, "push": {}}, sleeps=True)


def test_nothing_is_called_while_vllm_warms_up(start: Start) -> None:
    worker = start()
    worker.lamina.wait_for_layer_load = None  # type: ignore[method-assign]
    worker.warm_up()
    assert worker.finish() == []
