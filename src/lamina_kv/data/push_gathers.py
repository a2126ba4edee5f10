"""Prompts of one rank whose destination becomes known while their step runs, or never.

Used on the thread of :class:`~lamina_kv.data.push_wire.PushWire`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

from lamina_kv.plan import Binding, TransferId

EARLY = 4096
"""Bindings that are kept although nobody gathers for them yet."""

Gathered = TypeVar("Gathered")


@dataclass(frozen=True, slots=True)
class Bound:
    """A destination of a prompt.

    Attributes:
        binding: the destination.
        until: monotonic seconds after which nothing is sent any more.
    """

    binding: Binding
    until: float


class Gathers(Generic[Gathered]):
    """See the module. Gathers begin in the order of their transfers. So a binding of a transfer
    that is not gathered is early if the transfer is newer than every gather, and late if not."""

    def __init__(self) -> None:
        self._open: dict[TransferId, Gathered] = {}
        self._early: OrderedDict[TransferId, Bound] = OrderedDict()
        self._newest = -1

    def begin(self, transfer: TransferId, gathered: Gathered) -> Bound | None:
        """Rows of a prompt will come.

        Returns:
            Its destination, if that is known.
        """
        self._newest = max(self._newest, transfer)
        bound = self._early.pop(transfer, None)
        if bound is None:
            self._open[transfer] = gathered
        return bound

    def bind(self, bound: Bound) -> Gathered | None:
        """A destination is known.

        Returns:
            What is gathered for it; None if it is bound already, is over, or has not begun.
        """
        transfer = bound.binding.order.transfer
        gathered = self._open.pop(transfer, None)
        if gathered is None and transfer > self._newest:
            self._early[transfer] = bound
            if len(self._early) > EARLY:
                self._early.popitem(last=False)
        return gathered

    def end(self, transfer: TransferId) -> bool:
        """Nobody waits for it any more; returns whether it was gathered and not bound."""
        return self._open.pop(transfer, None) is not None
