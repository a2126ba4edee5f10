"""Guards what a prefill is said to have taken: its share of the steps that it was part of, and how
full these were."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from lamina_kv.control.prefills import PrefillTimer


@dataclass
class Learnt:
    """Takes the place of the costs."""

    computed_: list[tuple[int, int, float, float]] = field(default_factory=list)

    def computed(self, start: int, end: int, seconds: float, fill: float) -> None:
        self.computed_.append((start, end, seconds, fill))


def test_a_prefill_is_charged_by_its_share_of_the_steps_that_it_was_part_of() -> None:
    learnt, clock = Learnt(), SimpleNamespace(now=10.0)
    timer = PrefillTimer(cast(Any, learnt), cast(Any, clock))
    timer.planned(500)  # before its first step
    record = cast(Any, SimpleNamespace(fresh=True, offer=SimpleNamespace(loaded=0), prefill=None))
    record.view = SimpleNamespace(num_tokens=300)
    timer.runs(record, 100)
    for tokens in (150, 0, 250):  # nothing is computed in the second one
        timer.planned(tokens)
    clock.now = 14.0
    timer.runs(record, 200)
    assert learnt.computed_ == [], "no token is known behind its last"
    record.view.num_tokens = 301
    timer.runs(record, 300)
    assert learnt.computed_ == [(100, 300, 4.0 * 200 / 400, 200.0)]
