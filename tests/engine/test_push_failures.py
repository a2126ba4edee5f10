"""Promise 2 for pushes: whatever happens to either engine, or is wrong with what they were given,
the decode engine answers as one engine does, nothing hangs, and all blocks come back.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.driver import Ask, Engine, EngineSpec, Fleet, Start, differences
from engine.models import Checkpoints
from engine.pair import Pair, PairSpec
from engine.test_push import SMALL_STEPS, MakePair, make_pair
from engine.workload import BLOCK, CHUNK, mixed_prompts, prompt
from lamina_kv.bench.ports import free_port

__all__ = ["make_pair"]

pytestmark = pytest.mark.engine

LONG = Ask(prompt(800, 1500))
"""Many steps of a prefill engine."""
LATE = Ask(prompt(801, 1200))
SHORT = {"deadline": 8.0, "silence": 1.5, "quarantine": 0.5}
"""Little time to wait in, but enough for what is to go well."""
OTHERS = [Ask(tokens) for tokens in mixed_prompts(81, count=8)]


@pytest.fixture
def alone(llama: Path, fleet: Fleet) -> Engine:
    return fleet.get(EngineSpec(llama, options=SMALL_STEPS))


@pytest.fixture
def pair(llama: Path, make_pair: MakePair) -> Pair:
    """Breakers do not open: they are tested elsewhere, and would hide the second failure."""
    lamina = {"breaker": {"failures": 1000}}
    return make_pair(PairSpec(llama, SMALL_STEPS, push=SHORT, lamina=lamina))


@pytest.fixture
def doomed(llama: Path, start: Start) -> Pair:
    """Engines of this test alone."""
    lamina = {"breaker": {"failures": 1000}}
    spec = PairSpec(llama, SMALL_STEPS, push=SHORT, lamina=lamina, decode={"seed": 1})
    prefill, decode = spec.engines()
    return Pair(start(prefill), start(decode), spec.address)


def expect_usable(pair: Pair, alone: Engine) -> None:
    """Nothing is held any more, and pushes go well."""
    pair.settle()
    before = pair.served()
    expected = alone.generate(OTHERS)
    pair.forget_all()
    assert not differences(pair.push(OTHERS), expected)
    pair.settle()
    assert pair.served() == before + len(OTHERS)


# -- what is not there or does not fit -----------------------------------------------------------


def test_nobody_listens(pair: Pair, alone: Engine) -> None:
    address, pair.address = pair.address, f"127.0.0.1:{free_port()}"
    answers = pair.finish(pair.submit_decode([LONG], [pair.name_push()]))
    assert not differences(answers, [alone.ask(LONG)])
    assert answers[0].cached == 0
    # The connection is refused while the prompt is claimed, or when it is announced.
    assert pair.skipped("lost") + pair.pushes(pair.decode, "given_up") == 1
    pair.address = address
    expect_usable(pair, alone)


@pytest.mark.parametrize("address", ["nowhere.invalid:1", "no address"])
def test_an_address_that_is_none(pair: Pair, alone: Engine, address: str) -> None:
    right, pair.address = pair.address, address
    answers = pair.finish(pair.submit_decode([LONG], [pair.name_push()]))
    assert not differences(answers, [alone.ask(LONG)])
    pair.address = right
    expect_usable(pair, alone)


def test_prefill_is_never_asked(pair: Pair, alone: Engine) -> None:
    answers = pair.finish(pair.submit_decode([LONG], [pair.name_push()]))
    assert not differences(answers, [alone.ask(LONG)])
    assert pair.pushes(pair.decode, "given_up") == 1
    expect_usable(pair, alone)


def test_decode_is_never_asked(pair: Pair, alone: Engine) -> None:
    """The prefill engine keeps the prompt for a while, and then gives it up."""
    pair.submit_prefill([LONG], [pair.name_push()])
    pair.finish([])
    pair.settle()
    assert pair.counts() == {"stopped": 1}
    expect_usable(pair, alone)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(replace(LONG, tokens=(*LONG.tokens[:-1], 0)), id="token"),
        pytest.param(replace(LONG, tokens=LONG.tokens[:-1]), marks=pytest.mark.slow, id="length"),
        pytest.param(replace(LONG, salt="another"), marks=pytest.mark.slow, id="salt"),
    ],
)
def test_prefill_is_asked_something_else(pair: Pair, alone: Engine, given: Ask) -> None:
    for first in ("prefill", "decode"):
        pair.forget_all()
        push = pair.name_push()
        if first == "prefill":
            pair.submit_prefill([given], [push])
        names = pair.submit_decode([LONG], [push])
        pair.step(pair.decode)
        if first == "decode":
            pair.submit_prefill([given], [push])
        answers = pair.finish(names)
        assert not differences(answers, [alone.ask(LONG)])
        assert answers[0].cached == 0
        pair.settle()
    assert pair.counts() == {"given_up": 2, "stopped": 2}
    expect_usable(pair, alone)


def test_equal_salts_are_pushed(pair: Pair, alone: Engine) -> None:
    ask = replace(LONG, salt="ours")
    answers = pair.push([ask])
    assert not differences(answers, [alone.ask(ask)])
    assert answers[0].cached == len(ask.tokens) - 1


@pytest.mark.parametrize(
    ("options", "word"),
    [
        pytest.param({"block_size": 64}, "block size", id="blocks"),
        pytest.param({"dtype": "bfloat16"}, "same model", id="dtype", marks=pytest.mark.slow),
        pytest.param({}, "same model", id="weights", marks=pytest.mark.slow),
    ],
)
def test_another_kind_of_engine(
    checkpoints: Checkpoints,
    llama: Path,
    pair: Pair,
    fleet: Fleet,
    options: dict[str, object],
    word: str,
) -> None:
    """It is refused with a reason, and computes itself; a name in common is not enough."""
    model = llama if options else checkpoints.model("llama", seed=1)
    options = {**SMALL_STEPS, **options}
    alone = fleet.get(EngineSpec(model, options=options))
    expected = alone.ask(LONG)
    spec = PairSpec(model, options, push=SHORT)
    odd = Pair(pair.prefill, fleet.get(spec.engines()[1]), pair.address)
    answers = odd.push([LONG], apart=2)
    assert not differences(answers, [expected])
    assert answers[0].cached == 0
    odd.settle()
    assert odd.pushes(odd.prefill, "stopped") == 1
    # It is refused while the prompt is claimed, or when it is announced.
    assert odd.skipped("failed") + odd.pushes(odd.decode, "given_up") == 1
    refusals = [line for line in pair.prefill.log().splitlines() if "cannot be served" in line]
    assert word in refusals[-1]


# -- requests that end early ---------------------------------------------------------------------


def begin(pair: Pair, steps: int) -> tuple[list[str], list[str]]:
    """A push under way: requests of prefill and decode; the former has run so many steps."""
    pushes = [pair.name_push()]
    decode = pair.submit_decode([LONG], pushes)
    free = pair.decode.free_blocks()
    while pair.decode.free_blocks() == free:  # it opens its tiers first if it has just started
        pair.step(pair.decode)
    prefill = pair.submit_prefill([LONG], pushes)
    for _ in range(steps):
        pair.step(pair.prefill)
        pair.step(pair.decode)
    return prefill, decode


STEPS = pytest.mark.parametrize(
    "steps",
    [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)],
)


@STEPS
def test_abort_on_decode(pair: Pair, alone: Engine, steps: int) -> None:
    """Its blocks are not used again before the prefill engine has stopped: what others are answered
    meanwhile is right."""
    expected = alone.generate(OTHERS)
    _, names = begin(pair, steps)
    pair.abort(pair.decode, names)
    assert not differences(pair.push(OTHERS), expected)
    pair.settle()
    assert pair.pushes(pair.decode, "given_up") >= 1
    expect_usable(pair, alone)


@STEPS
def test_abort_on_prefill(pair: Pair, alone: Engine, steps: int) -> None:
    names, waiting = begin(pair, steps)
    pair.abort(pair.prefill, names)
    answers = pair.finish(waiting)
    assert not differences(answers, [alone.ask(LONG)])
    pair.settle()
    assert pair.counts() == {"given_up": 1, "stopped": 1}
    expect_usable(pair, alone)


def test_abort_on_both(pair: Pair, alone: Engine) -> None:
    prefill, decode = begin(pair, 2)
    pair.abort(pair.decode, decode)
    pair.abort(pair.prefill, prefill)
    expect_usable(pair, alone)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_preemption(llama: Path, make_pair: MakePair, alone: Engine, where: str) -> None:
    """A cache that is too small for what runs at once; on the decode engine requests lose what was
    pushed after they have begun to use it, and compute it."""
    tight = {"num_gpu_blocks_override": 60, "max_model_len": 1024}
    options = {"prefill": tight} if where == "prefill" else {"decode": tight}
    pair = make_pair(PairSpec(llama, SMALL_STEPS, **options))
    asks = [Ask(prompt(820 + seed, 200 + 10 * seed), max_tokens=90) for seed in range(8)]
    expected = alone.generate(asks)
    pushes = [pair.name_push() for _ in asks]
    names = pair.submit_decode(asks, pushes)
    if where == "prefill":  # what it generates is of no use, but takes room
        parts = [replace(a, push={"id": push}) for a, push in zip(asks, pushes, strict=True)]
        pair._submit(pair.prefill, parts)
    else:
        pair.submit_prefill(asks, pushes)
    assert not differences(pair.finish(names), expected)
    pair.settle()
    engine = pair.prefill if where == "prefill" else pair.decode
    assert engine.metrics().total("vllm:num_preemptions_total") > 0
    assert pair.pushes(pair.decode, "received") == len(asks)


# -- processes that die or stop ------------------------------------------------------------------


def test_prefill_is_killed(doomed: Pair, alone: Engine, start: Start) -> None:
    """And one that is started at the same address is another peer."""
    expect_usable(doomed, alone)
    _, names = begin(doomed, 3)
    doomed.freeze(doomed.prefill)
    doomed.prefill.kill()
    assert not differences(doomed.finish(names), [alone.ask(LONG)])
    doomed.settle()  # a new run would be asked, and is not stepped here
    again = start(doomed.prefill.spec)
    assert doomed.pushes(doomed.decode, "given_up") == 1
    expect_usable(Pair(again, doomed.decode, doomed.address), alone)


@pytest.mark.slow
def test_decode_is_killed(doomed: Pair, alone: Engine, start: Start) -> None:
    expect_usable(doomed, alone)
    begin(doomed, 3)
    doomed.freeze(doomed.decode)
    doomed.decode.kill()
    doomed.finish([])
    doomed.settle()
    assert doomed.pushes(doomed.prefill, "stopped") == 1
    expect_usable(Pair(doomed.prefill, start(doomed.decode.spec), doomed.address), alone)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, pytest.param(3, marks=pytest.mark.soak)])
def test_prefill_is_stopped_and_goes_on(doomed: Pair, alone: Engine, steps: int) -> None:
    """Until it goes on it could write at any moment: its blocks are not used for anything else,
    however long that takes."""
    expect_usable(doomed, alone)
    free = doomed.decode.free_blocks()
    _, names = begin(doomed, steps)
    running = doomed._running[doomed.prefill].copy()
    doomed.freeze(doomed.prefill)
    os.kill(doomed.prefill.process.pid, signal.SIGSTOP)
    try:
        assert not differences(doomed.finish(names), [alone.ask(LONG)])
        expected = alone.generate(OTHERS)
        end = time.monotonic() + 4 * (SHORT["silence"] + SHORT["quarantine"])
        while time.monotonic() < end:
            assert not differences(doomed.decode.generate(OTHERS), expected)
        assert free - doomed.decode.free_blocks() == len(LONG.tokens) // BLOCK + 1
    finally:
        os.kill(doomed.prefill.process.pid, signal.SIGCONT)
    doomed.frozen.clear()
    doomed._running[doomed.prefill] = running
    doomed.finish([])
    expect_usable(doomed, alone)


@pytest.mark.slow
def test_decode_is_stopped_and_goes_on(doomed: Pair, alone: Engine) -> None:
    """The prefill engine does not wait for it."""
    expect_usable(doomed, alone)
    _, names = begin(doomed, 2)
    running = doomed._running[doomed.decode].copy()
    doomed.freeze(doomed.decode)
    os.kill(doomed.decode.process.pid, signal.SIGSTOP)
    try:
        doomed.finish([])
        doomed.settle()
    finally:
        os.kill(doomed.decode.process.pid, signal.SIGCONT)
    doomed.frozen.clear()
    doomed._running[doomed.decode] = running
    assert not differences(doomed.finish(names), [alone.ask(LONG)])
    expect_usable(doomed, alone)


def hold_link(core: Any) -> None:
    """The thread of an engine's link is busy: what the engine says, and is told, waits for it."""
    link = core.scheduler.connector._scheduler._link
    link.goes_on = threading.Event()
    link._loop.call_soon_threadsafe(link.goes_on.wait)


