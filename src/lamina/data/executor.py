"""The executor: carries out one rank's part of every plan and keeps the receipts.

An engine adapter calls it around each forward pass, from one thread::

    begin_step(plan)            parked loads, writes, saves of what the step overwrites
    start_loads()               the step's layerwise loads
      wait_layer(name)          before a layer reads its row
      layer_written(name)       after a layer has written its row
    end_step()                  rows that no hook announced are saved
    collect()                   what has become of everything so far

Every layer waits. A model with layers that do not call has all rows loaded before its forward
(:meth:`Executor.load_before_forward`). A layer that was to wait and did not has read rows that
nobody knows to have been there: then nothing of the step is kept, and the engine has to stop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lamina.config import LoadConfig
from lamina.data.early_release import EarlyRelease
from lamina.data.fetch_pipeline import DiskFetcher
from lamina.data.load_pipeline import Load, LoadRun, LoadStuck, RowSource, window_rows
from lamina.data.movers.base import Mover
from lamina.data.push_pipeline import PushRun
from lamina.data.push_wire import PushIdentity, PushWire
from lamina.data.save_pipeline import SaveRun
from lamina.data.sources import LOAD_THREADS
from lamina.data.threads import Threads
from lamina.data.tiers.disk import DiskReader, DiskTier
from lamina.data.tiers.host import HostTier
from lamina.data.worker_pool import WorkerPool
from lamina.data.write_through import DiskWriter
from lamina.geometry import CacheGeometry
from lamina.observe.timeline import Lane, Timeline
from lamina.plan import (
    LOAD_FAILED,
    LoadMode,
    Outcome,
    RankReport,
    Receipt,
    SaveOrder,
    StepPlan,
    TierName,
    TransferReceipt,
)
from lamina.push.transports.base import Transport

log = logging.getLogger("lamina.data")

IDLE_WAIT, LONGEST_IDLE_WAIT = 0.002, 0.008
"""Seconds that a step without a forward waits for a receipt, so that an engine with nothing to
run neither spins on the interpreter lock nor is late for the next request. They double while there
is none: a push takes as long as another engine's prefill, which may run on the same cores."""

LEAST_PATIENCE = 30.0
"""Seconds that one copy between host memory and the engine may take at least, whatever
``load.deadline`` says: that is meant for tiers which can be slow, and what comes of this is an
engine that stops."""

_LAYERWISE, _PARKED = 0.0, 1.0


class LayersDidNotWait(RuntimeError):
    """Layers have read rows of a load without waiting for them."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What the engine must know after a step.

    Attributes:
        receipt: for control.
        arrived: requests whose parked load is over, well or not.
        failed: requests whose load failed, in the step or between steps.
        lost_blocks: engine blocks whose load failed.
        rejected: requests that have arrived, but not by a push: all of their blocks are to be
            given up, because something may still be written to them.
    """

    receipt: Receipt
    arrived: frozenset[str]
    failed: frozenset[str]
    lost_blocks: frozenset[int]
    rejected: frozenset[str] = frozenset()


