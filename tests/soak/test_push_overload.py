"""A decode engine that is asked twice what its cache can hold, for a minute and a half: what is
prefilled for it is not thrown away, and it is as quick afterwards as it was before.
"""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.deployment import Deployment, Outcome, complete, decode_spec, prefill_spec, wrong
from engine.driver import Ask, EngineSpec, Fleet, Metrics
from engine.server import Server
from engine.workload import BLOCK, prompt
from soak.conftest import Note

pytestmark = [pytest.mark.engine, pytest.mark.soak]

CAPACITY = 8
"""Requests that the decode engine's cache can hold."""
PROMPT, ANSWER = 12 * BLOCK - 1, 4 * BLOCK
POOL = {"num_gpu_blocks_override": 16 * CAPACITY + 1}
"""Of both engines; one block is never used."""
BEFORE, OVERLOAD, BACK, AFTER = 20.0, 90.0, 30.0, 20.0
"""Seconds of a load that fits, of twice as much, until all is well again, and of a load that fits.
"""
PATIENCE = 120.0


class Load:
    """Clients, each of which asks anew as soon as it has an answer, and what became of it.

    Args:
        url: of the proxy.
    """

    def __init__(self, url: str) -> None:
        self.answers: list[tuple[Ask, Outcome]] = []
        self._url = url
        self._seeds = itertools.count(17_000)

    def run(self, clients: int, seconds: float) -> float:
        """So many clients, for so long; returns how many answers there were in a second."""
        first = len(self.answers)
        over = threading.Event()
        with ThreadPoolExecutor(clients) as pool:
            asking = [pool.submit(self._ask, over) for _ in range(clients)]
            began = time.monotonic()
            over.wait(seconds)
            rate = (len(self.answers) - first) / (time.monotonic() - began)
            over.set()
        for client in asking:
            client.result()
        return rate

    def _ask(self, over: threading.Event) -> None:
        while not over.is_set():
            ask = Ask(prompt(next(self._seeds), PROMPT), max_tokens=ANSWER)
            outcome = complete(self._url, PATIENCE, ask)
            self.answers.append((ask, outcome))


@pytest.mark.timeout(900)
def test_decode_at_twice_its_capacity(llama: Path, fleet: Fleet, note: Note) -> None:
    prefill = Server(prefill_spec(llama, POOL), fleet.next_log(), forked=True)
    decode = Server(decode_spec(llama, POOL), fleet.next_log(), forked=True)
    with Deployment([prefill], [decode], fleet.next_log()) as deployment:
        load = Load(deployment.proxy.url)
        load.run(1, 5.0)
        rate = load.run(CAPACITY, BEFORE)
        before = decode.metrics()
        full = load.run(2 * CAPACITY, OVERLOAD)
        during = decode.metrics()
        load.run(CAPACITY, BACK)
        after = load.run(CAPACITY, AFTER)
        decode.wait_until_empty(30)
        prefill.wait_until_empty(30)
    asked, computed = share(during, before)
    note("decode at twice its capacity: prompts", asked)
    note("  of which it computed itself (%)", f"{100 * computed:.1f}")
    note("  answers/s before, meanwhile, afterwards", f"{rate:.2f} {full:.2f} {after:.2f}")
    asks = [ask for ask, _ in load.answers]
    expected = [answer.tokens for answer in fleet.answers(EngineSpec(llama), asks)]
    assert not wrong([outcome for _, outcome in load.answers], expected)
    assert asked > 4 * CAPACITY
    assert computed < 0.05
    assert after > 0.7 * rate


def share(now: Metrics, before: Metrics) -> tuple[int, float]:
    """Prompts that an engine has begun to decode, and the share of their tokens that it had to
    compute."""
    tokens = now.since(before, "lamina_prompt_tokens_total")
    computed = now.since(before, "lamina_computed_tokens_total")
    return round(tokens / PROMPT), computed / tokens
