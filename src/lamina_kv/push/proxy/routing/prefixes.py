"""Which prefixes one rank holds, learnt from what it was sent."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lamina_kv.push.proxy.routing.prompt import Mark

MAX_MARKS = 50_000
"""Marks that are remembered of a rank, which is some 10 MB: three million tokens of different
prompts."""

MAX_AGE = 3600.0
"""Seconds after which a prefix that nobody has asked for is forgotten. The engine may have kept it;
it is then found again by chance, and that costs one prefill."""


@dataclass(frozen=True, slots=True)
class _Held:
    tokens: int
    used: float


class PrefixCache:
    """What a rank is believed to hold: it forgets as an engine does, what was not used for longest
    first, and of one prompt the end first.

    Args:
        clock: monotonic seconds.

    Attributes:
        capacity: tokens that it can hold; None if nobody knows, or if tiers behind its own cache
            keep more.
        tokens: that it is believed to hold.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.capacity: int | None = None
        self.tokens = 0
        self._clock = clock
        self._held: OrderedDict[int, _Held] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def hit(self, marks: Sequence[Mark], *, answers: bool, age: float = MAX_AGE) -> int:
        """Tokens of a prompt that it holds.

        Args:
            marks: the prompt's.
            answers: whether it holds the answers to prompts it was sent, too.
            age: seconds; what it was not sent since does not count.
        """
        oldest = self._clock() - age
        reach = 0
        for mark in marks:
            held = self._held.get(mark.digest)
            if held is not None and held.used >= oldest:
                reach = max(reach, mark.reach if answers else mark.at)
            elif mark.at > reach:
                break
        return reach

    def add(self, marks: Sequence[Mark]) -> None:
        """It was sent a prompt, and holds all of it from now on."""
        now = self._clock()
        ends = [0, *(mark.at for mark in marks)]
        # The beginning last, so that it is forgotten last.
        for mark, behind in zip(reversed(marks), reversed(ends[:-1]), strict=True):
            self._forget(mark.digest)
            held = _Held(mark.at - behind, now)
            self._held[mark.digest] = held
            self.tokens += held.tokens
        while self._held and self._is_too_much(now):
            self._forget(next(iter(self._held)))

    def clear(self) -> None:
        """It holds nothing any more."""
        self._held.clear()
        self.tokens = 0

    def _is_too_much(self, now: float) -> bool:
        if len(self._held) > MAX_MARKS or next(iter(self._held.values())).used < now - MAX_AGE:
            return True
        return self.capacity is not None and self.tokens > self.capacity

    def _forget(self, digest: int) -> None:
        if (held := self._held.pop(digest, None)) is not None:
            self.tokens -= held.tokens
