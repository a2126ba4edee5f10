"""Two prefill servers, two decode servers and the proxy, each of which is killed or stopped at any
moment while many clients ask and some of them leave: every answer is right, or a clean error within
its deadline, and in the end nothing is held any more.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from engine.deployment import (
    ANSWERED,
    LEFT,
    Deployment,
    Outcome,
    Proxy,
    ask_all,
    complete,
    decode_spec,
    prefill_spec,
    wrong,
)
from engine.driver import Ask, EngineSpec, Fleet
from engine.server import Server
from engine.workload import CHUNK, random_tokens
from soak.conftest import Note

pytestmark = [pytest.mark.engine, pytest.mark.soak]

SEED = int(os.environ.get("LAMINA_SOAK_SEED", "0"))
REQUESTS = int(os.environ.get("LAMINA_SOAK_PUSH_REQUESTS", "60"))
CLIENTS = 6
LEAVING = 0.12
"""Of clients, before they have their answer."""
PAUSE = 0.75
"""Seconds that a client waits on average: engines take a while to come back."""
BACKOFF = 2.0
"""Seconds that it waits when there is no proxy, so that not all find none."""
DEADLINE = 60.0
"""Seconds after which a client that has no answer hangs."""
SETTLED = 150.0
"""Seconds after which nothing is held: more than ``push.quarantine``."""
OPTIONS = {"max_num_batched_tokens": 128}
LIMITS = (
    "--health-interval=0.5",
    "--connect-timeout=2",
    "--first-byte-timeout=25",
    "--stall-timeout=10",
    "--total-timeout=45",
)
"""The proxy's: it has given up what it cannot do before its clients have."""
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


class Chaos:
    """Everything that is killed and stopped.

    Args:
        sides: servers by what they are.
        proxy: between them.
        seed: decides what happens when.

    Attributes:
        done: how often each of it happened.
        counted: pushes by what became of them, of all engines that there were.
    """

    def __init__(self, sides: dict[str, Sequence[Server]], proxy: Proxy, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()
        self._proxy = proxy
        self._proxy_gone: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(len(sides) + 1)
        self._raging: list[Future[None]] = []
        self._rages: list[Callable[[], None]] = [
            lambda: self._rage_at_proxy(random.Random(seed)),
            *(
                lambda side=side, servers=servers: self._rage(
                    side, servers, random.Random(f"{seed}{side}")
                )
                for side, servers in sides.items()
            ),
        ]

    def begin(self) -> None:
        """From now on; one server of each side at a time, so that there is always another."""
        self._raging = [self._pool.submit(rage) for rage in self._rages]

    def end(self) -> None:
        """No more of it; everything runs again when this returns."""
        self._over.set()
        for rage in self._raging:
            rage.result()

    def spared_proxy(self, outcome: Outcome) -> bool:
        """Whether the proxy was there as long as the request took."""
        ended = outcome.began + outcome.seconds
        return not any(gone <= ended and outcome.began <= back for gone, back in self._proxy_gone)

    def count(self, server: Server) -> None:
        """Keep what an engine has counted, which is lost with it."""
        with contextlib.suppress(OSError):
            for sample in server.metrics().samples:
                if sample.name == "lamina_pushes_total":
                    self.counted[sample.labels["outcome"]] += int(sample.value)

    def _rage(self, side: str, servers: Sequence[Server], rng: random.Random) -> None:
        while not self._over.wait(rng.uniform(0.1, 1.5)):
            server = rng.choice(servers)
            if rng.random() < 0.5:
                self.done[f"kills of {side}"] += 1
                self.count(server)
                server.kill()
                self._over.wait(rng.uniform(0, 0.5))
                server.start()
                server.wait()
            else:
                self.done[f"stops of {side}"] += 1
                server.signal(signal.SIGSTOP)
                self._over.wait(rng.choice((0.3, 0.8, 2.0, 5.0)))
                server.signal(signal.SIGCONT)

    def _rage_at_proxy(self, rng: random.Random) -> None:
        while not self._over.wait(rng.uniform(5, 30)):
            self.done["kills of the proxy"] += 1
            gone = time.monotonic()
            self._proxy.kill()
            self._over.wait(rng.uniform(0, 0.5))
            self._proxy.start()
            self._proxy_gone.append((gone, time.monotonic()))


def ask_one(url: str, wish: Wish) -> Outcome:
    """One client, from when it begins to ask."""
    time.sleep(wish.pause)
    outcome = complete(url, wish.patience, wish.ask)
    if outcome.kind == "ConnectError":
        time.sleep(BACKOFF)
    return outcome


@pytest.mark.timeout(600 + 3 * REQUESTS)
def test_chaos(llama: Path, fleet: Fleet, note: Note) -> None:
    rng = random.Random(SEED)
    wanted = wishes(rng, REQUESTS)
    asks = [wish.ask for wish in wanted]
    plain = EngineSpec(llama, options={"max_num_batched_tokens": 2048})
    expected = [answer.tokens for answer in fleet.answers(plain, asks)]

    prefill, decode = (
        [Server(spec(llama, OPTIONS), fleet.next_log(), forked=True) for _ in range(2)]
        for spec in (prefill_spec, decode_spec)
    )
    with Deployment(prefill, decode, fleet.next_log(), *LIMITS) as deployment:
        url = deployment.proxy.url
        chaos = Chaos({"prefill": prefill, "decode": decode}, deployment.proxy, SEED)
        try:
            chaos.begin()
            with ThreadPoolExecutor(CLIENTS) as clients:
                outcomes = list(clients.map(lambda wish: ask_one(url, wish), wanted))
        finally:
            chaos.end()
        deployment.proxy.wait_for_engines()
        calm = ask_all(asks[:20], partial(complete, url, DEADLINE), clients=CLIENTS)
        for server in deployment.servers:
            chaos.count(server)
            server.wait_until_empty(SETTLED)

    kinds = Counter(outcome.kind for outcome in outcomes)
    note("push: requests", len(outcomes))
    for name, count in sorted((*kinds.items(), *chaos.done.items(), *chaos.counted.items())):
        note(f"  {name}", count)
    note("  longest (s)", f"{max(outcome.seconds for outcome in outcomes):.1f}")
    lived = [
        (outcome, right)
        for outcome, wish, right in zip(outcomes, wanted, expected, strict=True)
        if chaos.spared_proxy(outcome) and not (outcome.kind == LEFT and wish.patience < DEADLINE)
    ]
    answered = [(outcome, right) for outcome, right in lived if outcome.kind == ANSWERED]
    share = len(answered) / len(lived)
    note("  answered, where client and proxy lived (%)", f"{100 * share:.1f}")
    assert not wrong(*zip(*answered, strict=True))
    assert LEFT not in {outcome.kind for outcome, _ in lived}, "one hangs"
    assert not wrong(calm, expected[:20])
    assert share >= 0.95
    assert chaos.counted["received"] > len(outcomes) / 2
    assert sum(chaos.done.values()) > len(outcomes) / 30
