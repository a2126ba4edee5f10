"""The scheduler's side of Lamina: what is hit, what is loaded, what is saved, what is evicted.

The planner is called by an engine adapter, from one thread, and never touches bytes. It answers
lookups, turns allocations and progress into a :class:`~lamina.plan.StepPlan`, and learns from
receipts what became of it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lamina.config import Config
from lamina.control.catalog import Catalog, Location, TierCatalog
from lamina.control.leases import BlockPool, LeaseBook
from lamina.control.policy import LoadPolicy, Situation
from lamina.control.requests import FoundPrefix, RequestRecord, RequestView, Story
from lamina.control.transfers import Kind, State, Transfer, TransferTable
from lamina.keys import ChunkChain
from lamina.observe.metrics import Meter
from lamina.plan import (
    ChunkKey,
    ChunkLoad,
    LoadMode,
    LoadOrder,
    RankReport,
    Receipt,
    SaveOrder,
    StepPlan,
    TierName,
    WriteThrough,
)

log = logging.getLogger("lamina.control")
stories = logging.getLogger("lamina.requests")


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """Tokens and blocks of a chunk, all that control needs of the geometry."""

    block_tokens: int
    chunk_tokens: int

    @property
    def blocks(self) -> int:
        """Blocks in one chunk."""
        return self.chunk_tokens // self.block_tokens


@dataclass(frozen=True, slots=True)
class Hit:
    """The answer to a lookup.

    Attributes:
        tokens: tokens beyond the engine's own hit that will be loaded.
        mode: how.
    """

    tokens: int
    mode: LoadMode


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
        self._reports_blocks = reports_blocks
        self._clock = clock
        self._ranks = len(reports)
        self._chunk_bytes = sum(report.chunk_bytes for report in reports)
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
        self._policy = LoadPolicy(config.load, shape.chunk_tokens)
        self._leases = LeaseBook(pool)
        self._transfers = TransferTable(len(reports))
        self._catalog, self._drop_disk = _open_catalog(reports)
        self._requests: dict[str, RequestRecord] = {}
        self._loads: list[LoadOrder] = []
        self._saves: list[SaveOrder] = []
        self._ended_saves: list[Transfer] = []
        self._backlog: deque[ChunkKey] = deque()
        self._step = 0

    # -- lookup and admission ------------------------------------------------------------

    def lookup(self, view: RequestView, floor: int) -> Hit:
        """How many tokens beyond ``floor`` will be loaded for a request that has no blocks yet.

        Free of side effects on tiers and leases; called again for as long as the request waits.

        Args:
            view: the request.
            floor: tokens at its beginning that the engine already has, on a block boundary.
        """
        record = self._requests.get(view.request_id)
        if record is None or record.ended:
            chain = ChunkChain(self._namespace, self._shape.chunk_tokens, view.root_extra)
            record = self._requests[view.request_id] = RequestRecord(view, chain)
        elif record.admitted:
            record.new_epoch()
        record.view = view
        found = self._find_prefix(record, floor)
        tokens = found.tokens
        by_tier = self._tokens_by_tier(found)
        situation = Situation(
            hit_tokens=tokens,
            disk_tokens=by_tier[TierName.DISK],
            remaining_tokens=view.num_tokens - floor - tokens,
            others_active=self._others_active(view.request_id),
            reports_blocks=self._reports_blocks,
        )
        decision = self._policy.decide(situation)
        record.mode = decision.mode
        record.story = Story(
            prompt=view.num_tokens,
            engine=floor,
            host=by_tier[TierName.HOST],
            disk=by_tier[TierName.DISK],
            loaded=decision.tokens,
            mode=decision.mode,
            reason=decision.reason,
        )
        return Hit(decision.tokens, decision.mode)

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
        self._plan_load(record, loaded)

    def hit_sources(self, request_id: str) -> dict[TierName, int]:
        """Tokens of the request's load by the tier they come from."""
        story = self._requests[request_id].story
        sources = {TierName.HOST: story.host, TierName.DISK: story.disk}
        return {tier: tokens for tier, tokens in sources.items() if tokens}

    def _find_prefix(self, record: RequestRecord, floor: int) -> FoundPrefix:
        """The longest visible prefix; what was found before is extended, not sought again."""
        found, generation = record.hit, self._catalog.generation
        block, chunk = self._shape.block_tokens, self._shape.chunk_tokens
        if found.floor != floor or found.generation != generation:
            found = FoundPrefix(floor, generation, floor // chunk)
        keys = record.known_keys()
        end_chunk = self._catalog.prefix_end(keys, found.end_chunk)
        if end_chunk == found.end_chunk:
            record.hit = found
            return found
        usable = max(0, record.view.num_tokens - record.view.recompute_tokens) // block * block
        tokens = max(0, min(end_chunk * chunk, usable) - floor)
        wanted = keys[floor // chunk : -(-(floor + tokens) // chunk)] if tokens else []
        places = tuple(place for key in wanted if (place := self._catalog.locate(key)))
        record.hit = FoundPrefix(floor, generation, end_chunk, tokens, places)
        return record.hit

    def _spans(self, found: FoundPrefix) -> Iterator[tuple[Location, int, int]]:
        """Each chunk of a hit with the first token wanted of it and the one after the last."""
        chunk, end = self._shape.chunk_tokens, found.floor + found.tokens
        position = found.floor
        for place in found.places:
            upto = min((position // chunk + 1) * chunk, end)
            yield place, position, upto
            position = upto

    def _tokens_by_tier(self, found: FoundPrefix) -> dict[TierName, int]:
        split = dict.fromkeys(TierName, 0)
        for place, start, end in self._spans(found):
            split[place.tier] += end - start
        return split

    def _others_active(self, request_id: str) -> bool:
        return any(
            record.admitted and not record.ended
            for name, record in self._requests.items()
            if name != request_id
        )

    def _plan_load(self, record: RequestRecord, tokens: int) -> None:
        shape, block = self._shape, self._shape.block_tokens
        blocks = record.view.blocks()
        chunks = []
        for place, start, end in self._spans(record.hit):
            chunks.append(
                ChunkLoad(
                    key=place.key,
                    tier=place.tier,
                    slot=place.slot,
                    first_block=start % shape.chunk_tokens // block,
                    blocks=tuple(blocks[start // block : end // block]),
                )
            )
            self._catalog.tiers[place.tier].lease(place.slot)
            if place.tier is TierName.DISK:
                record.promote.add(place.key)
        deadline = self._config.load.deadline
        transfer = self._transfers.open(
            Kind.LOAD,
            record.view.request_id,
            step=self._step,
            expires=self._clock() + 2 * deadline,
            size=tokens // block * self._chunk_bytes // shape.blocks,
            chunks=record.hit.places,
            layerwise=record.mode is LoadMode.LAYERWISE,
        )
        record.load = transfer.id
        for tier in self._catalog.tiers.values():
            tier.use([place.key for place in record.hit.places])
        self._loads.append(
            LoadOrder(transfer.id, transfer.request_id, record.mode, tuple(chunks), float(deadline))
        )
        for tier_name, count in self.hit_sources(record.view.request_id).items():
            self._meter.count("hit_tokens", count, tier=tier_name.value)

    # -- the step --------------------------------------------------------------------------

    def plan_step(self, progress: Iterable[tuple[str, int]], *, forward: bool) -> StepPlan:
        """The plan of the step that the engine has just scheduled.

        Args:
            progress: for each request that runs in the step, how many tokens of it are
                computed when the step is over, draft tokens included.
            forward: whether the step runs the model.
        """
        for request_id, computed in progress:
            record = self._requests.get(request_id)
            if record is not None:
                self._plan_saves(record, computed, record.view.blocks)
        writes = self._plan_writes()
        outstanding = len(self._transfers) > 0
        plan = StepPlan(
            step=self._step,
            loads=tuple(self._loads),
            saves=tuple(self._saves),
            writes=writes,
            drop_disk=tuple(self._drop_disk),
            forward=forward,
            outstanding=outstanding,
        )
        self._step += 1
        if plan.loads:
            self._loads = []
        if plan.saves:
            self._saves = []
        if plan.drop_disk:
            self._drop_disk = []
        if outstanding:
            self._mark_overdue()
        return plan

    def finished(self, request_id: str, computed: int, blocks: Sequence[int]) -> None:
        """A request has ended; its blocks are freed after this call.

        Args:
            request_id: the request.
            computed: tokens of it that are computed once every step in flight has run.
            blocks: its block ids, in token order.
        """
        record = self._requests.get(request_id)
        if record is None:
            return
        # Chunks are published first to last; without this the beginning would go first.
        for tier in self._catalog.tiers.values():
            tier.use(record.chain.keys)
        still_loading = record.load is not None
        if record.admitted and not (still_loading and record.mode is LoadMode.PARKED):
            self._plan_saves(record, computed, lambda: blocks)
            left = self._saveable(record, computed) - record.next_save
            if left > 0:
                self._meter.count("saves_dropped", left)
        if still_loading:
            record.ended = True
        else:
            del self._requests[request_id]

    def _saveable(self, record: RequestRecord, computed: int) -> int:
        limit = min(computed, record.view.num_tokens)
        if self._config.save.tokens == "prompt":
            limit = min(limit, record.view.num_prompt_tokens)
        return limit // self._shape.chunk_tokens

    def _plan_saves(
        self, record: RequestRecord, computed: int, blocks_of: Callable[[], Sequence[int]]
    ) -> None:
        end = self._saveable(record, computed)
        if end <= record.next_save:
            return
        keys = record.known_keys()
        per_chunk = self._shape.blocks
        blocks: Sequence[int] = ()
        for index in range(record.next_save, end):
            key = keys[index]
            if self._wanted_on_host(record, key):
                blocks = blocks or blocks_of()
                chunk_blocks = tuple(blocks[index * per_chunk : (index + 1) * per_chunk])
                refusal = self._plan_save(record, key, chunk_blocks)
                if refusal is not None:
                    if record.held_back != index:
                        record.held_back = index
                        self._meter.count("saves_held_back", 1, reason=refusal)
                    return
            record.next_save = index + 1

    def _wanted_on_host(self, record: RequestRecord, key: ChunkKey) -> bool:
        if key in record.promote:
            return not self._catalog.host.holds(key)
        return not self._catalog.holds(key)

    def _plan_save(
        self, record: RequestRecord, key: ChunkKey, blocks: tuple[int, ...]
    ) -> str | None:
        in_flight = self._transfers.bytes_in_flight(Kind.SAVE)
        if in_flight + self._chunk_bytes > self._config.save.max_inflight * self._ranks:
            return "max_inflight"
        slot = self._catalog.host.reserve(key)
        if slot is None:
            return "host_in_use"
        transfer = self._transfers.open(
            Kind.SAVE,
            record.view.request_id,
            step=self._step,
            expires=self._clock() + self._config.load.deadline,
            size=self._chunk_bytes,
            chunks=(Location(key, TierName.HOST, slot),),
            lease=self._leases.take(blocks),
        )
        self._saves.append(SaveOrder(transfer.id, transfer.request_id, key, slot, blocks))
        return None

    def _plan_writes(self) -> tuple[WriteThrough, ...]:
        disk = self._catalog.disk
        if disk is None or self._config.disk is None or not self._backlog:
            return ()
        writes = []
        while self._backlog and self._may_write():
            key = self._backlog.popleft()
            host_slot = self._catalog.host.find(key)
            if host_slot is None or disk.holds(key):
                continue
            disk_slot = disk.reserve(key)
            if disk_slot is None:
                self._meter.count("writes_skipped", 1, reason="disk_in_use")
                continue
            self._catalog.host.lease(host_slot)
            transfer = self._transfers.open(
                Kind.WRITE,
                "",
                step=self._step,
                expires=self._clock() + self._config.load.deadline,
                size=self._chunk_bytes,
                chunks=(
                    Location(key, TierName.HOST, host_slot),
                    Location(key, TierName.DISK, disk_slot),
                ),
            )
            writes.append(WriteThrough(transfer.id, key, host_slot, disk_slot))
        return tuple(writes)

    def _may_write(self) -> bool:
        assert self._config.disk is not None
        in_flight = self._transfers.bytes_in_flight(Kind.WRITE)
        return in_flight + self._chunk_bytes <= self._config.disk.max_inflight * self._ranks

    def _mark_overdue(self) -> None:
        now = self._clock()
        for transfer in self._transfers.live():
            if transfer.overdue or transfer.expires > now:
                continue
            transfer.overdue = True
            self._meter.count("failures", 1, kind=f"{transfer.kind.value}_overdue")
            log.warning(
                "%s %d of request %r is overdue after step %d; it no longer holds engine blocks",
                transfer.kind.value, transfer.id, transfer.request_id, transfer.step,
            )  # fmt: skip
            if transfer.lease is not None:
                # What is read from now on may be another request's block: never show it.
                self._poison(transfer)
                transfer.lease.release()

    # -- receipts ----------------------------------------------------------------------------

    def receive(self, receipts: Iterable[Receipt]) -> None:
        """Take in what the ranks report after a step."""
        settled: list[Transfer] = []
        for receipt in receipts:
            for item in receipt.transfers:
                transfer = self._transfers.get(item.transfer)
                if transfer is None or not transfer.apply(receipt.rank, item):
                    continue
                if transfer.lease is not None:
                    transfer.lease.release()
                if transfer.state is not State.SOURCE_FREE:
                    settled.append(transfer)
        for transfer in settled:
            if transfer.kind is Kind.LOAD:
                self._settle_load(transfer)
            elif transfer.kind is Kind.WRITE:
                self._settle_write(transfer)
        self._ended_saves += (t for t in settled if t.kind is Kind.SAVE)
        if self._ended_saves:
            self._settle_saves()

    def _settle_load(self, transfer: Transfer) -> None:
        self._transfers.close(transfer)
        for place in transfer.chunks:
            self._catalog.tiers[place.tier].release(place.slot)
        record = self._requests.get(transfer.request_id)
        current = record is not None and record.load == transfer.id
        failed = transfer.state is State.FAILED
        self._meter.count("load_bytes", transfer.moved_bytes)
        self._meter.observe("load_seconds", transfer.seconds)
        self._meter.observe("wait_seconds", transfer.waited)
        if failed:
            self._meter.count("failures", 1, kind=f"load_{transfer.reason or 'unknown'}")
            self._drop_bad(transfer)
            self._poison_since(transfer.step)
        if record is not None and current:
            record.load = None
            story = record.story
            story.seconds, story.waited, story.failed = transfer.seconds, transfer.waited, failed
            if failed:
                story.reason = transfer.reason
                record.next_save = 0
            stories.info("%s", story.line(transfer.request_id))
            if record.ended:
                del self._requests[transfer.request_id]

    def _drop_bad(self, transfer: Transfer) -> None:
        for place in transfer.chunks:
            if place.key in transfer.bad_chunks:
                tier = self._catalog.tiers[place.tier]
                if tier.find(place.key) == place.slot:
                    tier.drop(place.key)
                    if place.tier is TierName.DISK:
                        self._drop_disk.append(place.slot)

    def _poison_since(self, step: int) -> None:
        for transfer in self._transfers.live():
            if transfer.kind is Kind.SAVE and transfer.step >= step:
                self._poison(transfer)
        for record in self._requests.values():
            record.next_save = 0

    def _poison(self, transfer: Transfer) -> None:
        """What a save or write brings must never become visible. Its key is free at once, so that
        a good copy can be made; its slot only when nothing is written there any more."""
        if not transfer.poisoned:
            transfer.poisoned = True
            target = transfer.chunks[-1]
            tier = self._catalog.tiers[target.tier]
            tier.lease(target.slot)
            tier.abandon(target.key)

    def _give_back_target(self, transfer: Transfer) -> None:
        target = transfer.chunks[-1]
        tier = self._catalog.tiers[target.tier]
        if transfer.poisoned:
            tier.release(target.slot)
        else:
            tier.abandon(target.key)

    def _settle_saves(self) -> None:
        """Settle the saves that have ended, unless a load that the model computed on, in their
        step or before it, has no outcome yet: what they saved may be worthless."""
        layerwise = (t.step for t in self._transfers.live() if t.layerwise)
        doubt = min(layerwise, default=self._step)
        ended, self._ended_saves = self._ended_saves, []
        for transfer in ended:
            if transfer.step < doubt:
                self._settle_save(transfer)
            else:
                self._ended_saves.append(transfer)

    def _settle_save(self, transfer: Transfer) -> None:
        self._transfers.close(transfer)
        (place,) = transfer.chunks
        if transfer.state is State.FAILED or transfer.poisoned:
            self._give_back_target(transfer)
            reason = transfer.reason or "poisoned"
            self._meter.count("failures", 1, kind=f"save_{reason}")
            return
        self._catalog.host.publish(place.key)
        self._meter.count("save_bytes", transfer.moved_bytes)
        self._meter.observe("save_seconds", transfer.seconds)
        if self._catalog.disk is not None and not self._catalog.disk.holds(place.key):
            self._backlog.append(place.key)

    def _settle_write(self, transfer: Transfer) -> None:
        self._transfers.close(transfer)
        source, target = transfer.chunks
        disk = self._catalog.disk
        assert disk is not None
        self._catalog.host.release(source.slot)
        if transfer.state is State.FAILED:
            self._give_back_target(transfer)
            self._drop_disk.append(target.slot)
            self._meter.count("failures", 1, kind=f"write_{transfer.reason or 'unknown'}")
            return
        disk.publish(target.key)
        self._meter.count("write_bytes", transfer.moved_bytes)
        self._meter.observe("write_seconds", transfer.seconds)

    # -- the whole ---------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every chunk in every tier; what is on its way will not become visible."""
        self._catalog.host.clear()
        if self._catalog.disk is not None:
            self._drop_disk.extend(self._catalog.disk.clear())
        self._backlog.clear()
        for transfer in self._transfers.live():
            if transfer.kind is not Kind.LOAD:
                self._poison(transfer)
        for record in self._requests.values():
            record.next_save = 0
            record.hit = FoundPrefix()

    @property
    def has_work(self) -> bool:
        """Whether the engine must keep stepping so that orders go out and receipts come in."""
        return (
            bool(self._saves or self._loads or self._drop_disk)
            or bool(self._backlog and self._may_write())
            or self._transfers.pending
        )

    def gauges(self) -> None:
        """Write the present state of tiers, leases and queues to the meter."""
        for tier in self._catalog.tiers.values():
            name = tier.name.value
            self._meter.gauge("tier_capacity_bytes", tier.slots * self._chunk_bytes, tier=name)
            self._meter.gauge("tier_used_bytes", tier.used * self._chunk_bytes, tier=name)
        for kind in Kind:
            self._meter.gauge(
                "bytes_in_flight", self._transfers.bytes_in_flight(kind), direction=kind.value
            )
            self._meter.gauge("transfers", self._transfers.count(kind), direction=kind.value)
        self._meter.gauge("write_backlog", len(self._backlog))
        self._meter.gauge("leased_blocks", self._leases.leased_blocks)


def _open_catalog(reports: Sequence[RankReport]) -> tuple[Catalog, list[int]]:
    """A catalog of what every rank has; and the disk slots that not every rank agrees on."""
    host_slots = min(report.host_slots for report in reports)
    disk_slots = min(report.disk_slots for report in reports)
    if host_slots < 1:
        raise ValueError(
            "host.capacity: too small for one chunk of "
            f"{max(report.chunk_bytes for report in reports)} bytes on each rank"
        )
    host = TierCatalog(TierName.HOST, host_slots)
    if not disk_slots:
        return Catalog(host, None), []
    disk = TierCatalog(TierName.DISK, disk_slots)
    first, *others = [{(c.key, c.slot) for c in report.stored} for report in reports]
    common = first.intersection(*others)
    stray = set().union(first, *others) - common
    disk.adopt(c for c in reports[0].stored if (c.key, c.slot) in common and c.slot < disk_slots)
    return Catalog(host, disk), sorted({slot for _, slot in stray} - {s for _, s in common})
