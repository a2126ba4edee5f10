"""The scheduler's side of Lamina: what is hit, what is loaded, what is saved, what is evicted.

The planner is called by an engine adapter, from one thread, and never touches bytes. It answers
lookups, turns allocations and progress into a :class:`~lamina_kv.plan.StepPlan`, and learns from
receipts what became of it. Its parts do the work; each is asked in turn, and hands back its orders.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lamina_kv.config import Config
from lamina_kv.control.books import Books, EngineClock
from lamina_kv.control.breakers import Breakers
from lamina_kv.control.catalog import open_catalog
from lamina_kv.control.cost import Costs
from lamina_kv.control.hits import HitFinder
from lamina_kv.control.leases import BlockPool, LeaseBook
from lamina_kv.control.loading import LoadEnd, LoadPlanner, stories
from lamina_kv.control.moving import MovePlanner
from lamina_kv.control.offers import ASK_AGAIN, Delivery, Offer, Unloaded
from lamina_kv.control.prefills import PrefillTimer
from lamina_kv.control.push.open_prompts import RanksChannel
from lamina_kv.control.push.pushes import Pushes
from lamina_kv.control.reporting.figures import begin as begin_figures
from lamina_kv.control.reporting.misses import Misses
from lamina_kv.control.reporting.prompts import PromptMeter
from lamina_kv.control.reporting.residency import Describe, Residency
from lamina_kv.control.reporting.spans import TransferSpans
from lamina_kv.control.reporting.summary import closing
from lamina_kv.control.requests import (
    BoundaryState,
    Hit,
    PushParameters,
    RequestRecord,
    RequestView,
)
from lamina_kv.control.saving import SavePlanner
from lamina_kv.control.second_uses import SecondUses
from lamina_kv.control.shape import ChunkShape
from lamina_kv.control.sharing import SharedLoads, Sharing
from lamina_kv.control.transfers import Kind, State, Transfer, TransferTable
from lamina_kv.keys import CHECKPOINT, ChunkChain, Epoch
from lamina_kv.observe.metrics import Meter
from lamina_kv.observe.traces import ServedRequest
from lamina_kv.plan import (
    NEAR,
    NO_PUSH,
    PUSHED,
    ChunkKey,
    LoadMode,
    NearSlots,
    RankReport,
    Receipt,
    StepPlan,
    TierName,
)
from lamina_kv.push.cards import EngineCard

if TYPE_CHECKING:
    from lamina_kv.observe.spans import Span, Spans

log = logging.getLogger("lamina_kv.control")


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
        leases_loads: whether blocks that are loaded into are leased until the load has ended, for
            an engine that does not keep them itself.
        recomputes: whether the engine computes what a load has not brought, and does not end its
            request instead.
        loads: whether anything is loaded from a tier.
        saves: whether anything is saved to one.
        incarnation: a word that no other run of any engine has; the same on every rank that has
            a planner.
        channel: a way to the ranks beside plans, for pushes; None if there is none.
        on_end: called with every request that had blocks and has ended. Must not wait.
        describe: what the engine calls a chunk, if somebody listens to what tiers hold.
        spans: is told what is done for each request; None if nobody traces.
        clock: monotonic seconds.

    Attributes:
        costs: what was measured so far.
        residency: what tiers hold, as it changes; None if nobody listens.
        pushes: what goes to other engines and comes from them; None if the engine takes no part.

    Raises:
        ValueError: if ``reports`` is empty, or near is smaller than one chunk.
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
        leases_loads: bool = False,
        recomputes: bool = True,
        loads: bool = True,
        saves: bool = True,
        incarnation: str = "",
        channel: RanksChannel | None = None,
        on_end: Callable[[ServedRequest], None] | None = None,
        describe: Describe | None = None,
        spans: Spans | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not reports:
            raise ValueError("no rank has reported its tiers")
        self._shape = shape
        self._namespace = namespace
        self._epoch = CHECKPOINT
        self._incarnation = incarnation or uuid.uuid4().hex
        self._resets = 0
        self._loads = loads
        self._saves = saves
        self._on_end = on_end
        self._spans = spans
        self._clock = clock
        breakers = Breakers(config.breaker, clock, [TierName(tier.name) for tier in config.tiers])
        keeping = [report for report in reports if not report.follows]
        engine_clock = EngineClock(clock, config.load.deadline / 2)
        self._misses = Misses(shape.chunk_tokens, clock)
        self._meter = meter
        self._books = books = Books(
            config=config,
            shape=shape,
            catalog=open_catalog(
                reports,
                config.tiers,
                breakers.readable,
                engine_clock.ticked,
                self._evicted,
            ),
            transfers=TransferTable(len(reports), None if spans is None else TransferSpans(spans)),
            leases=LeaseBook(pool),
            breakers=breakers,
            meter=meter,
            clock=engine_clock,
            kept_bytes=sum(report.chunk_bytes for report in keeping),
            moved_bytes=sum(report.chunk_bytes for report in reports),
            keeping=len(keeping),
        )
        self.residency = None if describe is None else Residency(books.catalog, describe)
        self._near_slots = {
            report.rank: report.near or NearSlots(report.near_slots, report.near_slots)
            for report in reports
        }
        self.costs = Costs(lambda: engine_clock.now, least=shape.chunk_tokens)
        self._prefills = PrefillTimer(self.costs, engine_clock)
        self._prompts = PromptMeter(meter, shape.chunk_tokens, self.costs)
        self._hits = HitFinder(shape, books.catalog, breakers, books.moved_bytes)
        self._shared = SharedLoads(shape, config.load.deadline)
        self._moves = MovePlanner(books, self._hits, self.costs)
        self._loading = LoadPlanner(
            books,
            self._hits,
            self._moves,
            self._shared,
            self.costs,
            leases_loads=leases_loads,
            recomputes=recomputes,
        )
        self._second_uses = SecondUses(books.shape, books.catalog.near, self._moves.sharing)
        self._saving = SavePlanner(books, self._moves.saved, self._second_uses.add)
        self.pushes: Pushes | None = None
        if config.push is not None and card is not None:
            self.pushes = Pushes(config.push, books, card, self.costs, channel=channel)
        begin_figures(
            meter,
            config,
            books.catalog,
            shape.chunk_tokens,
            loads=loads,
            saves=saves,
            pushes=self.pushes is not None,
        )
        self._requests: dict[str, RequestRecord] = {}
        self._active: set[str] = set()  # admitted and not ended
        self._queued = 0

    # -- lookup and admission ------------------------------------------------------------

    def arrived(self, view: RequestView, *, loads: bool = True) -> None:
        """A request waits for its blocks: what it will load may come near meanwhile, and what
        another engine computes for it is to be kept there.

        Args:
            view: the request.
            loads: whether anything may be loaded for it.
        """
        record = self._record_of(view)
        if loads and self._loads:
            record.known_keys()
            self._moves.expect(record)
        if self.pushes is not None:
            self.pushes.arrived(record, loads=loads)

    def lookup(
        self,
        view: RequestView,
        floor: int,
        *,
        declined: str = "",
        sharing: Sharing = Sharing.NOTHING,
        may_wait: bool = True,
    ) -> Offer:
        """What is brought beyond ``floor`` to a request that has no blocks yet.

        Called again for as long as the request waits.

        Args:
            view: the request.
            floor: tokens at its beginning that the engine already has, on a block boundary.
            declined: why nothing may be brought to it, from a tier or by a push, if so; a word for
                logs and metrics.
            sharing: which loads of others it may be told to wait for.
            may_wait: whether it may be told to wait for what is far.
        """
        record = self._requests.get(view.request_id)
        if (
            record is not None
            and may_wait
            and self._loads
            and not (record.admitted or declined or view.push)
            and self._loading.is_put_off(record)
        ):
            return ASK_AGAIN
        clock = self._books.clock
        if view.push is not None or self._books.catalog.far:
            clock.tick()
        if record is not None and record.admitted and not record.ended:
            self._prompts.interrupted(record)
            self._shared.end(record.load, clock.now, well=False)
            record.lose_blocks()
            self._active.discard(view.request_id)
            record.span = self._begin_lookup(view.request_id)
        record = self._record_of(view)
        pushes = self.pushes if view.push is not None and not declined else None
        if pushes is not None and pushes.waits(record, floor):
            return ASK_AGAIN
        pushed_to = view.push is not None and view.push.prefill is not None
        record.may_hit |= not declined and (self._loads or pushed_to)
        unloaded = declined or ("" if self._loads else Unloaded.ROLE)
        # A request that is pushed to has a destination to announce.
        shares = not (sharing is Sharing.NOTHING or unloaded or pushed_to)
        if shares and self._shared.waits(record, floor, clock.now):
            return ASK_AGAIN
        offer = self._loading.lookup(
            record,
            floor,
            declined=unloaded,
            others_active=bool(self._active),
            may_wait=may_wait,
        )
        if offer.ask_again:
            return offer
        if shares and self._shared.joins(record, floor, sharing, clock.now):
            record.offer = ASK_AGAIN
            return ASK_AGAIN
        if pushes is not None and pushed_to:
            offer = pushes.extend(record, offer)
        record.offer = offer
        return offer

    def _record_of(self, view: RequestView) -> RequestRecord:
        record = self._requests.get(view.request_id)
        if record is None or record.ended:
            if record is not None:
                self._forget(record)
            record = self._requests[view.request_id] = RequestRecord(
                view,
                self._chain_of(view),
                self._clock(),
                follower=None if self.residency is None else self.residency.follow(),
                span=self._begin_lookup(view.request_id),
            )
        elif not record.admitted and (
            record.chain.epoch is not self._epoch or record.view.root_extra != view.root_extra
        ):
            # Weights, or an adapter, were loaded anew while the request waited.
            record.rename(self._chain_of(view))
            self._moves.look_again(record)
            if self.pushes is not None:  # of one that was preempted a part may have been sent
                self.pushes.bar(record)
        record.view = view
        return record

    def _begin_lookup(self, request_id: str) -> Span | None:
        return None if self._spans is None else self._spans.begin("lookup", request_id)

    def _chain_of(self, view: RequestView) -> ChunkChain:
        return ChunkChain(
            self._namespace,
            self._shape.chunk_tokens,
            view.root_extra,
            len(self._shape.groups),
            self._epoch,
        )

    def admitted(self, request_id: str, loaded: int, *, floor: int | None = None) -> None:
        """The engine has given a request its blocks and will have ``loaded`` tokens loaded.

        Called after :meth:`lookup`, in the same scheduling pass; a call with 0 that follows the
        end of a parked load, or is for a request that was never looked up, changes nothing.

        Args:
            request_id: the request.
            loaded: tokens.
            floor: tokens that the engine has of it, if those are not the floor of the lookup:
                what it computes up to that one it has not found.
        """
        record = self._requests.get(request_id)
        if record is None or record.admitted:
            return
        record.admitted = record.fresh = True
        record.quiet_before = 0
        record.delivery = Delivery()
        self._active.add(request_id)
        self._books.clock.tick()
        offer = record.offer
        if loaded == 0 and offer.tokens:  # the engine has taken somebody else's offer
            reason = Unloaded.DECLINED_BY_ENGINE if offer.reason == "hit" else offer.reason
            record.offer = offer = replace(offer, loaded=0, pushed=0, reason=reason)
        assert loaded == offer.tokens, "what was offered is taken whole or not at all"
        if self.pushes is not None:
            self.pushes.admitted(record, offer)
        if not record.losses:  # one that comes back finds what it had computed itself
            found = offer if floor is None else replace(offer, floor=floor)
            self._hits.used(record, found.floor, found.floor + found.loaded)
            if self._saves:
                self._second_uses.found(record, found)
            if record.may_hit:
                self._note_miss(record, offer)
        if offer.pushed:
            assert self.pushes is not None, "it has made the offer"
            self.pushes.order(record)
        if offer.loaded:
            self._loading.order(record, partial=offer.pushed > 0)
        elif offer.parts and not offer.pushed:
            self._books.meter.count("loads_skipped", 1, reason=offer.reason)
        self._moves.forget(request_id)
        if record.span is not None:
            self._end_lookup(record.span, record)
            record.span = None
        if not offer.tokens:
            stories.debug("%s", self._loading.describe(record))

    @staticmethod
    def _end_lookup(span: Span, record: RequestRecord) -> None:
        """It is known what a request is brought."""
        offer = record.offer
        said: dict[str, str | int | float] = {
            "prompt_tokens": offer.prompt,
            "engine_tokens": offer.floor,
            "loaded_tokens": offer.loaded,
            "pushed_tokens": offer.pushed,
            "reason": offer.reason,
        }
        said |= {f"found_tokens.{tier}": tokens for tier, tokens in offer.found.items()}
        if record.miss:
            said["miss"] = record.miss
        if offer.loaded:
            said["mode"] = offer.mode.value
        span.end(said)

    def _evicted(self, tier: TierName, key: ChunkKey, idle: float) -> None:
        self._meter.observe("eviction_age_seconds", idle, tier=tier)
        self._misses.evicted(key)

    def _note_miss(self, record: RequestRecord, offer: Offer) -> None:
        """Find out why a hit is not longer."""
        end = offer.floor + offer.found_tokens + offer.pushed
        miss = self._misses.why(record, self._hits.lacked(record, end))
        record.miss = "" if miss is None else str(miss)
        if miss is not None:
            self._meter.count("misses", 1, reason=miss.reason)

    def preempted(self, request_id: str) -> None:
        """The engine has taken a request's blocks away, and says so before it looks it up again."""
        if (record := self._requests.get(request_id)) is not None:
            self._prompts.interrupted(record)
            if record.begun and not record.admitted:  # else it is looked up as one that had blocks
                record.lose_blocks()

    def hit_sources(self, request_id: str) -> dict[TierName, int]:
        """Tokens that are brought to a request, by the tier that had them, or ``push``."""
        offer = self._requests[request_id].offer
        return {**offer.taken, **({PUSHED: offer.pushed} if offer.pushed else {})}

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
        books = self._books
        clock = books.clock
        clock.tick()
        books.catalog.bring_up_to_date()
        # Before saves: what goes outward is held near, and they would give it up unwritten.
        self._second_uses.offer()
        self._moves.order_writes()
        # First of saves, because a hit needs one, and it is gone with the step.
        self._saving.order_postponed()
        if self._shape.recurrent:
            progress = tuple(progress)
            for request_id, start, computed in progress:
                if (record := self._requests.get(request_id)) is not None:
                    record.computes(start, computed)
        for state in states:
            self._note_state(state)
        self._prefills.planned(self._note_progress(progress))
        tiers = self._moves.step()
        push = NO_PUSH if self.pushes is None else self.pushes.plan()
        outstanding = len(books.transfers) > 0 or self._push_pending
        # Who waits for a near slot that is not there yet waits for a receipt, too.
        outstanding |= books.catalog.near.grows and self._moves.has_work
        plan = StepPlan(
            step=clock.step,
            loads=tuple(self._loading.orders),
            saves=tuple(self._saving.orders),
            tiers=tiers,
            push=push,
            forward=forward,
            outstanding=outstanding,
        )
        clock.step += 1
        self._loading.orders.clear()
        self._saving.orders.clear()
        if outstanding:
            self._mark_overdue()
        return plan

    def _note_state(self, state: BoundaryState) -> None:
        record = self._requests.get(state.request_id)
        if record is not None:
            if self._saves:
                self._saving.consider_state(record, state.group, state.block, state.end)
            if self.pushes is not None:
                self.pushes.state(record, state)

    def _note_progress(self, progress: Iterable[tuple[str, int, int]]) -> int:
        """Requests run in the step; arguments as those of :meth:`plan_step`. Most of them have
        completed no chunk, and nothing is called for these: hundreds run in every step.

        Returns:
            Tokens that the step computes.
        """
        requests, pushes, saving, saves = self._requests, self.pushes, self._saving, self._saves
        tokens, refused, chunk = 0, saving.refuses, self._shape.chunk_tokens
        rings = bool(self._shape.rings) and saves
        may_rest = not rings and pushes is None
        for request_id, start, computed in progress:
            tokens += computed - start
            record = requests.get(request_id)
            if record is None or computed < record.quiet_before:
                continue
            record.begun = True
            if not record.counted:
                self._prompts.runs(record, start, computed)
            if pushes is not None:
                pushes.progress(record, start, computed)
            if rings:
                saving.consider_rings(record, start, computed)
            # No token behind a prefill's last is known before that one is computed.
            if record.fresh or (record.prefill is not None and start >= record.prefill.end):
                self._prefills.runs(record, start)
            first = record.next_save
            if saves and computed >= (max(first, record.held_end) + 1) * chunk:
                if refused and record.held_back == first:
                    continue
                if saving.consider(record, computed, record.view.blocks):
                    continue  # the next plan tries again
            if may_rest and record.counted:
                record.rest(chunk, saves=saves)
        return tokens

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
        self._moves.forget(request_id)
        if record is None:
            if self.pushes is not None:
                self.pushes.finished(request_id, None, computed, blocks, push)
            return
        self._prompts.ended(record, computed)
        if record.span is not None:
            record.span.end({}, "ended without blocks")
            record.span = None
        self._active.discard(request_id)
        self._shared.end(record.load, self._books.clock.now, well=False)
        if record.prefill is not None and computed >= record.prefill.end:
            self._books.clock.tick()
            self._prefills.end(record)
        self._saving.order_postponed(ended=record, computed=computed)
        if self.pushes is not None:
            self.pushes.finished(request_id, record, computed, blocks, push)
        parked = record.moving and record.offer.mode is LoadMode.PARKED
        if record.admitted and self._saves and not parked:
            left = self._saving.consider(record, computed, lambda group: blocks[group])
            if left:
                self._books.meter.count("saves_dropped", left)
        self._hits.over(record)  # what is saved now is no chunk that it misses
        if record.admitted and self._on_end is not None:
            prompt = record.view.num_prompt_tokens
            self._on_end(record.served(self.costs.prefill_seconds(0, prompt) or 0.0))
        if record.moving:
            record.ended = True
        else:
            self._forget(record)

    def _mark_overdue(self) -> None:
        books = self._books
        now = books.clock.now
        late = [t for t in books.transfers.live() if not t.overdue and t.expires <= now]
        books.breakers.judge(late)
        for transfer in late:
            transfer.overdue = True
            word = transfer.kind.value
            tier = PUSHED if transfer.kind in (Kind.PUSH, Kind.RECEIVE) else transfer.tier
            books.meter.count("failures", 1, tier=tier, kind=f"{word}_overdue")
            log.warning("%s %d of step %d is overdue", word, transfer.id, transfer.step)
            if transfer.kind is Kind.SAVE:
                self._saving.overdue(transfer)
            elif transfer.kind is Kind.MOVE_IN:
                self._moves.overdue(transfer)

    # -- receipts ----------------------------------------------------------------------------

    def receive(self, receipts: Iterable[Receipt]) -> list[LoadEnd]:
        """Take in what the ranks report after a step.

        Returns:
            Loads that have ended on every rank and are the last of their requests, ended ones among
            them. An engine whose scheduler counts ranks itself has no need of it.
        """
        books, settled = self._books, []
        books.clock.tick()
        for receipt in receipts:
            self._queued = receipt.queued
            if receipt.near is not None:
                self._note_near(receipt.rank, receipt.near)
            for item in receipt.transfers:
                transfer = books.transfers.get(item.transfer)
                if transfer is None or not transfer.apply(receipt.rank, item):
                    continue
                if transfer.lease is not None:
                    transfer.lease.release()
                settled.append(transfer)
        books.breakers.judge(t for t in settled if not t.overdue)
        ends: list[LoadEnd] = []
        waits: dict[int, float] = {}
        # Loads first: a save of a step whose load has failed is worthless.
        for transfer in sorted(settled, key=lambda t: t.kind is not Kind.LOAD):
            if transfer.kind is Kind.LOAD:
                ends += self._settle_load(transfer)
                if transfer.layerwise:
                    waits[transfer.step] = max(transfer.waited, waits.get(transfer.step, 0.0))
            elif transfer.kind is Kind.SAVE:
                self._saving.settle(transfer)
            elif transfer.kind in (Kind.PUSH, Kind.RECEIVE):
                self._settle_push(transfer)
            else:
                self._moves.settle(transfer)
        for waited in waits.values():
            books.meter.observe("wait_seconds", waited)
        return ends

    def _note_near(self, rank: int, slots: NearSlots) -> None:
        """More near slots of a rank may be used. Chunks need the same slot on every rank."""
        self._near_slots[rank] = slots
        near, ranks = self._books.catalog.near, self._near_slots.values()
        ready, most = min(each.ready for each in ranks), min(each.most for each in ranks)
        near.grow(min(ready, near.capacity), min(most, near.capacity))

    def distrust(self, step: int = 0) -> None:
        """A load has failed in the engine's own eyes: nothing that was saved in ``step`` or later
        and is not visible yet may become visible, and everything is considered for saving anew.
        """
        self._saving.poison_saves_since(step)
        if self.pushes is not None:
            self.pushes.distrust(step)
        for record in self._requests.values():
            record.save_anew()

    def _settle_load(self, transfer: Transfer) -> list[LoadEnd]:
        record = self._requests.get(transfer.request_id)
        end = self._loading.settle(transfer, record)
        if transfer.state is State.FAILED and transfer.layerwise:
            self.distrust(transfer.step)
        self._forget_if_over(record)
        return [] if end is None else [end]

    def _settle_push(self, transfer: Transfer) -> None:
        assert self.pushes is not None, "it has ordered the push"
        if transfer.kind is Kind.PUSH:
            self.pushes.settle(transfer, None)
            return
        record = self._requests.get(transfer.request_id)
        self.pushes.settle(transfer, record)
        if record is not None:
            stories.info("%s", self._loading.describe(record))
        self._forget_if_over(record)

    def _forget_if_over(self, record: RequestRecord | None) -> None:
        if record is not None and record.ended and not record.moving:
            self._forget(record)

    def _forget(self, record: RequestRecord) -> None:
        """A request has ended, and nothing is on its way to it."""
        del self._requests[record.view.request_id]
        if record.follower is not None:
            record.follower.over()

    # -- the whole ---------------------------------------------------------------------------

    def hurry(self) -> None:
        """The engine ends, and steps for as long as there is work: what waits for a tier that is
        out of use is tried once more now. If that fails it is lost."""
        self._moves.hurry()

    @property
    def write_wait(self) -> float:
        """Seconds after which there is work although nobody has asked for anything: a tier that was
        out of use is tried with what waits to be written there. Infinite if there will be none."""
        return self._moves.write_wait

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
        if self.residency is not None:
            self.residency.begin(epoch)
        self._saving.poison_saves_since(0)
        for record in self._requests.values():
            record.hit = Hit()
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
            if record is None or not (record.admitted or record.begun):
                continue
            barred.add(request_id)
            record.barred = True
            if self.pushes is not None:
                self.pushes.bar(record)
        self._saving.poison_saves_of(barred)

    @property
    def has_work(self) -> bool:
        """Whether the engine must keep stepping so that orders go out and receipts come in."""
        # What is ordered, and not yet planned, has a transfer that is pending.
        return (
            self._moves.has_work
            or self._second_uses.pending
            or self._books.transfers.pending
            or self._push_pending
            or (self.residency is not None and self.residency.behind)
        )

    @property
    def _push_pending(self) -> bool:
        return self.pushes is not None and self.pushes.pending

    @property
    def leased_blocks(self) -> int:
        """Engine blocks that are held, each as often as it is."""
        return self._books.leases.leased_blocks

    def closing(self) -> str:
        """One line for the log when the engine ends."""
        far = self._books.catalog.far.values()
        stored = {str(tier.name): tier.index.used for tier in far if tier.index.capacity}
        prompts = self._prompts
        return closing(prompts.sources, prompts.saved, stored=stored, lost=self._moves.backlog)

    def gauges(self) -> None:
        """Write the present state of tiers, leases and queues to the meter."""
        books = self._books
        meter, size = books.meter, books.kept_bytes
        indexes = {NEAR: books.catalog.near} | {
            name: far.index for name, far in books.catalog.far.items()
        }
        for name, index in indexes.items():
            meter.gauge("tier_capacity_bytes", index.capacity * size, tier=name)
            meter.gauge("tier_used_bytes", index.used * size, tier=name)
            meter.gauge("tier_pinned_bytes", index.pinned * size, tier=name)
            books.breakers.gauges(meter, name)
        for kind in Kind:
            in_flight = books.transfers.bytes_in_flight(kind)
            meter.gauge("bytes_in_flight", in_flight, direction=kind.value)
            meter.gauge("transfers", books.transfers.count(kind), direction=kind.value)
        meter.gauge("waiting_requests", self._moves.waiting, cause="fetch")
        meter.gauge("waiting_requests", self._shared.waiting, cause="shared_load")
        meter.gauge("write_backlog", self._moves.backlog)
        meter.gauge("queue_depth", self._queued)
        if self.pushes is not None:
            self.pushes.gauges()
        meter.gauge("leased_blocks", books.leases.leased_blocks)