def let_go_of_link(core: Any) -> None:
    """It has time again."""
    core.scheduler.connector._scheduler._link.goes_on.set()


def test_prefill_is_told_to_end(llama: Path, start: Start, alone: Engine) -> None:
    """It says what it will not send, also of what it does not hear any more, so that nothing is
    quarantined for as long as this test is."""
    spec = PairSpec(llama, SMALL_STEPS, push={**SHORT, "quarantine": 3600.0}, decode={"seed": 3})
    prefill, decode = spec.engines()
    pair = Pair(start(prefill), start(decode), spec.address)
    pair.submit_prefill([OTHERS[0]], [pair.name_push()])  # nobody will ask for it

    def parked() -> float:
        return pair.decode.metrics().total("lamina_push_blocks", state="parked")

    def links() -> float:
        engines = pair.metrics().values()
        return sum(each.total("lamina_push_links") for each in engines)

    names = pair.submit_decode([LONG], [pair.name_push()])
    pair.step_until(lambda: parked() > 0 and links() == 2)
    pair.decode.in_core(hold_link)
    before = parked()
    names += pair.submit_decode([LATE], [pair.name_push()])
    pair.step_until(lambda: parked() > before)
    pair.prefill.close()
    pair.decode.in_core(let_go_of_link)
    pair.freeze(pair.prefill)
    assert not differences(pair.finish(names), alone.generate([LONG, LATE]))
    pair.settle()


@pytest.mark.slow
def test_a_peer_that_fails_is_left_alone(llama: Path, make_pair: MakePair, alone: Engine) -> None:
    """Not every request pays for the first failures."""
    pair = make_pair(PairSpec(llama, SMALL_STEPS, decode={"seed": 2}))
    pair.address, right = f"127.0.0.1:{free_port()}", pair.address
    asks = [Ask(prompt(850 + seed, 3 * CHUNK)) for seed in range(12)]
    expected = alone.generate(asks)
    answers = [pair.finish(pair.submit_decode([ask], [pair.name_push()]))[0] for ask in asks]
    assert not differences(answers, expected)
    # The connection may fail before a request has its blocks, or after that.
    paid = pair.pushes(pair.decode, "given_up") + pair.skipped("lost")
    assert 0 < paid < len(asks)
    assert paid + pair.skipped("peer_out_of_use") == len(asks)
    pair.address = right
    pair.forget_all()
    assert not differences(pair.push(asks), expected)
    pair.settle()
    assert pair.pushes(pair.decode, "received") == len(asks)
