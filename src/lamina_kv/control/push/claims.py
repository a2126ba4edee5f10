"""The decode engine's requests that wait for blocks, and are claimed from the prefill engines that
compute them.

Engines look at the head of their queue alone, so a claim is made when a request arrives, and
renewed by time for as long as it waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lamina_kv.control.requests import RequestRecord
from lamina_kv.push.letters import Letter
from lamina_kv.push.messages import MAX_CLAIMED, NO_EPOCH, Attempt, Cancel, Claim

ANEW_SECONDS = 1.0
"""Least time between two claims of the same pushes, if the link is lost in between: what it is
lost for may be the claim."""

RENEWALS = 3
"""Times that a claim is renewed in the time for which it holds."""

ABSENT_SECONDS = 1.0
"""Least time that a request has to come to a prefill engine which is looking out for it: a router
sends it to both engines at once."""

ANSWER_SHARE = 4
"""A prefill engine that says nothing at all may be in a long step. It has ``push.deadline`` divided
by this to answer."""


@dataclass(slots=True)
class Whereabouts:
    """What a prefill engine has said of a request that it is to compute.

    Attributes:
        asked: control's clock when it was told of the push.
        absent: control's clock when it first said that the request is not there; None if it has
            not.
        here: whether it has said that the request is there.
    """

    asked: float
    absent: float | None = None
    here: bool = False

    def is_given_up(self, now: float, deadline: float, seconds: float) -> bool:
        """Whether the request will not come there any more, for all that is known.

        Args:
            now: control's clock.
            deadline: ``push.deadline``.
            seconds: how long it would take to compute the prompt here, behind others of its kind.
        """
        if self.here:
            return False
        if self.absent is None:
            return now - self.asked >= max(seconds, deadline / ANSWER_SHARE)
        return now - self.absent >= max(seconds, ABSENT_SECONDS)


@dataclass(slots=True)
class Claimed:
    """A request that waits for blocks, and for which a prefill engine is to compute.

    Attributes:
        record: the request.
        push: the router's id of the push.
        address: the prefill engine's.
        whereabouts: what the prefill engine has said of it.
        crowded: control's clock when it was first told to wait because too many blocks are parked;
            None while it was not.
    """

    record: RequestRecord
    push: str
    address: str
    whereabouts: Whereabouts
    crowded: float | None = None


class Backlog:
    """Prompts that are computed here because their prefill engine did not have them. So an engine
    whose peers are slow to take up their requests computes no more of them than it can.

    Args:
        unknown: seconds that one counts as of which nobody knows how long it takes.
    """

    def __init__(self, unknown: float) -> None:
        self._unknown = unknown
        self._prompts: list[tuple[RequestRecord, float]] = []
        self._seconds = 0.0

    def add(self, record: RequestRecord, seconds: float | None) -> None:
        """A prompt will be computed here, which takes so long; None if nobody knows."""
        self._prompts.append((record, self._unknown if seconds is None else seconds))
        self._seconds += self._prompts[-1][1]

    def tick(self) -> None:
        """Look which of them have been computed."""
        if self._prompts:
            self._prompts = [
                (record, ahead) for record, ahead in self._prompts if not record.counted
            ]
            self._seconds = sum(ahead for _, ahead in self._prompts)

    def behind(self, seconds: float | None) -> float:
        """How long it takes to compute one more prompt behind them.

        Args:
            seconds: how long it would take alone; None if nobody knows. Then it is tried, one at a
                time.
        """
        return (seconds or 0.0) + self._seconds


class Claims:
    """See the module. A part of :class:`~lamina_kv.control.push.target.PushTarget`.

    Args:
        patience: seconds for which a claim holds.
        letters: where messages for the link go.
    """

    def __init__(self, patience: float, letters: list[Letter]) -> None:
        self._patience = patience
        self._letters = letters
        self._claimed: dict[str, Claimed] = {}
        self._requests: dict[tuple[str, str], str] = {}
        self._renewals: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def get(self, request_id: str) -> Claimed | None:
        """What is claimed for a request."""
        return self._claimed.get(request_id)

    def named(self, address: str, push: str) -> Claimed | None:
        """What a prefill engine speaks of."""
        request_id = self._requests.get((address, push))
        return None if request_id is None else self._claimed[request_id]

    def at(self, address: str) -> list[Claimed]:
        """What is claimed from one prefill engine."""
        return [claimed for claimed in self._claimed.values() if claimed.address == address]

    def only_from(self, address: str) -> bool:
        """Whether nothing is claimed from another prefill engine, or was a while ago."""
        return not self._renewals.keys() - {address}

    def add(self, record: RequestRecord, now: float) -> Claimed:
        """Claim what is computed for a request that has no blocks yet. No other one that is
        claimed has its name."""
        request_id, push = record.view.request_id, record.view.push
        if request_id in self._claimed:
            return self._claimed[request_id]
        assert push is not None
        assert push.prefill is not None
        claimed = Claimed(record, push.id, push.prefill, Whereabouts(now))
        self._claimed[request_id] = claimed
        self._requests[claimed.address, push.id] = request_id
        self._renewals.setdefault(claimed.address, now + self._patience / RENEWALS)
        self._say(claimed.address, [claimed])
        return claimed

    def remove(self, request_id: str) -> Claimed | None:
        """A request has its blocks, or waits for them no longer."""
        claimed = self._claimed.pop(request_id, None)
        if claimed is not None:
            del self._requests[claimed.address, claimed.push]
        return claimed

    def withdraw(self, claimed: Claimed) -> None:
        """Nothing that was computed for a request is needed."""
        self.remove(claimed.record.view.request_id)
        self._letters.append(Letter(claimed.address, Cancel(Attempt(claimed.push, NO_EPOCH))))

    def forgotten(self, address: str, now: float) -> None:
        """A connection is lost on which something was claimed: it is claimed anew."""
        claimed = self.at(address)
        for item in claimed:
            item.whereabouts = Whereabouts(now)
        if claimed:
            said = self._said.get(address)
            self._renewals[address] = now if said is None else max(now, said + ANEW_SECONDS)
            self.renew(now)

    def renew(self, now: float) -> None:
        """Time has passed: what still waits is claimed for longer."""
        for address in [address for address, due in self._renewals.items() if due <= now]:
            if claimed := self.at(address):
                self._say(address, claimed)
                self._said[address] = now
                self._renewals[address] = now + self._patience / RENEWALS
            else:
                del self._renewals[address]
                self._said.pop(address, None)

    def _say(self, address: str, claimed: Sequence[Claimed]) -> None:
        for first in range(0, len(claimed), MAX_CLAIMED):
            pushes = tuple(item.push for item in claimed[first : first + MAX_CLAIMED])
            self._letters.append(Letter(address, Claim(pushes, self._patience)))