class Executor:
    """See the module.

    Args:
        rank: this rank.
        geometry: the engine's cache.
        mover: copies pages between the engine and host memory.
        host: the host tier.
        disk: the disk tier, if there is one.
        config: the ``load`` section.
        sources: the tiers as loads see them, see :func:`~lamina.data.sources.tier_sources`.
        follows: whether the tiers are another rank's, see :mod:`~lamina.data.replicas`.
        push: who this rank is among engines, and its wire to them; None if it takes no part.
        timeline: records what happens when; None records nothing.
    """

    def __init__(
        self,
        *,
        rank: int,
        geometry: CacheGeometry,
        mover: Mover,
        host: HostTier,
        disk: DiskTier | DiskReader | None,
        config: LoadConfig,
        sources: Mapping[TierName, RowSource],
        follows: bool = False,
        push: tuple[PushIdentity, Transport] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self._rank = rank
        self._geometry = geometry
        self._mover = mover
        self._host = host
        self._disk = disk
        self._config = config
        self._follows = follows
        self._timeline = timeline
        self._row_of_layer = geometry.row_of_layer
        self._unwritten: dict[int, set[str]] = {}
        self._patience = max(config.deadline, LEAST_PATIENCE)
        self._cores = usable_cores()
        threads = Threads(mover.enter_thread, self._cores)
        # A pool for each tier: a disk that hangs takes its own threads with it, and no others.
        self._load_pools = {
            tier: WorkerPool(f"load-{tier.value}", LOAD_THREADS[tier], threads) for tier in sources
        }
        self._save_pool = WorkerPool("save", 1, threads)
        self._writer: DiskWriter | None = None
        self._sources = sources
        if disk is not None and not isinstance(disk, DiskReader):
            self._writer = DiskWriter(
                disk,
                host,
                self._report,
                loads=self._load_pools[TierName.DISK],
                rows=len(geometry.rows),
                chunk_bytes=geometry.chunk_bytes,
                threads=threads,
                timeline=timeline,
            )
        self._fetcher: DiskFetcher | None = None
        if disk is not None and not follows:
            self._fetcher = DiskFetcher(
                disk,
                host,
                mover,
                geometry,
                self._load_pools[TierName.DISK],
                self._report,
                threads,
                timeline,
            )
        self._plan: StepPlan | None = None
        self._pushes: PushRun | None = None
        self._layerwise: LoadRun | None = None
        self._in_step: list[LoadRun] = []
        self._resumed: list[LoadRun] = []
        self._early = EarlyRelease()
        self._layers_wait = True
        self._layers_save = True
        self._order: Mapping[str, int] | None = None
        self._called: set[str] = set()
        self._stopped: RuntimeError | None = None
        self._saves: SaveRun | None = None
        self._parked: list[LoadRun] = []
        self._awaited: Counter[str] = Counter()
        self._landing: list[LoadRun] = []
        self._receipts: deque[TransferReceipt] = deque()
        self._news = threading.Event()
        self._idle_wait = IDLE_WAIT
        self._failed: set[str] = set()
        self._rejected: set[str] = set()
        self._lost_blocks: set[int] = set()
        self._step_failure = ""
        self._computing = (-1, 0.0)
        self._nothing = Outcomes(Receipt(rank), frozenset(), frozenset(), frozenset())
        self._wire: PushWire | None = None
        if push is not None:
            self._wire = PushWire(
                *push,
                report=self._report,
                wake=self._news.set,
                threads=threads,
                timeline=timeline,
            )

    def report(self) -> RankReport:
        """This rank's tiers and what they already hold."""
        return RankReport(
            rank=self._rank,
            host_slots=self._host.slots,
            disk_slots=self._disk.slots if self._disk is not None else 0,
            chunk_bytes=self._geometry.chunk_bytes,
            stored=self._disk.stored() if self._disk is not None else (),
            follows=self._follows,
        )

    def load_before_forward(self) -> None:
        """Some layers do not wait for their rows: nobody is resumed before all is there, and
        :meth:`start_loads` returns when all is there."""
        self._layers_wait = False

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
        self._order = {layer: index for index, layer in enumerate(order)}

    @property
    def moves_rows(self) -> bool:
        """Whether the layers of this step have anything to wait for or to save."""
        pushes = self._pushes is not None and self._pushes.moves_rows
        return bool(self._in_step) or (self._layers_save and (self._saves is not None or pushes))

    # -- one step ----------------------------------------------------------------------------

    def begin_step(self, plan: StepPlan) -> None:
        """Start what does not belong to the forward; call before it.

        Raises:
            LoadStuck, LayersDidNotWait: if the engine had to stop, and has not.
        """
        if self._stopped is not None:
            raise self._stopped
        self._plan = plan
        self._called.clear()
        self._early.step_begins(plan.forward)
        if plan.forward and self._resumed:
            self._in_step, self._resumed = self._resumed, []
        if plan.is_empty:
            return
        if self._writer is not None:
            if plan.drop_disk:
                self._writer.drop(plan.drop_disk)
            if plan.writes:
                self._writer.write(plan.writes, plan.step)
        elif plan.writes:  # the leader writes them
            self._report(TransferReceipt(order.transfer, Outcome.DONE) for order in plan.writes)
        if self._fetcher is not None:
            self._fetcher.fetch(plan.fetches, plan.step)
        elif plan.fetches:
            self._report(TransferReceipt(order.transfer, Outcome.DONE) for order in plan.fetches)
        for order in plan.loads:
            if order.mode is LoadMode.PARKED:
                run = self._make_run([Load(order, self._geometry)], parked=True)
                self._parked.append(run)
                self._awaited[order.request_id] += 1
                run.start(self._mover.fence_compute())
        layerwise = [o for o in plan.loads if o.mode is LoadMode.LAYERWISE]
        if layerwise:
            loads = [Load(order, self._geometry) for order in layerwise]
            self._layerwise = self._make_run(loads, parked=False)
            self._in_step.append(self._layerwise)
        if self._wire is not None and not plan.push.is_empty:
            self._wire.carry_out(plan.push, plan.step)
            self._awaited.update(order.request_id for order in plan.push.receives)
            if plan.push.orders:
                self._pushes = PushRun(
                    plan.push.orders, self._geometry, self._mover, self._wire, step=plan.step
                )
        if overwritten := [order for order in plan.saves if order.overwritten]:
            self._make_saves(overwritten).read_before_forward()
        if written := [order for order in plan.saves if not order.overwritten]:
            self._saves = self._make_saves(written)

    def start_loads(self) -> None:
        """Submit the first rows of the step's layerwise loads; call right before the forward.

        Raises:
            LoadStuck: as :meth:`wait_layer` does, if all rows are loaded before the forward.
            RuntimeError: if there is no host memory to load from.
        """
        if self._layerwise is not None:
            # Of ranks that share a slab another one may have filled it while this one still pins
            # it. That takes its time, and no copy is late because of it.
            self._mover.await_host()
            # Here and not earlier: engines prepare blocks (zero, copy) once the step has begun.
            self._layerwise.start(self._mover.fence_compute())
            self._layerwise = None
        if not self._layers_wait:
            self.finish_loads()

    def wait_layer(self, layer: str) -> None:
        """Return when the row of ``layer`` may be read; at once if nothing is loaded, or if the
        layer has no row because it reads another one's.

        Raises:
            LoadStuck: if a copy does not end. The engine has to stop.
        """
        if self._in_step and (row := self._row_of_layer.get(layer)) is not None:
            self._called.add(layer)
            for run in self._in_step:
                self._hold(run, row)
        if self._timeline is not None:
            self._computing = (self._row_of_layer.get(layer, -1), Timeline.now())

    def layer_written(self, layer: str) -> None:
        """``layer`` has written its row; save it if all of the row's layers have."""
        if self._timeline is not None and self._plan is not None:
            row, began = self._computing
            self._timeline.add(Lane.COMPUTE, self._plan.step, row, began)
        if not self._layers_save or (self._saves is None and self._pushes is None):
            return
        if (written := self._row_of_layer.get(layer)) is not None:
            # Not "the last layer of the row": in what order layers run is the model's affair.
            left = self._unwritten.setdefault(written, set(self._geometry.rows[written].layers))
            left.discard(layer)
            if not left:
                if self._pushes is not None:
                    self._pushes.row_written(written)
                if self._saves is not None:
                    self._saves.row_written(written)

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
        self._unwritten.clear()
        pushes, self._pushes = self._pushes, None
        if pushes is not None:
            pushes.sweep(self._step_failure)
        self._step_failure = ""
        if saves is not None:
            saves.sweep()
        plan, self._plan = self._plan, None
        if plan is not None and not plan.forward and plan.outstanding and not self._receipts:
            quiet = not self._news.wait(self._idle_wait)
            self._idle_wait = min(2 * self._idle_wait, LONGEST_IDLE_WAIT) if quiet else IDLE_WAIT
        else:
            self._idle_wait = IDLE_WAIT
        self._news.clear()
        if self._stopped is not None:
            raise self._stopped

    def collect(self) -> Outcomes:
        """Everything that has ended since the last call.

        An engine that runs draft models asks before it ends the step; the step's loads are
        finished then, because their failures must be known now.

        Raises:
            LoadStuck: if a copy does not end. The engine has to stop.
        """
        self.finish_loads()
        pushed = self._wire.ended() if self._wire is not None else []
        waiting = self._parked or self._resumed or self._landing
        if not (waiting or self._receipts or self._failed or pushed):
            return self._nothing
        arrived: set[str] = set()
        for run in (*self._parked, *self._resumed):
            if run.expired and not run.landed:
                self._give_up(run, "deadline")
        for run in list(self._parked):
            if run.landed:
                self._parked.remove(run)
                self._settle(run)
            elif self._may_resume(run):
                self._parked.remove(run)
                self._resumed.append(run)
            else:
                continue
            for load in run.loads:
                self._one_arrived(load.order.request_id, arrived)
        for runs in (self._landing, self._resumed):
            for run in [run for run in runs if run.landed]:
                runs.remove(run)
                self._settle(run)
        for request_id, push_receipt in pushed:
            self._receipts.append(push_receipt)
            if push_receipt.outcome is Outcome.FAILED:
                self._rejected.add(request_id)
            self._one_arrived(request_id, arrived)
        receipts = []
        while self._receipts:
            receipts.append(self._receipts.popleft())
        # Of a parked request that waits for something else, too, nothing is said yet.
        failed = {request for request in self._failed if request not in self._awaited}
        self._failed -= failed
        lost, self._lost_blocks = self._lost_blocks, set()
        queued = sum(pool.depth() for pool in (*self._load_pools.values(), self._save_pool))
        receipt = Receipt(self._rank, tuple(receipts), queued)
        return Outcomes(
            receipt,
            frozenset(arrived),
            frozenset(failed),
            frozenset(lost),
            self._rejected_of(arrived),
        )

    def quiet(self) -> None:
        """Have nobody read or write the engine's memory any more, because it is about to go; call
        it between steps. Loads that requests wait for are given up. Those of requests that go on
        come to their end, because nobody could take them back, and so do saves.

        Raises:
            TimeoutError: if saves have not within ``load.deadline``.
            LoadStuck: if a copy does not end. The engine has to stop.
        """
        for run in self._parked:
            run.give_up("quiet")
        for run in (*self._resumed, *self._landing):
            run.land()
        if not self._save_pool.await_idle(self._config.deadline):
            raise TimeoutError(
                f"saves have not ended within load.deadline, {self._config.deadline:g} s, and "
                "still read the engine's cache: it must not go to sleep now"
            )

    def close(self) -> None:
        """Finish what is under way, within ``load.deadline``, and release what is held."""
        give_up = time.monotonic() + self._config.deadline
        ended = True
        for run in (*self._parked, *self._resumed):
            try:
                run.give_up("closed", max(0.0, give_up - time.monotonic()))
            except LoadStuck as error:
                log.warning("%s", error)
                ended = False
        pools: list[WorkerPool | DiskWriter | DiskFetcher | PushWire] = [
            *self._load_pools.values(),
            self._save_pool,
        ]
        if self._fetcher is not None:
            pools.append(self._fetcher)
        if self._writer is not None:
            pools.append(self._writer)
        if self._wire is not None:
            pools.append(self._wire)
        left = [pool.close(max(0.0, give_up - time.monotonic())) for pool in pools]
        ended = ended and all(left)
        if not ended:
            log.warning("transfers under way did not end within %.0f s", self._config.deadline)
        if ended:  # else files and memory that a thread still uses go with the process
            if self._disk is not None:
                self._disk.close()
            self._mover.close()
        if self._timeline is not None:
            self._timeline.write()

    def _may_resume(self, run: LoadRun) -> bool:
        """Whether the requests of a parked load may go on, and from now on do."""
        alone = all(self._awaited[load.order.request_id] == 1 for load in run.loads)
        grace = run.grace if self._layers_wait and alone else None
        if grace is None or not self._early.allows(run.arrival):
            return False
        run.resume(grace)
        return True

    def _one_arrived(self, request_id: str, arrived: set[str]) -> None:
        """Of what a parked request waits for, something has ended."""
        self._awaited[request_id] -= 1
        if self._awaited[request_id] <= 0:
            del self._awaited[request_id]
            arrived.add(request_id)

    def _rejected_of(self, arrived: set[str]) -> frozenset[str]:
        rejected = self._rejected & arrived
        self._rejected -= rejected
        return frozenset(rejected)

    # -- inside ------------------------------------------------------------------------------

    def _make_run(self, loads: list[Load], *, parked: bool) -> LoadRun:
        geometry = self._geometry
        blocks = sum(len(piece.blocks) for load in loads for piece in load.pieces)
        row_bytes = blocks * max(row.page_bytes for row in geometry.rows)
        window = window_rows(
            self._config.load_ahead, self._config.staging, row_bytes, len(geometry.rows)
        )
        assert self._plan is not None
        return LoadRun(
            loads,
            geometry,
            self._sources,
            self._load_pools,
            window=window,
            cores=len(self._cores),
            urgency=_PARKED if parked else _LAYERWISE,
            self_driven=parked,
            patience=self._patience,
            step=self._plan.step,
            timeline=self._timeline,
            done=self._wake,
        )

    def _make_saves(self, orders: Sequence[SaveOrder]) -> SaveRun:
        assert self._plan is not None
        return SaveRun(
            orders,
            self._geometry,
            self._host,
            self._mover,
            self._save_pool,
            self._report,
            follows=self._follows,
            step=self._plan.step,
            timeline=self._timeline,
        )

    def finish_loads(self) -> None:
        """Wait for all of the step's loads. Call it before the step ends where layers run that do
        not wait, and behind all that do.

        Raises:
            LoadStuck: as :meth:`wait_layer` does.
        """
        self._check_called()
        runs = list(self._in_step)
        for run in runs:
            for row in range(len(self._geometry.rows)):
                self._hold(run, row)
        self._in_step = []
        for run in runs:
            self._finish_load(run)
        self._early.step_ends(len(self._geometry.rows), sum(run.waited for run in runs))

    def _hold(self, run: LoadRun, row: int) -> None:
        try:
            for fence in run.wait(row):
                self._mover.hold_compute(fence)
        except LoadStuck as error:
            self._stop(error)
            raise

    def _give_up(self, run: LoadRun, reason: str) -> None:
        try:
            run.give_up(reason)
        except LoadStuck as error:
            self._stop(error)
            raise

    def _stop(self, error: RuntimeError) -> None:
        """Keep nothing of the step, and begin no other one."""
        log.error("%s", error)
        self._stopped = error
        self._in_step = []
        self.fail_step(type(error).__name__)

    def _check_called(self) -> None:
        """See that every layer has waited whose row is loaded in the step."""
        forward = self._plan is not None and self._plan.forward
        if not (self._in_step and forward and self._layers_wait) or self._step_failure:
            return
        groups = {
            piece.group for run in self._in_step for load in run.loads for piece in load.pieces
        }
        layers = [
            layer
            for row in self._geometry.rows
            if groups.intersection(row.groups)
            for layer in row.layers
        ]
        if self._order is not None and self._called:
            last = max(map(self._order.__getitem__, self._called))
            layers = [layer for layer in layers if self._order[layer] <= last]
        if silent := [layer for layer in layers if layer not in self._called]:
            named = ", ".join(silent[:4]) + (f" and {len(silent) - 4} more" if silent[4:] else "")
            self._stop(
                LayersDidNotWait(
                    f"layers {named} did not wait for rows that were loaded in their step, and may "
                    "have read them before they were there. Nothing of the step is kept, and the "
                    'engine stops. Set load.mode to "parked" to serve this model, and report this'
                )
            )

    def _finish_load(self, run: LoadRun) -> None:
        failed = any(load.failed for load in run.loads)
        if failed or run.landed:
            self._settle(run)
        else:  # A device may run behind. Who shares the slots does not wait for it, but for this.
            self._landing.append(run)
        if run.grace is not None:
            self._early.waited(run.waited)
        if failed:
            self.fail_step(LOAD_FAILED)

    def _settle(self, run: LoadRun) -> None:
        for load in run.loads:
            if load.failed:
                self._failed.add(load.order.request_id)
                self._lost_blocks |= load.lost_blocks()
        self._report(load.receipt(run.active, run.waited) for load in run.loads)

    def _report(self, receipts: Iterable[TransferReceipt]) -> None:
        self._receipts.extend(receipts)
        self._news.set()

    def _wake(self, _: LoadRun) -> None:
        self._news.set()


def usable_cores() -> frozenset[int]:
    """Cores that some thread of this process may run on. Engines pin their threads one by one, so
    the caller's own affinity says little."""
    cores: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            cores |= os.sched_getaffinity(int(task))
    return frozenset(cores)
