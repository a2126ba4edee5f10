"""One step of the engine, from its plan to its output."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamina_kv.plan import Receipt, StepPlan, TransferId
from simulator.request import Blocks, Run


@dataclass(eq=False, slots=True)
class Item:
    """A request's part in one step.

    Attributes:
        run: what it belongs to.
        count: tokens to compute.
        drafts: how many of them are drafts.
        sampled: what came of it.
    """

    run: Run
    count: int
    drafts: int
    sampled: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Step:
    """One step, from its plan to its output.

    Attributes:
        items: what the forward computes.
        plan: Lamina's plan.
        loads: the blocks of the request that each load of the plan is for.
        loads_now: whether the forward needs a load of this step.
        reports: what the ranks say when it is over; control may hear of it later.
    """

    items: list[Item]
    plan: StepPlan
    loads: dict[TransferId, Blocks]
    loads_now: bool
    reports: list[Receipt] = field(default_factory=list)
