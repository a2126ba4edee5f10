"""Which attempts at pushes are over, for as long as a decode engine may ask."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from lamina_kv.push.messages import Goodbye

REMEMBERED = 1024
"""Attempts of each decode engine that are known one by one."""

REMEMBERED_PEERS = 1024
"""Decode engines of which anything is known; those are forgotten first that were heard of least
recently. All of them together take some 100 MiB at most."""


@dataclass(slots=True)
class _Peer:
    """What is known of one decode engine.

    Attributes:
        clean: attempts that are over, and whether all that was sent has arrived.
        forgotten: the newest attempt that is not known one by one any more.
    """

    clean: OrderedDict[int, bool] = field(default_factory=OrderedDict)
    forgotten: int = -1

    def note(self, epoch: int, *, clean: bool) -> None:
        """An attempt is over."""
        self.clean[epoch] = clean
        while len(self.clean) > REMEMBERED:
            epoch, _ = self.clean.popitem(last=False)
            self.forgotten = max(epoch, self.forgotten)


class Endings:
    """See the module.

    Epochs of one decode engine only grow. So of its attempts that are not known any more the newest
    one's is enough: up to it an attempt is over, and may have been torn. What one decode engine
    says takes no room from another.
    """

    def __init__(self) -> None:
        self._peers: OrderedDict[str, _Peer] = OrderedDict()

    def note(self, peer: str, epoch: int, *, clean: bool) -> None:
        """An attempt is over.

        Args:
            peer: the decode engine's incarnation.
            epoch: its name for the attempt.
            clean: whether all that was sent has arrived.
        """
        self._peers.setdefault(peer, _Peer()).note(epoch, clean=clean)
        self._peers.move_to_end(peer)
        while len(self._peers) > REMEMBERED_PEERS:
            self._peers.popitem(last=False)

    def over(self, peer: str, epoch: int) -> bool:
        """Whether an attempt that is not under way is over, and not one that never was."""
        known = self._peers.get(peer)
        return known is not None and (epoch in known.clean or epoch <= known.forgotten)

    def goodbye(self, peer: str, under_way: Iterable[int]) -> Goodbye:
        """What there is to say of all attempts of a decode engine when no more will be begun.

        Args:
            peer: the decode engine's incarnation.
            under_way: epochs of its attempts that are not over.
        """
        known = self._peers.get(peer, _Peer())
        torn = (epoch for epoch, clean in known.clean.items() if not clean)
        return Goodbye.but_for(known.forgotten + 1, (*torn, *under_way))

    def clean(self, peer: str, epoch: int) -> bool:
        """Whether of an attempt that is not under way nothing can be on its way any more."""
        known = self._peers.get(peer)
        return known is None or known.clean.get(epoch, epoch > known.forgotten)
