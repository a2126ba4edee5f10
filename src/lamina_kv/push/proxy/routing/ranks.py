"""One data-parallel rank of an engine: what it is doing, and what it holds, as far as is known.

Known are the requests that this proxy has outstanding there, to the token, and what the engine
publishes now and then. What it publishes beyond the proxy's own are strangers': requests of other
proxies, or of clients that ask the engine itself.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamina_kv.push.proxy.reports import RankReport
from lamina_kv.push.proxy.routing.events.blocks import Blocks
from lamina_kv.push.proxy.routing.pace import Line
from lamina_kv.push.proxy.routing.prefixes import PrefixCache
from lamina_kv.push.proxy.routing.prompt import BLOCK, Prompt
from lamina_kv.push.proxy.routing.words import REQUEST_TOKENS, Candidate

if TYPE_CHECKING:
    from lamina_kv.push.proxy.engines import Engine

STRANGER_TOKENS = 1024
"""Tokens that a stranger's request holds, of which nobody has said how many it has."""

CROWD_SECONDS = 60.0
"""Time constant of the mean number of answers in the making."""

UNTOLD = 3.0
"""Seconds in which a prompt may be computed without having been announced: what was sent to a rank
so lately is expected there, whatever it announces."""

TRUST_STEP = 0.1
"""How much one answer changes how far hits are believed."""
LEAST_TRUST = 0.05
"""Hits are never quite given up, or nobody would notice that they are found again."""

FULL = 0.95
"""Share of an engine's blocks in use beyond which the next request waits for room."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a request means for a rank.

    Attributes:
        compute: tokens that it has to compute before its first one.
        hold: tokens whose KV cache it holds until it ends.
        decodes: whether it then makes an answer there.
        seconds: after which it counts as computed, where nothing tells when it is: an answer that
            is no stream comes as a whole. None if it cannot be said.
    """

    compute: int
    hold: int
    decodes: bool = False
    seconds: float | None = None


class Visit:
    """One request that is outstanding at a rank.

    Args:
        rank: where.
        work: what it means there.

    Attributes:
        rank: where.
    """

    def __init__(self, rank: Rank, work: Work) -> None:
        self.rank = rank
        self._work = work
        self._computing = True
        self._over = False
        rank.queues(work.compute)
        rank.held += work.hold
        rank.requests += 1
        rank.visits += 1
        if work.seconds is not None:
            rank.expect(self, work.seconds)

    def computed(self) -> None:
        """The prompt is: the first byte is there, or is no news."""
        if self._computing and not self._over:
            self._computing = False
            self.rank.queues(-self._work.compute)
            if self._work.decodes:
                self.rank.crowds(+1)

    def end(self) -> None:
        """It is over."""
        self._over = True
        if self._computing:
            self.rank.queues(-self._work.compute)
        elif self._work.decodes:
            self.rank.crowds(-1)
        self.rank.held -= self._work.hold
        self.rank.requests -= 1


