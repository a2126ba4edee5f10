"""Two prefill engines, two decode engines and the proxy, each of which is killed or stopped at any
moment while many clients ask and some of them leave: every answer is right, or a clean error within
its deadline, and in the end nothing is held any more.

The engines are real ones behind a small server (see :mod:`soak.serving`); the proxy is the program
that users run. A last test does the same, without the kills, with vLLM's own servers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.driver import SMALL, Ask, EngineSpec, Fleet, child_environment
from engine.server import Server
from engine.workload import CHUNK, Tokens, random_tokens
from lamina.bench.ports import free_port
from push_proxy.running import until
from soak.conftest import Note
from soak.serving import Served

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.scaled]

SEED = int(os.environ.get("LAMINA_SOAK_SEED", "0"))
REQUESTS = int(os.environ.get("LAMINA_SOAK_PUSH_REQUESTS", "60"))
CLIENTS = 6
LEAVING = 0.12
"""Of clients, before they have their answer."""
PAUSE = 0.75
"""Seconds that a client waits on average: engines take a while to come back."""
BACKOFF = 2.0
"""Seconds that it waits when there is no proxy, so that not all find none."""
PUSH = {"deadline": 4.0, "silence": 1.0, "quarantine": 1.0, "batch": "64KiB", "min_tokens": 0}
DEADLINE = 45.0
"""Seconds after which a client that has no answer hangs: more than everything that is to take
effect before, one after the other."""
PROGRAM = "from lamina.cli.main import main; main()"
OPTIONS = {"max_num_batched_tokens": 128}
LONGEST = 24 * CHUNK


@dataclass(frozen=True)
class Wish:
    """What one client wants.

    Attributes:
        ask: its request.
        patience: seconds after which it leaves.
        pause: seconds until it asks.
    """

    ask: Ask
    patience: float
    pause: float = 0.0


def wishes(rng: random.Random, count: int) -> list[Wish]:
    bases = [random_tokens(rng, LONGEST) for _ in range(12)]
    return [
        Wish(
            Ask(
                rng.choice(bases)[: rng.randrange(LONGEST)]
                + random_tokens(rng, rng.randrange(1, 3 * CHUNK)),
                max_tokens=rng.choice((1, 4, 8, 16)),
            ),
            rng.uniform(0.02, 1.0) if rng.random() < LEAVING else DEADLINE,
            rng.uniform(0, 2 * PAUSE),
        )
        for _ in range(count)
    ]


class ProxyProgram:
    """``lamina push-proxy`` in a process of its own.

    Args:
        prefill: URL and push address of each.
        decode: URL of each.
        log: what it says.
    """

    def __init__(self, prefill: list[tuple[str, str]], decode: list[str], log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        limits = {"connect": 2, "first-byte": 25, "stall": 10, "total": 35}
        self._arguments = [
            *(f"--prefill={url},{push}" for url, push in prefill),
            *(f"--decode={url}" for url in decode),
            f"--port={self.port}",
            "--health-interval=0.5",
            *(f"--{name}-timeout={seconds}" for name, seconds in limits.items()),
        ]

    def start(self) -> None:
        """Start it; returns when it answers."""
        with child_environment({}), self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, "push-proxy", *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        for _ in range(4):
            with contextlib.suppress(TimeoutError):
                until(self._answers)
                return
        raise TimeoutError("the proxy does not start")

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(f"{self.url}/health", trust_env=False, timeout=2)
            return True
        return False

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def metrics(self) -> str:
        """What it publishes."""
        return httpx.get(f"{self.url}/metrics", trust_env=False, timeout=10).text


class Chaos:
    """Everything that is killed and stopped.

    Args:
        sides: engines by what they are.
        proxy: between them.
        seed: decides what happens when.
    """

    def __init__(self, sides: dict[str, list[Served]], proxy: ProxyProgram, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()
        self._proxy = proxy
        self._over = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._rage, args=(side, engines, random.Random(f"{seed}{side}"))
            )
            for side, engines in sides.items()
        ]
        self._threads.append(
            threading.Thread(target=self._rage_at_proxy, args=(random.Random(seed),))
        )

    def begin(self) -> None:
        """From now on; one engine of each side at a time, so that there is always another."""
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """No more of it; everything runs again when this returns."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _rage(self, side: str, engines: list[Served], rng: random.Random) -> None:
        while not self._over.wait(rng.uniform(0.1, 1.5)):
            engine = rng.choice(engines)
            if rng.random() < 0.5:
                self.done[f"kills of {side}"] += 1
                self.count(engine)
                engine.kill()
                self._over.wait(rng.uniform(0, 0.5))
                engine.start()
                engine.wait()
            else:
                self.done[f"stops of {side}"] += 1
                engine.stop()
                self._over.wait(rng.choice((0.3, 0.8, 2.0, 5.0)))
                engine.go_on()

    def _rage_at_proxy(self, rng: random.Random) -> None:
        while not self._over.wait(rng.uniform(5, 30)):
            self.done["kills of the proxy"] += 1
            self._proxy.kill()
            self._over.wait(rng.uniform(0, 0.5))
            self._proxy.start()

    def count(self, engine: Served) -> None:
        """Keep what an engine has counted, which is lost with it."""
        with contextlib.suppress(httpx.HTTPError):
            for name, value in engine.census().items():
                if not name.startswith("held"):
                    self.counted[name] += int(value)


