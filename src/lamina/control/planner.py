"""The scheduler's side of Lamina: what is hit, what is loaded, what is saved, what is evicted.

The planner is called by an engine adapter, from one thread, and never touches bytes. It answers
lookups, turns allocations and progress into a :class:`~lamina.plan.StepPlan`, and learns from
receipts what became of it.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from math import inf

from lamina.config import Config
from lamina.control.breakers import Breakers
from lamina.control.catalog import open_catalog
from lamina.control.cost import CostModel, Costs
from lamina.control.decisions import DecisionRecord
from lamina.control.fetching import FetchPlanner
from lamina.control.hits import HitFinder
from lamina.control.leases import BlockPool, LeaseBook
from lamina.control.loading import ASK_AGAIN, Hit, LoadEnd, LoadPlanner, stories
from lamina.control.prompts import PromptMeter
from lamina.control.push_source import PushSource
from lamina.control.push_target import CANCELLED, PushTarget
from lamina.control.requests import (
    BoundaryState,
    ChunkShape,
    FoundPrefix,
    PushParameters,
    RequestRecord,
    RequestView,
)
from lamina.control.saving import SavePlanner
from lamina.control.sharing import SharedLoads, Sharing
from lamina.control.transfers import Kind, State, Transfer, TransferTable
from lamina.keys import CHECKPOINT, ChunkChain, Epoch
from lamina.observe.metrics import Meter
from lamina.plan import (
    NO_PUSH,
    LoadMode,
    PushPlan,
    RankReport,
    Receipt,
    StepPlan,
    TierName,
)
from lamina.push.cards import EngineCard
from lamina.push.letters import Letter, News

log = logging.getLogger("lamina.control")


class EngineClock:
    """Time as transfers feel it. While the model computes no receipt arrives, so that one long step
    must not make everything overdue that waits for its end.

    Args:
        clock: monotonic seconds.
        longest: seconds that one step counts as at most.

    Attributes:
        now: the time of the last tick.
        longest: seconds that one step counts as at most.
    """

    def __init__(self, clock: Callable[[], float], longest: float) -> None:
        self.now = 0.0
        self.longest = longest
        self._clock = clock
        self._last = clock()

    def tick(self) -> float:
        """The engine is here, between two steps; returns :attr:`now`."""
        last, self._last = self._last, self._clock()
        self.now += min(self._last - last, self.longest)
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
        card: this engine as other engines see it, if it takes part in pushes.
        reports_blocks: whether the engine can take back single blocks of a failed load.
        leases_loads: whether blocks that are loaded into are leased until the load has ended, for
            an engine that does not keep them itself.
        loads: whether anything is loaded from a tier.
        saves: whether anything is saved to one.
        step_tokens: tokens that the engine computes in one step at most; 0 if there is no bound.
        costs: what was measured by an engine before.
        incarnation: a word that no other run of any engine has; the same on every rank that has
            a planner.
        on_decision: called with what was decided for every request that gets its blocks.
        clock: monotonic seconds.

    Raises:
        ValueError: if ``reports`` is empty, or a tier is smaller than one chunk.
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
        card: EngineCard | None = None,
        reports_blocks: bool = True,
        leases_loads: bool = False,
        loads: bool = True,
        saves: bool = True,
        step_tokens: int = 0,
        costs: Costs | None = None,
        incarnation: str = "",
        on_decision: Callable[[DecisionRecord], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not reports:
            raise ValueError("no rank has reported its tiers")
        self._config = config
        self._shape = shape
        self._namespace = namespace
        self._epoch = CHECKPOINT
        self._incarnation = incarnation or uuid.uuid4().hex
        self._resets = 0
        self._meter = meter
        self._loads = loads
        self._saves = saves
        self._prompts = PromptMeter(meter, shape.chunk_tokens)
        self._clock = EngineClock(clock, config.load.deadline / 2)
        kept = [report.chunk_bytes for report in reports if not report.follows]
        self._kept_bytes = sum(kept)
        self._leases = LeaseBook(pool)
        self._transfers = TransferTable(len(reports))
        self._breakers = Breakers(config.breaker, clock)
        self._cost = CostModel(costs)
        self._on_decision = on_decision
        self._catalog = open_catalog(reports, self._breakers.readable)
        moved = sum(report.chunk_bytes for report in reports)
        self._hits = HitFinder(shape, self._catalog, self._breakers, moved)
        self._shared = SharedLoads(shape, config.load.deadline)
        self._loading = LoadPlanner(
            config,
            shape,
            self._catalog,
            self._hits,
            self._shared,
            self._transfers,
            self._leases,
            self._breakers,
            meter,
            chunk_bytes=moved,
            reports_blocks=reports_blocks,
            cost=self._cost,
            leases_loads=leases_loads,
            step_tokens=step_tokens,
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
        self._fetching = FetchPlanner(
            config,
            self._catalog,
            self._transfers,
            self._breakers,
            meter,
            self._hits.search,
            chunk_bytes=self._kept_bytes,
            ranks=len(kept),
        )
        self._source: PushSource | None = None
        self._target: PushTarget | None = None
        if config.push is not None and card is not None:
            self._source = PushSource(
                config.push, shape, card, self._transfers, self._leases, meter, cost=self._cost
            )
            self._target = PushTarget(
                config.push,
                config.breaker,
                shape,
                self._transfers,
                self._leases,
                meter,
                clock,
                card=card,
                cost=self._cost,
            )
        self._requests: dict[str, RequestRecord] = {}
        self._active: set[str] = set()  # admitted and not ended
        self._queued = 0
        self._step = 0

    # -- lookup and admission ------------------------------------------------------------

    def arrived(self, view: RequestView, *, loads: bool = True) -> None:
        """A request waits for its blocks: what it will load may come nearer meanwhile, and what
        another engine computes for it is to be kept there.

        Args:
            view: the request.
            loads: whether anything may be loaded for it.
        """
        record = self._record_of(view)
        if loads and self._loads:
            record.known_keys()
            self._fetching.expect(record)
        if self._source is not None and self._target is not None and view.push is not None:
            now = self._clock.tick()
            self._source.arrived(record, now)
            if loads:
                self._target.arrived(record, now)

    def lookup(
        self,
        view: RequestView,
        floor: int,
        *,
        declined: str = "",
        sharing: Sharing = Sharing.NOTHING,
    ) -> Hit:
        """How many tokens beyond ``floor`` will be loaded for a request that has no blocks yet.

        Free of side effects on tiers and leases; called again for as long as the request waits.

        Args:
            view: the request.
            floor: tokens at its beginning that the engine already has, on a block boundary.
            declined: why nothing may be brought to it, from a tier or by a push, if so; a word for
                logs and metrics.
            sharing: which loads of others it may be told to wait for.
        """
        now = self._clock.now if view.push is None else self._clock.tick()
        record = self._requests.get(view.request_id)
        if record is not None and record.admitted and not record.ended:
            self._prompts.interrupted(record)
            self._shared.end(record.load, now, well=False)
            record.lose_blocks()
            self._active.discard(view.request_id)
        record = self._record_of(view)
        if not declined and self._awaits_push(record, floor, now):
            return ASK_AGAIN
        pushed_to = view.push is not None and view.push.prefill is not None
        record.may_hit |= not declined and (self._loads or pushed_to)
        unloaded = declined or ("" if self._loads else "role")
        # A request that is pushed to has a destination to announce.
        may_wait = not (sharing is Sharing.NOTHING or unloaded or pushed_to)
        if may_wait and self._shared.waits(record, floor, now):
            return ASK_AGAIN
        hit = self._loading.lookup(
            record,
            floor,
            declined=unloaded,
            others_active=bool(self._active),
            now=now,
        )
        if may_wait and self._shared.joins(record, floor, sharing, now):
            record.offered = 0
            return ASK_AGAIN
        if pushed_to and not declined:
            hit = self._with_push(record, floor, hit)
        record.offered = hit.tokens
        return hit

    def _record_of(self, view: RequestView) -> RequestRecord:
        record = self._requests.get(view.request_id)
        if record is None or record.ended:
            record = self._requests[view.request_id] = RequestRecord(view, self._chain_of(view))
        elif not record.admitted and (
            record.chain.epoch is not self._epoch or record.view.root_extra != view.root_extra
        ):
            # Weights, or an adapter, were loaded anew while the request waited.
            record.rename(self._chain_of(view))
            self._fetching.look_again(record)
            if self._source is not None:  # of one that was preempted a part may have been sent
                self._source.bar(record)
        record.view = view
        return record

    def _chain_of(self, view: RequestView) -> ChunkChain:
        return ChunkChain(
            self._namespace,
            self._shape.chunk_tokens,
            view.root_extra,
            len(self._shape.groups),
            self._epoch,
        )

    def _awaits_push(self, record: RequestRecord, floor: int, now: float) -> bool:
        """Whether a request need not be looked at, because its destination may be said in a moment,
        or there is no room yet for what it would hold of a push, here or on the way to another
        engine."""
        source, target = self._source, self._target
        if source is None or target is None or record.view.push is None:
            return False
        return source.waits(record, now, floor) or target.waits(record, step=self._step)

    def _with_push(self, record: RequestRecord, floor: int, hit: Hit) -> Hit:
        """A hit and what a prefill engine will push behind it."""
        if self._target is None:
            return hit
        start = floor + hit.tokens
        offer = self._target.weigh(record, floor, start, step=self._step, now=self._clock.now)
        if offer.ask_again:
            return ASK_AGAIN
        if not offer.end:
            record.story.unpushed = offer.reason
            return hit
        record.story.pushed = offer.end - start
        record.story.mode = LoadMode.PARKED
        return Hit(offer.end - floor, LoadMode.PARKED)

    def admitted(self, request_id: str, loaded: int) -> None:
        """The engine has given a request its blocks and will have ``loaded`` tokens loaded.

        Called after :meth:`lookup`, in the same scheduling pass; a call with 0 that follows the
        end of a parked load, or is for a request that was never looked up, changes nothing.
        """
        record = self._requests.get(request_id)
        if record is None or record.admitted:
            return
        record.admitted = record.fresh = True
        self._active.add(request_id)
        self._fetching.forget(request_id)
        story = record.story
        if self._on_decision is not None and record.decision is not None:
            self._on_decision(record.decision)
        now = self._clock.tick()
        if loaded == 0:
            story.pushed = 0  # the engine has taken somebody else's offer
        if self._source is not None:
            self._source.admitted(record, story.engine + loaded, now)
        if self._target is not None and record.view.push is not None and not story.pushed:
            self._target.decline(record, story.unpushed or "not_needed")
        if not record.losses:  # one that comes back finds what it had computed itself
            self._hits.reuse(record, story.engine + (story.loaded if loaded else 0))
        if loaded == 0:
            if story.host + story.disk:
                reason = story.reason if story.reason != "hit" else "declined_by_engine"
                self._meter.count("loads_skipped", 1, reason=reason)
                story.reason = reason
            story.loaded = 0
            stories.debug("%s", story.line(request_id))
            return
        assert loaded == record.offered, "what was offered is taken whole or not at all"
        if story.pushed:
            assert self._target is not None
            start, end = story.engine + loaded - story.pushed, story.engine + loaded
            self._target.order(record, story.engine, start, end, step=self._step)
        if story.loaded:
            self._loading.order(record, step=self._step, now=now, partial=story.pushed > 0)
            if (place := self._loading.to_measure(record, now)) is not None:
                self._fetching.ask(request_id, place)

    def preempted(self, request_id: str) -> None:
        """The engine has taken a request's blocks away, and says so before it looks it up again."""
        if (record := self._requests.get(request_id)) is not None:
            self._prompts.interrupted(record)

    def hit_sources(self, request_id: str) -> dict[TierName, int]:
        """Tokens of the request's load by the tier they come from."""
        return dict(self._requests[request_id].story.taken)

    # -- the step --------------------------------------------------------------------------

    def plan_step(
        self,
        progress: Iterable[tuple[str, int, int]],
        *,
        forward: bool,
        states: Iterable[BoundaryState] = (),
    ) -> StepPlan:
        """The plan of the step that the engine has just scheduled.

        Args:
            progress: for each request that runs in the step, how many tokens of it are computed
                before it and when it is over, draft tokens included.
            forward: whether the step runs the model.
            states: recurrent states that blocks hold when the step is over.
        """
        now = self._clock.tick()
        chunk = self._shape.chunk_tokens
        self._catalog.bring_up_to_date()
        # First, because a hit needs one, and it is gone with the step.
        self._saving.order_postponed(step=self._step, now=now)
        if self._shape.recurrent:
            progress = tuple(progress)
            for request_id, start, computed in progress:
                if (record := self._requests.get(request_id)) is not None:
                    record.computes(start, computed)
        for state in states:
            record = self._requests.get(state.request_id)
            if record is not None:
                if self._saves:
                    self._saving.consider_state(
                        record, state.group, state.block, state.end, step=self._step, now=now
                    )
                if self._source is not None:
                    self._source.state(record, state)
        for request_id, start, computed in progress:
            record = self._requests.get(request_id)
            if record is None:
                continue
            if not record.counted:
                self._prompts.runs(record, start, computed)
            if self._source is not None:
                self._source.progress(record, start, computed)
            if self._shape.rings and self._saves:
                self._saving.consider_rings(record, start, computed, step=self._step, now=now)
            if record.fresh or record.prefill is not None:
                self._time_prefill(record, start, now)
            # Most requests of most steps have completed no chunk.
            if self._saves and computed >= (record.next_save + 1) * chunk:
                self._saving.consider(
                    record, computed, record.view.blocks, step=self._step, now=now
                )
        writes = self._saving.order_writes(step=self._step, now=now)
        fetches = self._fetching.order(step=self._step, now=now)
        push = self._plan_push(now)
        outstanding = len(self._transfers) > 0 or self._push_pending
        plan = StepPlan(
            step=self._step,
            loads=tuple(self._loading.orders),
            saves=tuple(self._saving.orders),
            writes=writes,
            fetches=fetches,
            drop_disk=tuple(self._catalog.forgotten),
            push=push,
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

    def _time_prefill(self, record: RequestRecord, start: int, now: float) -> None:
        """A request runs: its prompt begins to be computed, or has been if a token is known that
        was sampled behind it."""
        if record.fresh:
            record.fresh = False
            # While rows are loaded the model may wait for them.
            loading = record.story.loaded > 0 and record.story.mode is LoadMode.LAYERWISE
            loading |= record.load is not None  # it was released early
            record.prefill = None if loading else (start, now)
        elif record.view.num_tokens > record.view.num_prompt_tokens:
            self._end_prefill(record, now)

    def _end_prefill(self, record: RequestRecord, now: float) -> None:
        if record.prefill is not None:
            (start, began), record.prefill = record.prefill, None
            self._cost.computed(start, record.view.num_prompt_tokens, now - began)

    @property
    def costs(self) -> Costs:
        """What was measured so far."""
        return self._cost.costs

    def _plan_push(self, now: float) -> PushPlan:
        source, target = self._source, self._target
        if source is None or target is None:
            return NO_PUSH
        target.tick(now)
        source.plan(step=self._step, now=now)
        plan = PushPlan(
            peers=tuple(source.peers),
            gone=tuple(source.gone),
            stops=tuple(source.stops),
            orders=tuple(source.orders),
            receives=tuple(target.orders),
            senders=tuple(target.senders),
            give_ups=tuple(target.give_ups),
        )
        if plan.is_empty:
            return NO_PUSH
        for orders in (
            source.peers,
            source.gone,
            source.stops,
            source.orders,
            target.orders,
            target.senders,
            target.give_ups,
        ):
            orders.clear()
        return plan

    def take_news(self, news: Sequence[News]) -> None:
        """Take in what other engines have to say."""
        if news and self._source is not None and self._target is not None:
            now = self._clock.tick()
            self._source.receive(news, now)
            self._target.receive(news, now)

    def end_pushes(self, *, at_once: bool) -> None:
        """The engine ends.

        Args:
            at_once: whether nothing more will be sent; else what is under way still is.
        """
        if self._source is not None:
            self._source.end(at_once=at_once)

    def drain_letters(self) -> list[Letter]:
        """Messages for other engines since the last call."""
        if self._source is None or self._target is None:
            return []
        letters = self._source.letters + self._target.letters
        self._source.letters.clear()
        self._target.letters.clear()
        return letters

    def drain_unwanted(self) -> list[str]:
        """Requests since the last call whose prompts another engine computes itself: nobody will
        look at what comes of them here."""
        if self._source is None:
            return []
        unwanted, self._source.unwanted = self._source.unwanted, []
        return unwanted

    def finished(
        self,
        request_id: str,
        computed: int,
        blocks: Sequence[Sequence[int]],
        *,
        push: PushParameters | None = None,
    ) -> None:
        """A request has ended; its blocks are freed after this call.

        Args:
            request_id: the request.
            computed: tokens of it that are computed once every step in flight has run.
            blocks: per group, its block ids in token order.
            push: the push that it is part of.
        """
        record = self._requests.get(request_id)
        if push is not None and self._source is not None:
            self._source.abandoned(push, request_id)
        if self._target is not None:
            self._target.abandoned(request_id)
        if record is None:
            return
        self._prompts.ended(record, computed)
        self._fetching.forget(request_id)
        self._active.discard(request_id)
        self._shared.end(record.load, self._clock.now, well=False)
        if computed >= record.view.num_prompt_tokens:
            self._end_prefill(record, self._clock.tick())
        # Chunks are published first to last; without this the beginning would go first.
        self._catalog.note_use(record.chain.groups)
        self._saving.order_postponed(
            step=self._step, now=self._clock.now, ended=record, computed=computed
        )
        if self._source is not None:
            self._source.finished(record, computed, blocks)
        if self._target is not None and record.receive is not None:
            self._target.give_up(record.receive, CANCELLED)
        parked = record.moving and record.story.mode is LoadMode.PARKED
        if record.admitted and self._saves and not parked:
            left = self._saving.consider(
                record, computed, lambda group: blocks[group], step=self._step, now=self._clock.now
            )
            if left:
                self._meter.count("saves_dropped", left)
        if record.moving:
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

    def receive(self, receipts: Iterable[Receipt]) -> list[LoadEnd]:
        """Take in what the ranks report after a step.

        Returns:
            Loads that have ended on every rank and are the last of their requests, ended ones among
            them. An engine whose scheduler counts ranks itself has no need of it.
        """
        ends: list[LoadEnd] = []
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
                ends += self._settle_load(transfer)
                if transfer.computed_on:
                    waits[transfer.step] = max(transfer.waited, waits.get(transfer.step, 0.0))
            elif transfer.kind is Kind.WRITE:
                self._saving.settle_write(transfer)
            elif transfer.kind is Kind.FETCH:
                self._fetching.settle(transfer)
                self._loading.fetched(transfer, self._clock.now)
            elif transfer.kind is Kind.PUSH:
                assert self._source is not None
                self._source.settle(transfer)
            elif transfer.kind is Kind.RECEIVE:
                self._settle_receive(transfer)
        for waited in waits.values():
            self._meter.observe("wait_seconds", waited)
        self._saving.settle((t for t in settled if t.kind is Kind.SAVE), step=self._step)
        return ends

    def distrust(self, step: int = 0) -> None:
        """A load has failed in the engine's own eyes: nothing that was saved in ``step`` or later
        and is not visible yet may become visible, and everything is considered for saving anew.
        """
        self._saving.poison_saves_since(step)
        if self._source is not None:
            self._source.distrust(step)
        for record in self._requests.values():
            record.next_save = 0

    def _settle_load(self, transfer: Transfer) -> list[LoadEnd]:
        record = self._requests.get(transfer.request_id)
        end = self._loading.settle(transfer, record, self._clock.now)
        if transfer.state is State.FAILED and transfer.computed_on:
            self.distrust(transfer.step)
        self._forget_if_over(transfer, record)
        return [] if end is None else [end]

    def _settle_receive(self, transfer: Transfer) -> None:
        assert self._target is not None
        record = self._requests.get(transfer.request_id)
        self._target.settle(transfer, record)
        if record is not None:
            stories.info("%s", record.story.line(transfer.request_id))
        self._forget_if_over(transfer, record)

    def _forget_if_over(self, transfer: Transfer, record: RequestRecord | None) -> None:
        if record is not None and record.ended and not record.moving:
            del self._requests[transfer.request_id]

    # -- the whole ---------------------------------------------------------------------------

    @property
    def epoch(self) -> Epoch:
        """Which weights compute now."""
        return self._epoch

    @property
    def leaving(self) -> list[str]:
        """Requests that have ended, and to whose blocks something is still on its way."""
        return [name for name, record in self._requests.items() if record.ended]

    def reset(self) -> None:
        """The engine's cache is void, because its weights are others now, or may be: an epoch of
        weights without a name begins."""
        self._resets += 1
        self.begin(Epoch(run=f"{self._incarnation} {self._resets}"))

    def begin(self, epoch: Epoch) -> None:
        """Other weights compute from now on. Chunks of the old ones are kept, and found again in
        their epoch only; a save that has not ended will not become visible in any."""
        self._epoch = epoch
        self._saving.poison_saves_since(0)
        for record in self._requests.values():
            record.hit = FoundPrefix()
        self.bar(self._requests)

    def bar(self, requests: Iterable[str]) -> None:
        """Weights of these requests are others now, or may be. What those of them that have blocks
        hold was computed by several: it is neither saved nor pushed, until they get other blocks.
        Their saves that have not ended will not become visible.

        Args:
            requests: ids; those that are not known, or have no blocks, stay as they are.
        """
        barred = set()
        for request_id in requests:
            record = self._requests.get(request_id)
            if record is None or not record.admitted:
                continue
            barred.add(request_id)
            record.barred = True
            if self._source is not None:
                self._source.bar(record)
        self._saving.poison_saves_of(barred)

    @property
    def has_work(self) -> bool:
        """Whether the engine must keep stepping so that orders go out and receipts come in."""
        return (
            bool(self._loading.orders or self._saving.orders or self._catalog.forgotten)
            or self._fetching.has_orders
            or self._saving.may_write
            or self._transfers.pending
            or self._push_pending
        )

    @property
    def _push_pending(self) -> bool:
        """Whether a push waits for something that no receipt will say."""
        return (self._source is not None and self._source.pending) or (
            self._target is not None and self._target.pending
        )

    @property
    def leased_blocks(self) -> int:
        """Engine blocks that are held, each as often as it is."""
        return self._leases.leased_blocks

    @property
    def push_wait(self) -> float:
        """Seconds after which a step changes something of a push although nobody has said
        anything; infinite if none does."""
        if self._source is None or self._target is None:
            return inf
        # What is longer than a step counts as less, see the clock.
        wait = min(self._source.due, self._target.due) - self._clock.now
        return wait if wait == inf else max(0.0, min(wait, self._clock.longest))

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
        if self._source is not None and self._target is not None:
            self._source.gauges()
            self._target.gauges()
        self._meter.gauge("leased_blocks", self._leases.leased_blocks)
