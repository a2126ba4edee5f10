"""What comes back into the engine: whether a hit is loaded, how much of it, and how."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

from lamina.config import Config
from lamina.control.breakers import Breakers
from lamina.control.catalog import Catalog, Location
from lamina.control.cost import CostModel
from lamina.control.decisions import DecisionRecord, PolicySettings
from lamina.control.hits import HitFinder
from lamina.control.leases import LeaseBook
from lamina.control.policy import HitPart, LoadPolicy, Situation
from lamina.control.requests import ChunkShape, FoundChunk, RequestRecord, Story
from lamina.control.sharing import SharedLoads
from lamina.control.slow_tiers import SlowTiers
from lamina.control.transfers import Kind, State, Transfer, TransferTable
from lamina.geometry import GroupKind
from lamina.observe.metrics import Meter
from lamina.plan import ChunkLoad, LoadMode, LoadOrder, TierName, TransferId

stories = logging.getLogger("lamina.requests")

TRY_DEADLINE = 0.1
"""Share of ``load.deadline`` that a load has which tries a tier that is out of use."""


@dataclass(frozen=True, slots=True)
class Hit:
    """The answer to a lookup.

    Attributes:
        tokens: tokens beyond the engine's own hit that will be loaded.
        mode: how.
        ask_again: whether the request should not begin yet, because another's load brings what it
            needs: it is looked up again in the next step. Then ``tokens`` is 0.
    """

    tokens: int
    mode: LoadMode
    ask_again: bool = False


ASK_AGAIN = Hit(0, LoadMode.PARKED, ask_again=True)


@dataclass(frozen=True, slots=True)
class LoadEnd:
    """A load has ended on every rank, in the epoch that its request is in.

    Attributes:
        request_id: whose it was.
        failed: whether not all of it has come.
    """

    request_id: str
    failed: bool


class LoadPlanner:
    """Plans loads of what is hit, and settles them. A part of the planner.

    Args:
        config: the whole tree.
        shape: tokens of blocks and chunks.
        catalog: where chunks are.
        hits: finds what is kept of a request.
        shared: loads that several requests wait for.
        transfers: all transfers of the engine.
        leases: holds on engine blocks.
        breakers: which tiers are in use.
        meter: where figures go.
        chunk_bytes: bytes of one chunk, all ranks.
        reports_blocks: whether the engine can take back single blocks of a failed load.
        cost: what loads and computing take; measured here for loads.
        leases_loads: whether blocks that are loaded into are always leased, because the engine
            itself does not keep them until the load has ended, whatever becomes of the request.
            Such an engine resumes a request when its load has ended, and not sooner.
        step_tokens: tokens that the engine computes in one step at most; 0 if there is no bound.

    Attributes:
        orders: loads for the next plan.
    """

    def __init__(
        self,
        config: Config,
        shape: ChunkShape,
        catalog: Catalog,
        hits: HitFinder,
        shared: SharedLoads,
        transfers: TransferTable,
        leases: LeaseBook,
        breakers: Breakers,
        meter: Meter,
        *,
        chunk_bytes: int,
        reports_blocks: bool,
        cost: CostModel,
        leases_loads: bool = False,
        step_tokens: int = 0,
    ) -> None:
        self.orders: list[LoadOrder] = []
        self._cost = cost
        self._queued = dict.fromkeys(TierName, 0)
        self._ahead: dict[TransferId, int] = {}
        self._slow = SlowTiers()
        self._deadline = config.load.deadline
        self._shape = shape
        self._catalog = catalog
        self._hits = hits
        self._shared = shared
        self._transfers = transfers
        self._leases = leases
        self._leases_loads = leases_loads
        self._step_tokens = step_tokens
        # Who asks for loads between steps wants nothing of them in the step.
        # Engines copy a recurrent state before the forward, so that it must be there then.
        self._early = config.load.mode == "auto" and not (leases_loads or shape.recurrent)
        self._breakers = breakers
        self._meter = meter
        self._chunk_bytes = chunk_bytes
        self._reports_blocks = reports_blocks
        self._settings = PolicySettings.of(config.load, shape.chunk_tokens)
        self._policy = LoadPolicy(config.load, shape.chunk_tokens)

    # -- hits --------------------------------------------------------------------------------

    def lookup(
        self,
        record: RequestRecord,
        floor: int,
        *,
        declined: str,
        others_active: bool,
        now: float,
    ) -> Hit:
        """What will be loaded for a request beyond ``floor``; writes its story anew.

        Args:
            record: the request.
            floor: tokens at its beginning that the engine has.
            declined: why nothing may be loaded for it; empty if it may.
            others_active: whether the engine has other requests to run.
            now: control's clock.
        """
        found = self._hits.find(record, floor)
        by_tier = _split(found.parts, found.tokens)
        tiers = {part.tier for part in found.parts}
        situation = Situation(
            hit_tokens=found.tokens,
            fallible=TierName.DISK in tiers,
            others_active=others_active,
            reports_blocks=self._reports_blocks,
            trying=any(not self._breakers.loads(tier).closed for tier in tiers),
            out_of_use=not found.tokens and self._hits.is_out_of_use(record, found),
            floor=floor,
            prompt=record.view.num_tokens,
            parts=found.parts,
            divisible=not self._shape.sparse,
            queued=tuple((tier, size) for tier, size in self._queued.items() if size),
            chunk_tokens=self._shape.chunk_tokens,
            step_tokens=self._step_tokens,
            retries=self._slow.due(now),
        )
        declined = declined or record.distrust
        decision = self._policy.decide(situation, self._cost.costs, declined)
        record.decision = DecisionRecord(
            record.view.request_id,
            self._settings,
            situation,
            self._cost.costs,
            declined,
            decision,
        )
        taken = _split(found.parts, decision.tokens)
        if decision.reason in {"slower_than_computing", "hit_in_part"}:
            self._slow.decline(tiers - taken.keys(), now)
        record.patience = decision.patience
        record.story = Story(
            prompt=record.view.num_tokens,
            engine=floor,
            host=by_tier.get(TierName.HOST, 0),
            disk=by_tier.get(TierName.DISK, 0),
            loaded=decision.tokens,
            mode=decision.mode,
            reason=decision.reason,
            predicted_load=decision.load,
            predicted_compute=decision.compute,
            taken=taken,
        )
        return Hit(decision.tokens, decision.mode)

    # -- loads -------------------------------------------------------------------------------

    def order(self, record: RequestRecord, *, step: int, now: float, partial: bool = False) -> None:
        """Load what the last lookup found into the request's blocks.

        Args:
            record: the request.
            step: the step whose plan will carry the order.
            now: control's clock.
            partial: whether the request goes on from further ahead than the hit, so that the hit's
                windows and states are of no use.
        """
        end = record.hit.floor + record.story.loaded
        chunks = self._hits.chunks(record.known_keys(), record.hit.floor, end)
        if partial:
            chunks = tuple(chunk for chunk in chunks if chunk.group in self._shape.full)
        places = tuple(chunk.place for chunk in chunks)
        loads = [load for chunk in chunks for load in self._loads_of(record, chunk, end)]
        for place in places:
            self._catalog.tiers[place.tier].lease(place.slot)
            if place.tier is TierName.DISK:
                record.promote.add(place.key)
        tries = self._breakers.order(Kind.LOAD, _tiers(places))
        deadline = self._deadline * TRY_DEADLINE if tries else self._deadline
        deadline = min(deadline, record.patience)
        # Who has waited for another's load is not late by a second deadline.
        deadline = max(deadline - record.wait.seconds, deadline * TRY_DEADLINE)
        layerwise = record.story.mode is LoadMode.LAYERWISE
        # Where a load cannot be taken back that runs in the step, it is only late.
        patience = float(deadline) if self._reports_blocks else inf
        early = self._early and not (layerwise or tries) and _tiers(places) == {TierName.HOST}
        leased = early or self._leases_loads
        transfer = self._transfers.open(
            Kind.LOAD,
            record.view.request_id,
            step=step,
            expires=now + 2 * deadline,
            size=-(-record.story.loaded // self._shape.chunk_tokens) * self._chunk_bytes,
            chunks=places,
            layerwise=layerwise,
            early=early,
            lease=self._leases.take(_targets(loads)) if leased else None,
            tries=tries,
        )
        record.load = transfer.id
        if not partial:  # else it is not whole before the push is
            parked = not layerwise
            self._shared.begin(transfer.id, record, record.hit.floor, end, parked=parked)
        self._begin(transfer, record, now)
        self.orders.append(
            LoadOrder(
                transfer.id,
                transfer.request_id,
                record.story.mode,
                tuple(loads),
                patience if layerwise else float(deadline),
                patience if early else None,
            )
        )

    def _loads_of(self, record: RequestRecord, chunk: FoundChunk, end: int) -> Iterator[ChunkLoad]:
        """Orders that bring a chunk of a hit of ``end`` tokens to where its request has blocks."""
        place, group = chunk.place, chunk.group
        shape = self._shape.groups[group]
        if shape.kind is GroupKind.STATE:
            for block in record.view.state_blocks(group, end):
                yield ChunkLoad(place.key, place.tier, place.slot, 0, (block,), group)
            return
        size, table = shape.block_tokens, record.view.blocks(group)
        blocks = list(table[chunk.start // size : chunk.end // size])
        # What has fallen out of a window, or never was in it, has no block.
        absent = blocks.count(self._shape.null_block)
        if absent < len(blocks):
            first = chunk.start % self._shape.chunk_tokens // size + absent
            yield ChunkLoad(place.key, place.tier, place.slot, first, tuple(blocks[absent:]), group)

    def _begin(self, transfer: Transfer, record: RequestRecord, now: float) -> None:
        for tier in transfer.tiers:
            if record.story.reason == "hit_to_measure":
                self._slow.measure(tier, now)
            else:
                self._slow.trust(tier)
        self._ahead[transfer.id] = sum(self._queued[tier] for tier in transfer.tiers)
        for place in transfer.chunks:
            self._queued[place.tier] += self._chunk_bytes

    def _measure(self, transfer: Transfer) -> None:
        """Learn from a load that has ended."""
        ahead = self._ahead.pop(transfer.id)
        for place in transfer.chunks:
            self._queued[place.tier] -= self._chunk_bytes
        late = transfer.state is State.FAILED and transfer.reason == "deadline"
        if len(transfer.tiers) != 1 or not (late or transfer.state is State.DONE):
            return
        (tier,) = transfer.tiers
        self._cost.worked(tier, transfer.moved_bytes, transfer.busy)
        moved = transfer.moved_bytes + ahead
        if late:
            self._cost.given_up(tier, transfer.size + ahead, moved, transfer.active)
        else:
            self._cost.loaded(tier, moved, transfer.active)

    def to_measure(self, record: RequestRecord, now: float) -> Location | None:
        """A chunk of the disk to be fetched because a hit was cut where the disk begins, long
        enough after that was last found right; None if there is none. A load would bring host and
        disk together, and not say how long either took."""
        cut = record.story.reason == "hit_in_part" and TierName.DISK not in record.story.taken
        if not cut or TierName.DISK not in self._slow.due(now):
            return None
        hit = record.hit
        found = self._hits.chunks(record.known_keys(), hit.floor, hit.floor + hit.tokens)
        places = (chunk.place for chunk in found)
        return next((place for place in places if place.tier is TierName.DISK), None)

    def fetched(self, transfer: Transfer, now: float) -> None:
        """A chunk has come to the host from a tier, or has not: if that was too slow to load from,
        this is how slow it is now."""
        tier = transfer.chunks[0].tier
        if tier in self._slow:
            if tier in self._slow.due(now):
                self._slow.measure(tier, now)
            if transfer.state is State.DONE:  # of as many bytes as a load of it would have
                self._cost.measured_again(tier, self._chunk_bytes, transfer.seconds)

    def settle(
        self, transfer: Transfer, record: RequestRecord | None, now: float
    ) -> LoadEnd | None:
        """Take in a load that has ended.

        Args:
            transfer: the load.
            record: its request, if the engine still has it.
            now: control's clock.

        Returns:
            What its request is to know; None if it is not that load that it waits for.
        """
        self._transfers.close(transfer)
        self._measure(transfer)
        for place in transfer.chunks:
            self._catalog.tiers[place.tier].release(place.slot)
        failed = transfer.state is State.FAILED
        self._shared.end(transfer.id, now, well=not failed)
        self._meter.count("load_bytes", transfer.moved_bytes)
        self._meter.observe("load_seconds", transfer.seconds)
        if failed:
            self._meter.count("failures", 1, kind=f"load_{transfer.reason or 'unknown'}")
        self._catalog.drop_bad(transfer.chunks, transfer.bad_chunks)
        if record is None or record.load != transfer.id:
            return None
        record.load = None
        story = record.story
        story.seconds, story.waited, story.failed = transfer.seconds, transfer.waited, failed
        if failed:
            story.reason = transfer.reason
            record.next_save = 0
            # What was not delivered may still be in its tier: do not ask for it for ever.
            record.distrust = "failed_before"
        stories.info("%s", story.line(transfer.request_id))
        return LoadEnd(transfer.request_id, failed)


def _split(parts: Sequence[HitPart], tokens: int) -> dict[TierName, int]:
    """The first ``tokens`` of a hit by the tier that they are in."""
    split: dict[TierName, int] = {}
    for part in parts:
        taken = min(part.tokens, tokens)
        if taken:
            split[part.tier] = split.get(part.tier, 0) + taken
        tokens -= taken
    return split


def _targets(loads: Iterable[ChunkLoad]) -> tuple[int, ...]:
    """Engine blocks that are written. A request that was resumed early may lose them before they
    are."""
    return tuple(block for load in loads for block in load.blocks)


def _tiers(places: tuple[Location, ...]) -> set[TierName]:
    return {place.tier for place in places}
