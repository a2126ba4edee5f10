"""What several requests need is loaded into the engine once.

A parked load fills blocks that the engine shows to other requests when the load has ended. Until
then a request that begins with the same tokens would find nothing in the engine, and load them a
second time into blocks of its own. So it is told to ask again, and shares the first one's blocks::

    first    lookup ── load ─────────────── runs
    second   lookup ── asks again … again ── finds them in the engine's prefix cache ── runs
    third    lookup ── asks again … again ── finds them in the engine's prefix cache ── runs

Every wait has an end: that of the load, or of its request, or ``load.deadline`` over all waits of
one request. If a load ends and leaves nothing to share (it failed, its request was aborted), the
next one that asks loads for itself, and the others wait for that. A request that has waited for a
load that went well, and finds nothing all the same, waits for no other one.

A load in the step is the same for an engine that shows its blocks when the step is over. Some show
them at once, because whoever shares them waits for the same rows; then nobody has to wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from lamina_kv.control.requests import RequestRecord, Wait
from lamina_kv.control.shape import ChunkShape
from lamina_kv.plan import ChunkKey, TransferId

LARGEST = 2
"""A request waits for a load of at most so many times its own tokens. To compute its own prompt
mostly takes longer than to load twice as much; behind a much longer document it would be late."""


class Sharing(Enum):
    """Which loads of others a request may wait for, because the engine lets it find what they bring
    as soon as they have ended."""

    NOTHING = "nothing"
    """The engine has no prefix cache."""
    PARKED = "parked"
    """Those between steps. What is loaded in the step is found at once."""
    ALL = "all"
    """All."""


@dataclass(slots=True)
class _SharedLoad:
    """A load that others may wait for.

    Attributes:
        keys: chunks that it brings of the first group that needs all of a prefix.
        end: tokens that its request has with it.
        size: tokens that it brings.
        parked: whether it is one between steps.
        waiting: requests that were told to wait for it, by their ids.
    """

    keys: Sequence[ChunkKey]
    end: int
    size: int
    parked: bool
    waiting: dict[str, RequestRecord] = field(default_factory=dict)


class SharedLoads:
    """See the module. A part of the planner.

    Args:
        shape: tokens of blocks and chunks, and what each group needs of a prefix.
        longest: seconds that a request waits at most, all of its waits together.
    """

    def __init__(self, shape: ChunkShape, longest: float) -> None:
        self._shape = shape
        self._longest = longest
        self._loads: dict[TransferId, _SharedLoad] = {}
        self._by_key: dict[ChunkKey, TransferId] = {}

    @property
    def waiting(self) -> int:
        """Requests that wait for another's load."""
        return sum(len(load.waiting) for load in self._loads.values())

    def begin(
        self, load: TransferId, record: RequestRecord, floor: int, end: int, *, parked: bool
    ) -> None:
        """A load was ordered.

        Models without a group that needs all of a prefix share nothing here: what is needed of a
        window depends on where a request goes on.

        Args:
            load: the load.
            record: its request.
            floor: the first token that it brings.
            end: the one after the last.
            parked: whether it is one between steps.
        """
        if not self._shape.full:
            return
        chunk = self._shape.chunk_tokens
        keys = record.known_keys()[self._shape.full[0]][floor // chunk : -(-end // chunk)]
        self._loads[load] = _SharedLoad(keys, end, end - floor, parked)
        if self._by_key.keys().isdisjoint(keys):  # mostly, and there may be thousands
            self._by_key.update(dict.fromkeys(keys, load))
            return
        for key in keys:
            self._by_key.setdefault(key, load)

    def end(self, load: TransferId | None, now: float, *, well: bool) -> None:
        """A load has ended, or its request will not show to others what it brings.

        Args:
            load: the load; one that nobody may wait for is no mistake.
            now: control's clock.
            well: whether the engine shows all of it to others from now on.
        """
        shared = self._loads.pop(load, None) if load is not None else None
        if shared is None:
            return
        for key in shared.keys:
            if self._by_key.get(key) == load:
                del self._by_key[key]
        for record in shared.waiting.values():
            if record.wait.load == load:
                self._stop(record.wait, now)
                record.wait.promised = well

    def waits(self, record: RequestRecord, floor: int, now: float) -> bool:
        """Whether a request still waits for the load that it was told to wait for. The only thing
        that is asked about most requests of a crowd, in every step.

        Args:
            record: the request.
            floor: tokens that the engine has of it.
            now: control's clock.
        """
        wait = record.wait
        if wait.load is None:
            return False
        if wait.floor == floor and wait.seconds + now - wait.since < self._longest:
            return True
        self._loads[wait.load].waiting.pop(record.view.request_id, None)
        self._stop(wait, now)
        return False

    def joins(self, record: RequestRecord, floor: int, sharing: Sharing, now: float) -> bool:
        """Whether a request that was looked up, and could begin, is to wait for another's load.

        Args:
            record: the request, with its hit.
            floor: tokens that the engine has of it.
            sharing: whose loads it may wait for.
            now: control's clock.
        """
        wait = record.wait
        wait.in_vain |= wait.promised and floor <= wait.floor
        wait.promised = False
        if not self._by_key or wait.in_vain or wait.seconds >= self._longest:
            return False
        load = self._by_key.get(self._key(record, floor)) if record.hit.tokens else None
        if load is None:
            return False
        shared = self._loads[load]
        if not shared.parked and sharing is not Sharing.ALL:
            return False
        if floor >= shared.end or shared.size > LARGEST * record.view.num_tokens:
            return False
        if self._shape.sparse and not self._shares_all(record, floor, shared):
            return False
        wait.load, wait.floor, wait.since = load, floor, now
        shared.waiting[record.view.request_id] = record
        return True

    def _key(self, record: RequestRecord, floor: int) -> ChunkKey:
        """Of the first chunk that a request lacks. Keys are chained: who has this one in common
        with a load has all that is before it in common, too."""
        return record.known_keys()[self._shape.full[0]][floor // self._shape.chunk_tokens]

    def _shares_all(self, record: RequestRecord, floor: int, shared: _SharedLoad) -> bool:
        """Whether a request goes on behind all of a load: windows and states are there for its end
        only."""
        hit_end = floor + record.hit.tokens
        last = (shared.end - 1) // self._shape.chunk_tokens
        keys = record.known_keys()[self._shape.full[0]]
        return hit_end >= shared.end and keys[last] == shared.keys[-1]

    @staticmethod
    def _stop(wait: Wait, now: float) -> None:
        wait.seconds += now - wait.since
        wait.load = None
