"""The executor: carries out one rank's part of every plan and keeps the receipts.

An engine adapter calls it around each forward pass, from one thread::

    begin_step(plan)            moves, parked loads, saves of what the step overwrites
    start_loads()               the step's loads
      wait_layer(name)          before a layer reads its row
      layer_written(name)       after a layer has written its row
    end_step()                  rows that no hook announced are saved
    collect()                   what has become of everything so far
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from lamina_kv.config import LoadConfig
from lamina_kv.data.arrivals import Arrivals
from lamina_kv.data.compute_lane import ComputeLane
from lamina_kv.data.copier import Copier
from lamina_kv.data.far import FarTier
from lamina_kv.data.load_pipeline import LoadRun, LoadStuck, window_rows
from lamina_kv.data.loads import Load
from lamina_kv.data.movers.base import Mover
from lamina_kv.data.moving import MovePipeline, answers
from lamina_kv.data.near import NearSlab
from lamina_kv.data.push_listener import PushListener
from lamina_kv.data.push_pipeline import PushRun
from lamina_kv.data.push_wire import PushIdentity, PushWire
from lamina_kv.data.save_pipeline import SaveRun
from lamina_kv.data.step_loads import StepLoads
from lamina_kv.data.threads import Threads, usable_cores
from lamina_kv.data.worker_pool import WorkerPool
from lamina_kv.data.written_rows import WrittenRows
from lamina_kv.observe.timeline import Lane, Timeline
from lamina_kv.plan import (
    LOAD_FAILED,
    LoadMode,
    LoadOrder,
    NearSlots,
    Outcome,
    RankReport,
    Receipt,
    SaveOrder,
    StepPlan,
    TransferReceipt,
)
from lamina_kv.push.ranks import RankPlace
from lamina_kv.push.transports.base import Transport

log = logging.getLogger("lamina_kv.data")

LOAD_THREADS = 2
"""Threads that load; two copy as fast as memory allows."""

IDLE_WAIT, LONGEST_IDLE_WAIT = 0.002, 0.008
"""Seconds that a step without a forward waits for a receipt, so that an engine with nothing to
run neither spins on the interpreter lock nor is late for the next request. They double while there
is none: a push takes as long as another engine's prefill, which may run on the same cores."""

LEAST_PATIENCE = 30.0
"""Seconds that one copy between near memory and the engine may take at least, whatever
``load.deadline`` says: past them the engine stops."""

LEAST_CLOSE = 0.1
"""Seconds that each part has to end at the close at least, if others have used up the time."""


