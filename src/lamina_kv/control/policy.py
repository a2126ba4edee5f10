"""Whether a hit is loaded, how much of it, and how. The one seam where that is decided.

With ``load.when: always`` a hit is loaded if it is long enough. With ``auto`` a tier's part of it
is loaded if its bytes cost less than its tokens, as far as is known; a hit is cut where its tier
changes. What far tiers have is moved near first, from all of them at the same time, and then
loaded.

A mistake is bounded. A load that is not over when computing would have been is given up. One from a
tier that was slower than computing, and was not measured for long, is given up before it has made
its request 5 % later. Where nobody knows yet what computing takes, chunks are waited for as long as
any tier brings some, so that the first requests of an engine do not wait for a store that hangs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from math import inf

from lamina_kv.config import LoadConfig
from lamina_kv.control.cost import Costs
from lamina_kv.control.offers import HitPart, Offer, Unloaded
from lamina_kv.plan import NEAR, LoadMode, TierName

SHORT_STALL = 0.01
"""Seconds for which a load may hold up the engine's other requests. To be taken up in a later step
costs a load as much as a step: 20 ms and more between tokens in the mixed load of ``bench/peers``.
Also, the least that is granted to a load that is to tell whether its tier is still slow."""

ALLOWANCE = 0.04
"""Share of the time of its prefill for which a request waits to tell whether a tier is still slow.
Serving is promised to be slower than no cache by 5 % at most; the rest is for the step in which it
is seen that the time is over: see ``tests/unit/test_never_slower.py``."""

LEAST_TIMEOUT = 1.0
"""Seconds that a load has that is thought to be worth it. A step may hold up all news of it: those
of the mixed load of ``bench/peers`` take up to 0.9 s."""

PRESUMED = 1e-4
"""Seconds per token that computing is thought to take at least, before any was measured: large
models on one device compute some 10,000 tokens a second. After a restart, where every prompt is hit
from its beginning, only ends of hits are computed then to find out."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked about one request.

    Attributes:
        floor: tokens that the engine has.
        prompt: tokens of the request.
        parts: its hit by tiers, in prefix order.
        declined: why nothing may be loaded whatever was found; empty if it may.
        out_of_use: whether more is kept, but only in tiers that are out of use.
        others_active: whether the engine has other requests to run.
        ahead: bytes that are on their way from each tier already.
        prefetch: whether it is loaded whatever computing is predicted to take.
        measures: whether less of it was brought near so that what is computed tells what that
            takes.
    """

    floor: int
    prompt: int
    parts: tuple[HitPart, ...]
    declined: str = ""
    out_of_use: bool = False
    others_active: bool = False
    ahead: Mapping[TierName, int] = field(default_factory=dict)
    prefetch: bool = False
    measures: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the hit."""
        return sum(part.tokens for part in self.parts)


