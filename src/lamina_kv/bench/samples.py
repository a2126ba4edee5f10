"""What was measured: repetitions, their medians, and how they compare."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Unit(StrEnum):
    """What a number counts."""

    SECONDS = "s"
    RATIO = "x"
    BYTES = "B"
    COUNT = "n"


@dataclass(frozen=True, slots=True)
class Samples:
    """Repetitions of one measurement.

    Attributes:
        name: what was measured.
        values: one for each repetition, in order.
        floor: what their median is held against, in the same unit.

    Raises:
        ValueError: if there is no repetition.
    """

    name: str
    values: tuple[float, ...]
    floor: float | None = None

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"nothing was measured for {self.name!r}")

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.values)


def paired(name: str, combine: Callable[..., float], *samples: Samples) -> Samples:
    """Combine measurements repetition by repetition, so that what slowed one repetition down
    cancels out.

    Raises:
        ValueError: if they were not repeated equally often.
    """
    lengths = {len(one.values) for one in samples}
    if len(lengths) != 1:
        raise ValueError(f"{name!r} compares measurements of {sorted(lengths)} repetitions")
    rows: Sequence[tuple[float, ...]] = list(zip(*(one.values for one in samples), strict=True))
    return Samples(name, tuple(combine(*row) for row in rows))


def ratio(name: str, measured: Samples, floor: Samples) -> Samples:
    """``measured`` as a multiple of ``floor``, repetition by repetition."""
    return paired(name, lambda a, b: a / b, measured, floor)


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that is to be judged.

    Attributes:
        figure: what it is about.
        unit: of the figure.
        limit: what was promised; None if it is there to be compared with.
        at_most: whether the limit is an upper one.
    """

    figure: Samples
    unit: Unit
    limit: float | None
    at_most: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the median keeps the promise, if there is one."""
        if self.limit is None:
            return None
        value = self.figure.median
        return value <= self.limit if self.at_most else value >= self.limit
