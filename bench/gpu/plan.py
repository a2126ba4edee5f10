"""Sections, one after the other, each within its budget and all within the total."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gpu.report import Outcome, Row, State

Lab_co = TypeVar("Lab_co", covariant=True)

LEAST_SHARE = 0.25
"""Share of its budget without which a section is not begun: its figures would mean little."""


@dataclass
class Bench(Generic[Lab_co]):
    """What a section is given.

    Attributes:
        lab: what makes engines on the device.
        due: when the section should end, on ``clock``.
        clock: seconds.
        ceilings: what section B has measured, in GB/s by direction; empty if it has not run.
    """

    lab: Lab_co
    due: float
    clock: Callable[[], float] = time.monotonic
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds of the section's budget that are left."""
        return self.due - self.clock()


@dataclass(frozen=True, slots=True)
class Section(Generic[Lab_co]):
    """One section.

    Attributes:
        key: its letter.
        title: what it looks at.
        budget: seconds.
        run: yields its figures; when its budget is used up, it is closed behind the next one.
    """

    key: str
    title: str
    budget: float
    run: Callable[[Bench[Lab_co]], Generator[Row, None, None]]


def run_sections(
    sections: Iterable[Section[Lab_co]],
    bench: Bench[Lab_co],
    budget: float,
    alive: Callable[[], str] = str,
) -> Iterator[Outcome]:
    """Run sections in order.

    Args:
        sections: which.
        bench: for all of them.
        budget: seconds for all of them together.
        alive: why no further section can run, empty if one can; asked behind one that broke.
    """
    end = bench.clock() + budget
    lost = ""
    for section in sections:
        began = bench.clock()
        given = min(section.budget, end - began)
        short = given < LEAST_SHARE * section.budget
        if lost or short:
            why = lost or f"{max(0.0, given):.0f} s of the total budget are left"
            yield Outcome(section.key, section.title, State.SKIPPED, section.budget, 0.0, (), why)
            continue
        bench.due = began + given
        rows: list[Row] = []
        state, why = State.RAN, ""
        try:
            figures = section.run(bench)
            for row in figures:
                rows.append(row)
                if bench.left < 0:
                    figures.close()  # memory is given back before the next one needs it
                    state, why = State.CUT, "its budget was used up behind the last figure here"
                    break
        except Exception as error:  # the next section may say more
            state, why = State.BROKE, f"{type(error).__name__}: {error}"
            traceback.print_exc()
            lost = alive()
        seconds = bench.clock() - began
        yield Outcome(section.key, section.title, state, given, seconds, tuple(rows), why)
