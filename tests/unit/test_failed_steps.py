"""A step whose forward has failed keeps nothing; a step whose caller handles an exception of its
own is a step like any other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.forward_context import ForwardContext

from lamina_kv.engines.vllm.connector import LaminaConnector
from lamina_kv.engines.vllm.messages import LaminaPlan
from lamina_kv.engines.vllm.step_order import StepOrder
from lamina_kv.plan import StepPlan


class Worker:
    """Notes why its step has failed."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.executor = SimpleNamespace(
            moves_rows=False, fail_step=self.failures.append, end_step=lambda: None
        )

    def begin_step(self, plan: LaminaPlan) -> None: ...

    def start_loads(self, *, layers_call: bool) -> None: ...


@pytest.fixture
def worker() -> Worker:
    return Worker()


def run(worker: Worker, *, fails: bool) -> None:
    """One step of vLLM's V1 runner, which ends a step whatever its forward does."""
    connector: Any = object.__new__(LaminaConnector)
    connector._order, connector._worker = StepOrder(), worker
    connector.handle_preemptions(LaminaPlan(StepPlan(1)))
    try:
        connector.start_load_kv(ForwardContext({}, {}, {}))
        if fails:
            raise ValueError("the forward")
    finally:
        connector.wait_for_save()


def test_a_forward_that_fails(worker: Worker) -> None:
    with pytest.raises(ValueError, match="the forward"):
        run(worker, fails=True)
    assert worker.failures == ["step_failed"]


def test_a_caller_that_handles_an_exception(worker: Worker) -> None:
    try:
        int("the caller's own")
    except ValueError:
        run(worker, fails=False)
        assert worker.failures == []
        with pytest.raises(ValueError, match="the forward"):
            run(worker, fails=True)
    assert worker.failures == ["step_failed"]
