"""The simulated engine in real time, with clients that ask for one request after the other.

A step takes as long as its tokens take to compute. What a run takes is what it has computed and
what it has stood idle, so that a busy machine, or one that is stopped for a while, does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

from lamina_kv.bench.faulty_store import FaultyStore
from lamina_kv.plan import TierName
from simulator.content import Violation
from simulator.engine import Simulator
from simulator.options import Far, Options, Sort
from simulator.step import Step
from simulator.stores import Past

TOKEN = 0.0003
"""Seconds to compute a token."""

IDLE = 0.002
"""Seconds of a step that computes nothing."""

CLIENTS = 3
DOCUMENTS = 16
DOCUMENT = 192
"""Tokens that several requests begin with: twelve chunks."""
QUESTION = 8

DEADLINE = 0.5
"""``load.deadline``, seconds."""

TIMEOUT = 0.3
"""Of a call of a store, seconds."""

TIER = TierName("shared")

HOST_SLOTS = 64
"""A third of the documents' chunks."""


def options_of(entry: Mapping[str, object], pause: float) -> Options:
    """An engine whose only far tier is a store that others share.

    Args:
        entry: what ``tiers`` holds for it.
        pause: ``breaker.pause``, seconds.
    """
    tier = Far(TIER, Sort.KEYS, in_flight=48, entry={"keep": "all", "timeout": TIMEOUT, **entry})
    return Options(
        blocks=400,
        chunk_blocks=4,
        budget=512,
        max_running=CLIENTS + 1,
        prefix_caching=False,
        host_slots=HOST_SLOTS,
        tiers=(tier,),
        when="auto",
        deadline=DEADLINE,
        breaker_failures=3,
        breaker_pause=pause,
        save_tokens="prompt",
    )


class Busy(Simulator):
    """See the module.

    Args:
        seed: of its clients.
        entry: what ``tiers`` holds for its store.
        store: a directory for it.
        pause: ``breaker.pause``, seconds.

    Attributes:
        asked: tokens of all prompts that were served.
        computed: tokens that were computed.
        idle: seconds in which requests waited and nothing was computed.
        slowest: seconds that the slowest request took.
    """

    def __init__(
        self, seed: int, entry: Mapping[str, object], store: Path, *, pause: float = 0.2
    ) -> None:
        # Whether a store that may fail has what it shows is not looked at behind its back.
        past = Past(damaged={TIER})
        super().__init__(seed, options_of(entry, pause), store, past=past, virtual=False)
        self.asked = self.computed = 0
        self.idle = 0.0
        self.slowest = 0.0
        self._documents = Random(1)
        self._prompts = [
            [self._documents.randrange(5) for _ in range(DOCUMENT)] for _ in range(DOCUMENTS)
        ]
        self._clients = Random(seed)
        self._began: dict[str, float] = {}

    @property
    def faulty(self) -> FaultyStore:
        """Its store, to be made to fail."""
        store = self._ranks[0]._stores[TIER].inner
        assert isinstance(store, FaultyStore)
        return store

    @property
    def seconds(self) -> float:
        """What serving has taken."""
        return self.computed * TOKEN + self.idle

    def serve(self, requests: int, happens: Callable[[int], None] = lambda served: None) -> None:
        """Serve so many requests.

        Args:
            requests: how many.
            happens: called after each step with the number of those that were served.

        Raises:
            Violation: if a promise was broken.
        """
        submitted = served = 0
        while served < requests:
            while submitted < requests and len(self._began) < CLIENTS:
                document = self._clients.choice(self._prompts)
                question = [self._clients.randrange(5) for _ in range(QUESTION)]
                self._began[self.submit(document + question, 1)] = self.seconds
                submitted += 1
            self.step()
            for name in self._began.keys() - set(self.active):
                self.slowest = max(self.slowest, self.seconds - self._began.pop(name))
                served += 1
                self.asked += DOCUMENT + QUESTION
            happens(served)

    def _finish_step(self, step: Step) -> None:
        tokens = sum(item.count for item in step.items)
        began = time.perf_counter()
        time.sleep(tokens * TOKEN if tokens else IDLE)
        super()._finish_step(step)
        if tokens:
            self.computed += tokens
        elif self._began:
            self.idle += time.perf_counter() - began

    def check_pace(self) -> None:
        """Serving was not slower than without a cache by more than a twentieth.

        Raises:
            Violation: if it was.
        """
        took, alone = self.seconds, self.asked * TOKEN
        if alone < 0.95 * took:
            raise Violation(
                f"{took:.2f} s for what takes {alone:.2f} s without a cache: {self.computed} of "
                f"{self.asked} tokens were computed, and {self.idle:.2f} s idle"
            )

    @property
    def failures(self) -> dict[str, int]:
        """Transfers that have failed, by kind."""
        counters = self._watch._meter._counters
        return {
            labels[-1]: int(count)
            for (name, labels), count in counters.items()
            if name == "failures" and count
        }

    def account(self) -> str:
        """How it went, in a line."""
        pace = self.asked * TOKEN / self.seconds
        return (
            f"{pace:.2f}x no cache, {1 - self.computed / self.asked:.0%} brought, idle "
            f"{self.idle:.1f} s, slowest {self.slowest:.2f} s, {self.failures}"
        )
