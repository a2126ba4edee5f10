"""The scheduler's side of Lamina: what is hit, what is loaded, what is saved, what is evicted.

The planner is called by an engine adapter, from one thread, and never touches bytes. It answers
lookups, turns allocations and progress into a :class:`~lamina.plan.StepPlan`, and learns from
receipts what became of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from lamina.config import Config
from lamina.control.breakers import Breakers
from lamina.control.catalog import open_catalog
from lamina.control.leases import BlockPool, LeaseBook
from lamina.control.loading import Hit, LoadPlanner, stories
from lamina.control.requests import (
    BoundaryState,
    ChunkShape,
    FoundPrefix,
    RequestRecord,
    RequestView,
)
from lamina.control.saving import SavePlanner
from lamina.control.transfers import Kind, State, Transfer, TransferTable
from lamina.keys import ChunkChain
from lamina.observe.metrics import Meter
from lamina.plan import (
    LoadMode,
    RankReport,
    Receipt,
    StepPlan,
    TierName,
)

log = logging.getLogger("lamina.control")


class EngineClock:
    """Time as transfers feel it. While the model computes no receipt arrives, so that one long step
    must not make everything overdue that waits for its end.

    Args:
        clock: monotonic seconds.
        longest: seconds that one step counts as at most.

    Attributes:
        now: the time of the last tick.
    """

    def __init__(self, clock: Callable[[], float], longest: float) -> None:
        self.now = 0.0
        self._clock = clock
        self._longest = longest
        self._last = clock()

    def tick(self) -> float:
        """The engine is here, between two steps; returns :attr:`now`."""
        last, self._last = self._last, self._clock()
        self.now += min(self._last - last, self._longest)
        return self.now


class Planner:
    """See the module.

    Args:
        config: the whole tree.
        shape: tokens of blocks and chunks.
        namespace: fingerprint that every key starts from.
        pool: the engine's block pool.
        reports: one from each rank: its tiers and what they already hold.
        meter: where figures go.
        reports_blocks: whether the engine can take back single blocks of a failed load.
        clock: monotonic seconds.

    Raises:
        ValueError: if ``reports`` is empty, or a tier or a bound is smaller than one chunk.
    """

    def __init__(
        self,
        config: Config,
        shape: ChunkShape,
        namespace: bytes,
        pool: BlockPool,
        reports: Sequence[RankReport],
        meter: Meter,
        *,
        reports_blocks: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not reports:
            raise ValueError("no rank has reported its tiers")
        self._config = config
        self._shape = shape
        self._namespace = namespace
        self._meter = meter
        self._clock = EngineClock(clock, config.load.deadline / 2)
        kept = [report.chunk_bytes for report in reports if not report.follows]
        self._kept_bytes = sum(kept)
        for key, bound in (
            ("save.max_inflight", config.save.max_inflight),
            ("disk.max_inflight", config.disk.max_inflight if config.disk else None),
        ):
            largest = max(report.chunk_bytes for report in reports)
            if bound is not None and bound < largest:
                raise ValueError(
                    f"{key}: {bound} bytes is less than one chunk, so nothing could ever be "
                    f"moved; use at least {largest}"
                )
        self._leases = LeaseBook(pool)
        self._transfers = TransferTable(len(reports))
        self._breakers = Breakers(config.breaker, clock)
        self._catalog = open_catalog(reports, self._breakers.readable)
        self._loading = LoadPlanner(
            config,
            shape,
            self._catalog,
            self._transfers,
            self._breakers,
            meter,
            chunk_bytes=sum(report.chunk_bytes for report in reports),
            reports_blocks=reports_blocks,
        )
        self._saving = SavePlanner(
            config,
            shape,
            self._catalog,
            self._transfers,
            self._leases,
            self._breakers,
            meter,
            chunk_bytes=self._kept_bytes,
            ranks=len(kept),
        )
        self._requests: dict[str, RequestRecord] = {}
        self._queued = 0
        self._step = 0

    # -- lookup and admission ------------------------------------------------------------

    def lookup(self, view: RequestView, floor: int, *, declined: str = "") -> Hit:
        """How many tokens beyond ``floor`` will be loaded for a request that has no blocks yet.

        Free of side effects on tiers and leases; called again for as long as the request waits.

        Args:
            view: the request.
            floor: tokens at its beginning that the engine already has, on a block boundary.
            declined: why nothing may be loaded for it, if so; a word for logs and metrics.
        """
        record = self._requests.get(view.request_id)
        if record is None or record.ended:
            chain = ChunkChain(
                self._namespace,
                self._shape.chunk_tokens,
                view.root_extra,
                len(self._shape.groups),
            )
            record = self._requests[view.request_id] = RequestRecord(view, chain)
        elif record.admitted:
            record.new_epoch()
        record.view = view
        return self._loading.lookup(
            record,
            floor,
            declined=declined,
            others_active=self._others_active(view.request_id),
        )

    def admitted(self, request_id: str, loaded: int) -> None:
        """The engine has given a request its blocks and will have ``loaded`` tokens loaded.

        Called after :meth:`lookup`, in the same scheduling pass; a call with 0 that follows the
        end of a parked load changes nothing.
        """
        record = self._requests[request_id]
        if record.admitted:
            return
        record.admitted = True
        story = record.story
        self._meter.count("lookups", 1)
        self._meter.count("lookup_tokens", story.prompt)
        self._meter.count("hit_tokens", story.engine, tier="engine")
        if loaded == 0:
            if story.host + story.disk:
                reason = story.reason if story.reason != "hit" else "declined_by_engine"
                self._meter.count("loads_skipped", 1, reason=reason)
                story.reason = reason
            story.loaded = 0
            stories.debug("%s", story.line(request_id))
            return
        assert loaded == record.hit.tokens, "a hit is taken whole or not at all"
        self._loading.order(record, step=self._step, now=self._clock.tick())

    def hit_sources(self, request_id: str) -> dict[TierName, int]:
        """Tokens of the request's load by the tier they come from."""
        return self._requests[request_id].story.sources()

    def _others_active(self, request_id: str) -> bool:
        return any(
            record.admitted and not record.ended
            for name, record in self._requests.items()
            if name != request_id
        )

    # -- the step --------------------------------------------------------------------------

    def plan_step(
        self,
        progress: Iterable[tuple[str, int]],
        *,
        forward: bool,
        states: Iterable[BoundaryState] = (),
    ) -> StepPlan:
        """The plan of the step that the engine has just scheduled.

        Args:
            progress: for each request that runs in the step, how many tokens of it are
                computed when the step is over, draft tokens included.
            forward: whether the step runs the model.
            states: recurrent states that blocks hold when the step is over.
        """
        now = self._clock.tick()
        chunk = self._shape.chunk_tokens
        # First, because a hit needs one, and it is gone with the step.
        self._saving.order_passed(step=self._step, now=now)
        for state in states:
            record = self._requests.get(state.request_id)
            if record is not None:
                self._saving.consider_state(
                    record, state.group, state.block, state.end, step=self._step, now=now
                )
        for request_id, computed in progress:
            record = self._requests.get(request_id)
            # Most requests of most steps have completed no chunk.
            if record is not None and computed >= (record.next_save + 1) * chunk:
                self._saving.consider(
                    record, computed, record.view.blocks, step=self._step, now=now
                )
        writes = self._saving.order_writes(step=self._step, now=now)
        outstanding = len(self._transfers) > 0
        plan = StepPlan(
            step=self._step,
            loads=tuple(self._loading.orders),
            saves=tuple(self._saving.orders),
            writes=writes,
            drop_disk=tuple(self._catalog.forgotten),
            forward=forward,
            outstanding=outstanding,
        )
        self._step += 1
        self._loading.orders.clear()
        self._saving.orders.clear()
        self._catalog.forgotten.clear()
        if outstanding:
            self._mark_overdue(now)
        return plan

    def finished(self, request_id: str, computed: int, blocks: Sequence[Sequence[int]]) -> None:
        """A request has ended; its blocks are freed after this call.

        Args:
            request_id: the request.
            computed: tokens of it that are computed once every step in flight has run.
            blocks: per group, its block ids in token order.
        """
        record = self._requests.get(request_id)
        if record is None:
            return
        # Chunks are published first to last; without this the beginning would go first.
        for tier in self._catalog.tiers.values():
            tier.use([key for chunk in zip(*record.chain.groups, strict=True) for key in chunk])
        self._saving.order_passed(step=self._step, now=self._clock.now, ended=record)
        still_loading = record.load is not None
        if record.admitted and not (still_loading and record.story.mode is LoadMode.PARKED):
            left = self._saving.consider(
                record, computed, lambda group: blocks[group], step=self._step, now=self._clock.now
            )
            if left:
                self._meter.count("saves_dropped", left)
        if still_loading:
            record.ended = True
        else:
            del self._requests[request_id]

    def _mark_overdue(self, now: float) -> None:
        late = [t for t in self._transfers.live() if not t.overdue and t.expires <= now]
        self._breakers.judge(late, self._catalog.held)
        for transfer in late:
            transfer.overdue = True
            kind = transfer.kind.value
            self._meter.count("failures", 1, kind=f"{kind}_overdue")
            log.warning("%s %d of step %d is overdue", kind, transfer.id, transfer.step)
            if transfer.kind is not Kind.LOAD:
                self._saving.overdue(transfer)

    # -- receipts ----------------------------------------------------------------------------

    def receive(self, receipts: Iterable[Receipt]) -> None:
        """Take in what the ranks report after a step."""
        settled: list[Transfer] = []
        for receipt in receipts:
            self._queued = receipt.queued
            for item in receipt.transfers:
                transfer = self._transfers.get(item.transfer)
                if transfer is None or not transfer.apply(receipt.rank, item):
                    continue
                if transfer.lease is not None:
                    transfer.lease.release()
                settled.append(transfer)
        self._breakers.judge((t for t in settled if not t.overdue), self._catalog.held)
        waits: dict[int, float] = {}
        for transfer in settled:
            if transfer.kind is Kind.LOAD:
                self._settle_load(transfer)
                if transfer.layerwise:
                    waits[transfer.step] = max(transfer.waited, waits.get(transfer.step, 0.0))
            elif transfer.kind is Kind.WRITE:
                self._saving.settle_write(transfer)
        for waited in waits.values():
            self._meter.observe("wait_seconds", waited)
        self._saving.settle((t for t in settled if t.kind is Kind.SAVE), step=self._step)

    def distrust(self, step: int = 0) -> None:
        """A load has failed in the engine's own eyes: nothing that was saved in ``step`` or later
        and is not visible yet may become visible, and everything is considered for saving anew.
        """
        self._saving.poison_saves_since(step)
        for record in self._requests.values():
            record.next_save = 0

    def _settle_load(self, transfer: Transfer) -> None:
        record = self._requests.get(transfer.request_id)
        self._loading.settle(transfer, record)
        if transfer.state is State.FAILED and transfer.layerwise:
            self.distrust(transfer.step)
        if record is not None and record.ended and record.load is None:
            del self._requests[transfer.request_id]

    # -- the whole ---------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every chunk in every tier; what is on its way will not become visible."""
        self._saving.reset()
        for record in self._requests.values():
            record.hit = FoundPrefix()
            # What a running request has computed was computed before the reset.
            record.barred = record.admitted

    @property
    def has_work(self) -> bool:
        """Whether the engine must keep stepping so that orders go out and receipts come in."""
        return (
            bool(self._loading.orders or self._saving.orders or self._catalog.forgotten)
            or self._saving.may_write
            or self._transfers.pending
        )

    def gauges(self) -> None:
        """Write the present state of tiers, leases and queues to the meter."""
        for tier in self._catalog.tiers.values():
            name = tier.name.value
            self._meter.gauge("tier_capacity_bytes", tier.slots * self._kept_bytes, tier=name)
            self._meter.gauge("tier_used_bytes", tier.used * self._kept_bytes, tier=name)
            self._breakers.gauges(self._meter, tier.name)
        for kind in Kind:
            self._meter.gauge(
                "bytes_in_flight", self._transfers.bytes_in_flight(kind), direction=kind.value
            )
            self._meter.gauge("transfers", self._transfers.count(kind), direction=kind.value)
        self._meter.gauge("write_backlog", self._saving.backlog)
        self._meter.gauge("queue_depth", self._queued)
        self._meter.gauge("leased_blocks", self._leases.leased_blocks)
