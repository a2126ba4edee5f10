"""Rules of transfers, broken on purpose: for the model of pushes and for the simulated engine."""

from __future__ import annotations

import pytest

from lamina_kv.control.transfers import Transfer, TransferTable
from lamina_kv.plan import Outcome, TransferId, TransferReceipt

Patch = pytest.MonkeyPatch


def one_rank_is_enough(patch: Patch) -> None:
    apply = Transfer.apply

    def first(transfer: Transfer, rank: int, item: TransferReceipt) -> bool:
        if item.outcome is Outcome.DONE and rank in transfer.moving:
            transfer.moving = {rank}
        return apply(transfer, rank, item)

    patch.setattr(Transfer, "apply", first)


def identities_are_used_again(patch: Patch) -> None:
    opened = TransferTable.open

    def lowest(table: TransferTable, *args: object, **others: object) -> Transfer:
        table._next = 0
        while TransferId(table._next + 1) in table._live:
            table._next += 1
        return opened(table, *args, **others)  # type: ignore[arg-type]

    patch.setattr(TransferTable, "open", lowest)
