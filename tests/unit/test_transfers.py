"""Guards what a transfer remembers of what its ranks say."""

from __future__ import annotations

from math import inf

import pytest

from lamina.control.transfers import Kind, State, TransferTable
from lamina.plan import TORN, Outcome, TransferReceipt


@pytest.mark.parametrize("reasons", [("stopped", TORN), (TORN, "stopped")])
def test_one_torn_write_is_what_matters(reasons: tuple[str, str]) -> None:
    transfer = TransferTable(2).open(Kind.PUSH, "push", step=0, expires=inf, size=1, chunks=())
    for rank, reason in enumerate(reasons):
        transfer.apply(rank, TransferReceipt(transfer.id, Outcome.FAILED, reason=reason))
    assert transfer.state is State.FAILED
    assert transfer.reason == TORN
