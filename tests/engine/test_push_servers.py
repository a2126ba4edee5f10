"""Pushes between vLLM's own servers, behind the proxy, when the prefill engine is of no help: the
decode engine answers everything itself, and holds nothing longer than it must.
"""

from __future__ import annotations

import json
import random
import shlex
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import takewhile
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
from engine.driver import TESTS, Ask, EngineSpec, Fleet
from engine.server import Server
from engine.workload import BLOCK, mixed_prompts, prompt
from lamina_kv.bench.ports import free_port

pytestmark = [pytest.mark.engine, pytest.mark.slow]

POOL = 256
"""Blocks of a decode engine."""
SMALL_POOL = {"num_gpu_blocks_override": POOL}
QUICK_START = TESTS.parent / "docs/quick-start.md"
PATIENCE = 60.0
"""Seconds after which a client that has no answer hangs."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_prefill_server_that_refuses_everything(llama: Path, fleet: Fleet) -> None:
    """Its model has another name, and it does nothing else meanwhile."""
    rng = random.Random(14)
    asks = [Ask(prompt(seed, rng.randrange(200, 800)), max_tokens=2) for seed in range(240)]
    expected = [answer.tokens for answer in fleet.answers(EngineSpec(llama), asks)]
    prefill = Server(prefill_spec(llama), fleet.next_log(), name="another", forked=True)
    decode = Server(decode_spec(llama, SMALL_POOL), fleet.next_log(), forked=True)

    def route_and_ask_again(ask: Ask) -> Outcome:
        outcome = route(prefill, decode, ask, rng.choice((0.1, 0.3, PATIENCE)))
        return outcome if outcome.kind == ANSWERED else complete(decode.url, PATIENCE, ask)

    with Deployment([prefill], [decode], fleet.next_log()) as deployment:
        outcomes = ask_all(asks[:200], route_and_ask_again, clients=8)
        assert not wrong(outcomes, expected[:200])
        given_up = decode.metrics().total("lamina_pushes_total", outcome="given_up")
        assert given_up > 20, "the decode engine had announced little"
        decode.wait_until_empty(30)
        prefill.wait_until_empty(30)
        proxied = partial(complete, deployment.proxy.url, PATIENCE)
        assert not wrong(ask_all(asks[200:], proxied, clients=8), expected[200:])
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
        decode.wait_until(lambda: held_for_pushes(decode) >= 0.3 * POOL, PATIENCE)
        prefill.signal(signalled)
        assert not wrong(ask_all(alone, partial(complete, decode.url, 10), clients=1), right)
        assert not wrong(pushing.result(), expected)
        assert held_for_pushes(decode) <= POOL / 2
        if signalled is signal.SIGSTOP:
            prefill.signal(signal.SIGCONT)
            decode.wait_until_empty(30)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_commands_of_the_quick_start(llama: Path, fleet: Fleet) -> None:
    """As they stand there; the prefill engine is killed while it is busy."""
    asks = [Ask(tokens) for tokens in mixed_prompts(16, count=120)]
    expected = [answer.tokens for answer in fleet.answers(EngineSpec(llama), asks)]
    prefill, decode = (Server(spec, fleet.next_log()) for spec in documented_specs(llama))
    with Deployment([prefill], [decode], fleet.next_log()) as deployment:
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(
                ask_all, asks, partial(complete, deployment.proxy.url, PATIENCE), clients=8
            )
            decode.wait_until(lambda: received(decode) >= 10, PATIENCE)
            prefill.signal(signal.SIGKILL)
            outcomes = asking.result()
        assert not wrong(outcomes, expected)
        assert deployment.proxy.total("lamina_proxy_unpushed_total") > 10


def held_for_pushes(server: Server) -> float:
    """Its blocks that wait for pushes, or may still be written to by one."""
    return server.metrics().total("lamina_push_blocks")


def received(server: Server) -> float:
    """Prompts that were pushed to it."""
    return server.metrics().total("lamina_pushes_total", outcome="received")


def documented_specs(model: Path) -> Iterator[EngineSpec]:
    """The quick start's commands for a prefill engine and a decode engine, on this machine and with
    little host memory. What it does not say is left to vLLM."""
    section = QUICK_START.read_text().split("### One engine prefills, another decodes")[1]
    words = shlex.split(section.split("```")[1], comments=True)
    starts = [index for index, word in enumerate(words) if word == "serve"]
    assert len(starts) == 2, "there is a command for each side"
    for rest in (words[start + 2 :] for start in starts):
        pairs = zip(rest[::2], rest[1::2], strict=False)
        flags = takewhile(lambda pair: pair[0].startswith("--"), pairs)
        options = {flag[2:].replace("-", "_"): value for flag, value in flags}
        del options["host"], options["port"]
        config = json.loads(options.pop("kv_transfer_config"))
        lamina = {"host": {"capacity": "64MiB"}, **config["kv_connector_extra_config"]}
        if "listen" in lamina["push"]:
            lamina["push"]["listen"] = f"127.0.0.1:{free_port()}"
        usual = {"kv_load_failure_policy": "fail", "kv_connector_module_path": None}
        transfer = {**usual, **config, "kv_connector_extra_config": lamina}
        yield EngineSpec(model, lamina, options, transfer)


@pytest.mark.timeout(600)
def test_a_prefill_server_that_is_told_to_end(llama: Path, fleet: Fleet) -> None:
    """It sends what it has been asked for before it ends, and nothing is quarantined."""
    length = 1500
    asks = [Ask(prompt(seed, length), max_tokens=2) for seed in range(12)]
    expected = [answer.tokens for answer in fleet.answers(EngineSpec(llama), asks)]
    slow = {"max_num_batched_tokens": 64, "max_num_seqs": 1, "shutdown_timeout": 60}
    prefill = Server(prefill_spec(llama, slow), fleet.next_log(), forked=True)
    decode = Server(
        decode_spec(llama, {"num_gpu_blocks_override": 2000}, {"quarantine": 3600.0}),
        fleet.next_log(),
        forked=True,
    )
    with (
        Deployment([prefill], [decode], fleet.next_log()) as deployment,
        ThreadPoolExecutor(1) as pool,
    ):
        ask = partial(complete, deployment.proxy.url, PATIENCE)
        pushing = pool.submit(ask_all, asks, ask, clients=len(asks))
        decode.wait_until(lambda: decode.held().leased >= 3 * (length // BLOCK), PATIENCE)
        assert prefill.stop() == 0
        assert not wrong(pushing.result(), expected)
        decode.wait_until_empty(30)
        assert decode.metrics().total("lamina_pushes_total", outcome="received") > 3
