"""The room that pushes may take of a decode engine's blocks: parked prompts, and quarantined ones.

All of them together take a share, ``push.max_parked``. Where several prefill engines are in use,
each takes half of that at most, so that one which hangs leaves the others room to push into. One
that was alone when it began to hang may have all of it: then others are given half as much again.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum

PEER_SHARE = 2
"""Of the room of several prefill engines each takes at most one in so many."""


class Fit(Enum):
    """Whether a push fits."""

    NOW = "now"
    LATER = "later"
    """When others have arrived."""
    NOT = "not"
    """Not for as long as what is quarantined is."""


class Room:
    """See the module.

    Args:
        most: blocks that all pushes take at most.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._parked: Counter[str] = Counter()
        self._quarantined: Counter[str] = Counter()
        self._step = -1
        self._crowded: set[str] = set()
        self._all_crowded = False

    @property
    def parked(self) -> int:
        """Blocks of prompts that are on their way."""
        return self._parked.total()

    @property
    def quarantined(self) -> int:
        """Blocks of prompts that nobody waits for, and that may still be written to."""
        return self._quarantined.total()

    def park(self, address: str, blocks: int) -> None:
        """A prompt is expected from a prefill engine."""
        self._parked[address] += blocks

    def quarantine(self, address: str, blocks: int) -> None:
        """A prompt that was parked is not waited for any longer."""
        _take(self._parked, address, blocks)
        self._quarantined[address] += blocks

    def leave(self, address: str, blocks: int, *, quarantined: bool) -> None:
        """Blocks are not held any more."""
        _take(self._quarantined if quarantined else self._parked, address, blocks)

    def fit(self, address: str, blocks: int, *, alone: bool, step: int) -> Fit:
        """Whether a prompt fits that one prefill engine would push.

        Args:
            address: the prefill engine's.
            blocks: how many it needs.
            alone: whether no other one is in use.
            step: the step that is being scheduled. Prompts are asked about in the order in which
                the engine would begin them: where there is no room for one, nobody goes past it.
        """
        if step != self._step:
            self._step, self._all_crowded = step, False
            self._crowded.clear()
        parked, quarantined = self._parked[address], self._quarantined[address]
        alone = alone and self._only(address)
        # One that is larger than the share has all of it.
        share = self.most if alone else max(blocks, self.most // PEER_SHARE)
        fits_share = parked + quarantined + blocks <= share
        lasting = quarantined + self._lasting_of_others(address)
        fits = self.parked + lasting + blocks <= self.most
        if fits and fits_share and not self.is_crowded(address, step):
            return Fit.NOW
        if lasting + blocks > self.most or quarantined + blocks > share:
            return Fit.NOT
        if fits:
            self._crowded.add(address)
        else:
            self._all_crowded = True
        return Fit.LATER

    def is_crowded(self, address: str, step: int) -> bool:
        """Whether one that was asked about in this step, and goes first, has to wait."""
        return step == self._step and (self._all_crowded or address in self._crowded)

    def _lasting_of_others(self, address: str) -> int:
        """Blocks that other prefill engines have in quarantine, of each no more than its share: who
        hangs, and was alone before, does not lock everybody else out."""
        most = self.most // PEER_SHARE
        return sum(min(n, most) for other, n in self._quarantined.items() if other != address)

    def _only(self, address: str) -> bool:
        return not (self._parked.keys() | self._quarantined.keys()) - {address}


def _take(counter: Counter[str], address: str, blocks: int) -> None:
    counter[address] -= blocks
    if not counter[address]:
        del counter[address]
