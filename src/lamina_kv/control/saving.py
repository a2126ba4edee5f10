"""What leaves the engine: which chunks are saved to near, and when their blocks are read.

Pages of a chunk stay as they are once they are computed, so that a chunk can be saved by any step
while its request has its blocks, as soon as there is room. States and windows in place do not
wait: the next step overwrites them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile

from lamina_kv.control.books import Books
from lamina_kv.control.leases import BlockLease
from lamina_kv.control.requests import RequestRecord
from lamina_kv.control.transfers import Kind, State, Transfer
from lamina_kv.plan import NEAR, ChunkKey, SaveOrder
from lamina_kv.tiers.contract import NoRoom
from lamina_kv.tiers.reuse import Standing


class Unsaved(StrEnum):
    """Why a chunk is not saved for now; a word for metric labels."""

    NO_PREFIX = "no_prefix"
    """The chunk in front of it is not kept. It is looked at again when its request has completed
    more."""
    WORTH_LESS = "worth_less"
    """Only chunks that are worth more could be evicted for it. It is looked at again as after
    :attr:`NO_PREFIX`."""
    IN_USE = f"{NEAR}_in_use"
    """No near slot may be evicted now. The next plan looks again, as after the reasons below."""
    MAX_INFLIGHT = "max_inflight"
    """As many bytes are being saved as may be."""
    OUT_OF_USE = "tier_out_of_use"
    """Near's breaker is open."""


