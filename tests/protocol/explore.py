"""Every history of a small world, each state once."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.engine import Options, ProtocolViolationError
from protocol.world import Event, World


class FoundViolationError(AssertionError):
    """A history that must not be; the message has all of its events."""


@dataclass(frozen=True)
class Explored:
    """What was seen.

    Attributes:
        states: different states.
        events: transitions between them.
        complete: whether every state was seen.
    """

    states: int
    events: int
    complete: bool


def explore(options: Options, *, limit: int) -> Explored:
    """Depth first through everything that can happen. From each state the first normal event that
    changes anything leads on to one where nothing happens any more, and nothing may be left there.

    Args:
        options: the world.
        limit: states after which to stop.

    Raises:
        FoundViolationError: if anything happens that must not.
    """
    start = World(options)
    origins: dict[int, tuple[int, Event]] = {}
    calm: dict[int, int] = {}
    first = start.key()
    waiting = [(first, start.copy())]
    seen = {first}
    events = 0
    while waiting and len(seen) < limit:
        key, copy = waiting.pop()
        world = World.of(copy)
        kinds = (world.normal, world.time, world.late, world.faults)
        for kind in kinds:
            if kind == world.time and key in calm:
                continue  # time passes when nothing else happens
            for event in list(kind()):
                after = World.of(copy)
                events += 1
                try:
                    after.run(event, fault=kind == world.faults)
                    found = after.key()
                except Exception as error:
                    raise FoundViolationError(_story(origins, key, event, error)) from error
                if found == key:
                    continue
                if kind in (world.normal, world.time):
                    calm.setdefault(key, found)
                if found not in seen:
                    seen.add(found)
                    origins[found] = (key, event)
                    waiting.append((found, after.copy()))
        if key not in calm:
            try:
                world.check_clean()
            except ProtocolViolationError as error:
                raise FoundViolationError(_story(origins, key, ("end",), error)) from error
    complete = not waiting
    if complete:
        _check_that_all_end(calm, origins)
    return Explored(len(seen), events, complete)


def _check_that_all_end(calm: dict[int, int], origins: dict[int, tuple[int, Event]]) -> None:
    ends: set[int] = set()
    for key in calm:
        path: dict[int, None] = {}
        here = key
        while here in calm and here not in ends:
            if here in path:
                error = ProtocolViolationError("it never ends")
                raise FoundViolationError(_story(origins, here, ("...",), error))
            path[here] = None
            here = calm[here]
        ends.update(path)


def _story(origins: dict[int, tuple[int, Event]], key: int, event: Event, error: Exception) -> str:
    events = [event]
    while key in origins:
        key, before = origins[key]
        events.append(before)
    lines = [" ".join(map(str, event)) for event in reversed(events)]
    return "\n".join([f"{type(error).__name__}: {error}, after", *lines])
