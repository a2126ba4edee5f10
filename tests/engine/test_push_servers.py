"""Pushes between vLLM's own servers, behind the proxy, when the prefill engine is of no help: the
decode engine answers everything itself, and holds nothing longer than it must.
"""

from __future__ import annotations

import random
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from engine.deployment import (
    ANSWERED,
    Deployment,
    Outcome,
    ask_all,
    complete,
    decode_spec,
    prefill_spec,
    route,
    wrong,
)
from engine.driver import Ask, EngineSpec, Fleet
from engine.server import Server
from engine.workload import BLOCK, prompt

pytestmark = [pytest.mark.engine, pytest.mark.slow]

POOL = 256
"""Blocks of a decode engine."""
SMALL_POOL = {"num_gpu_blocks_override": POOL}
PATIENCE = 60.0
"""Seconds after which a client that has no answer hangs."""


@pytest.mark.timeout(600)
def test_a_prefill_server_that_refuses_everything(llama: Path, fleet: Fleet) -> None:
    """Its model has another name, and it does nothing else meanwhile."""
    rng = random.Random(14)
    asks = [Ask(prompt(seed, rng.randrange(200, 800)), max_tokens=2) for seed in range(200)]
    expected = [answer.tokens for answer in fleet.answers(EngineSpec(llama), asks)]
    prefill = Server(prefill_spec(llama), fleet.next_log(), name="another", forked=True)
    decode = Server(decode_spec(llama, SMALL_POOL), fleet.next_log(), forked=True)

    def route_and_ask_again(ask: Ask) -> Outcome:
        outcome = route(prefill, decode, ask, rng.choice((0.1, 0.3, PATIENCE)))
        return outcome if outcome.kind == ANSWERED else complete(decode.url, PATIENCE, ask)

    with Deployment([prefill], [decode], fleet.next_log()) as deployment:
        outcomes = ask_all(asks, route_and_ask_again, clients=8)
        assert not wrong(outcomes, expected)
        given_up = decode.metrics().total("lamina_pushes_total", outcome="given_up")
        assert given_up > len(asks) / 10, "the decode engine had announced little"
        decode.wait_until_empty(30)
        prefill.wait_until_empty(30)
        decode.forget()
        outcomes = ask_all(asks, partial(complete, deployment.proxy.url, PATIENCE), clients=8)
        assert not wrong(outcomes, expected)
        decode.wait_until_empty(30)
        quarter = (POOL - 8) // 4 * BLOCK
        everything = [Ask(prompt(seed, quarter), max_tokens=1) for seed in range(900, 904)]
        outcomes = ask_all(everything, partial(complete, decode.url, PATIENCE), clients=4)
    assert {outcome.kind for outcome in outcomes} == {ANSWERED}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("signalled", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_prefill_server_that_is_gone_while_pushes_are_parked(
    llama: Path, fleet: Fleet, signalled: signal.Signals
) -> None:
    rng = random.Random(15)
    pushed = [Ask(prompt(seed, rng.randrange(400, 600)), max_tokens=2) for seed in range(60)]
    alone = [Ask(prompt(seed, 100), max_tokens=2) for seed in range(100, 120)]
    expected, right = (
        [answer.tokens for answer in fleet.answers(EngineSpec(llama), asks)]
        for asks in (pushed, alone)
    )
    # It takes longer to compute them than the decode engine takes to announce them.
    prefill = Server(
        prefill_spec(llama, {"max_num_batched_tokens": 64, "max_num_seqs": 32}),
        fleet.next_log(),
        forked=True,
    )
    decode = Server(decode_spec(llama, SMALL_POOL), fleet.next_log(), forked=True)
    with (
        Deployment([prefill], [decode], fleet.next_log()) as deployment,
        ThreadPoolExecutor(1) as pool,
    ):
        proxy = deployment.proxy.url
        pushing = pool.submit(ask_all, pushed, partial(complete, proxy, PATIENCE), clients=20)
        decode.wait_until(lambda: decode.held().leased >= 0.3 * POOL, PATIENCE)
        prefill.signal(signalled)
        assert not wrong(ask_all(alone, partial(complete, decode.url, 10), clients=1), right)
        assert not wrong(pushing.result(), expected)
        assert decode.held().leased <= POOL / 2
        if signalled is signal.SIGSTOP:
            prefill.signal(signal.SIGCONT)
            decode.wait_until_empty(30)
