"""Guards the room of a decode engine, whatever its peers and requests do: what is parked and
quarantined never takes more than its share, nothing is counted that is not held, and all comes
back."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
from test_push_target import DEADLINE, OPENED, QUARANTINE, P, Target, lost

from lamina_kv.control.push.room import Fit, Room
from lamina_kv.control.push.target import CANCELLED, SETTLE_SECONDS
from lamina_kv.control.requests import RequestRecord
from lamina_kv.plan import TransferId
from lamina_kv.push.letters import Fate
from lamina_kv.push.messages import (
    NO_EPOCH,
    Absent,
    Announce,
    Attempt,
    Bound,
    Cancel,
    Claim,
    Failed,
    Fenced,
    LinkMessage,
    Queued,
)

EVENTS = (
    *("arrive", "admit", "absent", "queued", "bound", "fenced", "torn"),
    *("arrives", "fails", "deadline", "cancelled"),
    *("lost", "silent", "unreachable", "opened", "second", "minute"),
)


class Crowd:
    """Requests of one decode engine, and what a peer may do to them."""

    def __init__(self) -> None:
        self.target = Target(blocks=64, failures=1000)
        self.waiting: list[RequestRecord] = []
        self.parked: list[RequestRecord] = []
        self.attempts: dict[int, Attempt] = {}
        self.claimed: set[str] = set()
        self.is_open = False
        self.unsent: list[Attempt] = []
        self.count = 0

    def happen(self, event: str, index: int) -> None:
        match event:
            case "arrive":
                self.count += 1
                self.waiting.append(self.target.arrive(self.count))
            case "admit":
                self._admit()
            case "arrives" | "fails" | "deadline" | "cancelled":
                if self.parked:
                    self._end(event, self.parked.pop(index % len(self.parked)))
            case "second" | "minute":
                self.target.wait(1.0 if event == "second" else 60.0)
            case "opened":
                self._open()
            case "lost" | "silent" | "unreachable":
                fate = {"lost": Fate.CLOSED, "silent": Fate.SILENT}.get(event, Fate.UNREACHABLE)
                if not self.is_open and index % 2 == 0:
                    self._open()
                over = lost(was_open=self.is_open, fate=fate)
                self.target.hear(dataclasses.replace(over, unsent=tuple(self.unsent)))
                self.is_open, self.unsent = False, []
            case _:
                self._say(event, index)
        for message in self.target.said():
            if isinstance(message, Announce):
                self.attempts[message.attempt.epoch] = message.attempt
                if not self.is_open:
                    self.unsent.append(message.attempt)
                self.claimed.discard(message.attempt.push)
            elif isinstance(message, Claim):
                self.claimed.update(message.pushes)
            elif isinstance(message, Cancel) and message.attempt.epoch == NO_EPOCH:
                self.claimed.discard(message.attempt.push)

    def _open(self) -> None:
        self.target.hear(OPENED)
        self.is_open, self.unsent = True, []

    def _admit(self) -> None:
        """The engine looks at its queue, from the head on."""
        for record in list(self.waiting):
            offer = self.target.weigh(record)
            if offer.ask_again:
                continue
            self.waiting.remove(record)
            if offer.end:
                self.target.target.order(record, 0, 0, offer.end)
                self.parked.append(record)
            else:
                self.target.target.decline(record, offer.reason)

    def _end(self, event: str, record: RequestRecord) -> None:
        if event == "cancelled":
            assert record.receive is not None
            self.target.target.give_up(record.receive, CANCELLED)
        if event == "arrives":
            self.target.report(record)
        else:
            self.target.fail(record, reason=event)

    def _say(self, event: str, index: int) -> None:
        epochs = [*self.attempts, NO_EPOCH]
        epoch = epochs[index % len(epochs)]
        attempt = self.attempts.get(epoch) or Attempt(f"push {index % 9}", NO_EPOCH)
        words: dict[str, LinkMessage] = {
            "absent": Absent(attempt),
            "queued": Queued(attempt),
            "bound": Bound(attempt),
            "fenced": Fenced(attempt, clean=True),
            "torn": Fenced(attempt, clean=False),
        }
        self.target.hear(words[event] if index % 7 else Failed(attempt, "no"))

    def check(self) -> None:
        held = len(self.target.pool.held)
        assert held <= 32
        assert held == self.target.blocks("parked") + self.target.blocks("quarantined")

    def end(self) -> None:
        """Everybody goes, and the peer says that nothing is on its way."""
        for record in self.waiting:
            self.target.target.abandoned(record.view.request_id)
        for record in self.parked:
            self._end("cancelled", record)
        self.happen("second", 0)
        assert not {push for push in self.claimed if self._is_waiting(push)}
        for attempt in self.attempts.values():
            self.target.hear(Fenced(attempt, clean=True))
        self.target.wait(max(SETTLE_SECONDS, QUARANTINE))
        self.target.dial(Fate.CLOSED, Fate.CLOSED)
        self.target.wait(2 * DEADLINE)
        assert self.target.pool.held == set()
        assert not self.target.blocks("quarantined")
        assert not any(isinstance(message, Claim) for message in self.target.said())

    def _is_waiting(self, push: str) -> bool:
        return self.target.target._claims.named(P, push) is not None


@settings(deadline=None)  # other tests run beside it
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 62)), max_size=120))
def test_whatever_happens_the_rest_is_left_and_all_comes_back(
    events: list[tuple[str, int]],
) -> None:
    crowd = Crowd()
    for event, index in events:
        crowd.happen(event, index)
        crowd.check()
    crowd.end()


def test_that_it_sees_what_it_guards() -> None:
    """A history in which room is short."""
    crowd = Crowd()
    for _ in range(12):
        crowd.happen("arrive", 0)
    crowd.happen("admit", 0)
    assert (len(crowd.parked), len(crowd.waiting)) == (8, 4)
    assert len(crowd.target.pool.held) == 32
    crowd.happen("silent", 0)
    for _ in range(8):
        crowd.happen("fails", 0)
    crowd.happen("admit", 0)
    assert crowd.waiting == []
    assert crowd.parked == []
    crowd.check()
    assert TransferId(1) in crowd.target.target._inbound
    crowd.end()


def test_what_others_have_in_quarantine_takes_of_the_room_and_ones_own_counts_once() -> None:
    room = Room(16)
    room.park("a", 6)
    room.quarantine("a", 6)
    assert room.fit("b", 10, alone=False, step=1) is Fit.NOW
    assert room.fit("b", 11, alone=False, step=2) is Fit.NOT
    assert room.fit("a", 2, alone=False, step=3) is Fit.NOW, "of a share of 8"
    assert room.fit("a", 10, alone=True, step=4) is Fit.NOW, "nobody else is there"
