"""The simulator: an engine's loop around Lamina's planner and executors."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Self
from unittest.mock import patch

from lamina_kv.control.planner import Planner
from lamina_kv.keys import CHECKPOINT, Epoch
from lamina_kv.observe.metrics import Meter
from lamina_kv.plan import Move, Receipt, TierName, TierOrders
from lamina_kv.tiers.regard import USUAL, Regard
from simulator.content import Ledger, Violation
from simulator.faults import Sky, Weather
from simulator.forward import Part
from simulator.hand_off import HandOffScheduler
from simulator.options import Options, Sort
from simulator.pool import EnginePool, LeasedPool
from simulator.rank import Misread, Rank, Surroundings
from simulator.request import Request, Status
from simulator.scheduler import Scheduler
from simulator.step import Step
from simulator.stores import Past
from simulator.virtual import World
from simulator.watch import Watch

STEP_SECONDS = 0.001
"""What a step takes, if nothing is waited for."""

PATIENCE = 500
"""Steps after which a request that is not served is a hang."""

_NAMESPACE = b"simulator"

_NAMED = (CHECKPOINT, Epoch("second"))
"""Weights that the engine comes back to."""


class Simulator:
    """See the module. Use it as a context manager.

    Args:
        seed: decides everything that the caller does not.
        options: the engine.
        store: directory for disks; needed if there is one.
        past: what earlier engines have left behind.
        virtual: whether threads and time are virtual; else they are real, and no two histories
            are the same.

    Attributes:
        steps: steps taken.
        counts: what has happened how often.
    """

    def __init__(
        self,
        seed: int,
        options: Options,
        store: Path | None = None,
        *,
        past: Past | None = None,
        virtual: bool = True,
    ) -> None:
        self.options = options
        self.steps = 0
        self.counts: Counter[str] = Counter()
        self._random = Random(seed)
        self._trace: deque[tuple[object, ...]] = deque(maxlen=80)
        self._exit = ExitStack()
        self._sky = Sky(self._random, options.deadline)
        self._world = World(self._random, self._sky.delay)
        self._virtual = virtual
        self._killed = False
        self._clock = self._world.read if virtual else time.monotonic
        self._weights = 0
        self._changes = 0
        self._submitted = 0
        self._hurried = threading.Event()
        self._queue: deque[Step] = deque()
        self._outstanding: Counter[str] = Counter()
        self._last_progress = 0
        self._ledger = Ledger(options.ranks, options.rows, replicas=options.replicas)
        past = past or Past()
        past.lives += 1
        self._incarnation = f"simulator {past.lives}"  # a history is the same in every process
        self._watch = Watch(options, self._ledger, past)
        self._pool = EnginePool(options.blocks, options.prefix_caching, self._watch.reused)
        self._leased = LeasedPool(self._pool)
        self._around = Surroundings(
            sky=self._sky,
            ledger=self._ledger,
            pump=self._pump,
            stall=self._stall,
            stalled=self._world.stalled,
            world=self._world if virtual else None,
            clock=self._clock,
            slack=STEP_SECONDS if virtual else 10.0,
            store=store or Path("/nowhere"),
            shelves=past.shelves,
        )

    def __enter__(self) -> Self:
        """Open the tiers and start the executors.

        Raises:
            Violation: if what earlier engines have left behind is not what it should be.
        """
        try:
            self._open()
        except BaseException:  # else threads and time stay virtual until nobody knows when
            self._exit.close()
            raise
        return self

    def _open(self) -> None:
        if self._virtual:
            self._exit.enter_context(self._world.entered())
        options = self.options
        piece = options.piece_chunks * options.chunk_bytes // options.rows
        self._exit.enter_context(patch("lamina_kv.data.loads.PIECE_BYTES", piece))
        if options.saves_by_rows:
            self._exit.enter_context(patch("lamina_kv.data.save_pipeline.ROW_BYTES", 0))
        self._ranks: list[Rank] = []
        for number in range(options.ranks):
            leader = self._ranks[0] if number and options.replicas else None
            rank = Rank(number, options, self._around, leader)
            self._exit.callback(rank.executor.close)
            for file in rank.files:
                self._exit.callback(file.close)
            self._ranks.append(rank)
        self._exit.callback(self._end)
        self._planner = Planner(
            options.config(self._around.store),
            options.shape,
            _NAMESPACE,
            self._leased,
            [rank.executor.report() for rank in self._ranks],
            meter := Meter(),
            leases_loads=options.hand_off,
            incarnation=self._incarnation,
            describe=self._watch.subscriber.describe,
            clock=self._clock,
        )
        self._watch.attach(self._planner, self._ranks, self._leased, meter)
        scheduler = HandOffScheduler if options.hand_off else Scheduler
        self._scheduler: Scheduler | HandOffScheduler = scheduler(
            options,
            self._pool,
            self._planner,
            self._watch.check_hit,
            self._note,
            self._random,
        )

    def __exit__(self, *_: object) -> None:
        """Close everything."""
        self._exit.close()

    # -- what may happen -----------------------------------------------------------------------

    def reseed(self, seed: int) -> None:
        """Decide by another seed from now on."""
        self._random.seed(seed)

    @property
    def weather(self) -> Weather:
        """What can go wrong."""
        return self._sky.weather

    @weather.setter
    def weather(self, weather: Weather) -> None:
        self._sky.weather = weather

    @property
    def dry(self) -> set[str]:
        """Tiers that are spared of it."""
        return self._sky.dry

    @dry.setter
    def dry(self, tiers: set[str]) -> None:
        self._sky.dry = tiers

    @property
    def tokens_loaded(self) -> int:
        """Tokens of prompts that were neither computed nor found in the engine, as counted."""
        return self._watch.tokens_loaded

    @property
    def active(self) -> list[str]:
        """Requests that are not over."""
        requests = self._scheduler.requests.values()
        return [r.request_id for r in requests if r.status is not Status.FINISHED]

    def submit(
        self, prompt: Sequence[int], max_tokens: int, salt: int = 0, *, regard: Regard = USUAL
    ) -> str:
        """A new request; returns its name."""
        self._submitted += 1
        recompute = 1 + self.options.drafts
        request = Request(
            f"r{self._submitted}", prompt, max_tokens, salt, recompute, _NAMESPACE,
            self.options.chunk_tokens, self._weights, self._planner.epoch,
            self.options.ring_blocks,
        )  # fmt: skip
        request.regard = regard
        self._learn(request, 0)
        self._watch.submitted(request)
        self._scheduler.submit(request)
        self._note("submit", request.request_id, len(prompt), max_tokens)
        return request.request_id

    def abort(self, request_id: str) -> None:
        """A client hangs up."""
        request = self._scheduler.requests[request_id]
        self._note("abort", request_id, request.status.value)
        self._scheduler.finish(request)

    def preempt(self) -> None:
        """The next step begins with the preemption of the last request."""
        self._scheduler.preempt_next = True

    def hurry(self) -> None:
        """Everything slow or hanging comes back."""
        self._world.hurry()
        self._hurried.set()
        self._hurried = threading.Event()

    def kill(self) -> None:
        """The engine's process is killed: leave the context, and nothing else."""
        self._note("kill")
        self._killed = True

    def _end(self) -> None:
        if self._killed and self._virtual:
            self._world.kill()
        else:
            self.hurry()

    def damage(self) -> None:
        """Bits flip in far tiers."""
        if self.options.tiers:
            self._note("damage")
            tier = self._random.choice(self.options.tiers)
            spoiled = self._random.choice(self._ranks).damage(tier)
            if tier.sort is Sort.DISK:
                self._watch.damaged.add(TierName(tier.name))
            self._watch.spoiled.update((TierName(tier.name), key) for key in spoiled)

    def reset(self) -> None:
        """Find nothing any more of what is kept outside of the engine."""
        self._note("reset")
        self._planner.reset()
        self._rename()

    def empty_near(self) -> None:
        """Everything near is given up; what is in far tiers stays."""
        near = self._planner._books.catalog.near
        for key in list(near.visible):
            near.drop(key)

    def forget_prefixes(self) -> None:
        """Empty the engine's own prefix cache."""
        self._note("forget prefixes")
        self._pool.forget_all()

    def change_weights(self) -> bool:
        """Load other weights: all that was computed is wrong from now on, wherever it is. They may
        be weights that the engine has had before, under a name.

        Returns:
            Whether it was done; like vLLM, not while loads are under way.
        """
        # A step that is in flight may come to compute with the new ones.
        while self._queue and self._random.random() < 0.5:
            self._finish_step(self._queue.popleft())
        if self._scheduler.holding or len(self._scheduler.requests) > len(self.active):
            return False
        self._note("change weights")
        self._scheduler.preempt_all()
        self._pool.forget_all()
        if (number := self._random.randrange(4)) < len(_NAMED):
            self._weights = number
            self._planner.begin(_NAMED[number])
        else:
            self._changes += 1
            self._weights = len(_NAMED) + self._changes
            self._planner.reset()
        self._rename()
        return True

    def _rename(self) -> None:
        for request in self._scheduler.requests.values():
            request.rehash(self._weights, self._planner.epoch)
            self._learn(request, 0)

    def missing(self) -> int:
        """Chunks that a request has computed and that no tier holds, if none was aborted."""
        return self._watch.missing()

    def unshared(self) -> int:
        """Chunks that a tier lacks which keeps what is shared, in fair weather."""
        return self._watch.unshared()

    # -- the engine's loop -----------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether the engine steps on its own."""
        return bool(self._queue) or self._scheduler.has_requests or self._planner.has_work

    def step(self) -> None:
        """One turn of the engine's loop; nothing if there is no work.

        Raises:
            Violation: if a promise was broken.
        """
        try:
            self._step(self._scheduler.has_requests or self._planner.has_work)
        except Violation as violation:
            violation.add_note(self.describe())
            raise

    def _step(self, plan: bool) -> None:
        self.steps += 1
        self._world.now += STEP_SECONDS
        if plan:
            step = self._scheduler.schedule()
            self._watch.planned(step.plan)
            self._count(step)
            self._queue.append(step)
            if self.options.asynchronous and len(self._queue) < 2 and step.items:
                return
        if self._queue:
            self._finish_step(self._queue.popleft())
        if self._sky.strikes(self.weather.vanishes):
            self._random.choice(self._ranks).vanish()
        if self.steps % 16 == 0:
            self._watch.check_tiers()
            self._planner.gauges()
        if self._scheduler.requests and self.steps - self._last_progress > PATIENCE:
            raise Violation(f"nothing has moved for {PATIENCE} steps: {self.active}")

    def _finish_step(self, step: Step) -> None:
        window = self.options.window
        for item in step.items:
            self._watch.ran(item.run, item.count)
        parts = [Part(item, self._random, self._ledger, window) for item in step.items]
        failed: dict[str, None] = {}
        arrived: list[str] = []
        receipts: list[Receipt] = []
        misreads: list[Misread] = []
        for rank in self._ranks:
            outcomes, wrong = rank.run(step, parts)
            self._watch.reported(outcomes.receipt)
            failed.update(dict.fromkeys(sorted(outcomes.failed)))
            misreads += wrong
            for request_id in sorted(outcomes.arrived):
                self._outstanding[request_id] += 1
                if self._outstanding[request_id] == self.options.ranks:
                    del self._outstanding[request_id]
                    arrived.append(request_id)
            step.reports.append(outcomes.receipt)
            receipts.append(rank.mail.exchange(outcomes.receipt))
        self._judge(misreads)
        for part in parts:
            part.item.run.position = part.after
        if failed:
            self._note("failed", *failed)
            self.counts["failed loads"] += 1
        before = {id(part.item): part.item.run.request.num_tokens for part in parts}
        self._scheduler.update(step, failed, arrived, receipts)
        for part in parts:
            self._learn(part.item.run.request, before[id(part.item)])
        if parts or arrived:
            self._last_progress = self.steps

    def _judge(self, misreads: Sequence[Misread]) -> None:
        if self._around.violations:
            raise self._around.violations[0]
        for error in self._world.failures:
            if not isinstance(error, OSError):
                raise Violation(f"a job raised {error!r}") from error
        self._world.failures.clear()
        for misread in misreads:
            raise Violation(f"a wrong token: {misread.text}")

    def drain(self) -> None:
        """Let every request and every transfer come to its end, and check what is left.

        Raises:
            Violation: if a promise was broken.
        """
        try:
            self._drain()
        except Violation as violation:
            violation.add_note(self.describe())
            raise

    def _drain(self) -> None:
        steps = 0
        while self.has_work:
            self._step(self._scheduler.has_requests or self._planner.has_work)
            steps += 1
            if steps > 10 * PATIENCE:
                raise Violation("the engine would step for ever")
        # What hangs comes back at last, when nobody believes in it any more.
        self.weather = Weather()
        self.hurry()
        for _ in range(PATIENCE):
            if self._virtual:
                self._world.settle()
            else:
                time.sleep(STEP_SECONDS)
            self._step(plan=True)
            while self._queue:
                self._finish_step(self._queue.popleft())
            if self._watch.is_quiet:
                break
        self._watch.check_end()

    def _stall(self, seconds: float | None = None) -> None:
        if self._virtual:
            self._world.stall(seconds)
        else:
            seconds = self._sky.delay("load") if seconds is None else 0.0
            if threading.current_thread() is not threading.main_thread():
                self._hurried.wait(min(seconds, threading.TIMEOUT_MAX))

    # -- inside ----------------------------------------------------------------------------------

    def _pump(self) -> None:
        if self._virtual:
            self._world.pump(4)

    def _learn(self, request: Request, known: int) -> None:
        if request.num_tokens > known:
            self._ledger.note(
                request.hashes[known:].tolist(),
                f"{request.request_id} (weights {self._weights})",
                known,
            )
            self._watch.learn(request)

    def _count(self, step: Step) -> None:
        self.counts["saves"] += len(step.plan.saves)
        for tier in step.plan.tiers:
            self.counts["moves outward"] += len(tier.outward)
            self.counts["moves inward"] += len(tier.inward)
            self.counts["asks"] += len(tier.asks)
            self.counts["drops"] += len(tier.drops)
        self.counts["forwards"] += bool(step.items)
        for order in step.plan.loads:
            self.counts[f"{order.mode.value} loads"] += 1
            self.counts["chunks loaded"] += len(self._watch.slots_of(order))
        if not step.plan.is_empty:
            self._note(
                "plan",
                [(o.transfer, o.request_id, o.mode.value) for o in step.plan.loads],
                [(o.transfer, o.request_id, o.slot, o.blocks) for o in step.plan.saves],
                *(_describe(orders) for orders in step.plan.tiers),
            )

    def _note(self, *what: object) -> None:
        self._trace.append((self.steps, *what))
        self.counts[str(what[0])] += 1

    def describe(self) -> str:
        """The engine, the weather and what has happened last."""
        lines = [f"{self.options}", f"{self.weather}", f"after {self.steps} steps"]
        lines += [" ".join(map(str, entry)) for entry in self._trace]
        return "\n".join(lines)


def _describe(orders: TierOrders) -> str:
    """What a far tier is to do, in short."""

    def moves(moves: Sequence[Move]) -> str:
        return " ".join(f"{m.transfer}:{m.key.hex()[:6]}({m.near},{m.far})" for m in moves)

    asks = " ".join(f"{ask.transfer}:{len(ask.keys)}" for ask in orders.asks)
    return (
        f"{orders.tier} drops {orders.drops} out {moves(orders.outward)} in "
        f"{moves(orders.inward)} asks {asks}"
    )
