"""Every history of a small world, each state once; of a larger one as many as there is time for."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from random import Random

from protocol.engine import Options, ProtocolViolationError
from protocol.world import Copy, Event, World, settle

SETTLED = 100
"""States that an incomplete search has not gone on from, and from which it lets everything end."""


class FoundViolationError(AssertionError):
    """A history that must not be; the message has all of its events."""


@dataclass(frozen=True)
class Explored:
    """What was seen.

    Attributes:
        states: different states.
        events: transitions between them.
        complete: whether every state was seen.
        wrong: states in which something has gone wrong.
        wrong_later: those of them in which it was not the first thing that happened; a state counts
            as it was first seen.
        depths: how many events before it went wrong, and how many of those states.
    """

    states: int
    events: int
    complete: bool
    wrong: int
    wrong_later: int
    depths: dict[int, int]


@dataclass(frozen=True)
class Origin:
    """How a state was first seen.

    Attributes:
        before: the state before it.
        event: what happened there.
        depth: how many events there were, with this one.
        wrong_at: after how many events something went wrong first; None if nothing has.
    """

    before: int
    event: Event
    depth: int
    wrong_at: int | None


@dataclass
class Waiting:
    """States that are still to be gone on from, by where something has gone wrong before them, or
    by how many events there were if nothing has.

    Attributes:
        random: chooses among those places, and among their states; None for the newest.
    """

    random: Random | None
    _found: dict[tuple[bool, int], list[tuple[int, Copy]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, origin: Origin, key: int, copy: Copy) -> None:
        """A state was found."""
        place = (
            origin.wrong_at is None,
            origin.depth if origin.wrong_at is None else origin.wrong_at,
        )
        self._found.setdefault(place if self.random else (True, 0), []).append((key, copy))

    def take(self) -> tuple[int, Copy]:
        """One of them; of any place as likely as of any other."""
        place = self.random.choice(sorted(self._found)) if self.random else (True, 0)
        states = self._found[place]
        if self.random:
            index = self.random.randrange(len(states))
            states[index], states[-1] = states[-1], states[index]
        found = states.pop()
        if not states:
            del self._found[place]
        return found


def explore(
    options: Options, *, limit: int, wrong_later: int | None = None, seed: int | None = None
) -> Explored:
    """Go through everything that can happen. From each state the first normal event that changes
    anything leads on to one where nothing happens any more, and nothing may be left there.

    Args:
        options: the world.
        limit: states after which to stop.
        wrong_later: stop after so many states in which something has gone wrong, and was not the
            first thing that happened; None for no such end.
        seed: for a search that ends before it is complete: where things go wrong is spread over
            all that happens, chosen by this. Without, depth first.

    Raises:
        FoundViolationError: if anything happens that must not.
    """
    start = World(options)
    first = start.key()
    origins: dict[int, Origin] = {first: Origin(first, (), 0, None)}
    calm: dict[int, int] = {}
    waiting = Waiting(None if seed is None else Random(seed))
    waiting.add(origins[first], first, start.copy())
    events, depths = 0, defaultdict[int, int](int)
    late = 0
    while waiting and len(origins) < limit and (wrong_later is None or late < wrong_later):
        key, copy = waiting.take()
        origin = origins[key]
        world = World.of(copy)
        kinds = (world.normal, world.time, world.late, world.faults)
        for kind in kinds:
            if kind == world.time and key in calm:
                continue  # time passes when nothing else happens
            wrong = kind == world.faults
            for event in list(kind()):
                after = World.of(copy)
                events += 1
                try:
                    after.run(event, fault=wrong)
                    keys = after.keys()
                    found = hash(keys)
                except Exception as error:
                    raise FoundViolationError(_story(origins, key, event, error)) from error
                if found == key:
                    continue
                if kind in (world.normal, world.time):
                    calm.setdefault(key, found)
                if found not in origins:
                    wrong_at = (
                        origin.depth if wrong and origin.wrong_at is None else origin.wrong_at
                    )
                    origins[found] = Origin(key, event, origin.depth + 1, wrong_at)
                    if wrong_at is not None:
                        depths[wrong_at] += 1
                        late += wrong_at > 0
                    waiting.add(origins[found], found, after.copy(keys))
        if key not in calm:
            try:
                world.check_clean()
            except ProtocolViolationError as error:
                raise FoundViolationError(_story(origins, key, ("end",), error)) from error
    complete = not waiting
    if complete:
        _check_that_all_end(calm, origins)
    for _ in range(SETTLED if waiting else 0):
        if not waiting:
            break
        key, copy = waiting.take()
        try:
            settle(World.of(copy))
        except Exception as error:
            raise FoundViolationError(_story(origins, key, ("...",), error)) from error
    return Explored(len(origins), events, complete, sum(depths.values()), late, dict(depths))


def _check_that_all_end(calm: dict[int, int], origins: dict[int, Origin]) -> None:
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


def _story(origins: dict[int, Origin], key: int, event: Event, error: Exception) -> str:
    events = [event]
    while (origin := origins[key]).depth:
        events.append(origin.event)
        key = origin.before
    lines = [" ".join(map(str, event)) for event in reversed(events)]
    return "\n".join([f"{type(error).__name__}: {error}, after", *lines])