class LoadPolicy:
    """See the module.

    Args:
        config: the ``load`` section.
        chunk_tokens: the smallest load that is worth its overhead when ``min_tokens`` is auto.
        divisible: whether the beginning of a hit can be loaded without the rest.
    """

    def __init__(self, config: LoadConfig, chunk_tokens: int, *, divisible: bool = True) -> None:
        self._config = config
        self._chunk_tokens = chunk_tokens
        self._min_tokens = chunk_tokens if config.min_tokens == "auto" else config.min_tokens
        self._divisible = divisible

    def decide(self, asked: Asked, costs: Costs) -> Offer:
        """What is loaded for a request.

        Args:
            asked: the request and its hit.
            costs: what was measured.
        """
        tokens = asked.tokens
        if (why := self._why_not(asked, tokens)) is not None:
            return Offer(asked.floor, asked.prompt, reason=why, parts=asked.parts)
        compute = costs.prefill_seconds(asked.floor, asked.floor + tokens)
        load = -1.0
        if all(costs.knows(tier) for tier in {NEAR, *(part.tier for part in asked.parts)}):
            *_, whole = _prefixes(asked.parts)
            load = _seconds(whole[1], asked.ahead, costs)
        weighs = self._config.when == "auto" and not asked.prefetch
        if weighs and compute is not None:
            return self._cheapest(asked, load, compute, costs)
        reason, measures = "hit", False
        if weighs and load > SHORT_STALL:
            tokens = self._measuring(asked, load)
            if tokens < asked.tokens:
                reason, measures = Unloaded.COMPUTING_TO_MEASURE, True
        # Beside rows that are loaded no computing is measured, nor is that of a few tokens.
        tells = asked.prompt - asked.floor - tokens >= self._chunk_tokens
        parks = weighs and tells and (measures or asked.measures or self._config.mode == "auto")
        return Offer(
            asked.floor,
            asked.prompt,
            loaded=tokens,
            mode=LoadMode.PARKED if parks else self._choose_mode(asked, tokens, costs),
            reason=reason,
            parts=asked.parts,
            timeout=self._config.deadline,
            stall=LEAST_TIMEOUT if weighs else inf,
            predicted_load=load,
            predicted_compute=-1.0 if compute is None else compute,
            measures=measures,
        )

    def _why_not(self, asked: Asked, tokens: int) -> str | None:
        """Why nothing is loaded of a hit of so many tokens, whatever it costs; None if that is to
        be weighed."""
        if asked.declined:
            return asked.declined
        if tokens == 0:
            return "tier_out_of_use" if asked.out_of_use else "miss"
        return Unloaded.BELOW_MIN_TOKENS if tokens < self._min_tokens else None

    def _measuring(self, asked: Asked, load: float) -> int:
        """Tokens of a hit to load where it is not known what computing takes, so that the rest of
        the prompt tells. Nothing if most engines compute faster than that load, or if the hit
        cannot be divided."""
        if load > PRESUMED * asked.tokens:
            return 0
        end, chunk = asked.floor + asked.tokens, self._chunk_tokens
        missing = chunk - (asked.prompt - end)
        if missing <= 0:
            return asked.tokens
        tokens = (end - missing) // chunk * chunk - asked.floor
        return tokens if self._divisible and tokens >= self._min_tokens else 0

    def _cheapest(self, asked: Asked, load: float, compute: float, costs: Costs) -> Offer:
        """As much of a hit as is worth it.

        Args:
            asked: the request and its hit.
            load: seconds to load all of the hit; negative if nobody knows.
            compute: seconds to compute it.
            costs: what was measured.
        """
        tokens, hoped = self._cut(asked, costs), self._cut(asked, costs, hoped=True)
        mode, timeout = LoadMode.PARKED, self._config.deadline
        if hoped > tokens:  # parked, because one in a step cannot be given up
            whole = costs.prefill_seconds(asked.floor, asked.prompt) or 0.0
            timeout = min(timeout, max(SHORT_STALL, ALLOWANCE * whole))
            tokens, reason = hoped, "hit_to_measure"
        elif tokens:
            mode = self._choose_mode(asked, tokens, costs)
            reason = "hit" if tokens == asked.tokens else "hit_in_part"
            saved = costs.prefill_seconds(asked.floor, asked.floor + tokens) or 0.0
            timeout = min(timeout, max(LEAST_TIMEOUT, saved))
        else:
            mode, reason = LoadMode.LAYERWISE, Unloaded.SLOWER_THAN_COMPUTING
        return Offer(
            asked.floor,
            asked.prompt,
            loaded=tokens,
            mode=mode,
            reason=reason,
            parts=asked.parts,
            timeout=timeout,
            predicted_load=load,
            predicted_compute=compute,
        )

    def _cut(self, asked: Asked, costs: Costs, *, hoped: bool = False) -> int:
        """Tokens of the hit to load so that as much time as possible is saved; 0 if none is."""
        best, most = 0, 0.0
        for tokens, sizes in _prefixes(asked.parts):
            if tokens == asked.tokens or (self._divisible and tokens >= self._min_tokens):
                compute = costs.prefill_seconds(asked.floor, asked.floor + tokens) or 0.0
                saved = compute - _seconds(sizes, asked.ahead, costs, hoped=hoped)
                if saved > most:
                    best, most = tokens, saved
        return best

    def _choose_mode(self, asked: Asked, tokens: int, costs: Costs) -> LoadMode:
        """How the first ``tokens`` of a hit are loaded, once they are near."""
        if self._config.mode != "auto":
            return LoadMode(self._config.mode)
        size = next(sum(sizes.values()) for end, sizes in _prefixes(asked.parts) if end == tokens)
        load = costs.load_seconds(NEAR, size + asked.ahead.get(NEAR, 0))
        if load is None and self._config.when == "auto":
            return LoadMode.PARKED  # because one in a step could not be given up
        short = load is not None and load <= SHORT_STALL
        return LoadMode.LAYERWISE if short or not asked.others_active else LoadMode.PARKED


def _prefixes(parts: Sequence[HitPart]) -> Iterator[tuple[int, dict[TierName, int]]]:
    """The ends of a hit where its tier changes, and the bytes up to there by tier. The last one is
    the whole hit."""
    tokens, sizes = 0, dict[TierName, int]()
    for part, after in zip_longest(parts, parts[1:]):
        tokens += part.tokens
        sizes[part.tier] = sizes.get(part.tier, 0) + part.size
        if after is None or after.tokens:  # else windows or states follow, of the whole hit
            yield tokens, sizes


def _seconds(
    sizes: Mapping[TierName, int],
    ahead: Mapping[TierName, int],
    costs: Costs,
    *,
    hoped: bool = False,
) -> float:
    """Seconds to bring so many bytes from each tier, behind what is on its way from there. A tier
    of which nothing is known counts for nothing: that is to be found out."""
    known = {
        tier: costs.load_seconds(tier, size + ahead.get(tier, 0), hoped=hoped) or 0.0
        for tier, size in {**sizes, NEAR: sum(sizes.values())}.items()
    }
    return known.pop(NEAR) + max(known.values(), default=0.0)
