"""What Lamina brings to a request, decided before the request has blocks.

An offer is made by :mod:`~lamina_kv.control.loading` and never changed; a newer one replaces it
while the request waits. Everything that control does for the request follows from it, and it is
printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from lamina_kv.plan import LoadMode, TierName


class Unloaded(StrEnum):
    """Why a hit is not loaded, or not all of it, where that is Lamina's own doing or known to it; a
    word for logs and metric labels."""

    BELOW_MIN_TOKENS = "below_min_tokens"
    SLOWER_THAN_COMPUTING = "slower_than_computing"
    COMPUTING_TO_MEASURE = "computing_to_measure"
    DECLINED_BY_ENGINE = "declined_by_engine"
    ROLE = "role"
    FAILED_BEFORE = "failed_before"


@dataclass(frozen=True, slots=True)
class HitPart:
    """Neighbouring tokens of a hit that are in one tier.

    Attributes:
        tier: where.
        tokens: how many.
        size: bytes of them, over all ranks.
    """

    tier: TierName
    tokens: int
    size: int


@dataclass(frozen=True, slots=True)
class Offer:
    """See the module.

    Attributes:
        floor: tokens at the request's beginning that the engine has.
        prompt: tokens of the request.
        loaded: tokens behind ``floor`` that are loaded.
        pushed: tokens behind these that a prefill engine pushes.
        mode: how the load runs.
        reason: why so much and not more; a word for logs and metric labels, on which nothing
            depends.
        parts: what was found, by tier, in prefix order. What a far tier had is near by the time of
            the load.
        timeout: seconds that the load, moves included, may take.
        stall: seconds for which tiers may bring nothing at all before moves are not waited for any
            more.
        predicted_load: seconds that loading all that was found is predicted to take; negative if
            nobody knows.
        predicted_compute: seconds to compute it instead; negative if nobody knows.
        unpushed: why nothing is pushed, if a push was meant for the request.
        measures: whether less is loaded so that what is computed tells what that takes.
        ask_again: whether the request should not begin yet: it is looked up again in the next step.
            Then nothing is loaded.
    """

    floor: int = 0
    prompt: int = 0
    loaded: int = 0
    pushed: int = 0
    mode: LoadMode = LoadMode.LAYERWISE
    reason: str = "miss"
    parts: tuple[HitPart, ...] = ()
    timeout: float = 0.0
    stall: float = inf
    predicted_load: float = -1.0
    predicted_compute: float = -1.0
    unpushed: str = ""
    measures: bool = False
    ask_again: bool = False

    @property
    def tokens(self) -> int:
        """Tokens beyond ``floor`` that the request has when it begins."""
        return self.loaded + self.pushed

    @property
    def found_tokens(self) -> int:
        """Tokens beyond ``floor`` that were found."""
        return sum(part.tokens for part in self.parts)

    @property
    def found(self) -> dict[TierName, int]:
        """Tokens that were found, by tier."""
        return by_tier(self.parts, self.found_tokens)

    @property
    def cut(self) -> str:
        """Why less is loaded than was found, in the words of ``reason``; empty if all of it is, or
        nothing."""
        return self.reason if 0 < self.loaded < self.found_tokens else ""

    @property
    def taken(self) -> dict[TierName, int]:
        """Tokens that are loaded, by the tier that had them."""
        return by_tier(self.parts, self.loaded)


NOTHING_LACKED = "nothing_lacked"
"""Why nothing is loaded for a request of which the engine has all that there can be."""

ASK_AGAIN = Offer(mode=LoadMode.PARKED, ask_again=True)


@dataclass(slots=True)
class Delivery:
    """What became of an offer.

    Attributes:
        seconds: how long the load or push took, moves not included.
        waited: seconds that the model waited for it.
        failed: why the load failed; empty if it did not.
        push_failed: why the push failed; empty if it did not.
    """

    seconds: float = 0.0
    waited: float = 0.0
    failed: str = ""
    push_failed: str = ""


def by_tier(parts: Sequence[HitPart], tokens: int) -> dict[TierName, int]:
    """The first ``tokens`` of a hit by the tier that has them."""
    split: dict[TierName, int] = {}
    for part in parts:
        if taken := min(part.tokens, tokens):
            split[part.tier] = split.get(part.tier, 0) + taken
        tokens -= taken
    return split


def describe(
    request_id: str,
    offer: Offer,
    delivery: Delivery,
    tiers: Sequence[TierName],
    lack: str = "",
) -> str:
    """One line that says what was hit, where, what was loaded, and why the rest was not.

    Args:
        request_id: the engine's name for the request.
        offer: what was to be brought.
        delivery: what became of it.
        tiers: every tier, in the order in which to name them.
        lack: why not more is loaded; empty if all is that can be.
    """
    brought = 0 if delivery.failed or delivery.push_failed else offer.tokens
    found = offer.found
    text = f"request {request_id}: prompt {offer.prompt} tokens, hit engine {offer.floor}"
    text += "".join(f" {tier} {found.get(tier, 0)}" for tier in tiers) + ", "
    if delivery.failed:
        text += f"load FAILED ({delivery.failed}), "
    elif offer.loaded or not offer.pushed:
        nothing = NOTHING_LACKED if offer.reason == "miss" and not lack else offer.reason
        text += f"loaded {offer.loaded} ({offer.mode.value if offer.loaded else nothing}), "
    if delivery.push_failed:
        text += f"push FAILED ({delivery.push_failed}), "
    elif offer.pushed:
        text += f"pushed {offer.pushed}, "
    elif offer.unpushed:
        text += f"not pushed ({offer.unpushed}), "
    text += f"recomputed {offer.prompt - offer.floor - brought}" + (f" ({lack})" if lack else "")
    if offer.predicted_load >= 0 and offer.predicted_compute >= 0:
        text += (
            f", predicted: load {offer.predicted_load * 1e3:.1f} ms, compute "
            f"{offer.predicted_compute * 1e3:.1f} ms"
        )
    if offer.tokens:
        text += (
            f", load {delivery.seconds * 1e3:.1f} ms, model waited {delivery.waited * 1e3:.1f} ms"
        )
    return text
