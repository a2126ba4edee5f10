"""Which attempts at pushes are over, for as long as a decode engine may ask."""

from __future__ import annotations

from collections import OrderedDict

REMEMBERED = 4096
"""Attempts that are known one by one, and decode engines of which it is known how far older ones
reach."""


class Endings:
    """See the module.

    Epochs of one decode engine only grow. So of its attempts that are not known any more the newest
    one's is enough: up to it an attempt is over, and may have been torn.
    """

    def __init__(self) -> None:
        self._clean: OrderedDict[tuple[str, int], bool] = OrderedDict()
        self._forgotten: OrderedDict[str, int] = OrderedDict()

    def note(self, peer: str, epoch: int, *, clean: bool) -> None:
        """An attempt is over.

        Args:
            peer: the decode engine's incarnation.
            epoch: its name for the attempt.
            clean: whether all that was sent has arrived.
        """
        self._clean[peer, epoch] = clean
        while len(self._clean) > REMEMBERED:
            (peer, epoch), _ = self._clean.popitem(last=False)
            self._forgotten[peer] = max(epoch, self._forgotten.get(peer, epoch))
            self._forgotten.move_to_end(peer)
        while len(self._forgotten) > REMEMBERED:
            self._forgotten.popitem(last=False)

    def over(self, peer: str, epoch: int) -> bool:
        """Whether an attempt that is not under way is over, and not one that never was."""
        return (peer, epoch) in self._clean or self._is_forgotten(peer, epoch)

    def clean(self, peer: str, epoch: int) -> bool:
        """Whether of an attempt that is not under way nothing can be on its way any more."""
        return self._clean.get((peer, epoch), not self._is_forgotten(peer, epoch))

    def _is_forgotten(self, peer: str, epoch: int) -> bool:
        return peer in self._forgotten and epoch <= self._forgotten[peer]
