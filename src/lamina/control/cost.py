"""What loading and computing cost, as measured while the engine runs.

Estimates are means of logarithms, so that one figure that is far off changes little; every new
measurement counts for at least a fifth, so that what was true an hour ago is soon forgotten. Where
nothing was measured there is no estimate, and nobody guesses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from lamina.plan import TierName

T = TypeVar("T")

LEAST_WEIGHT = 0.2
"""Share of a new measurement in an estimate, however many there were."""

LARGEST_STEP = math.log(4)
"""A measurement further than this factor from the estimate counts as one that is as far."""

SIZE_CLASS = 4.0
"""Loads whose sizes are within this factor share an estimate; so do prefills at contexts within the
half of it."""

LEAST_TOKENS = 64
"""A prefill of fewer tokens says more about the engine's step than about its rate."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One figure.

    Attributes:
        log: logarithm of seconds per byte, or per token.
        count: measurements that it rests on; 0 if it is only known that it takes as long or longer.
    """

    log: float
    count: int

    @property
    def rate(self) -> float:
        """Seconds per byte or token."""
        return math.exp(self.log)

    def with_measured(self, rate: float) -> Estimate:
        """The estimate after one more measurement."""
        if not self.count:
            return Estimate(math.log(rate), 1)
        off = max(-LARGEST_STEP, min(LARGEST_STEP, math.log(rate) - self.log))
        weight = max(LEAST_WEIGHT, 1 / (self.count + 1))
        return Estimate(self.log + weight * off, self.count + 1)


@dataclass(frozen=True, slots=True)
class Costs:
    """Everything that is known at one moment; what is written down, and what a decision rests on.

    Attributes:
        loads: per tier and size class of the load.
        prefills: per class of the context in the middle of the prefill.
        busy: per tier, seconds for which a byte takes the cores that the model runs on.
    """

    loads: dict[TierName, dict[int, Estimate]] = field(default_factory=dict)
    prefills: dict[int, Estimate] = field(default_factory=dict)
    busy: dict[TierName, Estimate] = field(default_factory=dict)

    def load_seconds(self, tier: TierName, size: int) -> float | None:
        """Seconds to bring ``size`` bytes from a tier; None if nothing is known of it."""
        known = self.loads.get(tier)
        if not known or size <= 0:
            return 0.0 if size <= 0 else None
        return _nearest(known, _size_class(size)).rate * size

    def busy_seconds(self, tier: TierName, size: int) -> float:
        """Seconds by which a load of ``size`` bytes delays a model that runs beside it; none where
        nothing is known."""
        known = self.busy.get(tier)
        return known.rate * size if known else 0.0

    def prefill_seconds(self, start: int, end: int) -> float | None:
        """Seconds to compute tokens ``start..end`` of a prompt; None if nothing is known. Each
        token counts with what is known of its own context: to compute more never takes less."""
        if end <= start:
            return 0.0
        if not self.prefills:
            return None
        seconds, known = 0.0, sorted(self.prefills)
        for where, above in zip(known, [*known[1:], None], strict=True):
            stop = end if above is None else min(end, 1 << (where + above + 1) // 2)
            if stop > start:
                seconds += self.prefills[where].rate * (stop - start)
                start = stop
        return seconds


def encode_costs(costs: Costs) -> bytes:
    """Costs as JSON."""
    return msgspec.json.encode(costs)


def decode_costs(data: bytes) -> Costs:
    """The costs that :func:`encode_costs` was given.

    Raises:
        ValueError: if they are none.
    """
    try:
        return msgspec.json.decode(data, type=Costs)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not costs that Lamina has written: {error}") from error


class CostModel:
    """Measures; :attr:`costs` is what it has learnt.

    Args:
        costs: what was known before.
    """

    def __init__(self, costs: Costs | None = None) -> None:
        self.costs = costs or Costs()

    def worked(self, tier: TierName, size: int, seconds: float) -> None:
        """A load of ``size`` bytes from one tier took all cores for so long."""
        if size > 0 and seconds > 0:
            _measure(self.costs.busy, tier, seconds / size)

    def given_up(self, tier: TierName, size: int, moved: int, seconds: float) -> None:
        """Of a load of ``size`` bytes from one tier only ``moved`` had come after so long. That
        was long enough to be believed at once, until the next that ends says otherwise."""
        if seconds > 0:
            rate = math.log(seconds / max(1, moved))
            known = self.costs.loads.setdefault(tier, {})
            for where in {*known, _size_class(size)}:
                known[where] = Estimate(rate, 0)

    def loaded(self, tier: TierName, size: int, seconds: float) -> None:
        """A load of ``size`` bytes from one tier took so long, nothing else having held it up."""
        if size > 0 and seconds > 0:
            known = self.costs.loads.setdefault(tier, {})
            where = _size_class(size)
            doubtful = (estimate for estimate in known.values() if not estimate.count)
            before = known.get(where) or next(doubtful, None)
            _measure(known, where, seconds / size)
            if before is not None:
                _move({*known} - {where}, known, known[where].log - before.log)

    def measured_again(self, tier: TierName, size: int, seconds: float) -> None:
        """A tier that was too slow to be loaded from brought ``size`` bytes in so long. Nothing
        else is known of how it is now, so that is believed at once, and for every size."""
        known = self.costs.loads.get(tier)
        if known and size > 0 and seconds > 0:
            believed = _nearest(known, _size_class(size)).log
            _move(known.keys(), known, math.log(seconds / size) - believed)

    def computed(self, start: int, end: int, seconds: float) -> None:
        """Tokens ``start..end`` of a prompt were computed in so long."""
        if end - start >= LEAST_TOKENS and seconds > 0:
            _measure(self.costs.prefills, _context_class(start, end), seconds / (end - start))


def _measure(known: dict[T, Estimate], where: T, rate: float) -> None:
    before = known.get(where)
    known[where] = Estimate(math.log(rate), 1) if before is None else before.with_measured(rate)


def _move(classes: Iterable[int], known: dict[int, Estimate], by: float) -> None:
    """A tier that has become slow, or fast, has become so for every size."""
    for where in classes:
        known[where] = Estimate(known[where].log + by, known[where].count)


def _nearest(known: dict[int, Estimate], where: int) -> Estimate:
    # Of two that are equally near, the one that was measured more often.
    return known[min(known, key=lambda other: (abs(other - where), -known[other].count))]


def _size_class(size: int) -> int:
    return int(math.log(size, SIZE_CLASS))


def _context_class(start: int, end: int) -> int:
    return int(math.log2(max(1, (start + end) // 2)))
