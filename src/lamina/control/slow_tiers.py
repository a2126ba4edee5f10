"""Tiers that were found slower than computing, and when they are measured again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lamina.control.policy import LONGEST_RETRY, RETRY_SECONDS
from lamina.plan import TierName


@dataclass(slots=True)
class _Retry:
    """When a tier is measured again.

    Attributes:
        at: control's clock.
        pause: seconds before that.
    """

    at: float
    pause: float


class SlowTiers:
    """See the module. What is never loaded from is never measured, so that now and then a little
    has to be brought: after :data:`~lamina.control.policy.RETRY_SECONDS`, and if it was still slow
    after twice as long as before, up to :data:`~lamina.control.policy.LONGEST_RETRY`."""

    def __init__(self) -> None:
        self._retries: dict[TierName, _Retry] = {}

    def __contains__(self, tier: TierName) -> bool:
        return tier in self._retries

    def decline(self, tiers: Iterable[TierName], now: float) -> None:
        """Something was not loaded because these tiers are slow."""
        for tier in tiers:
            self._retries.setdefault(tier, _Retry(now + RETRY_SECONDS, RETRY_SECONDS))

    def due(self, now: float) -> frozenset[TierName]:
        """Those that are to be measured again."""
        return frozenset(tier for tier, retry in self._retries.items() if now >= retry.at)

    def measure(self, tier: TierName, now: float) -> None:
        """A little is brought from a tier to see how slow it is now."""
        if (retry := self._retries.get(tier)) is not None:
            retry.pause = min(2 * retry.pause, LONGEST_RETRY)
            retry.at = now + retry.pause

    def trust(self, tier: TierName) -> None:
        """A tier is loaded from because that is thought to be fast enough."""
        self._retries.pop(tier, None)
