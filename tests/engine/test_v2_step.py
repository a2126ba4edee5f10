"""vLLM's V2 model runner around the real connector, on a device that runs behind its host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

from engine.v2_step import CHUNK_BLOCKS, Forward, Work, Worker
from lamina_kv.data.executor import Executor
from lamina_kv.data.movers import Fence
from lamina_kv.data.step_loads import LayersDidNotWait, StepLoads
from lamina_kv.engines.vllm import worker_side
from lamina_kv.engines.vllm.connector import LaminaConnector
from lamina_kv.engines.vllm.layout import UnsupportedModel
from lamina_kv.engines.vllm.step_order import StepOrderError
from lamina_kv.plan import (
    LoadMode,
    LoadOrder,
    Outcome,
    PageMap,
    SaveOrder,
    StepPlan,
    TransferId,
)

pytestmark = pytest.mark.engine

SAVED, LOADED = tuple(range(1, 1 + CHUNK_BLOCKS)), tuple(range(5, 5 + CHUNK_BLOCKS))
STAMP, STALE = 7, 99
GOOD = dict.fromkeys(LOADED, STAMP)
FULL = CUDAGraphMode.FULL


def save(number: int = 1) -> SaveOrder:
    return SaveOrder(TransferId(number), "r", 0, SAVED)


def load(number: int = 2, mode: LoadMode = LoadMode.LAYERWISE) -> LoadOrder:
    near = np.arange(CHUNK_BLOCKS, dtype=np.int32)
    pages = PageMap(0, near, np.array(LOADED, np.int32))
    return LoadOrder(TransferId(number), "r", mode, (pages,), 30.0)


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
    written = Work(writes=dict.fromkeys(SAVED, STAMP))
    receipts = worker.step(StepPlan(0, saves=(save(),)), written, draft=written)
    receipts += worker.settle(1 - len(receipts))
    assert [receipt.outcome for receipt in receipts] == [Outcome.DONE]
    worker.stamp(dict.fromkeys(LOADED, STALE))


def expect_loaded(worker: Worker, forward: Forward = Forward.EAGER) -> None:
    """A step with a load reads what was saved, however late the load stream is."""
    work = Work(reads=GOOD)
    works = [work, work] if forward is Forward.MICRO_BATCHES else work
    with worker.mover.loads.stopped():
        receipts = worker.step(StepPlan(0, loads=(load(),)), works, forward, draft=work)
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


@pytest.mark.parametrize("mute", [["layer.1"], ["layer.0", "layer.1", "layer.2"]])
def test_layers_that_do_not_call_although_their_class_does_stop_the_engine(
    start: Start, mute: list[str]
) -> None:
    worker = start(mute=mute)
    fill(worker)
    with pytest.raises(LayersDidNotWait, match=mute[0]):
        worker.step(StepPlan(0, loads=(load(),), saves=(save(3),)))
    with pytest.raises(RuntimeError):
        worker.step(StepPlan(0))


def test_a_layer_that_calls_no_hook_finds_its_row(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """An indexer of sparse attention beside attention that calls."""
    worker = start(silent=["layer.1"])
    assert "layers layer.1 do not call KV connectors" in caplog.text
    fill(worker)
    expect_loaded(worker)


@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE"])
def test_a_full_graph_that_is_replayed_without_hooks_finds_its_rows(
    start: Start, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """As with vLLM's fusion of attention and quantisation, whatever the connector has asked for."""
    worker = start(graphs=CUDAGraphMode[mode])
    assert f"CUDA graphs ({mode}) hold" in caplog.text
    fill(worker)
    expect_loaded(worker, Forward.FULL_GRAPH)
    worker.stamp(dict.fromkeys(LOADED, STALE))
    expect_loaded(worker)


def test_a_full_graph_that_nobody_knew_of_stops_the_engine(start: Start) -> None:
    worker = start()
    fill(worker)
    with pytest.raises(LayersDidNotWait):
        worker.step(StepPlan(0, loads=(load(),)), Work(), Forward.FULL_GRAPH)


def test_a_draft_model_in_a_full_graph_finds_its_rows(start: Start) -> None:
    worker = start(drafts=["draft.0"], mute=["draft.0"])
    fill(worker)
    copy = worker.mover.load

    def slowly(rows: Sequence[int], *arguments: Any) -> Fence:
        if len(worker.layers) in rows:
            worker.mover.loads.launch(lambda: time.sleep(0.05))
        return copy(rows, *arguments)

    worker.mover.load = slowly  # type: ignore[method-assign]
    expect_loaded(worker)


