"""Whether a hit is loaded, how much of it, and how. The one seam where that is decided.

By the simple rule, a hit is loaded if it is long enough. With ``load.when: auto`` it is loaded if
that is predicted to be faster than to compute it, and as much of it as is; where the
:class:`~lamina.control.cost.CostModel` knows nothing yet, the simple rule holds. Mistakes are
bounded: a load that is not over when computing would have been is given up, and now and then a
little is loaded that would not be, to see whether that is still true.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from lamina.config import LoadConfig
from lamina.control.cost import Costs
from lamina.plan import LoadMode, TierName

SHORT_STALL = 0.01
"""Seconds for which a load may hold up the engine's other requests: to park it, and to take it up
in a later step, costs them as much."""

LEAST_GAIN = 0.05
"""Share of the time to the first token that a load has to save: predictions are no better."""

PARKING = 0.002
"""Seconds that it takes to take up a parked load in a later step."""

LEAST_PATIENCE = 1.0
"""Seconds that a load has at least: predictions this small are noise."""

PATIENCE = 2.0
"""A load is given up when it has taken so many times what computing was predicted to take."""

RETRY_SECONDS, LONGEST_RETRY = 30.0, 600.0
"""After a load was declined as too slow, the next one of its tier for which a little is loaded; the
time is doubled, up to the second, whenever it was still too slow."""


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
class Situation:
    """What a load decision may depend on.

    Attributes:
        hit_tokens: tokens, beyond what the engine has, that a tier could deliver.
        fallible: whether some of what is to be loaded comes from a tier that can fail.
        others_active: whether the engine has other requests to run.
        reports_blocks: whether the engine can take back a failed load once the request runs.
        trying: whether a tier that is out of use would be tried by this load.
        out_of_use: whether more is kept, but only in tiers that are out of use.
        floor: tokens that the engine has.
        prompt: tokens of the request.
        parts: the hit by tiers, in prefix order.
        divisible: whether the beginning of the hit can be loaded without the rest.
        queued: bytes that are being loaded from each tier already.
        chunk_tokens: a hit is cut at multiples of this.
        step_tokens: tokens that one step computes at most; 0 if there is no bound. A load in the
            step runs beside the first one.
        retries: tiers that were declined as too slow long enough ago.
    """

    hit_tokens: int
    fallible: bool
    others_active: bool
    reports_blocks: bool
    trying: bool = False
    out_of_use: bool = False
    floor: int = 0
    prompt: int = 0
    parts: tuple[HitPart, ...] = ()
    divisible: bool = True
    queued: tuple[tuple[TierName, int], ...] = ()
    chunk_tokens: int = 1
    step_tokens: int = 0
    retries: frozenset[TierName] = frozenset()


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a hit.

    Attributes:
        tokens: tokens to load, 0 to recompute them.
        mode: how to load them.
        reason: why, in a word that becomes a log field and a metric label.
        load: seconds that the load is predicted to take; negative if nobody knows.
        compute: seconds that computing the hit is predicted to take; negative if nobody knows.
        bounded: whether a load is given up that takes longer than that by far.
    """

    tokens: int
    mode: LoadMode
    reason: str
    load: float = -1.0
    compute: float = -1.0
    bounded: bool = False

    @property
    def patience(self) -> float:
        """Seconds after which the load has taken too long."""
        if not self.bounded or self.compute < 0:
            return inf
        return max(LEAST_PATIENCE, PATIENCE * self.compute)


