"""Replays a trace through many engines that share one store, in virtual time.

Every engine is a real planner with an index of its own of what the store has; what it orders is
carried out here. Simplified is the rest:

- An engine computes one prompt at a time, in steps of :data:`~lamina_kv.bench.replay.STEP_TOKENS`
  tokens, and decodes any number of answers beside that at no cost. It has no cache of its own.
- Loads from host memory into the engine take no time. A save ends with the step that computes it.
- A prompt is whole blocks. While a step computes nothing new is taken in.
- The store is one line of limited bandwidth for everybody and both directions, first come first
  served, with a latency. It loses what was used longest ago when it is full, and never fails.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import count

from lamina_kv.bench.replay import STEP_TOKENS, NoPool, Pace, View
from lamina_kv.bench.trace_file import ReplayedRequest, Trace
from lamina_kv.config import load_config
from lamina_kv.control.planner import Planner
from lamina_kv.control.shape import ChunkShape
from lamina_kv.observe.metrics import Meter
from lamina_kv.plan import (
    NEAR,
    Ask,
    ChunkKey,
    Move,
    Outcome,
    RankReport,
    Receipt,
    StepPlan,
    TierName,
    TierOrders,
    TierReport,
    TransferReceipt,
)
from lamina_kv.tiers.contract import Fate

STORE = TierName("store")
READERS = 4
"""Reads of one engine that the store sees at once. Writes are one after the other: each tier has
one thread for them."""

IDLE_STEP = 0.01
"""Seconds after which an engine that computes nothing asks again for requests that wait."""

NEWS = 0.002
"""Seconds after which it takes in what it hears from the store, and all that came since."""

COMMON = 0.1
"""Share of all requests above which a block they begin with is nobody's session: a system
prompt."""

_MOST_PLANS = 100_000
"""Plans after which a wait that should be over has shown a fault of the planner."""


class Keep(StrEnum):
    """What goes to the store."""

    ALL = "all"
    SHARED = "shared"
    """What a second request has used, as far as the engine that keeps it sees."""
    NOTHING = "nothing"
    """There is no store."""


class Routing(StrEnum):
    """Which engine gets a request."""

    ROUND_ROBIN = "round-robin"
    """The next one."""
    SESSIONS = "sessions"
    """The one that last served the longest beginning of its prompt; a new session the next one."""


@dataclass(frozen=True, slots=True)
class StoreShape:
    """The shared store.

    Attributes:
        capacity: blocks.
        bandwidth: bytes a second, both directions together; may be infinite.
        latency: seconds that each call takes beside its bytes.
    """

    capacity: int
    bandwidth: float
    latency: float


@dataclass(frozen=True, slots=True)
class FleetShape:
    """A fleet.

    Attributes:
        engines: how many.
        near: blocks of host memory that each has.
        routing: who gets which request.
        keep: what goes to the store.
        store: the store.
        pace: how fast each engine is.
    """

    engines: int
    near: int
    routing: Routing
    keep: Keep
    store: StoreShape
    pace: Pace


@dataclass(slots=True)
class FleetReplay:
    """What became of a trace. Blocks are those of prompts.

    Attributes:
        near: blocks that were loaded and were in the engine's own host memory.
        store: blocks that were loaded and came from the store.
        written: blocks that were sent to the store.
        again: of these, those that it had already.
        read: blocks that the store has sent.
        gone: blocks that it was asked for and did not have any more.
        evicted: blocks that it lost for others.
        waits: for each request that could have begun and waited for the store, seconds in which
            its engine computed nothing.
        firsts: seconds to the first token of each request.
    """

    near: int = 0
    store: int = 0
    written: int = 0
    again: int = 0
    read: int = 0
    gone: int = 0
    evicted: int = 0
    waits: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)


def routes(trace: Trace, engines: int, routing: Routing) -> list[int]:
    """The engine of each request."""
    if routing is Routing.ROUND_ROBIN:
        return [number % engines for number in range(len(trace.requests))]
    uses = Counter(block for request in trace.requests for block in request.blocks)
    most = COMMON * len(trace.requests)
    served: dict[int, int] = {}
    chosen, fresh = [], 0
    for request in trace.requests:
        own = [block for block in request.blocks if uses[block] <= most or uses[block] == 1]
        engine = next((served[block] for block in reversed(own) if block in served), None)
        if engine is None:
            engine, fresh = fresh % engines, fresh + 1
        served.update(dict.fromkeys((*own, *request.answer), engine))
        chosen.append(engine)
    return chosen


class _Store:
    """See the module.

    Args:
        shape: the store.
        block_bytes: bytes of a block.
        replay: where traffic is counted.
    """

    def __init__(self, shape: StoreShape, block_bytes: int, replay: FleetReplay) -> None:
        self.latency = shape.latency
        self._capacity = shape.capacity
        self._seconds = block_bytes / shape.bandwidth
        self._replay = replay
        self._kept: OrderedDict[ChunkKey, None] = OrderedDict()  # used longest ago first
        self._free_at = 0.0

    def crosses(self, now: float) -> float:
        """A block sets out, either way; returns when it has arrived."""
        self._free_at = max(now, self._free_at) + self._seconds
        return self._free_at + self.latency

    def has(self, key: ChunkKey) -> bool:
        """Whether a block is there."""
        return key in self._kept

    def used(self, key: ChunkKey) -> None:
        """A block was of use."""
        if key in self._kept:
            self._kept.move_to_end(key)

    def write(self, key: ChunkKey) -> None:
        """A block has arrived."""
        self._replay.written += 1
        self._replay.again += key in self._kept
        self._kept[key] = None
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
            self._replay.evicted += 1

    def read(self, key: ChunkKey) -> bool:
        """A block was to be sent; whether it was there."""
        there = key in self._kept
        self._replay.read += there
        self._replay.gone += not there
        self.used(key)
        return there


class _Engine:
    """One engine.

    Args:
        fleet: what it is a part of.
        planner: its planner.
        pace: how fast it is.
    """

    def __init__(self, fleet: Fleet, planner: Planner, pace: Pace) -> None:
        self._fleet = fleet
        self._planner = planner
        self._pace = pace
        self._views: dict[int, View] = {}
        self._arrived: dict[int, float] = {}
        self._computed = 0.0  # seconds in which it did so
        # When requests that wait could have begun, less the seconds computed until then.
        self._asked: dict[int, float] = {}
        self._waiting: list[int] = []
        self._running = 0
        self._computes = False
        self._next_turn = math.inf
        self._news: list[TransferReceipt] = []
        self._outward: deque[tuple[Move, float]] = deque()
        self._inward: deque[tuple[Move, float]] = deque()
        self._writes = self._reads = 0  # that the store has seen, and not answered

    def arrives(self, number: int) -> None:
        """A request comes."""
        fleet = self._fleet
        tokens = fleet.trace.block_tokens
        self._views[number] = view = View(str(number), fleet.trace.requests[number], tokens)
        self._arrived[number] = fleet.now
        self._waiting.append(number)
        self._planner.arrived(view)
        self._turn()

    def _turn(self) -> None:
        """Between two steps: take in what is new, and begin the next one."""
        if self._computes:
            return
        self._receive()
        for _ in range(_MOST_PLANS):
            if (number := self._begins()) is not None:
                self._step(number)
                return
            if not self._plan():
                break
        else:
            raise RuntimeError("an engine plans for ever")
        if self._waiting:
            self._turns_in(IDLE_STEP)

    def _turns_in(self, seconds: float) -> None:
        """The next turn comes so soon, or sooner."""
        moment = self._fleet.now + seconds
        if moment < self._next_turn:
            self._next_turn = moment
            self._fleet.at(moment, partial(self._turns, moment))

    def _turns(self, moment: float) -> None:
        if moment == self._next_turn:
            self._next_turn = math.inf
            self._turn()

    # -- requests ----------------------------------------------------------------------------

    def _begins(self) -> int | None:
        """The first request that need not wait gets its blocks, and what was found is loaded."""
        if self._running >= self._pace.running:
            return None
        replay, idle = self._fleet.replay, self._fleet.now - self._computed
        for number in self._waiting:
            view = self._views[number]
            offer = self._planner.lookup(view, 0)
            if offer.ask_again:
                self._asked.setdefault(number, idle)
                continue
            self._waiting.remove(number)
            if (since := self._asked.pop(number, None)) is not None:
                replay.waits.append(idle - since)
            taken, tokens = offer.taken, self._fleet.trace.block_tokens
            replay.near += taken.get(NEAR, 0) // tokens
            replay.store += taken.get(STORE, 0) // tokens
            self._planner.admitted(view.request_id, offer.tokens)
            self._plan()
            self._running += 1
            view.computed = offer.tokens
            return number
        return None

    def _step(self, number: int) -> None:
        """Compute some of a prompt."""
        view = self._views[number]
        start, view.computed = view.computed, min(view.num_tokens, view.computed + STEP_TOKENS)
        saves = self._order((view.request_id, start, view.computed))
        self._computes = True
        seconds = (view.computed - start) / self._pace.prefill
        self._computed += seconds
        self._fleet.at(self._fleet.now + seconds, partial(self._stepped, number, saves))

    def _stepped(self, number: int, saves: Sequence[TransferReceipt]) -> None:
        view, fleet = self._views[number], self._fleet
        self._computes = False
        self._news += saves
        self._receive()
        if view.computed < view.num_tokens:
            self._step(number)
            return
        fleet.replay.firsts.append(fleet.now - self._arrived.pop(number))
        view.sampled()
        self._compute(view)
        request = fleet.trace.requests[number]
        fleet.at(fleet.now + request.output_tokens / self._pace.decode, partial(self._ends, number))
        self._turn()

    def _ends(self, number: int) -> None:
        view, request = self._views.pop(number), self._fleet.trace.requests[number]
        if request.answer:
            view.answered()
            self._compute(view)
        self._planner.finished(view.request_id, view.computed, [view.blocks(0)])
        self._running -= 1
        self._fleet.ended(request)
        self._turn()

    def _compute(self, view: View) -> None:
        """Compute what is known of an answer: that takes the engine no time."""
        start, view.computed = view.computed, view.num_tokens
        self._news += self._order((view.request_id, start, view.computed))
        if not self._computes:
            self._receive()

    # -- plans -------------------------------------------------------------------------------

    def _plan(self) -> bool:
        """A plan that computes nothing; whether another one may have more to do at once."""
        if not self._planner.has_work:
            return False
        done = self._order()
        self._news += done
        self._receive()
        return bool(done)

    def _order(self, *progress: tuple[str, int, int]) -> list[TransferReceipt]:
        """Make a plan and have it carried out; returns what the end of the step brings."""
        plan = self._planner.plan_step(progress, forward=bool(progress))
        for orders in plan.tiers:
            self._send(orders)
        return self._done(plan)

    def _done(self, plan: StepPlan) -> list[TransferReceipt]:
        size = self._fleet.trace.block_bytes
        loads = [
            (load.transfer, sum(len(each.blocks) for each in load.pages)) for load in plan.loads
        ]
        return [
            TransferReceipt(transfer, Outcome.DONE, blocks * size)
            for transfer, blocks in (*loads, *((save.transfer, 1) for save in plan.saves))
        ]

    def _receive(self) -> None:
        if self._news:
            news, self._news = tuple(self._news), []
            self._planner.receive([Receipt(0, news)])

    # -- the store ---------------------------------------------------------------------------

    def _send(self, orders: TierOrders) -> None:
        store = self._fleet.store
        for key, _ in orders.touches:
            store.used(key)
        for ask in orders.asks:
            self._fleet.at(self._fleet.now + store.latency, partial(self._answered, ask))
        if orders.probe is not None:
            self._hears(TransferReceipt(orders.probe, Outcome.DONE))
        now = self._fleet.now
        self._outward += ((move, now) for move in orders.outward)
        self._inward += ((move, now) for move in orders.inward)
        self._begin_moves()

    def _begin_moves(self) -> None:
        store, now = self._fleet.store, self._fleet.now
        while self._inward and self._reads < READERS:
            self._reads += 1
            self._fleet.at(store.crosses(now), partial(self._read, *self._inward.popleft()))
        while self._outward and not self._writes:
            self._writes = 1
            self._fleet.at(store.crosses(now), partial(self._wrote, *self._outward.popleft()))

    def _answered(self, ask: Ask) -> None:
        present = bytes(map(self._fleet.store.has, ask.keys))
        self._hears(TransferReceipt(ask.transfer, Outcome.DONE, present=present))

    def _wrote(self, move: Move, ordered: float) -> None:
        self._writes = 0
        self._fleet.store.write(move.key)
        self._moved(move, ordered)

    def _read(self, move: Move, ordered: float) -> None:
        self._reads -= 1
        if self._fleet.store.read(move.key):
            self._moved(move, ordered)
        else:
            self._begin_moves()
            self._hears(TransferReceipt(move.transfer, Outcome.FAILED, lost=True, reason=Fate.GONE))

    def _moved(self, move: Move, ordered: float) -> None:
        self._begin_moves()
        size, seconds = self._fleet.trace.block_bytes, self._fleet.now - ordered
        self._hears(TransferReceipt(move.transfer, Outcome.DONE, size, seconds))

    def _hears(self, receipt: TransferReceipt) -> None:
        self._news.append(receipt)
        self._turns_in(NEWS)


class Fleet:
    """See the module.

    Args:
        trace: what is asked; the bytes of a block are known.
        shape: of whom.
        ended: called whenever a request has ended, with the blocks of its prompt.

    Attributes:
        trace: as given.
        now: virtual seconds.
        replay: what was found so far.
        store: what the engines share.
    """

    def __init__(
        self, trace: Trace, shape: FleetShape, ended: Callable[[int], None] = lambda _: None
    ) -> None:
        self.trace = trace
        self.now = 0.0
        self.replay = FleetReplay()
        self.store = _Store(shape.store, trace.block_bytes, self.replay)
        self._report = ended
        self._meter = Meter()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()  # of what happens at the same moment
        self._routes = routes(trace, shape.engines, shape.routing)
        self._engines = [
            _Engine(self, _planner(shape, trace, self._meter, lambda: self.now), shape.pace)
            for _ in range(shape.engines)
        ]

    def run(self) -> FleetReplay:
        """Serve every request."""
        for number, (request, route) in enumerate(
            zip(self.trace.requests, self._routes, strict=True)
        ):
            self.at(request.seconds, partial(self._engines[route].arrives, number))
        while self._events:
            self.now, _, happens = heapq.heappop(self._events)
            happens()
        return self.replay

    def at(self, moment: float, happens: Callable[[], None]) -> None:
        """Something is to happen."""
        heapq.heappush(self._events, (moment, next(self._order), happens))

    def ended(self, request: ReplayedRequest) -> None:
        """A request has ended."""
        self._meter.drain()  # nobody reads it, and it grows
        self._report(len(request.blocks))


def _planner(shape: FleetShape, trace: Trace, meter: Meter, clock: Callable[[], float]) -> Planner:
    """A planner whose host memory is empty."""
    store = {
        # Any kind will do: what makes it a store by key is that it reports no slots.
        "kind": "disk",
        "name": STORE,
        "path": "/store",
        "capacity": "1GiB",
        "keep": shape.keep.value,
    }
    stores = [] if shape.keep is Keep.NOTHING else [store]
    config = load_config(
        {
            "load": {"mode": "parked"},
            # Saves of a step are over before the next plan, so that they need no bound.
            "save": {"max_inflight": max(1, shape.near) * trace.block_bytes},
            "tiers": stores,
        },
        {},
    )
    tiers = tuple(TierReport(STORE) for _ in stores)
    return Planner(
        config,
        ChunkShape.uniform(trace.block_tokens, trace.block_tokens),
        b"trace",
        NoPool(),
        [RankReport(0, shape.near, trace.block_bytes, tiers)],
        meter,
        clock=clock,
    )
