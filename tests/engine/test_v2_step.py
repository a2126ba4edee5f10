"""vLLM's model runners around the real connector, on a device that runs behind its host. V2, but
for tests that say otherwise."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

from engine.device import PATIENCE
from engine.v2_step import CHUNK_BLOCKS, Forward, Work, Worker
from lamina_kv.data.executor import Executor
from lamina_kv.data.movers import Fence
from lamina_kv.data.step_loads import LayersDidNotWait, StepLoads
from lamina_kv.engines.vllm import connector, worker_side
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
        # Pages are small here; layers are to announce their rows all the same.
        patch.setattr("lamina_kv.data.save_pipeline.ROW_BYTES", 0)

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


def expect_loaded(worker: Worker, forward: Forward = Forward.EAGER, batches: int = 1) -> None:
    """A step with a load reads what was saved, however late the load stream is. The host does not
    wait for that."""
    work = Work(reads=GOOD)
    with worker.mover.loads.stopped():
        receipts = worker.step(StepPlan(0, loads=(load(),)), [work] * batches, forward, draft=work)
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


@pytest.mark.parametrize("runner", [1, 2])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_full_graph_comes_after_its_rows(
    start: Start, caplog: pytest.LogCaptureFixture, runner: int, batches: int
) -> None:
    """Its layers call nothing, in a model whose layers call in every other step. V2 hands over no
    metadata with a graph of two micro-batches."""
    worker = start(runner=runner, graphs=CUDAGraphMode.FULL_DECODE_ONLY, micro_batches=batches == 2)
    assert "before a forward" not in caplog.text
    fill(worker)
    expect_loaded(worker, Forward.FULL_GRAPH, batches)
    worker.stamp(dict.fromkeys(LOADED, STALE))
    expect_loaded(worker)


@pytest.mark.parametrize("runner", [1, 2])
def test_layers_that_call_wait_for_their_own_rows(start: Start, runner: int) -> None:
    """A step is not taken for a full graph: its first layers run before its last row is there."""
    worker = start(runner=runner)
    fill(worker)
    copy, last = worker.mover.load, len(worker.layers) - 1
    launched, reached, held = threading.Semaphore(0), threading.Event(), threading.Event()

    def load_rows(rows: Sequence[int], *arguments: Any, **how: Any) -> Fence:
        if last in rows:
            for _ in range(last):  # by another thread
                launched.acquire()
            worker.mover.loads.launch(lambda: (reached.set(), held.wait(PATIENCE)))
        fence = copy(rows, *arguments, **how)
        launched.release()
        return fence

    worker.mover.load = load_rows  # type: ignore[method-assign]
    worker.step(StepPlan(0, loads=(load(),)), Work(writes={0: 3}))
    assert reached.wait(PATIENCE)
    worker.compute.settle()
    written = [worker.pages(layer, 0) == {3} for layer in worker.layers]
    held.set()
    worker.compute.synchronize()
    assert written == [True] * (len(worker.layers) - 1) + [False]


@pytest.mark.parametrize("runner", [1, 2])
def test_what_a_full_graph_has_written_is_saved(start: Start, runner: int) -> None:
    worker = start(runner=runner)
    with worker.compute.stopped():  # the host is at the end of the step before a layer has run
        receipts = worker.step(
            StepPlan(0, saves=(save(),)),
            Work(writes=dict.fromkeys(SAVED, STAMP)),
            Forward.FULL_GRAPH,
        )
    receipts += worker.settle(1 - len(receipts))
    assert receipts[0].outcome is Outcome.DONE
    worker.stamp(dict.fromkeys(LOADED, STALE))
    expect_loaded(worker)


def test_pieces_of_a_graph_that_hold_attention_come_after_all_rows(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """As where somebody has taken attention off the operators at which vLLM cuts graphs. The runner
    calls that a step in pieces."""
    worker = start(graphs=CUDAGraphMode.PIECEWISE, mute=["layer.0", "layer.1", "layer.2"])
    assert "pieces of CUDA graphs hold" in caplog.text
    fill(worker)
    expect_loaded(worker)


@pytest.mark.parametrize("settings", [{}, {"load": {"mode": "layerwise"}}])
def test_full_graphs_are_kept_whatever_is_configured(settings: dict[str, object]) -> None:
    assert not LaminaConnector.requires_piecewise_for_cudagraph(settings)


def test_a_draft_model_in_a_full_graph_finds_its_rows(start: Start) -> None:
    worker = start(drafts=["draft.0"], mute=["draft.0"])
    fill(worker)
    copy = worker.mover.load

    def slowly(rows: Sequence[int], *arguments: Any, **how: Any) -> Fence:
        if len(worker.layers) in rows:
            worker.mover.loads.launch(lambda: time.sleep(0.05))
        return copy(rows, *arguments, **how)

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
        worker.let_device_run()

    receipts = worker.step(
        StepPlan(0, saves=(save(),)),
        [Work(writes=first), Work(writes=second)],
        Forward.MICRO_BATCHES,
        between=copied,
    )
    receipts += worker.settle(1 - len(receipts))
    assert receipts[0].outcome is Outcome.DONE
    worker.stamp(dict.fromkeys(LOADED, STALE))
    expect_loaded(worker, Forward.MICRO_BATCHES, 2)


def test_two_micro_batches_wait_for_the_rows_they_share(start: Start) -> None:
    worker = start(micro_batches=True)
    fill(worker)
    expect_loaded(worker, Forward.MICRO_BATCHES, 2)


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


def pieces_are_taken_to_call(patch: Patch) -> None:
    patch.setattr(worker_side, "pieces_hide_hooks", lambda compilation: False)


def full_graphs_are_taken_to_call(patch: Patch) -> None:
    patch.setattr(connector, "forward_calls_hooks", lambda context: True)


def every_step_is_taken_for_a_full_graph(patch: Patch) -> None:
    patch.setattr(connector, "forward_calls_hooks", lambda context: False)


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
            pieces_are_taken_to_call,
            lambda start: expect_loaded(
                filled(start(graphs=CUDAGraphMode.PIECEWISE, mute=["layer.0"]))
            ),
        ),
        (
            full_graphs_are_taken_to_call,
            lambda start: expect_loaded(filled(start(runner=1)), Forward.FULL_GRAPH),
        ),
        (
            every_step_is_taken_for_a_full_graph,
            lambda start: test_layers_that_call_wait_for_their_own_rows(start, 2),
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
        (
            nobody_is_missed,
            lambda start: test_layers_that_do_not_call_although_their_class_does_stop_the_engine(
                start, ["layer.1"]
            ),
        ),
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
