"""Guards: an engine core that waits for requests looks for work when something else has come."""

from __future__ import annotations

import threading
from collections import deque
from math import inf
from queue import Queue
from types import SimpleNamespace
from typing import Any

from driven_planner import Engine
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState
from vllm.v1.request import RequestStatus

from lamina_kv.engines.vllm.adapters import Adapters
from lamina_kv.engines.vllm.core_loop import CoreLoop
from lamina_kv.engines.vllm.weights import Watch, WeightsWatch, watch_engine_core

PATIENCE = 60.0


class Connector:
    def __init__(self) -> None:
        self.watch = Watch(WeightsWatch(Engine().planner), Adapters(None), CoreLoop())


class Several:
    """A ``MultiConnector`` of vLLM."""

    def __init__(self, *connectors: object) -> None:
        self.sub_connectors = connectors


class Scheduler:
    def __init__(self, connector: object) -> None:
        self.connector = connector
        self.has_news = False
        self.ended: list[tuple[list[str], RequestStatus]] = []

    def get_kv_connector(self) -> object:
        return self.connector

    def has_requests(self) -> bool:
        return self.has_news

    def finish_requests(self, requests: list[str] | None, status: RequestStatus) -> list[object]:
        self.ended.append((requests, status))
        return [SimpleNamespace(request_id=name, client_index=2) for name in (requests or ())[:1]]

    def get_num_unfinished_requests(self) -> int:
        return 1


def core_of(connector: object) -> Any:
    """A core whose loop has not begun."""
    watch_engine_core()
    core: Any = object.__new__(EngineCoreProc)
    core.scheduler = Scheduler(connector)
    core.input_queue, core.aborts_queue, core.output_queue = Queue(), Queue(), Queue()
    core.engines_running, core.batch_queue = False, deque()
    core.process_input_queue_block = True
    core.shutdown_state = EngineShutdownState.RUNNING
    core._idle_state_callbacks = []
    return core


def test_a_core_that_waits_looks_for_work_when_it_is_woken() -> None:
    connector = Connector()
    core = core_of(connector)
    turned = threading.Event()

    def turn() -> None:
        assert core._handle_shutdown()
        core._process_input_queue()
        turned.set()

    waits = threading.Event()
    core._idle_state_callbacks.append(lambda _: waits.set())
    threading.Thread(target=turn, daemon=True).start()
    assert waits.wait(PATIENCE)
    core.scheduler.has_news = True
    connector.watch.loop.wake()
    assert turned.wait(PATIENCE)


def test_every_connector_of_a_core_can_wake_it() -> None:
    first, second = Connector(), Connector()
    core = core_of(Several(first, object(), second))
    for _ in range(2):
        core._handle_shutdown()
    for connector in (first, second):
        connector.watch.loop.wake()
        assert core.input_queue.get_nowait() == (EngineCoreRequestType.WAKEUP, None)
    assert core.input_queue.empty()


def test_where_no_loop_is_nobody_is_woken() -> None:
    Connector().watch.loop.wake()


def test_requests_that_nobody_wants_end_between_two_steps_and_are_answered() -> None:
    """Those that are not there any more are not answered."""
    connector = Connector()
    core = core_of(connector)
    connector.watch.loop.abort(["before the loop begins"])
    core._handle_shutdown()
    connector.watch.loop.abort(["a", "gone"])
    connector.watch.loop.abort(iter(["b"]))
    assert core.scheduler.ended == []
    for _ in range(2):
        core._handle_shutdown()
    assert core.scheduler.ended == [(["a", "gone", "b"], RequestStatus.FINISHED_ABORTED)]
    client, answer = core.output_queue.get_nowait()
    assert (client, [output.request_id for output in answer.outputs]) == (2, ["a"])
    assert core.output_queue.empty()


def test_what_a_core_that_is_told_to_end_says_comes_before_it_ends_requests() -> None:
    """And once: then it steps for as long as something is on its way."""
    connector = Connector()
    core = core_of(connector)
    core.vllm_config = SimpleNamespace(shutdown_timeout=0)
    happened = core.scheduler.ended
    connector.watch.loop.on_end = lambda: happened.append("said")
    core._handle_shutdown()
    assert happened == []
    core.shutdown_state = EngineShutdownState.REQUESTED
    core.scheduler.has_news = True
    for _ in range(2):
        assert core._handle_shutdown()
    assert happened == ["said", (None, RequestStatus.FINISHED_ABORTED)]


def test_a_core_is_woken_after_a_while_by_one_timer() -> None:
    core, loop = core_of(Connector()), CoreLoop()
    loop.begins(core)
    before = threading.active_count()
    for _ in range(5):
        loop.wake_after(0.01)
    loop.wake_after(inf)
    assert threading.active_count() <= before + 1
    assert core.input_queue.get(timeout=PATIENCE) == (EngineCoreRequestType.WAKEUP, None)
    assert core.input_queue.empty()
