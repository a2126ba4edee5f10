"""Which rank has answered a session."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from lamina_kv.push.proxy.routing.ranks import Rank

MAX_SESSIONS = 100_000
"""Sessions that are remembered: some 20 MB."""
MAX_AGE = 3600.0
"""Seconds after which a session that has not asked again is forgotten."""


class Sessions:
    """See the module.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ranks: OrderedDict[str, tuple[Rank, float]] = OrderedDict()

    def rank(self, session: str) -> Rank | None:
        """The rank that has answered it last; None if nobody has, or not for long."""
        rank, used = self._ranks.get(session, (None, 0.0))
        return rank if self._clock() - used < MAX_AGE else None

    def answered(self, session: str, rank: Rank) -> None:
        """A rank answers it from now on."""
        if not session:
            return
        self._ranks.pop(session, None)
        self._ranks[session] = rank, self._clock()
        if len(self._ranks) > MAX_SESSIONS:
            self._ranks.popitem(last=False)
