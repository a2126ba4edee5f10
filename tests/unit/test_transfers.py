"""Guards what a transfer remembers of what its ranks say."""

from __future__ import annotations

from math import inf

import pytest

from lamina_kv.control.transfers import Kind, State, Transfer, TransferTable
from lamina_kv.plan import TORN, ChunkKey, Outcome, TierName, TransferReceipt


@pytest.mark.parametrize("reasons", [("stopped", TORN), (TORN, "stopped")])
def test_one_torn_write_is_what_matters(reasons: tuple[str, str]) -> None:
    transfer = TransferTable(2).open(Transfer(Kind.PUSH, "push", step=0, expires=inf, size=1))
    for rank, reason in enumerate(reasons):
        transfer.apply(rank, TransferReceipt(transfer.id, Outcome.FAILED, reason=reason))
    assert transfer.state is State.FAILED
    assert transfer.reason == TORN


def test_a_chunk_is_there_when_every_ranks_part_is() -> None:
    keys = tuple(ChunkKey(bytes([n] * 20)) for n in range(3))
    transfer = TransferTable(2).open(Transfer(Kind.ASK, "", step=0, expires=inf, size=0, keys=keys))
    assert not transfer.apply(0, TransferReceipt(transfer.id, Outcome.DONE, present=b"\1\1\0"))
    assert transfer.apply(1, TransferReceipt(transfer.id, Outcome.DONE, present=b"\1\0\1"))
    assert (transfer.state, transfer.present) == (State.DONE, b"\1\0\0")


def test_what_one_rank_has_lost_is_lost() -> None:
    transfer = TransferTable(2).open(Transfer(Kind.MOVE_IN, "", step=0, expires=inf, size=1))
    gone = TransferReceipt(transfer.id, Outcome.FAILED, lost=True, reason="gone")
    transfer.apply(0, gone)
    transfer.apply(1, TransferReceipt(transfer.id, Outcome.DONE))
    assert (transfer.state, transfer.lost, transfer.reason) == (State.FAILED, True, "gone")


def test_bytes_on_their_way_are_counted_by_kind_and_by_tier() -> None:
    table, (one, two) = TransferTable(1), (TierName("one"), TierName("two"))
    moves = [
        table.open(Transfer(kind, "", step=0, expires=inf, size=size, tier=tier))
        for kind, tier, size in [
            (Kind.MOVE_IN, one, 1),
            (Kind.MOVE_IN, two, 10),
            (Kind.MOVE_OUT, two, 100),
        ]
    ]
    assert table.bytes_in_flight(Kind.MOVE_IN) == 11
    assert table.bytes_in_flight(Kind.MOVE_IN, two) == 10
    assert (table.bytes_in_flight(Kind.MOVE_OUT), table.count(Kind.MOVE_OUT)) == (100, 1)
    table.close(moves[1])
    assert table.bytes_in_flight(Kind.MOVE_IN, two) == 0
    assert table.bytes_in_flight(Kind.MOVE_IN) == 1