def test_a_draft_model_need_not_run(start: Start) -> None:
    """As where a prompt is too long for it."""
    worker = start(drafts=["draft.0"])
    fill(worker)
    worker.drafts = ()
    expect_loaded(worker)


def test_a_last_layer_that_does_not_wait_is_missed_where_tokens_are_guessed(start: Start) -> None:
    """There is no draft model that it could be of."""
    worker = start(guesses=True, mute=["layer.2"])
    fill(worker)
    with pytest.raises(LayersDidNotWait, match=r"layer\.2"):
        expect_loaded(worker)


def test_a_row_is_saved_when_both_micro_batches_have_written_it(start: Start) -> None:
    """The second one writes long after the first one's hook, and after the row could be copied."""
    worker = start(micro_batches=True)
    first, second = ({block: STAMP} for block in SAVED)

    def copied() -> None:  # whoever copies now copies too early
        assert worker.lamina._on_worker.executor._saver.pool.await_idle(60)

    receipts = worker.step(
        StepPlan(0, saves=(save(),)),
        [Work(writes=first), Work(writes=second)],
        Forward.MICRO_BATCHES,
        between=copied,
    )
    receipts += worker.settle(1 - len(receipts))
    assert receipts[0].outcome is Outcome.DONE
    worker.stamp(dict.fromkeys(LOADED, STALE))
    expect_loaded(worker, Forward.MICRO_BATCHES)


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
    receipts += worker.settle(1 - len(receipts))
    assert receipts[0].outcome is Outcome.DONE
    worker.stamp(dict.fromkeys(LOADED, STALE))
    expect_loaded(worker)


def test_a_full_graph_calls_no_hook_and_all_its_rows_are_saved(start: Start) -> None:
    worker = start()
    receipts = worker.step(
        StepPlan(0, saves=(save(),)),
        Work(writes=dict.fromkeys(SAVED, STAMP)),
        Forward.FULL_GRAPH,
    )
    receipts += worker.settle(1 - len(receipts))
    assert receipts[0].outcome is Outcome.DONE
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
    receipts += worker.settle(1 - len(receipts))
    assert receipts[0].outcome is Outcome.DONE
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


# -- Lamina, broken ------------------------------------------------------------------------------


Patch = pytest.MonkeyPatch


def every_layer_is_taken_to_call(patch: Patch) -> None:
    patch.setattr(worker_side, "silent_layers", lambda layers, names: ())


def graphs_are_taken_to_call(patch: Patch) -> None:
    patch.setattr(worker_side, "graphs_hide_hooks", lambda compilation: False)


def the_first_micro_batch_counts(patch: Patch) -> None:
    patch.setattr(Executor, "save_after_forward", lambda executor: None)


def drafts_are_not_waited_for(patch: Patch) -> None:
    patch.setattr(LaminaConnector, "finish_forward", lambda connector: None)


def drafts_must_run(patch: Patch) -> None:
    patch.setattr(StepLoads, "drafts_follow", lambda loads, order: None)


def nobody_is_missed(patch: Patch) -> None:
    patch.setattr(StepLoads, "_check_called", lambda loads, run: None)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (
            every_layer_is_taken_to_call,
            lambda start: expect_loaded(filled(start(silent=["layer.1"]))),
        ),
        (
            graphs_are_taken_to_call,
            lambda start: expect_loaded(
                filled(start(graphs=CUDAGraphMode.FULL)), Forward.FULL_GRAPH
            ),
        ),
        (the_first_micro_batch_counts, test_a_row_is_saved_when_both_micro_batches_have_written_it),
        pytest.param(
            drafts_are_not_waited_for,
            test_a_draft_model_in_a_full_graph_finds_its_rows,
            marks=pytest.mark.skipif(
                hasattr(ActiveKVConnector, "finalize_step"),
                reason="vLLM 0.33 asks for results before drafts run, which finishes loads as well",
            ),
        ),
        (drafts_must_run, test_a_draft_model_need_not_run),
        (nobody_is_missed, test_a_full_graph_that_nobody_knew_of_stops_the_engine),
    ],
    ids=lambda part: part.__name__,
)
def test_a_broken_worker_is_seen(
    broken: Callable[[Patch], None],
    test: Callable[[Start], None],
    start: Start,
    monkeypatch: Patch,
) -> None:
    broken(monkeypatch)
    with pytest.raises((AssertionError, LayersDidNotWait, pytest.fail.Exception)):
        test(start)


def filled(worker: Worker) -> Worker:
    """With a chunk in the host tier."""
    fill(worker)
    return worker