class Rank:
    """See the module. One scheduler, with a cache of its own.

    Args:
        engine: whose it is.
        number: its number among all of the deployment.
        index: how a request asks for it: its place among those behind the engine's server.
        push: address at which decode engines reach it; empty for a decode engine.
        clock: monotonic seconds.

    Attributes:
        held: tokens of ours whose KV cache is held there.
        requests: of ours that are outstanding.
        visits: requests sent there so far.
        prefixes: what it holds.
        pace: how long prompts take there.
        usage: share of its KV cache in use when it last said so.
        waiting: requests that waited there then.
        blocks: what it announces that it holds; None if nobody listens.
    """

    def __init__(
        self, engine: Engine, number: int, index: int, push: str, clock: Callable[[], float]
    ) -> None:
        self.engine = engine
        self.number = number
        self.index = index
        self.push = push
        self.held = 0
        self.requests = 0
        self.visits = 0
        self.usage = 0.0
        self.waiting = 0
        self.blocks: Blocks | None = None
        self.prefixes = PrefixCache(clock)
        self.pace = Line(clock)
        self._clock = clock
        self._trust = 1.0
        self._extra = (0, 0)
        self._queued = 0
        self._expected: list[tuple[float, int, Visit]] = []
        self._decoding = 0
        self._mean = 0.0
        self._since = clock()

    @property
    def queued(self) -> int:
        """Tokens of ours that are to be computed there before their first one."""
        now = self._clock()
        while self._expected and self._expected[0][0] <= now:
            heapq.heappop(self._expected)[2].computed()
        return self._queued

    @property
    def load(self) -> int:
        """Tokens of ours, to be computed or held, and what each request costs besides."""
        return self.queued + self.held + REQUEST_TOKENS * self.requests

    @property
    def strangers(self) -> int:
        """Requests there that are not ours. The fewer of what two reports in a row say: one of
        ours may have ended, or begun, while a report was on its way."""
        return min(self._extra)

    @contextmanager
    def visit(self, work: Work) -> Iterator[Visit]:
        """A request is outstanding there."""
        visit = Visit(self, work)
        try:
            yield visit
        finally:
            visit.end()

    def reported(self, report: RankReport | None) -> None:
        """What the engine says of it now; None if it says nothing."""
        extra = 0 if report is None else max(0, report.running + report.waiting - self.requests)
        self._extra = (self._extra[1], extra)
        self.usage = 0.0 if report is None else report.usage
        self.waiting = 0 if report is None else report.waiting
        self.prefixes.capacity = None if report is None else report.capacity

    def found(self, expected: int, cached: int) -> None:
        """The engine has said how much of a prompt it had. If it is mostly less than expected, its
        cache is too small, or others use it, too: then a hit counts for less.

        Args:
            expected: tokens, as the candidate had it.
            cached: tokens that it had.
        """
        if expected >= BLOCK * self._trust:
            share = min(1.0, self._trust * cached / expected)
            self._trust = max(LEAST_TRUST, self._trust + TRUST_STEP * (share - self._trust))

    def queues(self, change: int) -> None:
        """So many more tokens are to be computed there."""
        self._queued += change

    def expect(self, visit: Visit, seconds: float) -> None:
        """The prompt of a visit is computed after so many seconds, unless something is heard of it
        earlier."""
        heapq.heappush(self._expected, (self._clock() + seconds, self.visits, visit))

    def crowds(self, change: int) -> None:
        """So many more answers are in the making there."""
        self._mean, self._since = self._crowd(), self._clock()
        self._decoding += change

    def candidate(self, prompt: Prompt, *, sticky: bool, decodes: bool) -> Candidate:
        """What a policy is told of it.

        Args:
            prompt: what is to be sent there.
            sticky: whether it has answered the session before.
            decodes: whether it makes answers, and so holds those that it has made.
        """
        others = self.strangers
        queued = self.queued
        return Candidate(
            self,
            min(self._hit(prompt, answers=decodes), max(0, prompt.tokens - 1)),
            queued,
            self.held + STRANGER_TOKENS * others,
            self.requests + others,
            max(self._crowd(), float(self._decoding + others)) if decodes else 0.0,
            self.usage > FULL and self.waiting > 0,
            self.visits,
            sticky,
        )

    def _hit(self, prompt: Prompt, *, answers: bool) -> int:
        if self.blocks is None or not self.blocks.told or not prompt.ids:
            return self._learnt(prompt, answers=answers)
        announced = self.blocks.hit(prompt.ids, prompt.model)
        if not self.blocks.complete:
            return max(self._learnt(prompt, answers=answers), announced)
        sent = self.prefixes.hit(prompt.marks, answers=False, age=UNTOLD)
        return max(sent, announced)

    def _learnt(self, prompt: Prompt, *, answers: bool) -> int:
        return int(self._trust * self.prefixes.hit(prompt.marks, answers=answers))

    def _crowd(self) -> float:
        """The mean number of answers in the making, fading."""
        part = math.exp((self._since - self._clock()) / CROWD_SECONDS)
        return part * self._mean + (1 - part) * self._decoding