def complete(url: str, wish: Wish) -> tuple[str, Tokens, float]:
    """One client: what became of it, its answer, and how long it took."""
    body = {
        "model": "model",
        "prompt": wish.ask.tokens,
        "max_tokens": wish.ask.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    time.sleep(wish.pause)
    begun = time.monotonic()
    answer: Tokens = ()
    try:
        with httpx.Client(trust_env=False, timeout=httpx.Timeout(wish.patience)) as client:
            response = client.post(f"{url}/v1/completions", json=body)
        kind = "answers"
        if response.status_code != 200:
            kind = f"status {response.status_code}"
            assert response.json()["error"]["message"]
        else:
            answer = tuple(response.json()["choices"][0]["token_ids"])
    except httpx.HTTPError as error:
        kind = type(error).__name__
        if isinstance(error, httpx.ReadTimeout):
            kind = "left" if wish.patience < DEADLINE else "hung"
    seconds = time.monotonic() - begun
    if kind == "ConnectError":
        time.sleep(BACKOFF)
    return kind, answer, seconds


def settle(engines: list[Served]) -> dict[str, dict[str, float]]:
    """What engines still hold after a while in which nobody asks them for anything."""
    end = time.monotonic() + 40
    while True:
        held = {}
        for engine in engines:
            census = engine.census()
            if any(value for name, value in census.items() if name.startswith("held")):
                held[engine.url] = census
        if not held or time.monotonic() > end:
            return held
        time.sleep(0.2)


@pytest.fixture
def served(llama: Path, fleet: Fleet, tmp_path: Path) -> Iterator[Any]:
    """Makes an engine that is served; all are gone when the test ends."""
    children: list[Served] = []

    def serve(push: dict[str, object]) -> Served:
        with child_environment({}):
            forkserver.set_forkserver_preload(["engine.preloaded"])
            context = multiprocessing.get_context("forkserver")
            spec = EngineSpec(llama, {**SMALL, "push": {**PUSH, **push}}, OPTIONS)
            children.append(Served(spec, free_port(), tmp_path, context))
            children[-1].start()
        return children[-1]

    yield serve
    for child in children:
        child.go_on()
        child.kill()


@pytest.mark.timeout(300 + 2 * REQUESTS)
def test_chaos(llama: Path, fleet: Fleet, served: Any, tmp_path: Path, note: Note) -> None:
    rng = random.Random(SEED)
    wanted = wishes(rng, REQUESTS)
    plain = fleet.get(EngineSpec(llama, options={"max_num_batched_tokens": 2048}))
    expected = [answer.tokens for answer in plain.generate([wish.ask for wish in wanted])]

    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    prefill = [served({"listen": address}) for address in addresses]
    decode = [served({}) for _ in range(2)]
    for engine in (*prefill, *decode):
        engine.wait()
    proxy = ProxyProgram(
        [(engine.url, address) for engine, address in zip(prefill, addresses, strict=True)],
        [engine.url for engine in decode],
        tmp_path / "proxy.log",
    )
    proxy.start()
    chaos = Chaos({"prefill": prefill, "decode": decode}, proxy, SEED)
    try:
        chaos.begin()
        with ThreadPoolExecutor(CLIENTS) as clients:
            outcomes = list(clients.map(lambda wish: complete(proxy.url, wish), wanted))
        chaos.end()
        for engine in (*prefill, *decode):
            engine.wait()
        assert not settle([*prefill, *decode])
        calm = [complete(proxy.url, Wish(wish.ask, DEADLINE)) for wish in wanted[:20]]
        assert not settle([*prefill, *decode])
    finally:
        chaos.end()
        proxy.kill()
    for engine in (*prefill, *decode):
        chaos.count(engine)

    kinds = Counter(kind for kind, _, _ in outcomes)
    note("push: requests", len(outcomes))
    for name, count in sorted((*kinds.items(), *chaos.done.items(), *chaos.counted.items())):
        note(f"  {name}", count)
    note("  longest (s)", f"{max(seconds for _, _, seconds in outcomes):.1f}")
    wrong = [
        index
        for index, (kind, answer, _) in enumerate(outcomes)
        if kind == "answers" and answer != expected[index]
    ]
    assert not wrong
    assert not kinds["hung"]
    assert [(kind, answer) for kind, answer, _ in calm] == [("answers", e) for e in expected[:20]]
    assert kinds["answers"] > len(outcomes) / 3
    assert chaos.counted["lamina_pushes_total received"] > len(outcomes) / 10
    assert sum(chaos.done.values()) > len(outcomes) / 30


@pytest.mark.timeout(600)
def test_with_servers_of_vllm(llama: Path, fleet: Fleet, tmp_path: Path, note: Note) -> None:
    """Then the prefill engine is killed, and the decode engine computes everything."""
    wanted = wishes(random.Random(SEED), 24)
    plain = fleet.get(EngineSpec(llama, options={"max_num_batched_tokens": 2048}))
    expected = [answer.tokens for answer in plain.generate([wish.ask for wish in wanted])]
    address = f"127.0.0.1:{free_port()}"
    engines = [
        EngineSpec(
            llama, {**SMALL, "push": {**PUSH, "deadline": 20.0, "silence": 5.0, **push}}, OPTIONS
        )
        for push in ({"listen": address}, {})
    ]
    with (
        Server(engines[0], fleet.next_log()) as prefill,
        Server(engines[1], fleet.next_log()) as decode,
    ):
        proxy = ProxyProgram(
            [(prefill._address, address)], [decode._address], tmp_path / "proxy.log"
        )
        proxy.start()
        try:
            with ThreadPoolExecutor(CLIENTS) as clients:
                outcomes = list(clients.map(lambda wish: complete(proxy.url, wish), wanted))
            received = decode.metrics().total("lamina_pushes_total", outcome="received")
            os.killpg(prefill._process.pid, signal.SIGKILL)
            late = [complete(proxy.url, Wish(wish.ask, DEADLINE)) for wish in wanted[:6]]
        finally:
            proxy.kill()
    note("push, servers of vLLM: answers", sum(kind == "answers" for kind, _, _ in outcomes))
    note("push, servers of vLLM: pushes received", int(received))
    for (kind, answer, _), wish, right in zip(outcomes, wanted, expected, strict=True):
        assert answer == right if kind == "answers" else wish.patience < DEADLINE
    assert received > len(wanted) / 3
    assert [(kind, answer) for kind, answer, _ in late] == [("answers", e) for e in expected[:6]]
