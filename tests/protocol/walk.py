"""Random histories: anything happens that can, and then nothing bad any more."""

from __future__ import annotations

from collections import defaultdict
from random import Random

from protocol.engine import Options, ProtocolViolationError
from protocol.explore import FoundViolationError
from protocol.world import Event, World, settle

EARLY, LATE = (0.03, 0.15), 0.3
"""How often something goes wrong while no page is on its way, and while one is."""


LIMIT = 400


def walk(options: Options, seed: int, *, events: int = 80) -> None:
    """One history. In each some kinds of events are late and some early, so that orders of events
    come up soon that are not likely.

    Args:
        options: the world.
        seed: which history.
        events: how many there are at most before nothing bad happens any more.

    Raises:
        FoundViolationError: if anything happens that must not.
    """
    random = Random(seed)
    world = World(options)
    haste: defaultdict[str | int, float] = defaultdict(lambda: random.choice((0.03, 1.0, 4.0)))
    haste["step_prefill"] = haste["step_decode"] = 0.5  # most of them change nothing
    haste["go_on"] = 0.03
    early = random.choice(EARLY)
    story: list[Event] = []
    try:
        for _ in range(random.randrange(events)):
            wrong = random.random() < (LATE if world.sends else early)
            faults = list(world.faults()) if wrong else []
            possible = faults or [*world.normal(), *world.late()]
            if not possible:
                break
            story += random.choices(possible, [haste[event[0]] for event in possible])
            world.run(story[-1], fault=bool(faults))
        story.append(("and then nothing bad",))
        settle(world, LIMIT)
    except Exception as error:
        lines = "\n".join(" ".join(map(str, event)) for event in story)
        problem = f"{type(error).__name__}: {error}"
        raise FoundViolationError(f"{problem}, in history {seed}:\n{lines}") from error


def finds(options: Options, histories: int) -> str:
    """What goes wrong in the first histories, empty if nothing does."""
    for seed in range(histories):
        try:
            walk(options, seed)
        except FoundViolationError as error:
            if not isinstance(error.__cause__, ProtocolViolationError):
                raise
            return str(error)
    return ""