class LoadPolicy:
    """See the module.

    Args:
        config: the ``load`` section.
        chunk_tokens: the smallest load that is worth its overhead when ``min_tokens`` is auto.
    """

    def __init__(self, config: LoadConfig, chunk_tokens: int) -> None:
        self._mode = config.mode
        self._when = config.when
        self._min_tokens = chunk_tokens if config.min_tokens == "auto" else config.min_tokens

    def decide(self, situation: Situation, costs: Costs, declined: str = "") -> Decision:
        """See the class.

        Args:
            situation: what the decision may depend on.
            costs: what was measured.
            declined: why nothing may be loaded whatever the situation; empty if it may.
        """
        if declined:
            return Decision(0, LoadMode.LAYERWISE, declined)
        if situation.hit_tokens == 0:
            reason = "tier_out_of_use" if situation.out_of_use else "miss"
            return Decision(0, LoadMode.LAYERWISE, reason)
        if situation.hit_tokens < self._min_tokens:
            return Decision(0, LoadMode.LAYERWISE, "below_min_tokens")
        load = predict_load(situation, situation.hit_tokens, costs)
        end = situation.floor + situation.hit_tokens
        compute = costs.prefill_seconds(situation.floor, end)
        if self._when == "always" or load is None or compute is None:
            return Decision(
                situation.hit_tokens,
                self._choose_mode(situation, load, costs),
                "hit",
                load=-1.0 if load is None else load,
                compute=-1.0 if compute is None else compute,
                bounded=self._when == "auto",
            )
        return self._cheapest(situation, costs, load, compute)

    def _cheapest(
        self, situation: Situation, costs: Costs, load: float, compute: float
    ) -> Decision:
        mode = self._choose_mode(situation, load, costs)
        best, least = 0, (1 - LEAST_GAIN) * _finish(situation, 0, mode, costs)
        for tokens in _cuts(situation):
            seconds = _finish(situation, tokens, mode, costs)
            if tokens >= self._min_tokens and seconds < least:
                best, least = tokens, seconds
        if best:
            loading = predict_load(situation, best, costs)
            assert loading is not None, "it was known for more of the hit"
            reason = "hit" if best == situation.hit_tokens else "hit_in_part"
            return Decision(best, mode, reason, loading, compute, bounded=True)
        if {part.tier for part in situation.parts} <= situation.retries:
            least = _cuts(situation)[0]
            return Decision(least, LoadMode.PARKED, "hit_to_measure", load, compute, bounded=True)
        return Decision(0, LoadMode.LAYERWISE, "slower_than_computing", load, compute)

    def _choose_mode(self, situation: Situation, load: float | None, costs: Costs) -> LoadMode:
        if situation.trying or (situation.fallible and not situation.reports_blocks):
            return LoadMode.PARKED
        if self._mode != "auto":
            return LoadMode(self._mode)
        short = load is not None and load <= SHORT_STALL
        if situation.others_active and not short:
            return LoadMode.PARKED
        tokens, end = situation.hit_tokens, situation.floor + situation.hit_tokens
        if load is None and self._when == "auto" and not situation.reports_blocks:
            return LoadMode.PARKED  # because in a step it could not be given up
        if load is None or costs.prefill_seconds(end, situation.prompt) is None:
            return LoadMode.LAYERWISE
        beside = _finish(situation, tokens, LoadMode.LAYERWISE, costs)
        before = _finish(situation, tokens, LoadMode.PARKED, costs) + PARKING
        return LoadMode.PARKED if before < beside else LoadMode.LAYERWISE


def predict_load(situation: Situation, tokens: int, costs: Costs) -> float | None:
    """Seconds that loading the first ``tokens`` of the hit would take; None if nobody knows. What
    is loaded from the same tier already goes first; tiers are loaded from at the same time."""
    queued = dict(situation.queued)
    sizes = _sizes(situation, tokens)
    slowest = 0.0
    for tier, size in sizes.items():
        seconds = costs.load_seconds(tier, size + queued.get(tier, 0))
        if seconds is None:
            return None
        slowest = max(slowest, seconds)
    return slowest if sizes else None


def _sizes(situation: Situation, tokens: int) -> dict[TierName, int]:
    """Bytes of the first ``tokens`` of the hit by tier."""
    sizes: dict[TierName, int] = {}
    for part in situation.parts:
        taken = min(tokens, part.tokens)
        if taken:
            sizes[part.tier] = sizes.get(part.tier, 0) + part.size * taken // part.tokens
        tokens -= taken
    return sizes


def _finish(situation: Situation, tokens: int, mode: LoadMode, costs: Costs) -> float:
    """Seconds until the whole prompt is there if the first ``tokens`` of the hit are loaded."""
    load = predict_load(situation, tokens, costs) if tokens else 0.0
    rest = costs.prefill_seconds(situation.floor + tokens, situation.prompt)
    assert load is not None, "it was known for more of the hit"
    assert rest is not None, "it was known for more of the prompt"
    if mode is LoadMode.PARKED:
        return load + rest
    # Beside the load runs one step, and not on the same cores.
    end = situation.prompt
    if situation.step_tokens:
        end = min(end, situation.floor + tokens + situation.step_tokens)
    first = costs.prefill_seconds(situation.floor + tokens, end)
    assert first is not None, "it was known for more of the prompt"
    busy = sum(costs.busy_seconds(tier, size) for tier, size in _sizes(situation, tokens).items())
    return max(load, first) + max(0.0, rest - first) + min(busy, load)


_FRACTIONS = 8


def _cuts(situation: Situation) -> list[int]:
    """Ends of the hit that are worth a thought: where the tier changes, and some between."""
    cuts, floor, chunk, end = {situation.hit_tokens}, situation.floor, situation.chunk_tokens, 0
    if situation.divisible:
        cuts.add((floor // chunk + 1) * chunk - floor)
        for part in situation.parts:
            for i in range(1, _FRACTIONS + 1):
                cut = end + part.tokens * i // _FRACTIONS
                cuts.add((floor + cut) // chunk * chunk - floor)
            end += part.tokens
    return sorted(cut for cut in cuts if 0 < cut <= situation.hit_tokens)