@dataclass(frozen=True, slots=True)
class Postponed:
    """A chunk whose save a later plan orders. Either the engine had not said the last token of a
    recurrent state when it planned the step that computes it; or the blocks are overwritten in
    place, and so are read between that step and the next.

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
    """Plans saves, and settles them. A part of the planner.

    Args:
        books: what the parts of control share.
        saved: called with each chunk that became visible near and may be of use to a later process,
            and where it stands.
        again: called with a request, and which of the chunks that it has computed, or found, near
            has of another.

    Attributes:
        orders: saves for the next plan.
    """

    def __init__(
        self,
        books: Books,
        saved: Callable[[ChunkKey, Standing], None],
        again: Callable[[RequestRecord, int, int], None],
    ) -> None:
        self.orders: list[SaveOrder] = []
        self._postponed: list[Postponed] = []
        self._saved = saved
        self._again = again
        self._prompt_only = books.config.save.tokens == "prompt"
        self._bound = books.config.save.max_inflight * books.keeping
        self._timeout = books.config.load.deadline
        self._chunk_bytes = books.kept_bytes
        self._shape = books.shape
        self._catalog = books.catalog
        self._near = books.catalog.near
        self._transfers = books.transfers
        self._leases = books.leases
        self._fills = books.breakers.fills(NEAR)
        self._meter = books.meter
        self._clock = books.clock

    # -- pages -------------------------------------------------------------------------------

    def consider(
        self,
        record: RequestRecord,
        computed: int,
        blocks_of: Callable[[int], Sequence[int]],
    ) -> int:
        """Order a save of every complete chunk that is kept nowhere, as far as there is room. What
        the request has computed itself although a far tier has it, because that is slow or failed,
        is worth a near slot. A chunk whose predecessor is not kept is worth none: it is looked at
        again when the request has completed more.

        Args:
            record: the request.
            computed: tokens of it that are computed when the step is over.
            blocks_of: gives its block ids of one group, in token order.

        Returns:
            Complete chunks for which there was no room.
        """
        end = self._complete_chunks(record, computed)
        if end <= record.next_save or not record.may_save:
            return 0
        if record.held_back == record.next_save and (
            record.held_end == end or self._refusal() is not None
        ):
            return end - record.next_save  # as before, and nothing of it was looked at
        keys = record.known_keys()
        brought = record.offer.floor + (0 if record.delivery.failed else record.offer.tokens)
        tables: dict[int, Sequence[int]] = {}
        # As SlotIndex.leading, but here: such a call for every chunk that is saved is a tenth of a
        # plan. Of a long hit thousands of chunks are near, and nothing need be asked about each.
        start, visible = record.next_save, self._near.visible
        near = end - start
        for group in self._shape.paged:
            if keys[group][start] not in visible:  # mostly so: one chunk was completed
                near = 0
                break
            near = len(list(takewhile(visible.__contains__, keys[group][start : start + near])))
        record.next_save += near
        # What is held back comes here in every plan, and seldom has more of it near.
        if self._shape.paged and record.next_save > (first := max(start, record.considered)):
            self._again(record, first, record.next_save)
        for index in range(record.next_save, end):
            behind = (
                self._shape.behind(keys, self._shape.full[0], index) if self._shape.full else None
            )
            if behind is not None and not (self._near.holds(behind) or self._catalog.lasts(behind)):
                return self._hold_back(record, index, end, Unsaved.NO_PREFIX)
            kept = 0
            for group in self._shape.paged:
                key, own = keys[group][index], index * self._shape.chunk_tokens >= brought
                if self._near.holds(key):
                    kept += 1
                    continue
                if not own and self._catalog.keeps(key):
                    continue
                refusal = self._refusal()
                if refusal is None:
                    if group not in tables:  # long, and made anew whenever it is asked for
                        tables[group] = blocks_of(group)
                    blocks = self._chunk_blocks(tables[group], group, index)
                    if self._shape.null_block in blocks:
                        continue  # fallen out of a window before there was room
                    refusal = self._order(record, index, blocks, group)
                if refusal is not None:
                    return self._hold_back(record, index, end, refusal)
            if kept == len(self._shape.paged) > 0 and index >= record.considered:
                self._again(record, index, index + 1)
            record.next_save = index + 1
        return 0

    def _hold_back(self, record: RequestRecord, index: int, end: int, reason: Unsaved) -> int:
        """Chunks ``index..end`` of a request are not saved now; returns how many they are."""
        if record.held_back != index:
            record.held_back = index
            self._meter.count("saves_held_back", 1, reason=reason)
        record.held_end = end if reason in (Unsaved.NO_PREFIX, Unsaved.WORTH_LESS) else -1
        return end - index

    # -- states, and windows in place --------------------------------------------------------

    def consider_state(self, record: RequestRecord, group: int, block: int, end: int) -> None:
        """Order a save of a recurrent state that a block holds when the step is over.

        Args:
            record: the request.
            group: its cache group.
            block: the block.
            end: tokens that the state stands behind.
        """
        if end % self._shape.chunk_tokens or not record.may_save:
            return
        if end > record.view.num_tokens or self._shape.groups[group].in_place:
            self._postpone(record, group, (block,), end)
        else:
            self._order_now(record, group, (block,), end)

    def consider_rings(self, record: RequestRecord, start: int, computed: int) -> None:
        """Have the next plan save the chunks of windows in place that the step completes.

        Args:
            record: the request.
            start: tokens of it that are computed before the step.
            computed: tokens of it that are computed when the step is over.
        """
        chunk = self._shape.chunk_tokens
        if not record.may_save or computed // chunk <= start // chunk:
            return
        for group in self._shape.rings:
            keys, table = record.known_keys()[group], record.view.blocks(group)
            first = -(-self._shape.groups[group].first_kept(computed) // chunk)
            for index in range(max(first, start // chunk), computed // chunk):
                if index >= len(keys) or not self._near.holds(keys[index]):
                    blocks = self._chunk_blocks(table, group, index)
                    self._postpone(record, group, blocks, (index + 1) * chunk)

    def order_postponed(self, *, ended: RequestRecord | None = None, computed: int = 0) -> None:
        """Order saves of what an earlier step has left behind, now that its last token is known.
        Blocks of states are not written again; what is in place is lost if it is not read now.

        Args:
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
                self._order_now(record, postponed.group, postponed.blocks, postponed.end)
            elif not lost and lasts:
                self._postponed.append(postponed)
                continue
            postponed.lease.release()

    def _postpone(
        self, record: RequestRecord, group: int, blocks: tuple[int, ...], end: int
    ) -> None:
        lease = self._leases.take(blocks)
        prompt = record.view.num_prompt_tokens
        self._postponed.append(Postponed(record, record.losses, prompt, group, blocks, end, lease))

    def _order_now(
        self, record: RequestRecord, group: int, blocks: tuple[int, ...], end: int
    ) -> None:
        index = end // self._shape.chunk_tokens
        if index > self._complete_chunks(record, end):
            return  # behind the prompt, and only that is kept
        key = record.known_keys()[group][index - 1]
        if not self._near.holds(key):
            refusal = self._refusal() or self._order(record, index - 1, blocks, group)
            if refusal is not None:  # it is gone with the next step
                self._meter.count("saves_dropped", 1)

    # -- orders ------------------------------------------------------------------------------

    def _chunk_blocks(self, table: Sequence[int], group: int, index: int) -> tuple[int, ...]:
        """Of a request's blocks of one group, those of its chunk ``index``."""
        size = self._shape.chunk_tokens // self._shape.groups[group].block_tokens
        return tuple(table[index * size : (index + 1) * size])

    def _complete_chunks(self, record: RequestRecord, computed: int) -> int:
        limit = min(computed, record.view.num_tokens)
        if self._prompt_only:
            limit = min(limit, record.view.num_prompt_tokens)
        return limit // self._shape.chunk_tokens

    @property
    def refuses(self) -> bool:
        """Whether no save may be ordered now. What is held back need not be looked at then."""
        return self._refusal() is not None

    def _refusal(self) -> Unsaved | None:
        """Why no save may be ordered now; None if one may."""
        if self._transfers.bytes_in_flight(Kind.SAVE) + self._chunk_bytes > self._bound:
            return Unsaved.MAX_INFLIGHT
        if not self._fills.allows:
            return Unsaved.OUT_OF_USE
        return None if self._near.has_room else Unsaved.IN_USE

    def _order(
        self, record: RequestRecord, index: int, blocks: tuple[int, ...], group: int
    ) -> Unsaved | None:
        """Order a save that nothing refuses, see :meth:`_refusal`; returns why there is no slot for
        it all the same."""
        key = record.chain.groups[group][index]
        standing = record.standing(self._shape, group, index)
        slot = self._catalog.room(key, NEAR, standing)
        if isinstance(slot, NoRoom):
            return Unsaved.WORTH_LESS if slot is NoRoom.WORTH_LESS else Unsaved.IN_USE
        transfer = self._transfers.open(
            Transfer(
                Kind.SAVE,
                record.view.request_id,
                step=self._clock.step,
                expires=self._clock.now + self._timeout,
                size=self._chunk_bytes,
                keys=(key,),
                near=(slot,),
                standing=standing,
                lease=self._leases.take(blocks),
                lasting=record.chain.epoch.lasting,
                trying=self._fills.ordered(),
            )
        )
        overwritten = self._shape.groups[group].in_place
        self.orders.append(
            SaveOrder(transfer.id, transfer.request_id, slot, blocks, group, overwritten)
        )
        return None

    # -- outcomes ----------------------------------------------------------------------------

    def settle(self, transfer: Transfer) -> None:
        """Take in a save that has ended. Loads that ended with it come first, because one that
        failed under the model poisons the saves of its step."""
        self._transfers.close(transfer)
        (key,), (slot,) = transfer.keys, transfer.near
        if transfer.poisoned:
            self._near.release(slot)
        elif transfer.state is State.FAILED:
            self._near.abandoned(key)
        else:
            self._catalog.publish(key)
            self._meter.count("save_bytes", transfer.moved_bytes)
            self._meter.observe("save_seconds", transfer.seconds)
            if transfer.lasting:
                self._saved(key, transfer.standing)
            return
        self._meter.count("failures", 1, tier=NEAR, kind=f"save_{transfer.reason or 'poisoned'}")

    def overdue(self, transfer: Transfer) -> None:
        """A save has not ended in time. The bytes that are read from now on may be those of another
        request's block: never show them."""
        self._poison(transfer)
        if transfer.lease is not None:
            transfer.lease.release()

    def poison_saves_since(self, step: int) -> None:
        """What was computed from ``step`` on may rest on a load that failed."""
        while self._postponed:
            self._postponed.pop().lease.release()
        for transfer in self._transfers.live():
            if transfer.kind is Kind.SAVE and transfer.step >= step:
                self._poison(transfer)

    def poison_saves_of(self, requests: Collection[str]) -> None:
        """What these requests have computed may be another's; what is postponed sees it itself."""
        for transfer in self._transfers.live():
            if transfer.kind is Kind.SAVE and transfer.request_id in requests:
                self._poison(transfer)

    def _poison(self, transfer: Transfer) -> None:
        """What a save brings must never become visible. Its key is free at once, so that a good
        copy can be made; its slot only when nothing is written there any more."""
        if not transfer.poisoned:
            transfer.poisoned = True
            self._near.disowned(transfer.keys[0])