@dataclass(frozen=True, slots=True)
class Tiers:
    """Where a rank keeps chunks.

    Attributes:
        near: its near tier.
        far: its far tiers, the preferred one first; none if it follows.
        follows: whether the near tier is another rank's, see :mod:`~lamina_kv.data.replicas`. What
            is ordered of saves and moves is that rank's to do.
    """

    near: NearSlab
    far: tuple[FarTier, ...] = ()
    follows: bool = False


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What the engine must know after a step.

    Attributes:
        receipt: for control.
        arrived: requests that were parked and wait for nothing any more, whether or not it came.
        failed: requests whose load failed, in the step or between steps; nothing of it is there.
        rejected: requests of ``arrived`` of which a push failed: all of their blocks are to be
            given up, because something may still be written to them.
    """

    receipt: Receipt
    arrived: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    rejected: frozenset[str] = frozenset()


class Executor:
    """See the module.

    Args:
        rank: this rank.
        tiers: where it keeps chunks; far tiers are closed with it.
        mover: copies pages between the engine and the near tier; closed with it.
        config: the ``load`` section.
        push: who this rank is among engines, and its wire to them; None if it takes no part.
        timeline: records what happens when; None records nothing.
    """

    def __init__(
        self,
        *,
        rank: int,
        tiers: Tiers,
        mover: Mover,
        config: LoadConfig,
        push: tuple[PushIdentity, Transport] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self._rank = rank
        self._tiers = tiers
        self._mover = mover
        self._config = config
        self._timeline = timeline
        self._step_began = 0.0
        geometry = self._geometry = tiers.near.geometry
        self._row_of_layer = geometry.row_of_layer
        self._written = WrittenRows(geometry)
        self._patience = max(config.deadline, LEAST_PATIENCE)
        threads = self._threads = Threads(mover.enter_thread, usable_cores())
        near = tiers.near
        self._loader = Copier(near, mover, WorkerPool("load", LOAD_THREADS, threads), timeline)
        self._waiter = WorkerPool("land", 1, threads)
        self._saver = Copier(near, mover, WorkerPool("save", 1, threads), timeline)
        self._moves = {
            tier.name: MovePipeline(tier, near, self._report, threads=threads, timeline=timeline)
            for tier in tiers.far
        }
        self._plan: StepPlan | None = None
        self._loads = StepLoads(geometry, mover)
        self._arrivals = Arrivals(self._report)
        self._saves: SaveRun | None = None
        self._layers_save = True
        self._pushes: PushRun | None = None
        self._receipts: deque[TransferReceipt] = deque()
        self._news = threading.Event()
        self._idle_wait = IDLE_WAIT
        self._step_failure = ""
        self._computing = None if timeline is None else ComputeLane(mover, timeline)
        self._nothing = Outcomes(Receipt(rank))
        self._near_said = mover.near_slots(near)
        self._listener: PushListener | None = None
        self._wire: PushWire | None = None
        if push is not None:
            self._wire = PushWire(
                *push,
                report=self._report,
                wake=self._news.set,
                threads=threads,
                timeline=timeline,
            )

    def listen(self) -> RankPlace | None:
        """Hear destinations of pushes while a step runs, too.

        Returns:
            Where; None if this rank takes no part in pushes, or there is no place for a socket.
        """
        if self._wire is None:
            return None
        try:
            self._listener = PushListener(self._wire.bind, self._threads)
        except OSError as error:
            log.warning(
                "what is announced while a step runs leaves after the step: no socket can be made "
                "in the folder for temporary files (TMPDIR): %s",
                error,
            )
            return None
        return self._listener.place

    def report(self) -> RankReport:
        """This rank's tiers and what they already hold. The first rank alone says whole keys."""
        return RankReport(
            rank=self._rank,
            near_slots=self._tiers.near.slots,
            chunk_bytes=self._geometry.chunk_bytes,
            tiers=tuple(tier.report(keys=self._rank == 0) for tier in self._tiers.far),
            follows=self._tiers.follows,
            near=self._near_said,
        )

    def load_before_forward(self) -> None:
        """Layers do not wait for their rows: :meth:`start_loads` returns when all is there."""
        self._loads.load_before_forward()

    def save_after_forward(self) -> None:
        """Layers run several times in a step, each time for a part of it: no row is written before
        the step is over."""
        self._layers_save = False

    def drafts_follow(self, order: Sequence[str]) -> None:
        """Layers at the end of ``order`` may be a draft model's. They run once the loads of a step
        are finished, or not at all, and need not wait.

        Args:
            order: all layers, in the order in which they run.
        """
        self._loads.drafts_follow(order)

    @property
    def moves_rows(self) -> bool:
        """Whether the layers of this step have anything to wait for or to save."""
        pushes = self._pushes is not None and self._pushes.moves_rows
        saves = self._saves is not None and self._saves.by_rows
        return not self._loads.is_empty or (self._layers_save and (saves or pushes))

    # -- one step ----------------------------------------------------------------------------

    def begin_step(self, plan: StepPlan) -> None:
        """Start what does not belong to the forward; call before it.

        Raises:
            LoadStuck, LayersDidNotWait: if the engine had to stop, and has not.
        """
        self._loads.begin_step(forward=plan.forward)
        self._plan = plan
        self._step_began = Timeline.now()
        if plan.is_empty:
            return
        for orders in plan.tiers:
            if self._tiers.follows:
                self._report(answers(orders))
            else:
                self._moves[orders.tier].carry_out(orders, plan.step)
        for order in plan.loads:
            if order.mode is LoadMode.PARKED:
                run = self._make_run([order], plan, parked=True)
                self._arrivals.park(run)
                run.start(self._mover.fence_compute())
        if in_step := [order for order in plan.loads if order.mode is LoadMode.LAYERWISE]:
            self._loads.add(self._make_run(in_step, plan, parked=False))
        if self._wire is not None and not plan.push.is_empty:
            self._wire.carry_out(plan.push, plan.step)
            for receive in plan.push.receives:
                self._arrivals.expect(receive.request_id)
            if plan.push.orders or plan.push.gathers:
                self._pushes = PushRun(
                    plan.push.orders,
                    self._geometry,
                    self._mover,
                    self._wire,
                    gathers=plan.push.gathers,
                    step=plan.step,
                )
        if overwritten := [order for order in plan.saves if order.overwritten]:
            self._make_saves(overwritten, plan).read_before_forward()
        if written := [order for order in plan.saves if not order.overwritten]:
            self._saves = self._make_saves(written, plan)

    def start_loads(self, *, layers_call: bool = True) -> None:
        """Submit the first rows of the step's loads; call right before the forward.

        Args:
            layers_call: whether layers of this step call :meth:`wait_layer`. They do not where the
                step replays one graph of the whole model: that is ordered behind all rows then.

        Raises:
            LoadStuck: as :meth:`wait_layer` does, if all rows are loaded before the forward.
            RuntimeError: if there is no host memory to load from.
        """
        if self._loads.is_empty:
            return
        with self._failing_on_stop():
            self._loads.start(layers_call=layers_call)

    def wait_layer(self, layer: str) -> None:
        """Return when the row of ``layer`` may be read; at once if nothing is loaded, or if the
        layer has no row because it reads another one's.

        Raises:
            LoadStuck: if a copy does not end. The engine has to stop.
        """
        if not self._loads.is_empty:
            with self._failing_on_stop():
                self._loads.wait_layer(layer)
        if self._computing is not None:
            self._computing.begins(self._row_of_layer.get(layer, -1))

    def layer_written(self, layer: str) -> None:
        """``layer`` has written its row; save it if all of the row's layers have."""
        if self._computing is not None and self._plan is not None:
            self._computing.ends(self._plan.step)
        if not self._layers_save or (self._saves is None and self._pushes is None):
            return
        if (row := self._written.note(layer)) is not None:
            if self._pushes is not None:
                self._pushes.row_written(row)
            if self._saves is not None:
                self._saves.row_written(row)

    def fail_step(self, reason: str) -> None:
        """Nothing that the step computes is to be believed, because its forward has failed, or what
        it rests on. The step is to be ended all the same."""
        self._step_failure = reason
        if self._saves is not None:
            self._saves.poison(reason)

    def end_step(self) -> None:
        """Finish the step's loads and sweep its saves; call after the forward.

        Raises:
            LayersDidNotWait: if layers have not waited for their rows. Nothing of the step is
                kept, and the engine has to stop: what it has computed cannot be taken back.
            LoadStuck: if a copy does not end. The engine has to stop.
        """
        with contextlib.suppress(LoadStuck):  # raised below, once everybody knows of it
            self.finish_loads()
        saves, self._saves = self._saves, None
        self._written.clear()
        pushes, self._pushes = self._pushes, None
        if pushes is not None:
            pushes.sweep(self._step_failure)
        self._step_failure = ""
        if saves is not None:
            saves.sweep()
        if self._computing is not None:
            self._computing.collect()
        plan, self._plan = self._plan, None
        if self._timeline is not None and plan is not None and plan.forward:
            self._timeline.add(Lane.STEP, plan.step, -1, self._step_began)
        if plan is not None and not plan.forward and plan.outstanding and not self._receipts:
            quiet = not self._news.wait(self._idle_wait)
            self._idle_wait = min(2 * self._idle_wait, LONGEST_IDLE_WAIT) if quiet else IDLE_WAIT
        else:
            self._idle_wait = IDLE_WAIT
        self._news.clear()
        self._loads.raise_if_stopped()

    def finish_loads(self) -> None:
        """Wait for all of the step's loads. Call it before the step ends where layers run that do
        not wait, and behind all that do.

        Raises:
            LoadStuck: as :meth:`wait_layer` does.
        """
        if self._loads.is_empty:
            return
        with self._failing_on_stop():
            run = self._loads.finish(blameless=bool(self._step_failure))
        if run is not None:
            self._arrivals.finished(run)
            if run.failed:
                self.fail_step(LOAD_FAILED)

    def collect(self) -> Outcomes:
        """Everything that has ended since the last call.

        An engine that runs draft models asks before it ends the step; the step's loads are
        finished then, because their failures must be known now.

        Raises:
            LoadStuck: if a copy does not end. The engine has to stop.
        """
        self.finish_loads()
        pushed = self._wire.ended() if self._wire is not None else []
        near = self._near_news()
        if not (pushed or self._receipts or near) and self._arrivals.is_empty:
            return self._nothing
        for request_id, push_receipt in pushed:
            self._receipts.append(push_receipt)
            failed = push_receipt.outcome is Outcome.FAILED
            self._arrivals.pushed(request_id, failed=failed)
        try:
            ended = self._arrivals.collect()
        except LoadStuck as error:
            self._loads.stop(error)
            self.fail_step(type(error).__name__)
            raise
        receipts = []
        while self._receipts:
            receipts.append(self._receipts.popleft())
        queued = self._loader.pool.depth() + self._saver.pool.depth()
        queued += sum(moves.depth for moves in self._moves.values())
        receipt = Receipt(self._rank, tuple(receipts), queued, near)
        return Outcomes(receipt, ended.arrived, ended.failed, ended.rejected)

    def quiet(self) -> None:
        """Have nobody read or write the engine's memory any more, because it is about to go; call
        it between steps. Loads that requests wait for are given up, and saves come to their end.

        Raises:
            TimeoutError: if saves have not within ``load.deadline``.
            LoadStuck: if a copy does not end. The engine has to stop.
        """
        self._arrivals.give_up("quiet", lambda: self._patience)
        self._arrivals.land(lambda: self._patience)
        if not self._saver.pool.await_idle(self._config.deadline):
            raise TimeoutError(
                f"saves have not ended within load.deadline, {self._config.deadline:g} s, and "
                "still read the engine's cache: it must not go to sleep now"
            )

    def close(self, *, process_ends: bool = False) -> None:
        """Finish what is under way, within ``load.deadline``, and release what is held. Memory that
        something may still use then is kept until the process ends.

        Args:
            process_ends: whether the process ends with it, see
                :meth:`~lamina_kv.data.movers.base.Mover.close`.
        """
        due = time.monotonic() + self._config.deadline

        def left() -> float:
            return max(LEAST_CLOSE, due - time.monotonic())

        ended = []
        for end in (partial(self._arrivals.give_up, "closed"), self._arrivals.land):
            try:
                end(left)
            except LoadStuck as error:
                log.warning("%s", error)
                ended.append(False)
        parts: list[WorkerPool | PushWire | MovePipeline] = [self._loader.pool, self._waiter]
        parts.append(self._saver.pool)
        if self._listener is not None:
            self._listener.close()
        if self._wire is not None:
            parts.append(self._wire)
        parts += self._moves.values()
        ended += [part.close(left()) for part in parts]
        if not all(ended):
            self._mover.keep_memory()  # a thread still uses it
        elif not self._mover.close(process_ends=process_ends, timeout=left()):
            ended.append(False)
        if not all(ended):
            log.warning(
                "transfers under way did not end within load.deadline, %g s. Host memory that they "
                "may still use is kept until the process ends", self._config.deadline,
            )  # fmt: skip
        if self._timeline is not None:
            self._timeline.close()

    # -- inside ------------------------------------------------------------------------------

    def _make_run(self, orders: Sequence[LoadOrder], plan: StepPlan, *, parked: bool) -> LoadRun:
        geometry = self._geometry
        blocks = sum(len(pages.blocks) for order in orders for pages in order.pages)
        row_bytes = blocks * max(row.page_bytes for row in geometry.rows)
        window = window_rows(
            self._config.load_ahead, self._config.staging, row_bytes, len(geometry.rows)
        )
        return LoadRun(
            [Load(order, geometry) for order in orders],
            self._loader,
            window=window,
            parked=parked,
            patience=self._patience,
            waiter=self._waiter,
            step=plan.step,
            done=self._news.set,
        )

    def _near_news(self) -> NearSlots | None:
        """How many near slots may be used, if that is news to control."""
        if self._near_said.is_final:
            return None
        near = self._mover.near_slots(self._tiers.near)
        if near == self._near_said:
            return None
        self._near_said = near
        return near

    def _make_saves(self, orders: Sequence[SaveOrder], plan: StepPlan) -> SaveRun:
        follows = self._tiers.follows
        return SaveRun(orders, self._saver, self._report, follows=follows, step=plan.step)

    @contextlib.contextmanager
    def _failing_on_stop(self) -> Iterator[None]:
        """What a step computed in which the engine has to stop is worth nothing."""
        try:
            yield
        finally:
            if self._loads.stopped is not None and not self._step_failure:
                self.fail_step(type(self._loads.stopped).__name__)

    def _report(self, receipts: Iterable[TransferReceipt]) -> None:
        self._receipts.extend(receipts)
        self._news.set()
