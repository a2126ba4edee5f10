"""Requests of a prefill engine that wait for blocks because of their pushes."""

from __future__ import annotations

from math import inf

from lamina_kv.config import PushConfig
from lamina_kv.control.cost import Costs
from lamina_kv.control.push.outbound import Outbound
from lamina_kv.control.requests import RequestRecord

DESTINATION_WAIT = 0.01
"""Seconds for which a request waits for its destination, at least, where ranks hear plans alone. A
router asks both engines at once, and what is announced after a step was planned leaves when that is
over."""

WAIT_SHARE = 0.1
"""As long as its decode engine has not spoken of it, a request waits for this share of what its
prompt takes: the engine may be in a step, and what leaves row by row is there as much earlier as
it takes to send."""

LONGEST_WAIT = 0.1
"""Seconds; steps of a decode engine that take longer are rare."""


class PushQueue:
    """See the module.

    Args:
        config: the ``push`` section.
        cost: what computing takes.

    Attributes:
        unwanted: requests whose decode engines need nothing of them any more.
    """

    def __init__(self, config: PushConfig, cost: Costs) -> None:
        self.unwanted: list[str] = []
        self._deadline = config.deadline
        self._cost = cost
        self._forgone: dict[str, float] = {}
        self._next: set[str] = set()  # pushes whose requests wait, and could begin
        self._busy = False  # whether one has begun since the last step, or ran in it
        self._ran = False
        self._yielding: dict[str, float] = {}

    def joins(self, push: str) -> None:
        """A request waits, and could begin."""
        self._next.add(push)

    def leaves(self, push: str) -> None:
        """It could not, or does not wait any more."""
        self._next.discard(push)

    def begins(self, request: str, push: str) -> None:
        """A request has got its blocks."""
        self._yielding.pop(request, None)
        self._next.discard(push)

    def ended(self, request: str) -> None:
        """A request has ended."""
        self._yielding.pop(request, None)
        self._forgone.pop(request, None)

    def works(self) -> None:
        """A request that is pushed has begun."""
        self._busy = True

    def runs(self) -> None:
        """A request that is pushed runs in the step that is being planned."""
        self._ran = True

    def stepped(self) -> None:
        """A step is planned."""
        self._busy, self._ran = self._ran, False

    def forgo(self, request: str, now: float) -> None:
        """What comes of a request is of no use to its decode engine."""
        self.unwanted.append(request)
        self._forgone[request] = now

    def is_about_to_end(self, request: str, now: float) -> bool:
        """Whether the engine may be about to end a request that was forgone."""
        return now < self._forgone.get(request, -inf) + DESTINATION_WAIT

    def is_in_time(self, out: Outbound, record: RequestRecord, floor: int, now: float) -> bool:
        """Whether an announced prompt can be computed in time, as far as is known."""
        seconds = self._cost.prefill_seconds(floor, record.view.num_prompt_tokens)
        # An estimate that is far too long would never change if nothing were computed.
        spared = not self._busy or self._next <= {out.push}
        return spared or now + (seconds or 0.0) <= out.expires

    def expected_until(self, out: Outbound, record: RequestRecord, floor: int) -> float:
        """Control's clock after which a destination is not to be expected soon. A decode engine
        claims a push when it sees the request, and says where it goes in the same moment, or has no
        room for it yet."""
        if out.peer:
            return out.claimed + DESTINATION_WAIT
        seconds = self._cost.prefill_seconds(floor, record.view.num_prompt_tokens) or 0.0
        return out.arrived + min(max(DESTINATION_WAIT, seconds * WAIT_SHARE), LONGEST_WAIT)

    def yields(self, request: str, now: float) -> bool:
        """Whether a request that nobody needs any more waits for others that somebody needs. Else
        an engine that has too much to do would compute nothing that comes in time."""
        since = self._yielding.setdefault(request, now)
        return bool(self._next) and now - since < self._deadline
