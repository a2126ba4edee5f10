"""Replays a trace through the planner, in virtual time and without an engine.

Around the planner is an engine that computes nothing. It prefills one prompt at a time, in the
order in which requests come, and decodes many at once. A save, a load or a move is over before the
next plan, so what is found is decided by what the tiers keep, and not by how fast they are. The
engine may have a cache of its own, which goes by the order of use. Tiers are asked only for what is
not there.
"""

from __future__ import annotations

import heapq
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lamina_kv.bench.policies import Event, Ids, Lru
from lamina_kv.bench.trace_file import ReplayedRequest, Trace
from lamina_kv.config import load_config
from lamina_kv.control.offers import Offer
from lamina_kv.control.planner import Planner
from lamina_kv.control.requests import PushParameters
from lamina_kv.control.shape import ChunkShape
from lamina_kv.keys import KEY_BYTES
from lamina_kv.observe.metrics import Meter
from lamina_kv.plan import (
    NEAR,
    LoadOrder,
    Move,
    Outcome,
    RankReport,
    Receipt,
    SaveOrder,
    StepPlan,
    StoredChunks,
    TierName,
    TierReport,
    TransferReceipt,
)
from lamina_kv.tiers.regard import USUAL

STEP_TOKENS = 8192
"""Tokens of a prompt that one step computes: what vLLM's own default is on a large GPU. Saves of a
step are over before the next one's are ordered."""

PRESUMED = 50_000.0
"""Tokens of prompts that an engine computes a second, if nobody has measured it."""

_CHUNK = 2
"""Tokens that stand for one block. One token behind the prompt is computed whatever is found, and
must not make a chunk whole."""

_CHUNK_BYTES = 1
"""Bytes of a chunk, so small that no bound on bytes is reached."""

_MOST_STEPS = 100_000
"""Steps after which a wait that should be over has shown a fault of the planner."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast the engine is.

    Attributes:
        prefill: tokens a second, of one prompt after the other.
        decode: tokens a second, of each request.
        running: requests that have blocks at once. With 1 they go one after the other.
        measured: whether ``prefill`` gives way to what the trace says of each prompt, if it does.
    """

    prefill: float
    decode: float
    running: int
    measured: bool = False

    def of(self, trace: Trace) -> Pace:
        """The same for the server that recorded a trace."""
        rate = trace.prefill_rate
        return replace(self, prefill=rate) if self.measured and rate else self

    def seconds(self, request: ReplayedRequest, tokens: int) -> float:
        """What computing some tokens of a prompt takes."""
        tokens = min(tokens, request.input_tokens)  # the last block of some traces is not whole
        if self.measured and request.prefill_seconds and request.input_tokens:
            return request.prefill_seconds * tokens / request.input_tokens
        return tokens / self.prefill


@dataclass(slots=True)
class Replay:
    """What became of a trace.

    Attributes:
        found: blocks that were found, by the tier that had them.
        saved: seconds of prefill that were saved, by the tier that had the blocks.
        had: blocks that the engine had itself.
        schedule: what happened, in order.
        seconds: virtual seconds that it took.
    """

    found: dict[TierName, int] = field(default_factory=dict)
    saved: dict[TierName, float] = field(default_factory=dict)
    had: int = 0
    schedule: list[Event] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def blocks(self) -> int:
        """Blocks that were found in tiers."""
        return sum(self.found.values())


class NoPool:
    """Engine blocks of which there are always enough."""

    def hold(self, blocks: Sequence[int]) -> None:
        """Nothing to hold."""

    def free(self, blocks: Sequence[int]) -> None:
        """Nothing to free."""


