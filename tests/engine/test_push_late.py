"""A destination that becomes known while a prefill engine computes: what is written by then leaves
in that step, and not after it.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.driver import Ask, Engine, EngineSpec, Fleet, Start, differences
from engine.pair import Pair, PairSpec
from engine.test_push import SMALL_STEPS, expect_pushed
from engine.workload import prompt
from lamina_kv.data.executor import Executor
from lamina_kv.push.transports.nixl import NixlTransport

pytestmark = pytest.mark.engine

HOLD = 120.0
"""Seconds that a step waits at most. It goes on as soon as something of it has left."""


def hold_the_step(_: Any, folder: str) -> None:
    """Hold the step that completes a prompt in front of its last layer, until something of it has
    left or time is up; says how many writes that were. Runs in a worker of vLLM."""
    held, released = Path(folder, "held"), Path(folder, "released")
    write, layer_written = NixlTransport.write, Executor.layer_written
    writes = 0

    def counted(transport: NixlTransport, *arguments: Any) -> Any:
        nonlocal writes
        writes += 1
        return write(transport, *arguments)

    def and_hold(executor: Executor, layer: str) -> None:
        layer_written(executor, layer)
        plan, rows = executor._plan, len(executor._geometry.rows)
        if plan is None or not plan.push.gathers or held.exists():
            return
        if executor._row_of_layer[layer] == rows - 2:
            before, until = writes, time.monotonic() + HOLD
            held.touch()
            while writes == before and time.monotonic() < until:
                time.sleep(0.001)
            released.write_text(str(writes - before))

    NixlTransport.write, Executor.layer_written = counted, and_hold


@pytest.fixture
def alone(llama: Path, fleet: Fleet) -> Engine:
    return fleet.get(EngineSpec(llama, options=SMALL_STEPS))


@pytest.mark.parametrize("tokens", [100, 700])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_rows_leave_in_the_step_in_which_their_destination_comes(
    llama: Path, start: Start, alone: Engine, tmp_path: Path, asynchronous: bool, tokens: int
) -> None:
    """In one step, and in the last of several."""
    ask = Ask(prompt(760, tokens))
    expected = alone.ask(ask)
    spec = PairSpec(llama, SMALL_STEPS, push={"batch": 1}, asynchronous=asynchronous)
    prefill, decode = spec.engines()
    pair = Pair(start(prefill), start(decode), spec.address)
    pair.push([Ask(prompt(761, 40))])  # they know each other
    pair.settle()
    pair.prefill.in_workers(hold_the_step, str(tmp_path))
    held, released = tmp_path / "held", tmp_path / "released"
    push = [pair.name_push()]
    pair.submit_prefill([ask], push)
    with ThreadPoolExecutor(1) as thread:
        steps = thread.submit(pair.step_until, released.exists, pair.prefill)
        while not held.exists() and not steps.done():
            time.sleep(0.001)
        names = pair.submit_decode([ask], push)
        pair.step_until(steps.done, pair.decode)
        steps.result()
    left = int(released.read_text())
    (answer,) = pair.finish(names)
    assert not differences([answer], [expected])
    assert answer.cached == len(ask.tokens) - 1
    expect_pushed(pair, 2)
    assert left > 0
