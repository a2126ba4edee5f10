"""What comes back into the engine: what is offered to a request, and the load that follows.

Loads come from near only. What only far tiers have is moved near first, while its request waits
without blocks and is told to ask again; see :mod:`lamina_kv.control.moving`.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lamina_kv.control.books import Books
from lamina_kv.control.cost import Costs
from lamina_kv.control.hits import HitFinder
from lamina_kv.control.moving import MovePlanner
from lamina_kv.control.offers import ASK_AGAIN, Delivery, Offer, Unloaded, describe
from lamina_kv.control.policy import LEAST_TIMEOUT, Asked, LoadPolicy
from lamina_kv.control.requests import RequestRecord
from lamina_kv.control.sharing import SharedLoads
from lamina_kv.control.transfers import Kind, State, Transfer
from lamina_kv.geometry import GroupKind
from lamina_kv.plan import NEAR, TIMED_OUT, LoadMode, LoadOrder, PageMap, TransferId

stories = logging.getLogger("lamina_kv.requests")

LEAST_SHARE = 0.1
"""Share of its timeout that a load has at least, however long its request has waited for others."""

LOOKED = 1024
"""Chunks that are looked up for one plan of requests that then wait for far tiers, or have waited,
some 5 ms; who comes behind them is looked up for the next one. An engine asks for all that wait, at
once, and the waits of all may end at once."""

LOOKED_OF_AN_END = 16
"""To end the wait of a request takes as long as so many chunks, however few have come."""


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
    """Makes offers, plans the loads that follow, and settles them. A part of the planner.

    Args:
        books: what the parts of the planner share.
        hits: finds what is kept of a request.
        moves: brings near what is far.
        shared: loads that several requests wait for.
        costs: what loads and computing take; measured here for loads from near.
        leases_loads: whether blocks that are loaded into are leased, because the engine itself does
            not keep them until the load has ended, whatever becomes of the request.
        recomputes: whether the engine computes what a load has not brought. Else a load that is
            given up ends its request, and none is given up before ``load.deadline``.

    Attributes:
        orders: loads for the next plan.
    """

    def __init__(
        self,
        books: Books,
        hits: HitFinder,
        moves: MovePlanner,
        shared: SharedLoads,
        costs: Costs,
        *,
        leases_loads: bool = False,
        recomputes: bool = True,
    ) -> None:
        self.orders: list[LoadOrder] = []
        self._books = books
        self._hits = hits
        self._moves = moves
        self._shared = shared
        self._costs = costs
        self._ahead: dict[TransferId, int] = {}
        self._pass, self._looked = 0, 0  # the plan's number, and chunks that were looked up for it
        self._leases_loads = leases_loads
        self._recomputes = recomputes
        self._policy = LoadPolicy(
            books.config.load, books.shape.chunk_tokens, divisible=not books.shape.sparse
        )

    # -- offers ------------------------------------------------------------------------------

    def lookup(
        self,
        record: RequestRecord,
        floor: int,
        *,
        declined: str,
        others_active: bool,
        may_wait: bool,
    ) -> Offer:
        """What is loaded for a request beyond ``floor``.

        Args:
            record: the request.
            floor: tokens at its beginning that the engine has.
            declined: why nothing may be loaded for it; empty if it may.
            others_active: whether the engine has other requests to run.
            may_wait: whether the request may be told to ask again.
        """
        declined = declined or record.no_loads
        waits = may_wait and not declined
        if waits and self.is_put_off(record):
            return ASK_AGAIN
        waited = waits and self._moves.is_waiting(record)
        if waited and self._moves.awaits(record, floor):
            return ASK_AGAIN
        # Chunks of an epoch that does not last are in no far tier.
        far = waits and record.chain.epoch.lasting and record.brought is None
        if far and self._moves.awaits_probes(record):
            return ASK_AGAIN
        hit = self._hits.find(record, floor, far=far)
        if waited:
            self._looked += LOOKED_OF_AN_END + hit.end_chunk
        if hit.unknown and self._moves.awaits_answers(record):
            return ASK_AGAIN
        offer = self._decide(record, floor, declined, others_active)
        # A hit of near alone was just found there: its chunks need not be looked at one by one.
        if not hit.has_far or self._hits.is_near(record, floor, floor + offer.loaded):
            return self._moves.credit(record, offer)
        self._looked += self._moves.bring(record, offer)
        record.brought = offer
        return ASK_AGAIN

    def is_put_off(self, record: RequestRecord) -> bool:
        """Whether enough was looked up for this plan, so that a request waits for the next one that
        was not looked up yet, or waits already. Asked first about every request of a crowd."""
        step = self._books.clock.step
        if self._pass != step:
            self._pass, self._looked = step, 0
        if self._looked < LOOKED or record.no_loads:
            return False
        return record.hit.floor < 0 or self._moves.is_waiting(record)

    def _decide(
        self, record: RequestRecord, floor: int, declined: str, others_active: bool
    ) -> Offer:
        hit = record.hit
        asked = Asked(
            floor,
            record.view.num_tokens,
            hit.parts,
            declined,
            out_of_use=not hit.tokens and self._hits.is_out_of_use(record, hit),
            others_active=others_active,
            ahead={NEAR: self._loading, **self._moves.bytes_ahead(record)},
            prefetch=record.view.regard.prefetch,
            measures=record.brought is not None and record.brought.measures,
        )
        return self._policy.decide(asked, self._costs)

    @property
    def _loading(self) -> int:
        """Bytes on their way from near into the engine."""
        return self._books.transfers.bytes_in_flight(Kind.LOAD)

    # -- loads -------------------------------------------------------------------------------

    def order(self, record: RequestRecord, *, partial: bool = False) -> None:
        """Load what was offered into the request's blocks.

        Args:
            record: the request.
            partial: whether the request goes on from further ahead than the hit, so that the hit's
                windows and states are of no use.
        """
        books, offer = self._books, record.offer
        shape, near = books.shape, books.catalog.near
        end = offer.floor + offer.loaded
        groups = shape.full if partial else range(len(shape.groups))
        slots: list[int] = []
        pages = tuple(
            found
            for group in groups
            if len((found := self._pages_of(record, group, end, slots)).blocks)
        )
        near.lease_all(slots)
        layerwise = offer.mode is LoadMode.LAYERWISE
        # Who has waited for another's load, or for moves, is not late by a second timeout.
        waited = record.wait.seconds + self._moves.waited(record)
        timeout = offer.timeout if self._recomputes else books.config.load.deadline
        timeout = max(timeout - waited, timeout * LEAST_SHARE)
        transfer = books.transfers.open(
            Transfer(
                Kind.LOAD,
                record.view.request_id,
                step=books.clock.step,
                expires=books.clock.now + 2 * max(LEAST_TIMEOUT, timeout),
                size=-(-offer.loaded // shape.chunk_tokens) * books.moved_bytes,
                near=tuple(slots),
                layerwise=layerwise,
                lease=books.leases.take(_blocks(pages)) if self._leases_loads else None,
            )
        )
        self._ahead[transfer.id] = self._loading - transfer.size
        record.load = transfer.id
        if not shape.sparse and offer.floor <= record.next_save * shape.chunk_tokens:
            record.skip_saved(-(-end // shape.chunk_tokens))
        if not partial:  # else it is not whole before the push is
            self._shared.begin(transfer.id, record, offer.floor, end, parked=not layerwise)
        self.orders.append(
            LoadOrder(transfer.id, transfer.request_id, offer.mode, pages, float(timeout))
        )

    def _pages_of(self, record: RequestRecord, group: int, end: int, slots: list[int]) -> PageMap:
        """Near pages of one group of a hit of ``end`` tokens, and the request's blocks for them.

        Args:
            record: the request.
            group: the cache group.
            end: tokens that the request has with the hit.
            slots: receives the near slots that are read.
        """
        books, floor = self._books, record.offer.floor
        shape = books.shape
        chunk, per_slot = shape.chunk_tokens, shape.blocks_per_chunk
        first = self._hits.first_chunk(group, floor, end)
        near = books.catalog.near.visible
        found = [near[key] for key in record.known_keys()[group][first : -(-end // chunk)]]
        slots += found
        of_group = shape.groups[group]
        if of_group.kind is GroupKind.STATE:
            blocks = np.array(record.view.state_blocks(group, end), np.int32)
            return PageMap(group, np.full(len(blocks), found[-1] * per_slot, np.int32), blocks)
        size = of_group.block_tokens
        start = max(floor, of_group.first_token(end) // size * size) // size
        table = record.view.blocks(group)
        # By way of an array, because numpy takes each number of a list for something of its own.
        blocks = np.frombuffer(array("i", table[start : end // size]), np.int32)
        index = np.arange(start, start + len(blocks))
        per_chunk = chunk // size
        pages = np.frombuffer(array("i", found), np.int32)[index // per_chunk - first] * per_slot
        pages += (index % per_chunk).astype(np.int32)
        # What has fallen out of a window, or never was in it, has no block.
        wanted = blocks != shape.null_block
        return PageMap(group, pages[wanted], blocks[wanted])

    def settle(self, transfer: Transfer, record: RequestRecord | None) -> LoadEnd | None:
        """Take in a load that has ended.

        Args:
            transfer: the load.
            record: its request, if the engine still has it.

        Returns:
            What its request is to know; None if it is not that load that it waits for.
        """
        books = self._books
        books.transfers.close(transfer)
        failed = transfer.state is State.FAILED
        ahead = self._ahead.pop(transfer.id)
        moved = transfer.moved_bytes + ahead
        if failed and transfer.reason == TIMED_OUT:
            self._costs.given_up(NEAR, moved, transfer.active)
        elif not failed:
            self._costs.loaded(NEAR, moved, transfer.active)
        for slot in transfer.near:
            books.catalog.near.release(slot)
        self._shared.end(transfer.id, books.clock.now, well=not failed)
        books.meter.count("load_bytes", transfer.moved_bytes)
        books.meter.observe("load_seconds", transfer.seconds)
        if failed:
            books.meter.count("failures", 1, tier=NEAR, kind=f"load_{transfer.reason or 'unknown'}")
        if record is None or record.load != transfer.id:
            return None
        record.load = None
        record.delivery = Delivery(transfer.seconds, transfer.waited)
        if failed:
            record.delivery.failed = transfer.reason or "unknown"
            record.save_anew()
            # What was not delivered is still near: do not ask for it for ever.
            record.no_loads = Unloaded.FAILED_BEFORE
        stories.info("%s", self.describe(record))
        return LoadEnd(transfer.request_id, failed)

    def describe(self, record: RequestRecord) -> str:
        """One line about a request, see :func:`~lamina_kv.control.offers.describe`."""
        tiers = (NEAR, *self._books.catalog.far)
        offer, brought = record.offer, record.brought
        # What came near is all that was to come, or else it says why not.
        came = brought is not None and offer.loaded >= brought.loaded
        why = offer.cut or (brought.cut if brought is not None and came else "") or record.miss
        return describe(record.view.request_id, record.offer, record.delivery, tiers, why)


def _blocks(pages: Sequence[PageMap]) -> tuple[int, ...]:
    """Engine blocks that a load writes."""
    return tuple(block for part in pages for block in part.blocks.tolist())
