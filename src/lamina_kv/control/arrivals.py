"""A request that has no blocks yet, and what comes near for it: the record of one wait.

Written by :mod:`lamina_kv.control.moving`, and of tiers' words by
:mod:`lamina_kv.control.questions`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from lamina_kv.control.fetches import Fetch
from lamina_kv.control.offers import HitPart
from lamina_kv.control.requests import RequestRecord
from lamina_kv.plan import ChunkKey, TierName


class Phase(Enum):
    """How far the wait of a request is."""

    AHEAD = "ahead"
    """Its turn has not come: chunks are searched for it ahead."""
    WAITS = "waits"
    """An offer was made, and its chunks are to come near."""
    OVER = "over"
    """All chunks are near, or were given up."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a request waits for a tier's word.

    Attributes:
        since: control's clock when it began to.
        step: number of the plan that was made next.
        seconds: for how long.
    """

    since: float
    step: int
    seconds: float


@dataclass(slots=True)
class Arrival:
    """A request that has no blocks yet, and what comes near for it.

    Attributes:
        record: the request.
        search: looks ahead for chunks that only far tiers have.
        question: a chunk of which a tier has yet to say whether it has it; None if there is none.
        asked: how long answers are waited for; None while none was.
        probed: how long news of tiers that are out of use is waited for; None while none was.
        phase: how far its wait is.
        turn: its place among requests that began to wait; higher ones began later.
        wanted: chunks that are to come near, in prefix order.
        claimed: chunks that are pinned for it, or will be when they arrive.
        awaited: of these, those that are on their way, in the order in which they were ordered.
        came: moves that brought chunks near, or may, while it waited.
        sources: the tier that had each chunk when it was first wanted. A store that finds chunks by
            key may have been asked long ago by the time there is room on the way.
        credited: parts of a hit, and the same with the tiers from which they came.
        floor: tokens that the engine has of it.
        end: the first token behind what is brought near.
        began: control's clock when :meth:`MovePlanner.bring` was called.
        step: number of the plan that was made next.
        due: control's clock after which nothing is waited for any more.
        stall: seconds after which a tier has stalled that brings nothing to anybody.
        ended: control's clock when the last move was over, or when the wait was given up.
        held_up: whether near had no room for it meanwhile, so that the wait says nothing of a tier.
        behind: the busy tier for which the search ahead has put it aside; None if none.
    """

    record: RequestRecord
    search: Iterator[ChunkKey | int] = field(default_factory=lambda: iter(()))
    question: ChunkKey | None = None
    asked: Patience | None = None
    probed: Patience | None = None
    phase: Phase = Phase.AHEAD
    turn: int = 0
    wanted: deque[ChunkKey] = field(default_factory=deque)
    claimed: dict[ChunkKey, None] = field(default_factory=dict)
    awaited: deque[ChunkKey] = field(default_factory=deque)
    came: dict[ChunkKey, Fetch] = field(default_factory=dict)
    sources: dict[ChunkKey, TierName] = field(default_factory=dict)
    credited: tuple[tuple[HitPart, ...], tuple[HitPart, ...]] = ((), ())
    floor: int = 0
    end: int = 0
    began: float = 0.0
    step: int = 0
    due: float = 0.0
    stall: float = inf
    ended: float = 0.0
    held_up: bool = False
    behind: TierName | None = None

    @property
    def request_id(self) -> str:
        """The request's name in the engine."""
        return self.record.view.request_id

    @property
    def waits(self) -> bool:
        """Whether something was to be brought near, and the wait for it is not over."""
        return self.phase is Phase.WAITS