class View:
    """A request as the planner sees it: whole blocks, and a token or two behind them.

    Args:
        name: its name.
        request: what the trace says of it.
        block_tokens: tokens that a block has here; all of them are the block's number.

    Attributes:
        computed: tokens of it that are computed.
    """

    recompute_tokens = 1
    root_extra = b""
    push: PushParameters | None = None
    regard = USUAL

    def __init__(self, name: str, request: ReplayedRequest, block_tokens: int) -> None:
        self.request_id = name
        self.computed = 0
        ids = np.array(request.blocks + request.answer, np.uint32)
        self._tokens = array("I", np.repeat(ids, block_tokens).tobytes() + bytes(8))
        self._block_tokens = block_tokens
        self.num_prompt_tokens = self.num_tokens = block_tokens * len(request.blocks) + 1

    def sampled(self) -> None:
        """The first token of the answer is known from now on."""
        self.num_tokens = self.num_prompt_tokens + 1

    def answered(self) -> None:
        """All tokens are known from now on."""
        self.num_tokens = len(self._tokens) - 1

    def tokens(self) -> Sequence[int]:
        """Every block's tokens, answers included, and one or two behind them."""
        return self._tokens

    def chunk_extra(self, start: int, end: int) -> bytes:
        """Nothing but tokens sets chunks apart."""
        return b""

    def blocks(self, group: int) -> Sequence[int]:
        """As many as there are chunks; which ones makes no difference."""
        return range(-(-len(self._tokens) // self._block_tokens))

    def state_blocks(self, group: int, end: int) -> Sequence[int]:
        """There are no states."""
        return ()


class Engine:
    """See the module.

    Args:
        trace: what is asked of it.
        near: blocks of host memory.
        far: blocks of each far tier, by name.
        pace: how fast it is.
        ended: called whenever a request has ended, with the blocks of its prompt.
        own: blocks of the engine's own cache.
    """

    def __init__(
        self,
        trace: Trace,
        near: int,
        far: Mapping[str, int],
        pace: Pace,
        ended: Callable[[int], None] = lambda _: None,
        own: int = 0,
    ) -> None:
        self._trace = trace
        self._own = Lru(own, leaf_first=True)
        self._pace = pace
        self._report = ended
        self._now = 0.0
        self._step = _CHUNK * max(1, STEP_TOKENS // trace.block_tokens)
        # Moments, in order; equal ones in the order in which they became known.
        self._events: list[tuple[float, int, Callable[[int], None], int]] = []
        self._known = 0
        self._views: dict[int, View] = {}
        self._waiting: deque[int] = deque()
        self._prefilling = False
        self._running = 0
        tiers = [TierName(name) for name in (NEAR, *far)]
        self._replay = Replay(dict.fromkeys(tiers, 0), dict.fromkeys(tiers, 0.0))
        self._meter = Meter()
        self._planner = _planner(near, far, self._meter, lambda: self._now)

    def run(self) -> Replay:
        """Serve every request."""
        for number, request in enumerate(self._trace.requests):
            self._at(request.seconds, self._arrives, number)
        while self._events:
            self._now, _, happens, number = heapq.heappop(self._events)
            happens(number)
            if self._waiting and not self._prefilling and self._running < self._pace.running:
                self._begins(self._waiting.popleft())
        self._replay.seconds = self._now
        return self._replay

    def _at(self, moment: float, happens: Callable[[int], None], number: int) -> None:
        heapq.heappush(self._events, (moment, self._known, happens, number))
        self._known += 1

    def _arrives(self, number: int) -> None:
        self._views[number] = view = View(str(number), self._trace.requests[number], _CHUNK)
        self._planner.arrived(view)
        self._waiting.append(number)

    def _begins(self, number: int) -> None:
        """A request is looked up, gets its blocks, and what was found is loaded."""
        view, request = self._views[number], self._trace.requests[number]
        had = self._own.find(request.blocks, len(self._replay.schedule))
        self._replay.had += had
        self._replay.schedule.append(Event(True, request.blocks, had))
        offer = self._look_up(view, had * _CHUNK)
        for tier, tokens in offer.taken.items():
            self._replay.found[tier] += tokens // _CHUNK
            saved = self._pace.seconds(request, tokens // _CHUNK * self._trace.block_tokens)
            self._replay.saved[tier] += saved
        self._planner.admitted(view.request_id, offer.tokens)
        self._plan()
        self._running += 1
        self._prefilling = True
        view.computed = had * _CHUNK + offer.tokens
        left = request.input_tokens - view.computed // _CHUNK * self._trace.block_tokens
        self._at(self._now + self._pace.seconds(request, max(0, left)), self._prefilled, number)

    def _look_up(self, view: View, floor: int) -> Offer:
        for _ in range(_MOST_STEPS):
            offer = self._planner.lookup(view, floor)
            if not offer.ask_again:
                return offer
            self._plan()
        raise RuntimeError(f"request {view.request_id} waits for ever")

    def _prefilled(self, number: int) -> None:
        view, request = self._views[number], self._trace.requests[number]
        self._compute(view)
        self._arrived(request.blocks)
        self._prefilling = False
        self._at(self._now + request.output_tokens / self._pace.decode, self._ends, number)

    def _ends(self, number: int) -> None:
        view, request = self._views.pop(number), self._trace.requests[number]
        if request.answer:
            view.answered()
            self._compute(view)
            self._arrived(request.blocks + request.answer)
        self._planner.finished(view.request_id, view.computed, [view.blocks(0)])
        for _ in range(_MOST_STEPS):
            if not self._planner.has_work:
                break
            self._plan()
        self._running -= 1
        self._meter.drain()  # nobody reads it, and it grows
        self._report(len(request.blocks))

    def _arrived(self, blocks: Ids) -> None:
        """All blocks of a request are in the engine, and may be kept."""
        self._own.use(blocks, len(self._replay.schedule))
        self._replay.schedule.append(Event(False, blocks))

    def _compute(self, view: View) -> None:
        """Compute all tokens of a request that are known."""
        while view.computed < view.num_tokens:
            start, view.computed = view.computed, min(view.num_tokens, view.computed + self._step)
            self._plan((view.request_id, start, view.computed))

    def _plan(self, *progress: tuple[str, int, int]) -> None:
        """A step: all that it orders goes well."""
        plan = self._planner.plan_step(progress, forward=bool(progress))
        self._planner.receive([_done(plan)])


def _done(plan: StepPlan) -> Receipt:
    orders: list[LoadOrder | SaveOrder | Move] = [*plan.loads, *plan.saves]
    for tier in plan.tiers:
        orders += (*tier.outward, *tier.inward)
    return Receipt(
        0, tuple(TransferReceipt(each.transfer, Outcome.DONE, _CHUNK_BYTES) for each in orders)
    )


def _planner(
    near: int, far: Mapping[str, int], meter: Meter, clock: Callable[[], float]
) -> Planner:
    """A planner whose tiers are empty."""
    config = load_config(
        {
            # All of a hit is loaded, so that what is found is what is kept.
            "load": {"when": "always", "mode": "parked", "min_tokens": 0},
            "tiers": [
                {"kind": "disk", "name": name, "path": f"/{name}", "capacity": size}
                for name, size in far.items()
            ],
        },
        {},
    )
    nothing = np.empty(0, np.int32)
    stored = StoredChunks(
        nothing, nothing.astype(np.uint32), np.empty((0, KEY_BYTES), np.uint8), np.empty(0)
    )
    tiers = tuple(TierReport(TierName(name), size, stored) for name, size in far.items())
    return Planner(
        config,
        ChunkShape.uniform(_CHUNK, _CHUNK),
        b"trace",
        NoPool(),
        [RankReport(0, near, _CHUNK_BYTES, tiers)],
        meter,
        clock=clock,
    )
