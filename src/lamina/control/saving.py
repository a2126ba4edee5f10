"""What leaves the engine: which chunks are saved to the host, and which of those go to disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from lamina.config import Config
from lamina.control.breakers import Breakers
from lamina.control.catalog import Catalog, Location
from lamina.control.leases import BlockLease, LeaseBook
from lamina.control.requests import ChunkShape, RequestRecord
from lamina.control.transfers import Kind, State, Transfer, TransferTable
from lamina.observe.metrics import Meter
from lamina.plan import ChunkKey, SaveOrder, TierName, WriteThrough


@dataclass(frozen=True, slots=True)
class Postponed:
    """A chunk whose save is a later plan's: a recurrent state of which the engine had not said its
    last token yet when it planned the step that computes it; or what is overwritten in place, and
    so is read between that step and the next.

    Attributes:
        record: the request.
        losses: how often it had lost its blocks then.
        prompt: tokens of its prompt then.
        group: the cache group.
        blocks: the blocks that hold it.
        end: the first token behind it.
        lease: hold on the blocks.
    """

    record: RequestRecord
    losses: int
    prompt: int
    group: int
    blocks: tuple[int, ...]
    end: int
    lease: BlockLease


class SavePlanner:
    """Plans saves and writes, and settles them. A part of the planner.

    Args:
        config: the whole tree.
        shape: tokens of blocks and chunks.
        catalog: where chunks are.
        transfers: all transfers of the engine.
        leases: holds on engine blocks.
        breakers: which tiers are in use.
        meter: where figures go.
        chunk_bytes: bytes of one chunk, all ranks that keep it.
        ranks: how many those are; the bounds of the configuration are for each.

    Attributes:
        orders: saves for the next plan.
    """

    def __init__(
        self,
        config: Config,
        shape: ChunkShape,
        catalog: Catalog,
        transfers: TransferTable,
        leases: LeaseBook,
        breakers: Breakers,
        meter: Meter,
        *,
        chunk_bytes: int,
        ranks: int,
    ) -> None:
        self.orders: list[SaveOrder] = []
        self._prompt_only = config.save.tokens == "prompt"
        self._save_bound = config.save.max_inflight * ranks
        self._write_bound = config.disk.max_inflight * ranks if config.disk else 0
        self._patience = config.load.deadline
        self._shape = shape
        self._catalog = catalog
        self._transfers = transfers
        self._leases = leases
        self._breakers = breakers
        self._meter = meter
        self._chunk_bytes = chunk_bytes
        self._ended: list[Transfer] = []
        self._backlog: deque[ChunkKey] = deque()
        self._postponed: list[Postponed] = []

    # -- saves -------------------------------------------------------------------------------

    def consider(
        self,
        record: RequestRecord,
        computed: int,
        blocks_of: Callable[[int], Sequence[int]],
        *,
        step: int,
        now: float,
    ) -> int:
        """Order a save of every chunk that is complete and kept nowhere, as far as there is room.

        Args:
            record: the request.
            computed: tokens of it that are computed when the step is over.
            blocks_of: gives its block ids of one group, in token order.
            step: the step whose plan will carry the orders.
            now: control's clock.

        Returns:
            Complete chunks for which there was no room.
        """
        end = self._complete_chunks(record, computed)
        if end <= record.next_save or record.barred:
            return 0
        if record.held_back == record.next_save and self._refusal() is not None:
            return end - record.next_save  # as before, and nothing of it was looked at
        keys = record.known_keys()
        tables: dict[int, Sequence[int]] = {}
        for index in range(record.next_save, end):
            for group in self._shape.paged:
                if not self._wanted(record, keys[group][index]):
                    continue
                refusal = self._refusal()
                if refusal is None:
                    if group not in tables:  # long, and made anew whenever it is asked for
                        tables[group] = blocks_of(group)
                    blocks = self._chunk_blocks(tables[group], group, index)
                    if self._shape.null_block in blocks:
                        continue  # fallen out of a window before there was room
                    refusal = self._order_save(record, keys[group][index], blocks, group, step, now)
                if refusal is not None:
                    if record.held_back != index:
                        record.held_back = index
                        self._meter.count("saves_held_back", 1, reason=refusal)
                    return end - index
            record.next_save = index + 1
        return 0

    def consider_state(
        self,
        record: RequestRecord,
        group: int,
        block: int,
        end: int,
        *,
        step: int,
        now: float,
    ) -> None:
        """Order a save of a recurrent state that a block holds when the step is over.

        Args:
            record: the request.
            group: its cache group.
            block: the block.
            end: tokens that the state stands behind.
            step: the step whose plan will carry the order.
            now: control's clock.
        """
        if end % self._shape.chunk_tokens or record.barred:
            return
        if end > record.view.num_tokens or self._shape.groups[group].in_place:
            self._postpone(record, group, (block,), end)
        else:
            self._order_now(record, group, (block,), end, step, now)

    def consider_rings(
        self, record: RequestRecord, start: int, computed: int, *, step: int, now: float
    ) -> None:
        """Have the next plan save what the step completes of windows in place and leaves whole; and
        this one what was loaded from where the host should hold it, too, and is whole before it.

        Args:
            record: the request.
            start: tokens of it that are computed before the step.
            computed: tokens of it that are computed when the step is over.
            step: the step whose plan will carry the orders.
            now: control's clock.
        """
        chunk = self._shape.chunk_tokens
        loaded = record.fresh and record.promote and record.load is None
        if record.barred or not (loaded or computed // chunk > start // chunk):
            return
        for group in self._shape.rings:
            keys, table = record.known_keys()[group], record.view.blocks(group)
            ring = self._shape.groups[group]
            first = -(-ring.first_kept(start) // chunk)
            for index in range(first, start // chunk if loaded else 0):
                if keys[index] in record.promote:
                    blocks = self._chunk_blocks(table, group, index)
                    self._order_now(record, group, blocks, (index + 1) * chunk, step, now)
            first = -(-ring.first_kept(computed) // chunk)
            for index in range(max(first, start // chunk), computed // chunk):
                if index >= len(keys) or self._wanted(record, keys[index]):
                    blocks = self._chunk_blocks(table, group, index)
                    self._postpone(record, group, blocks, (index + 1) * chunk)

    def _chunk_blocks(self, table: Sequence[int], group: int, index: int) -> tuple[int, ...]:
        """Of a request's blocks of one group, those of its chunk ``index``."""
        size = self._shape.chunk_tokens // self._shape.groups[group].block_tokens
        return tuple(table[index * size : (index + 1) * size])

    def _postpone(
        self, record: RequestRecord, group: int, blocks: tuple[int, ...], end: int
    ) -> None:
        lease = self._leases.take(blocks)
        prompt = record.view.num_prompt_tokens
        self._postponed.append(Postponed(record, record.losses, prompt, group, blocks, end, lease))

    def order_postponed(
        self, *, step: int, now: float, ended: RequestRecord | None = None, computed: int = 0
    ) -> None:
        """Order saves of what an earlier step has left behind, now that its last token is known.
        Blocks of states are not written again; what is in place is lost if it is not read now.

        Args:
            step: the step whose plan will carry the orders.
            now: control's clock.
            ended: a request of which no more tokens will be known.
            computed: tokens of that one that are certain to be computed: a step may have failed.
        """
        waiting, self._postponed = self._postponed, []
        for postponed in waiting:
            record = postponed.record
            lost = record.losses != postponed.losses or record.barred
            # A session's next turn may have put another token in the place of its last one.
            lost |= record.view.num_prompt_tokens != postponed.prompt
            if ended is None:
                lasts = not self._shape.groups[postponed.group].in_place
            else:  # the plan is yet to be made, and before it others may learn their tokens
                lasts = record is not ended
                lost |= record is ended and postponed.end > computed
            if not lost and record.view.num_tokens >= postponed.end:
                self._order_now(record, postponed.group, postponed.blocks, postponed.end, step, now)
            elif not lost and lasts:
                self._postponed.append(postponed)
                continue
            postponed.lease.release()

    def _order_now(
        self,
        record: RequestRecord,
        group: int,
        blocks: tuple[int, ...],
        end: int,
        step: int,
        now: float,
    ) -> None:
        index = end // self._shape.chunk_tokens
        if index > self._complete_chunks(record, end):
            return  # behind the prompt, and only that is kept
        key = record.known_keys()[group][index - 1]
        if self._wanted(record, key):
            refusal = self._refusal() or self._order_save(record, key, blocks, group, step, now)
            if refusal is not None:  # it is gone with the next step
                self._meter.count("saves_dropped", 1)

    def _complete_chunks(self, record: RequestRecord, computed: int) -> int:
        limit = min(computed, record.view.num_tokens)
        if self._prompt_only:
            limit = min(limit, record.view.num_prompt_tokens)
        return limit // self._shape.chunk_tokens

    def _wanted(self, record: RequestRecord, key: ChunkKey) -> bool:
        if self._catalog.host.holds(key):
            return False
        return key in record.promote or not self._catalog.keeps(key)

    def _refusal(self) -> str | None:
        """Why no save may be ordered now; None if one may."""
        if self._transfers.bytes_in_flight(Kind.SAVE) + self._chunk_bytes > self._save_bound:
            return "max_inflight"
        if not self._breakers.fills(TierName.HOST).allows:
            return "tier_out_of_use"
        return None if self._catalog.host.has_room else "host_in_use"

    def _order_save(
        self,
        record: RequestRecord,
        key: ChunkKey,
        blocks: tuple[int, ...],
        group: int,
        step: int,
        now: float,
    ) -> str | None:
        """Order a save that nothing refuses, see :meth:`_refusal`; returns why there is no slot for
        it all the same."""
        slot = self._catalog.host.reserve(key)
        if slot is None:
            return "host_in_use"
        transfer = self._transfers.open(
            Kind.SAVE,
            record.view.request_id,
            step=step,
            expires=now + self._patience,
            size=self._chunk_bytes,
            chunks=(Location(key, TierName.HOST, slot),),
            lease=self._leases.take(blocks),
            lasting=record.chain.epoch.lasting,
            tries=self._breakers.order(Kind.SAVE, [TierName.HOST]),
        )
        overwritten = self._shape.groups[group].in_place
        self.orders.append(
            SaveOrder(transfer.id, transfer.request_id, key, slot, blocks, group, overwritten)
        )
        return None

    # -- writes ------------------------------------------------------------------------------

    def order_writes(self, *, step: int, now: float) -> tuple[WriteThrough, ...]:
        """Writes of chunks that have reached the host and not the disk, within the bound."""
        disk = self._catalog.disk
        writes: list[WriteThrough] = []
        while disk is not None and self.may_write:
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
                step=step,
                expires=now + self._patience,
                size=self._chunk_bytes,
                chunks=(
                    Location(key, TierName.HOST, host_slot),
                    Location(key, TierName.DISK, disk_slot),
                ),
                tries=self._breakers.order(Kind.WRITE, [TierName.DISK]),
            )
            writes.append(WriteThrough(transfer.id, key, host_slot, disk_slot))
        return tuple(writes)

    @property
    def may_write(self) -> bool:
        """Whether there is something to write, room for it on the way, and a disk that takes it."""
        in_flight = self._transfers.bytes_in_flight(Kind.WRITE)
        return (
            bool(self._backlog)
            and in_flight + self._chunk_bytes <= self._write_bound
            and self._breakers.fills(TierName.DISK).allows
        )

    @property
    def backlog(self) -> int:
        """Chunks waiting to be written."""
        return len(self._backlog)

    def _enqueue_write(self, key: ChunkKey) -> None:
        disk = self._catalog.disk
        if disk is None or disk.holds(key):
            return
        if len(self._backlog) >= self._catalog.host.slots:
            # More than the host can still hold: the oldest are likely gone from it.
            self._backlog.popleft()
            self._meter.count("writes_skipped", 1, reason="backlog")
        self._backlog.append(key)

    # -- outcomes ----------------------------------------------------------------------------

    def settle(self, ended: Iterable[Transfer], *, step: int) -> None:
        """Take in saves that have ended.

        One is settled once no load that the model computed on, in its step or before it, is
        without an outcome: what it saved may be worthless.
        """
        self._ended += ended
        if not self._ended:
            return
        computed_on = (t.step for t in self._transfers.live() if t.may_be_computed_on)
        doubt = min(computed_on, default=step)
        waiting, self._ended = self._ended, []
        for transfer in waiting:
            if transfer.step < doubt:
                self._settle_save(transfer)
            else:
                self._ended.append(transfer)

    def overdue(self, transfer: Transfer) -> None:
        """A save or write has not ended in time."""
        if transfer.lease is not None:
            # What is read from now on may be another request's block: never show it.
            self.poison(transfer)
            transfer.lease.release()

    def _settle_save(self, transfer: Transfer) -> None:
        self._transfers.close(transfer)
        if transfer.state is State.FAILED or transfer.poisoned:
            self._catalog.give_back(transfer.chunks[-1], poisoned=transfer.poisoned)
            self._meter.count("failures", 1, kind=f"save_{transfer.reason or 'poisoned'}")
            return
        (place,) = transfer.chunks
        self._catalog.publish(place)
        self._meter.count("save_bytes", transfer.moved_bytes)
        self._meter.observe("save_seconds", transfer.seconds)
        if transfer.lasting:
            self._enqueue_write(place.key)

    def settle_write(self, transfer: Transfer) -> None:
        """Take in a write that has ended."""
        self._transfers.close(transfer)
        source, target = transfer.chunks
        self._catalog.host.release(source.slot)
        if transfer.state is State.FAILED:
            self._catalog.give_back(target, poisoned=transfer.poisoned)
            self._catalog.forgotten.append(target.slot)
            self._meter.count("failures", 1, kind=f"write_{transfer.reason or 'poisoned'}")
            return
        self._catalog.publish(target)
        self._meter.count("write_bytes", transfer.moved_bytes)
        self._meter.observe("write_seconds", transfer.seconds)

    def poison(self, transfer: Transfer) -> None:
        """What a save, write or fetch brings must never become visible. Its key is free at once,
        so that a good copy can be made; its slot only when nothing is written there any more.
        """
        if not transfer.poisoned:
            transfer.poisoned = True
            target = transfer.chunks[-1]
            tier = self._catalog.tiers[target.tier]
            tier.lease(target.slot)
            tier.abandon(target.key)

    def poison_saves_since(self, step: int) -> None:
        """What was computed from ``step`` on may rest on a load that failed."""
        while self._postponed:
            self._postponed.pop().lease.release()
        for transfer in self._transfers.live():
            if transfer.kind is Kind.SAVE and transfer.step >= step:
                self.poison(transfer)

    def poison_saves_of(self, requests: Collection[str]) -> None:
        """What these requests have computed may be another's; what is postponed sees it itself."""
        for transfer in self._transfers.live():
            if transfer.kind is Kind.SAVE and transfer.request_id in requests:
                self.poison(transfer)
