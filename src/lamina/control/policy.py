"""Whether a hit is loaded, how much of it, and how. The one seam where that is decided."""

from __future__ import annotations

from dataclasses import dataclass

from lamina.config import LoadConfig
from lamina.plan import LoadMode


@dataclass(frozen=True, slots=True)
class Situation:
    """What a load decision may depend on.

    Attributes:
        hit_tokens: tokens, beyond what the engine has, that a tier could deliver.
        fallible: whether some of what is to be loaded comes from a tier that can fail.
        others_active: whether the engine has other requests to run.
        reports_blocks: whether the engine can take back a failed load once the request runs.
        trying: whether a tier that is out of use would be tried by this load.
        out_of_use: whether more is kept, but only in tiers that are out of use.
    """

    hit_tokens: int
    fallible: bool
    others_active: bool
    reports_blocks: bool
    trying: bool = False
    out_of_use: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a hit.

    Attributes:
        tokens: tokens to load, 0 to recompute them.
        mode: how to load them.
        reason: why, in a word that becomes a log field and a metric label.
    """

    tokens: int
    mode: LoadMode
    reason: str


class LoadPolicy:
    """Decides by the configuration and, in ``auto``, by whether the engine has other work.

    Args:
        config: the ``load`` section.
        chunk_tokens: the smallest load that is worth its overhead when ``min_tokens`` is auto.
    """

    def __init__(self, config: LoadConfig, chunk_tokens: int) -> None:
        self._mode = config.mode
        self._min_tokens = chunk_tokens if config.min_tokens == "auto" else config.min_tokens

    def decide(self, situation: Situation, declined: str = "") -> Decision:
        """See the class.

        Args:
            situation: what the decision may depend on.
            declined: why nothing may be loaded whatever the situation; empty if it may.
        """
        if declined:
            return Decision(0, LoadMode.LAYERWISE, declined)
        if situation.hit_tokens == 0:
            reason = "tier_out_of_use" if situation.out_of_use else "miss"
            return Decision(0, LoadMode.LAYERWISE, reason)
        if situation.hit_tokens < self._min_tokens:
            return Decision(0, LoadMode.LAYERWISE, "below_min_tokens")
        return Decision(situation.hit_tokens, self._choose_mode(situation), "hit")

    def _choose_mode(self, situation: Situation) -> LoadMode:
        if situation.trying or (situation.fallible and not situation.reports_blocks):
            return LoadMode.PARKED
        if self._mode != "auto":
            return LoadMode(self._mode)
        return LoadMode.PARKED if situation.others_active else LoadMode.LAYERWISE
