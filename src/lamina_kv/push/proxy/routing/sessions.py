"""Which rank has answered a session."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable

from lamina_kv.push.proxy.routing.ranks import Rank

MAX_SESSIONS = 100_000
"""Sessions that are remembered: some 30 MB."""
MAX_AGE = 3600.0
"""Seconds after which a session that has not asked again is forgotten."""


class Sessions:
    """See the module. Keeps no rank, and so no engine, alive that is gone.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ranks: OrderedDict[bytes, tuple[weakref.ref[Rank], float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ranks)

    def rank(self, session: bytes) -> Rank | None:
        """The rank that has answered it last; None if nobody has, or not for long.

        Args:
            session: see :attr:`Prompt.session`.
        """
        if (known := self._ranks.get(session)) is None:
            return None
        rank, used = known
        return rank() if self._clock() - used < MAX_AGE else None

    def answered(self, session: bytes, rank: Rank) -> None:
        """A rank answers it from now on."""
        if not session:
            return
        self._ranks.pop(session, None)
        self._ranks[session] = weakref.ref(rank), self._clock()
        if len(self._ranks) > MAX_SESSIONS:
            self._ranks.popitem(last=False)
