"""Rules of far tiers, broken on purpose, for the simulated engine."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

import pytest

from lamina_kv.control.hits import HitFinder
from lamina_kv.control.lanes import Lane, Waiting
from lamina_kv.control.moving import MovePlanner
from lamina_kv.control.offers import Offer
from lamina_kv.control.pins import Pins
from lamina_kv.control.questions import Questions
from lamina_kv.control.requests import Hit, RequestRecord
from lamina_kv.control.saving import SavePlanner
from lamina_kv.control.transfers import State, Transfer
from lamina_kv.data.far import FarTier
from lamina_kv.data.moving import MovePipeline
from lamina_kv.plan import ChunkKey, Move
from lamina_kv.tiers.contract import Fate, Piece
from lamina_kv.tiers.hints import HintIndex
from lamina_kv.tiers.objects import Object, verify
from lamina_kv.tiers.slots import SlotIndex

Patch = pytest.MonkeyPatch

_IDENTITY = struct.Struct("<8s20sI")
"""Magic, version and flags; key; shard."""


# -- bytes ---------------------------------------------------------------------------------------


def what_is_read_is_not_verified(patch: Patch) -> None:
    patch.setattr("lamina_kv.data.far.verify", lambda *_: True)


def any_chunk_is_as_good(patch: Patch) -> None:
    def loose(chunk: Object, key: ChunkKey, shard: int, length: int) -> bool:
        _, found, _ = _IDENTITY.unpack(chunk[: _IDENTITY.size].tobytes())
        return verify(chunk, ChunkKey(found), shard, length)

    patch.setattr("lamina_kv.data.far.verify", loose)


def any_ranks_part_is_as_good(patch: Patch) -> None:
    def loose(chunk: Object, key: ChunkKey, shard: int, length: int) -> bool:
        _, _, found = _IDENTITY.unpack(chunk[: _IDENTITY.size].tobytes())
        return verify(chunk, key, found, length)

    patch.setattr("lamina_kv.data.far.verify", loose)


def what_is_written_is_not_sealed(patch: Patch) -> None:
    patch.setattr("lamina_kv.data.far.seal", lambda *_: None)


def fates_are_not_looked_at(patch: Patch) -> None:
    read = FarTier.read

    def happy(tier: FarTier, pieces: Sequence[Piece]) -> list[str]:
        return [Fate.DONE for _ in read(tier, pieces)]

    patch.setattr(FarTier, "read", happy)


def slots_are_dropped_behind_writes(patch: Patch) -> None:
    drop = MovePipeline._drop_and_touch

    def behind(moves: MovePipeline, count: int) -> list[Move]:
        if not moves._outward:
            return drop(moves, count)
        kept, moves._drops = moves._drops, []
        taken = drop(moves, count)
        moves._drops = kept + moves._drops
        return taken

    patch.setattr(MovePipeline, "_drop_and_touch", behind)


# -- slots ---------------------------------------------------------------------------------------


def a_near_slot_is_not_held_while_it_is_written_from(patch: Patch) -> None:
    write, written = Lane._write, Lane.written

    def unheld(lane: Lane, key: ChunkKey, waiting: Waiting) -> bool:
        before = len(lane._outward)
        ordered = write(lane, key, waiting)
        for move in lane._outward[before:]:
            lane._books.catalog.near.release(move.near)
        return ordered

    def settled(lane: Lane, transfer: Transfer) -> None:
        lane._books.catalog.near.lease(transfer.near[0])
        written(lane, transfer)

    patch.setattr(Lane, "_write", unheld)
    patch.setattr(Lane, "written", settled)


def a_late_move_has_lost_its_near_slot(patch: Patch) -> None:
    overdue, fetched = Lane.overdue, Lane.fetched

    def hasty(lane: Lane, transfer: Transfer) -> None:
        overdue(lane, transfer)
        lane._books.catalog.near.release(transfer.near[0])

    def settled(lane: Lane, transfer: Transfer) -> None:
        if transfer.poisoned:
            lane._books.catalog.near.lease(transfer.near[0])
        fetched(lane, transfer)

    patch.setattr(Lane, "overdue", hasty)
    patch.setattr(Lane, "fetched", settled)


def a_far_slot_is_not_held_while_it_is_read(patch: Patch) -> None:
    hold, release = SlotIndex.hold, SlotIndex.release

    def unheld(index: SlotIndex, key: ChunkKey) -> int:
        return index.visible[key] if index._stored else hold(index, key)

    def released(index: SlotIndex, place: int) -> None:
        if not index._stored:
            release(index, place)

    patch.setattr(SlotIndex, "hold", unheld)
    patch.setattr(SlotIndex, "release", released)


def what_is_pinned_stays_pinned(patch: Patch) -> None:
    patch.setattr(Pins, "remove", lambda pins, key: None)


def more_moves_than_are_allowed(patch: Patch) -> None:
    patch.setattr(Lane, "_has_room", lambda lane, kind: True)


# -- what a tier has -----------------------------------------------------------------------------


def a_move_inward_that_failed_counts(patch: Patch) -> None:
    fetched = Lane.fetched

    def optimistic(lane: Lane, transfer: Transfer) -> None:
        transfer.state = State.DONE
        fetched(lane, transfer)

    patch.setattr(Lane, "fetched", optimistic)


def a_move_outward_that_failed_counts(patch: Patch) -> None:
    written = Lane.written

    def optimistic(lane: Lane, transfer: Transfer) -> None:
        transfer.state = State.DONE
        written(lane, transfer)

    patch.setattr(Lane, "written", optimistic)


def what_is_gone_is_hoped_for(patch: Patch) -> None:
    patch.setattr(HintIndex, "lost", lambda index, key, place: None)


def what_is_damaged_is_kept(patch: Patch) -> None:
    patch.setattr(SlotIndex, "lost", lambda index, key, place: None)


def ranks_need_not_agree(patch: Patch) -> None:
    adopt = SlotIndex.adopt
    patch.setattr(SlotIndex, "adopt", lambda index, ranks: adopt(index, ranks[:1]))


def what_is_not_lasting_is_moved(patch: Patch) -> None:
    settle = SavePlanner.settle

    def lasting(saving: SavePlanner, transfer: Transfer) -> None:
        transfer.lasting = True
        settle(saving, transfer)

    patch.setattr(SavePlanner, "settle", lasting)


def answers_are_not_listened_to(patch: Patch) -> None:
    patch.setattr(HintIndex, "told", lambda index, keys, present: None)


def nobody_is_asked(patch: Patch) -> None:
    patch.setattr(HintIndex, "asks", lambda index: ())


# -- requests ------------------------------------------------------------------------------------


def a_wait_for_moves_has_no_end(patch: Patch) -> None:
    bring = MovePlanner.bring

    def patient(moves: MovePlanner, record: RequestRecord, offer: Offer) -> int:
        return bring(moves, record, replace(offer, timeout=1e9))

    patch.setattr(MovePlanner, "bring", patient)


def a_wait_for_answers_has_no_end(patch: Patch) -> None:
    patch.setattr(Questions, "_for_answers", lambda *_: 1e9)


def those_who_have_ended_are_not_forgotten(patch: Patch) -> None:
    patch.setattr(MovePlanner, "forget", lambda moves, request_id: None)


def what_is_far_is_loaded(patch: Patch) -> None:
    patch.setattr(HitFinder, "is_near", lambda *_: True)


def only_what_is_near_is_found(patch: Patch) -> None:
    find = HitFinder.find

    def close_by(hits: HitFinder, record: RequestRecord, floor: int, *, far: bool) -> Hit:
        return find(hits, record, floor, far=False)

    patch.setattr(HitFinder, "find", close_by)


def what_came_near_is_counted_twice(patch: Patch) -> None:
    credit = MovePlanner.credit

    def twice(moves: MovePlanner, record: RequestRecord, offer: Offer) -> Offer:
        credited = credit(moves, record, offer)
        if credited is offer:
            return offer
        parts = tuple(replace(part, tokens=2 * part.tokens) for part in credited.parts)
        return replace(credited, parts=parts)

    patch.setattr(MovePlanner, "credit", twice)
