"""The decode engine's side of a push: what is announced, when the request runs, and until when the
blocks of one that was given up are held. What happens under every order of events is shown in
``tests/protocol``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest
from driven_planner import Pool

from lamina.config import BreakerConfig, PushConfig
from lamina.control.leases import LeaseBook
from lamina.control.push_target import CANCELLED, SETTLE_SECONDS, PushTarget
from lamina.control.requests import ChunkShape, PushParameters, RequestRecord
from lamina.control.transfers import TransferTable
from lamina.geometry import Group, GroupKind
from lamina.keys import CHECKPOINT, ChunkChain, Epoch, prompt_digest
from lamina.observe.metrics import Meter
from lamina.plan import Outcome, ReceiveOrder, TransferId, TransferReceipt
from lamina.push.letters import Fate, Letter, Lost, News, Opened
from lamina.push.messages import (
    NO_BLOCK,
    NO_EPOCH,
    Announce,
    Attempt,
    BlockTable,
    Bound,
    Cancel,
    Failed,
    Fenced,
    LinkMessage,
)

BLOCK = 16
FULL = Group(GroupKind.FULL, BLOCK)
WINDOW = Group(GroupKind.WINDOW, BLOCK, window=BLOCK + 1)
STATE = Group(GroupKind.STATE, BLOCK)
NULL = -1
P = "10.0.0.1:9300"
PUSH = "5b1c"
DEADLINE, SILENCE, QUARANTINE = 60.0, 5.0, 120.0
PAUSE = 10.0


@dataclass
class View:
    tables: list[list[int]]
    states: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 56
    push: PushParameters | None = field(default_factory=lambda: PushParameters(PUSH, P))
    request_id: str = "request"
    recompute_tokens: int = 1
    root_extra: bytes = b"salt"

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + 3

    def tokens(self) -> Sequence[int]:
        return range(self.num_tokens)

    def chunk_extra(self, start: int, end: int) -> bytes:
        return b"image %d" % end

    def blocks(self, group: int) -> Sequence[int]:
        return self.tables[group]

    def state_blocks(self, group: int, end: int) -> Sequence[int]:
        return self.states


class Target:
    """A target, with the ranks and the link that it needs."""

    def __init__(self, *groups: Group, ranks: int = 1, failures: int = 3) -> None:
        self.groups = groups or (FULL,)
        self.pool = Pool()
        self.ranks = ranks
        self.transfers = TransferTable(ranks)
        self.now = 0.0
        self.target = PushTarget(
            PushConfig(deadline=DEADLINE, silence=SILENCE, quarantine=QUARANTINE),
            BreakerConfig(failures=failures, pause=PAUSE),
            ChunkShape(BLOCK, self.groups, NULL),
            self.transfers,
            LeaseBook(self.pool),
            Meter(),
            lambda: self.now,
        )

    def order(
        self,
        view: View | None = None,
        *,
        floor: int = 0,
        start: int = 0,
        end: int = 55,
        epoch: Epoch = CHECKPOINT,
    ) -> RequestRecord:
        view = view or View([[50, 51, 52, 53] for _ in self.groups])
        record = RequestRecord(view, ChunkChain(b"namespace", 16, epoch=epoch))
        self.target.order(record, floor, start, end, step=0)
        return record

    def hear(self, *news: News | LinkMessage) -> None:
        items = [
            n if isinstance(n, Opened | Lost) else Letter(P, cast(LinkMessage, n)) for n in news
        ]
        self.target.receive(items, self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.target.tick(self.now)

    def report(
        self, record: RequestRecord, *outcomes: Outcome, transfer: int = 0, reason: str = "rank"
    ) -> None:
        transfer = transfer or record.receive or 0
        found = self.transfers.get(TransferId(transfer))
        assert found is not None
        for rank, outcome in enumerate(outcomes or (Outcome.DONE,)):
            why = reason if outcome is Outcome.FAILED else ""
            if found.apply(rank, TransferReceipt(found.id, outcome, reason=why)):
                self.target.settle(found, record)

    def fail(self, record: RequestRecord, reason: str = "rank") -> None:
        self.report(record, *[Outcome.FAILED] * self.ranks, reason=reason)

    def said(self) -> list[LinkMessage]:
        said = [letter.message for letter in self.target.letters]
        self.target.letters.clear()
        return said


def lost(*, was_open: bool = True, fate: Fate = Fate.CLOSED) -> Lost:
    return Lost(P, "gone", was_open=was_open, fate=fate)


OPENED = Opened(P, "one")


def announced(*groups: Group, ranks: int = 1) -> tuple[Target, RequestRecord, Attempt]:
    target = Target(*groups, ranks=ranks)
    target.hear(OPENED)
    record = target.order()
    (announce,) = target.said()
    assert isinstance(announce, Announce)
    return target, record, announce.attempt


# -- what is announced -----------------------------------------------------------------------


def test_an_announcement_names_the_prompt_and_where_its_pages_go() -> None:
    target = Target()
    record = target.order(floor=16, start=32)
    (letter,) = target.target.letters
    epoch = record.receive
    assert letter == Letter(
        P,
        Announce(
            Attempt(PUSH, cast(int, epoch)),
            prompt_digest(range(56), b"salt", b"image 56"),
            32,
            55,
            DEADLINE,
            (BlockTable(2, (52, 53)),),
        ),
    )
    assert target.target.orders == [ReceiveOrder(TransferId(cast(int, epoch)), "request", DEADLINE)]
    assert target.pool.held == {52, 53}


def test_of_a_window_only_blocks_that_are_needed_and_not_the_engines_own() -> None:
    target = Target(FULL, WINDOW)
    target.order(View([[50, 51, 52, 53], [NULL, NULL, 62, 63]]), end=55)
    target.order(View([[50, 51, 52, 53], [NULL, NULL, 62, 63]]), floor=48, start=48, end=55)
    target.order(View([[50, 51, 52, 53], [NULL, NULL, NULL, 63]]), end=55)
    first, second, third = (cast(Announce, message) for message in target.said())
    assert first.tables[1] == BlockTable(2, (62, 63))
    assert second.tables[1] == BlockTable(3, (63,))
    assert third.tables[1] == BlockTable(2, (NO_BLOCK, 63))
    assert target.pool.references[62] == 1
    assert NULL not in target.pool.held


def test_of_a_state_the_one_block_where_the_request_goes_on() -> None:
    target = Target(FULL, STATE)
    record = RequestRecord(View([[50, 51, 52, 53], []], [70, 71]), ChunkChain(b"namespace", 16))
    end, why = target.target.reach(record)
    assert (end, why) == (48, "")
    target.target.order(record, 0, 0, end, step=0)
    (announce,) = target.said()
    assert isinstance(announce, Announce)
    assert announce.tables == (BlockTable(0, (50, 51, 52)), BlockTable(2, (70,)))
    assert target.pool.held == {50, 51, 52, 70}


def test_reach() -> None:
    target = Target()
    record = RequestRecord(View([[50]]), ChunkChain(b"namespace", 16))
    assert target.target.reach(record) == (55, "")
    record.push_over = "pushed"
    assert target.target.reach(record) == (0, "pushed")
    for push in (None, PushParameters(PUSH, None)):
        other = RequestRecord(View([[50]], push=push), ChunkChain(b"namespace", 16))
        assert target.target.reach(other) == (0, "")


def test_a_push_that_is_not_needed_is_declined_once() -> None:
    target = Target()
    record = RequestRecord(View([[50]]), ChunkChain(b"namespace", 16))
    target.target.decline(record)
    target.target.decline(record)
    assert target.said() == [Cancel(Attempt(PUSH, NO_EPOCH))]
    assert target.target.reach(record) == (0, "not_needed")


def test_nothing_is_declined_that_was_asked_for() -> None:
    target, record, _ = announced()
    target.report(record)
    target.target.decline(record)
    assert target.said() == []


# -- how it ends -----------------------------------------------------------------------------


def test_the_request_runs_when_every_rank_has_all() -> None:
    target, record, attempt = announced(ranks=2)
    target.hear(Bound(attempt))
    epoch = attempt.epoch
    target.report(record, Outcome.DONE)
    assert record.receive == epoch
    assert record.push_over == ""
    target.report(record, Outcome.DONE, Outcome.DONE)
    assert (record.push_over, record.story.failed) == ("pushed", False)
    assert target.pool.held == set()
    assert target.said() == []


def test_the_request_does_not_run_if_one_rank_has_not() -> None:
    target, record, attempt = announced(ranks=2)
    target.report(record, Outcome.DONE, Outcome.FAILED, reason="deadline")
    assert (record.push_over, record.story.reason) == ("push_failed", "deadline")
    assert target.said() == [Cancel(attempt)]
    assert target.pool.held
    assert target.target.quarantined == 1


@pytest.mark.parametrize(
    "word",
    [
        lambda attempt: Failed(attempt, "no"),
        lambda attempt: Fenced(attempt, clean=True),
        lambda attempt: lost(),
    ],
)
def test_what_will_not_be_complete_is_given_up_once(word: object) -> None:
    target, record, attempt = announced()
    for _ in range(2):
        target.hear(word(attempt))  # type: ignore[operator]
    assert target.target.give_ups == [attempt.epoch]
    assert target.said() == [Cancel(attempt)]
    target.fail(record)
    assert record.push_over == "push_failed"
    assert target.target.give_ups == [attempt.epoch]


def test_a_fence_ends_a_quarantine_when_what_has_come_is_taken_up() -> None:
    target, record, attempt = announced()
    target.fail(record)
    target.wait(10 * QUARANTINE)  # as long as it is connected, it will answer
    assert target.pool.held
    target.hear(Fenced(attempt, clean=True))
    assert target.target.pending
    target.wait(SETTLE_SECONDS / 2)
    assert target.pool.held
    target.wait(SETTLE_SECONDS / 2)
    assert target.pool.held == set()
    assert target.target.quarantined == 0


def test_a_failure_is_no_fence() -> None:
    """What was sent before it may still be on its way."""
    target, record, attempt = announced()
    target.hear(Failed(attempt, "no"))
    target.fail(record)
    target.wait(10 * QUARANTINE)
    assert target.pool.held
    assert not target.target.pending


def test_a_word_of_another_peer_or_push_changes_nothing() -> None:
    target, record, attempt = announced()
    for letter in (
        Letter("10.0.0.2:9300", Fenced(attempt, clean=True)),
        Letter("10.0.0.2:9300", Failed(attempt, "no")),
        Letter(P, Fenced(Attempt("another", attempt.epoch), clean=True)),
    ):
        target.target.receive([letter], 0.0)
    assert (target.said(), target.target.give_ups) == ([], [])
    target.fail(record)
    target.wait(2 * SETTLE_SECONDS)
    assert target.pool.held


def test_a_fence_that_is_not_clean_ends_it_when_no_network_holds_anything_back() -> None:
    target, record, attempt = announced()
    target.fail(record)
    target.hear(Fenced(attempt, clean=False))
    target.wait(QUARANTINE - 1)
    target.hear(lost())
    target.hear(Opened(P, "one"))
    assert target.pool.held
    target.wait(1)
    assert target.pool.held == set()


def test_a_fence_does_not_free_what_ranks_still_wait_for() -> None:
    target, record, attempt = announced()
    target.hear(Fenced(attempt, clean=True))
    target.wait(2 * SETTLE_SECONDS)
    assert target.pool.held
    target.fail(record)
    target.wait(0)
    assert target.pool.held == set()


@pytest.mark.parametrize("fate", [Fate.CLOSED, Fate.UNREACHABLE])
def test_a_peer_that_is_gone_ends_a_quarantine_after_a_while(fate: Fate) -> None:
    target, record, _ = announced()
    target.hear(lost(fate=fate))
    target.fail(record)
    target.wait(QUARANTINE - 1)
    assert target.pool.held
    target.wait(1)
    assert target.pool.held == set()


def test_a_peer_that_is_silent_ends_it_only_with_its_word() -> None:
    target, record, attempt = announced()
    target.hear(lost(fate=Fate.CLOSED))
    target.hear(lost(was_open=False, fate=Fate.SILENT))
    target.fail(record)
    target.wait(10 * QUARANTINE)
    assert target.pool.held
    target.hear(OPENED, Fenced(attempt, clean=True))
    target.wait(SETTLE_SECONDS)
    assert target.pool.held == set()


def test_a_peer_that_is_back_is_asked_again_and_ends_it_with_its_word() -> None:
    target, record, attempt = announced()
    target.hear(lost())
    target.fail(record)
    target.said()
    target.wait(SILENCE)
    assert target.said() == [Cancel(attempt)]
    target.wait(SILENCE)
    assert target.said() == [Cancel(attempt)]  # until it answers
    target.hear(OPENED)
    assert target.said() == [Cancel(attempt)]
    target.wait(10 * QUARANTINE)
    assert target.pool.held


def test_another_incarnation_is_asked_too() -> None:
    """What was announced while the former one was dying may have waited for this connection."""
    target, record, attempt = announced()
    target.hear(lost(), Opened(P, "two"))
    target.fail(record)
    assert target.said().count(Cancel(attempt)) == 2
    target.wait(10 * QUARANTINE)
    assert target.pool.held
    target.hear(Fenced(attempt, clean=True))
    target.wait(SETTLE_SECONDS)
    assert target.pool.held == set()


def test_what_was_never_said_holds_nothing() -> None:
    target = Target()
    record = target.order()
    target.hear(lost(was_open=False))
    assert not any(isinstance(message, Announce) for message in target.said())
    target.fail(record)
    assert target.pool.held == set()


def test_what_the_link_could_not_say_holds_nothing() -> None:
    target = Target()
    record = target.order()
    (announce,) = target.said()
    assert isinstance(announce, Announce)
    target.hear(Lost(P, "refused", False, Fate.CLOSED, (announce.attempt,)))
    target.fail(record)
    assert target.pool.held == set()


def test_what_the_link_has_may_arrive_although_a_connection_is_lost_that_never_was() -> None:
    """It may have been given to the link after that connection, and wait for the next."""
    target = Target()
    record = target.order()
    assert any(isinstance(message, Announce) for message in target.said())
    target.hear(lost(was_open=False))
    target.fail(record)
    assert target.pool.held


def test_what_is_said_of_a_push_that_is_over_changes_nothing() -> None:
    target, record, attempt = announced()
    target.report(record)
    target.hear(
        Bound(attempt), Failed(attempt, "late"), Fenced(attempt, clean=True), lost(), OPENED
    )
    assert (target.said(), target.target.give_ups) == ([], [])
    assert record.push_over == "pushed"


def test_a_request_that_ends_gives_its_push_up_and_that_is_nobodys_fault() -> None:
    target = Target(failures=1)
    record = target.order()
    assert record.receive is not None
    target.target.give_up(record.receive, CANCELLED)
    target.fail(record, reason="given_up")
    assert target.target.reach(RequestRecord(View([[50]]), ChunkChain(b"namespace", 16))) == (
        55,
        "",
    )


def test_an_announcement_names_the_weights() -> None:
    target, epoch = Target(), Epoch("v2")
    target.order(epoch=epoch)
    (letter,) = target.target.letters
    assert isinstance(letter.message, Announce)
    assert letter.message.digest == prompt_digest(range(56), b"salt", b"image 56", epoch)
    assert letter.message.digest != prompt_digest(range(56), b"salt", b"image 56")


def test_a_peer_that_fails_in_a_row_is_not_asked_for_a_while_and_then_tried_once() -> None:
    target = Target(failures=2)
    for _ in range(2):
        target.fail(target.order())
    other = RequestRecord(View([[50]]), ChunkChain(b"namespace", 16))
    assert target.target.reach(other) == (0, "peer_out_of_use")
    elsewhere = RequestRecord(
        View([[50]], push=PushParameters(PUSH, "10.0.0.2:9300")), ChunkChain(b"namespace", 16)
    )
    assert target.target.reach(elsewhere) == (55, "")
    target.now += PAUSE
    assert target.target.reach(other) == (55, "")
    tried = target.order()
    assert target.target.reach(other) == (0, "peer_out_of_use")
    target.report(tried)
    assert target.target.reach(other) == (55, "")


def test_nobody_else_ends_a_push() -> None:
    target, _, attempt = announced()
    for letter in (
        Letter("10.9.9.9:1", Failed(attempt, "no")),
        Letter("10.9.9.9:1", Fenced(attempt, clean=True)),
        Letter(P, Failed(Attempt("another", attempt.epoch), "no")),
    ):
        target.target.receive([letter], 0.0)
    assert target.target.give_ups == []


def test_what_was_never_announced_is_not_held() -> None:
    target, record, attempt = announced()
    target.hear(Lost(P, "refused", was_open=False, fate=Fate.CLOSED, unsent=(attempt,)))
    target.fail(record)
    assert target.target.quarantined == 0
