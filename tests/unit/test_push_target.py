"""The decode engine's side of a push: what is announced, when the request runs, and until when the
blocks of one that was given up are held. What happens under every order of events is shown in
``tests/protocol``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import cast

import pytest
from driven_planner import Pool

from lamina_kv.config import BreakerConfig, PushConfig
from lamina_kv.config.tree import least_quarantine
from lamina_kv.control import offers
from lamina_kv.control.cost import Costs
from lamina_kv.control.leases import LeaseBook
from lamina_kv.control.push.claims import ANEW_SECONDS, MAX_CLAIMED
from lamina_kv.control.push.failures import QUIET_SECONDS
from lamina_kv.control.push.inbound import LONGEST_SUSPICION, PushOffer
from lamina_kv.control.push.target import (
    CANCELLED,
    REMEMBERED_PEERS,
    SETTLE_SECONDS,
    PushTarget,
)
from lamina_kv.control.requests import PushParameters, RequestRecord
from lamina_kv.control.shape import ChunkShape
from lamina_kv.control.transfers import TransferTable
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.keys import CHECKPOINT, ChunkChain, Epoch, prompt_digest
from lamina_kv.observe.metrics import Meter, Series
from lamina_kv.plan import Outcome, ReceiveOrder, SendersOrder, TransferId, TransferReceipt
from lamina_kv.push.cards import EngineCard, RankCard, SenderCard
from lamina_kv.push.letters import Fate, Letter, Lost, News, Opened
from lamina_kv.push.messages import (
    LONGEST_PATIENCE,
    NO_BLOCK,
    NO_EPOCH,
    Absent,
    Announce,
    Attempt,
    BlockTable,
    Bound,
    Cancel,
    Claim,
    Failed,
    Fenced,
    Goodbye,
    LinkMessage,
    Queued,
)
from lamina_kv.tiers.regard import USUAL
from push_books import ByHand, ClockByHand, push_books

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
    regard = USUAL

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


class Target(ByHand):
    """A target, with the ranks and the link that it needs."""

    def __init__(
        self,
        *groups: Group,
        ranks: int = 1,
        failures: int = 3,
        blocks: int = 1000,
        deadline: float = DEADLINE,
    ) -> None:
        self.groups = groups or (FULL,)
        self.cost = Costs()
        self.meter = Meter()
        self.gauges: dict[Series, float] = {}
        self.clock = ClockByHand()
        self.pool = Pool()
        self.ranks = ranks
        self.transfers = TransferTable(ranks)
        shape = ChunkShape(BLOCK, self.groups, NULL)
        breaker = BreakerConfig(failures=failures, pause=PAUSE)
        self.target = PushTarget(
            PushConfig(
                deadline=deadline,
                silence=SILENCE,
                quarantine=max(QUARANTINE, least_quarantine(deadline, SILENCE)),
            ),
            push_books(
                shape, self.transfers, LeaseBook(self.pool), self.clock, self.meter, breaker
            ),
            EngineCard(
                "D", b"", False, (), tuple(RankCard(rank, b"", blocks, ()) for rank in range(ranks))
            ),
            self.cost,
        )

    @property
    def step(self) -> int:
        """The step whose plan is made next."""
        return self.clock.step

    @step.setter
    def step(self, number: int) -> None:
        self.clock.step = number

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
        self.target.order(record, floor, start, end)
        return record

    def arrive(self, number: int, *, address: str = P, request_id: str = "") -> RequestRecord:
        """A request of four blocks of its own comes."""
        push = PushParameters(f"push {number}", address)
        blocks = [1000 + 4 * number + i for i in range(4)]
        view = View(
            [blocks for _ in self.groups], push=push, request_id=request_id or f"request {number}"
        )
        record = RequestRecord(view, ChunkChain(b"namespace", 16))
        self.target.arrived(record)
        return record

    def weigh(self, record: RequestRecord, start: int = 0) -> PushOffer:
        return self.target.weigh(record, start, start)

    def admit(self, record: RequestRecord) -> bool:
        """The engine would give a request its blocks. Returns whether it is pushed to."""
        if not (offer := self.weigh(record)).end:
            return False
        self.target.order(record, 0, 0, offer.end)
        return True

    def counted(self, name: str, reason: str) -> float:
        return self.meter.drain().counters.get((name, (reason,)), 0)

    def blocks(self, state: str) -> float:
        self.target.gauges()
        self.gauges.update(self.meter.drain().gauges)
        return self.gauges[("push_blocks", (state,))]

    @property
    def due_in(self) -> float:
        return self.target.due - self.now

    def hear(self, *news: News | LinkMessage) -> None:
        items = [
            n if isinstance(n, Opened | Lost) else Letter(P, cast(LinkMessage, n)) for n in news
        ]
        self.target.receive(items)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.step += 1
        self.target.tick()

    def dial(self, *fates: Fate) -> None:
        """The link calls again, and does not get through."""
        for fate in fates:
            self.hear(lost(was_open=False, fate=fate))
            self.wait(0)

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


ALL = 1_000_000
"""An epoch that nothing has reached."""


def lost(*, was_open: bool = True, fate: Fate = Fate.CLOSED, announced: int = ALL) -> Lost:
    """The end of a connection, on which everything was announced if nothing else is said."""
    return Lost(P, "gone", was_open=was_open, fate=fate, announced=announced)


def elsewhere(machine: str, incarnation: str = "two") -> Opened:
    return Opened(P, incarnation, SenderCard(incarnation, False, ("end",)), machine)


OPENED = Opened(P, "one", SenderCard("one", False, ("end 0", "end 1")), "10.0.0.1")


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
    target.target.order(record, 0, 0, end)
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
    assert (record.push_over, record.delivery.push_failed) == ("pushed", "")
    assert target.pool.held == set()
    assert target.said() == []


def test_the_request_does_not_run_if_one_rank_has_not() -> None:
    target, record, attempt = announced(ranks=2)
    target.report(record, Outcome.DONE, Outcome.FAILED, reason="deadline")
    assert (record.push_over, record.delivery.push_failed) == ("push_failed", "deadline")
    assert target.said() == [Cancel(attempt)]
    assert target.pool.held
    assert target.blocks("quarantined")


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
    assert not target.blocks("quarantined")


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
        target.target.receive([letter])
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
    target.hear(OPENED)
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
    target.dial(fate, fate)
    target.wait(QUARANTINE - 1)
    target.dial(fate, fate)
    assert target.pool.held
    target.wait(1)
    target.dial(fate)
    assert target.pool.held, "this dial may have begun before"
    target.dial(fate)
    assert target.pool.held == set()


def test_a_peer_that_is_found_stopped_when_the_time_is_up_is_not_gone() -> None:
    """A firewall has ended its connection, and it was not dialled since."""
    target, record, attempt = announced()
    target.hear(lost(fate=Fate.CLOSED))
    target.fail(record)
    target.wait(QUARANTINE)
    assert target.due_in > 0, "an engine without requests does not step all the time"
    target.dial(Fate.UNREACHABLE, Fate.SILENT, Fate.UNREACHABLE, Fate.UNKNOWN)
    assert target.pool.held
    target.hear(OPENED, Fenced(attempt, clean=True))
    target.wait(SETTLE_SECONDS)
    assert target.pool.held == set()


def test_who_keeps_silent_where_a_peer_was_that_has_gone_is_believed_for_an_hour() -> None:
    """It may be the peer, stopped, or anybody who can listen there."""
    target, record, _ = announced()
    target.hear(lost(fate=Fate.CLOSED))
    target.fail(record)
    while target.now < LONGEST_SUSPICION - SILENCE:
        target.wait(SILENCE)
        target.dial(Fate.SILENT if target.now % 3600 else Fate.CLOSED)
        assert target.pool.held
    target.wait(SILENCE)
    assert target.pool.held == set()


def test_a_name_that_leads_elsewhere_does_not_end_what_a_stopped_peer_may_write() -> None:
    target, record, attempt = announced()
    target.hear(lost(fate=Fate.SILENT))
    target.fail(record)
    target.hear(elsewhere("10.0.0.9"), Fenced(attempt, clean=True))
    target.wait(100 * QUARANTINE)
    assert target.pool.held
    target.hear(lost(fate=Fate.CLOSED), elsewhere("10.0.0.9", "three"))
    target.wait(100 * QUARANTINE)
    assert target.pool.held
    target.hear(lost(fate=Fate.CLOSED), elsewhere("10.0.0.1", "four"))
    target.wait(QUARANTINE - 1)
    assert target.pool.held
    target.wait(1)
    assert target.pool.held == set(), "another run listens where the stopped one did"


@pytest.mark.parametrize("fate", [Fate.CLOSED, Fate.UNREACHABLE])
def test_a_name_that_leads_elsewhere_ends_what_a_peer_may_write_that_has_gone(fate: Fate) -> None:
    target, record, attempt = announced()
    target.hear(lost(fate=fate))
    target.fail(record)
    target.hear(elsewhere("10.0.0.9"), Fenced(attempt, clean=True))
    target.wait(QUARANTINE)
    assert target.pool.held == set()


@pytest.mark.parametrize("fate", [Fate.UNREACHABLE, Fate.UNKNOWN])
def test_a_peer_that_was_silent_is_not_gone_because_it_cannot_be_reached(fate: Fate) -> None:
    """It is stopped, and goes on when it is told to."""
    target, record, _ = announced()
    target.hear(lost(fate=Fate.SILENT))
    target.fail(record)
    target.hear(lost(was_open=False, fate=fate))
    target.wait(10 * QUARANTINE)
    assert target.pool.held
    target.hear(lost(was_open=False, fate=Fate.CLOSED))
    target.wait(QUARANTINE)
    target.dial(Fate.CLOSED, Fate.CLOSED)
    assert target.pool.held == set()


def test_what_is_in_the_way_here_says_nothing_of_a_peer() -> None:
    target, record, _ = announced()
    target.hear(lost(fate=Fate.UNKNOWN))
    target.fail(record)
    target.wait(10 * QUARANTINE)
    assert target.pool.held
    target.hear(lost(was_open=False, fate=Fate.UNREACHABLE))
    target.wait(QUARANTINE - 1)
    target.hear(lost(was_open=False, fate=Fate.UNKNOWN))
    assert target.pool.held
    target.wait(1)
    target.dial(Fate.UNKNOWN, Fate.UNKNOWN)
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
    target.hear(lost(), Opened(P, "two", SenderCard("two", False, ("end",))))
    target.fail(record)
    assert target.said().count(Cancel(attempt)) == 2
    target.wait(10 * QUARANTINE)
    assert target.pool.held
    target.hear(Fenced(attempt, clean=True))
    target.wait(SETTLE_SECONDS)
    assert target.pool.held == set()


@pytest.mark.parametrize("fate", Fate)
def test_another_incarnation_does_not_answer_for_what_the_former_one_has_sent(fate: Fate) -> None:
    """Its workers may live on for a while, and so may bytes in the network."""
    target, record, attempt = announced()
    anew = elsewhere("10.0.0.1")
    target.hear(OPENED)
    target.hear(lost(fate=fate))
    target.fail(record)
    target.hear(anew, Fenced(attempt, clean=True))
    target.wait(SETTLE_SECONDS)
    target.hear(anew, Fenced(attempt, clean=True))
    target.wait(QUARANTINE - SETTLE_SECONDS - 1)
    assert target.pool.held
    target.wait(1)
    assert target.pool.held == set()


def test_a_peer_that_is_connected_is_asked_until_it_has_fenced() -> None:
    """It may be idle when the last write has drained: only a word from here makes it look."""
    target, record, attempt = announced()
    target.hear(OPENED)
    target.hear(lost())
    target.fail(record)
    target.hear(OPENED)
    target.said()
    for _ in range(3):
        target.wait(SILENCE)
        assert target.said() == [Cancel(attempt)]
    target.hear(Fenced(attempt, clean=True))
    target.wait(SILENCE)
    assert target.said() == []


def test_what_was_never_said_holds_nothing_if_that_is_known_late() -> None:
    """Its request had ended before."""
    target = Target()
    record = target.order()
    (announce,) = [word for word in target.said() if isinstance(word, Announce)]
    target.target.give_up(TransferId(announce.attempt.epoch), CANCELLED)
    target.fail(record)
    assert target.pool.held
    unsent = (announce.attempt,)
    target.hear(Lost(P, "gone", was_open=False, fate=Fate.SILENT, unsent=unsent))
    assert target.pool.held == set()


def test_what_the_link_could_not_say_holds_nothing() -> None:
    target = Target()
    record = target.order()
    (announce,) = target.said()
    assert isinstance(announce, Announce)
    unsent = (announce.attempt,)
    target.hear(Lost(P, "refused", was_open=False, fate=Fate.CLOSED, unsent=unsent))
    target.fail(record)
    assert target.pool.held == set()


def goodbye(*unclean: int, announced_until: int = ALL) -> Lost:
    last = Goodbye(NO_EPOCH, unclean)
    return Lost(
        P, "it has ended", was_open=True, fate=Fate.CLOSED, announced=announced_until, goodbye=last
    )


def test_what_a_peer_that_has_ended_does_not_name_holds_nothing_for_long() -> None:
    """It may have been announced when the peer did not listen any more."""
    target, record, _ = announced()
    target.hear(goodbye())
    target.fail(record)
    target.wait(SETTLE_SECONDS)
    assert target.pool.held == set()
    assert target.blocks("quarantined") == 0


def test_what_a_peer_that_has_ended_names_may_still_arrive() -> None:
    target, record, attempt = announced()
    target.hear(goodbye(attempt.epoch))
    target.fail(record)
    target.wait(QUARANTINE - 1)
    assert target.pool.held


def test_a_goodbye_says_nothing_of_what_a_former_run_may_have_sent() -> None:
    target, record, _ = announced()
    target.hear(lost(fate=Fate.CLOSED), elsewhere("10.0.0.1"), goodbye())
    target.fail(record)
    target.wait(QUARANTINE - 1)
    assert target.pool.held
    target.wait(1)
    assert target.pool.held == set()


def test_a_peer_that_says_goodbye_is_not_to_blame() -> None:
    target = Target(failures=1)
    target.hear(OPENED)
    record = target.order()
    target.hear(goodbye())
    target.fail(record)
    assert target.target.reach(target.arrive(1))[0]


def test_what_the_link_has_may_arrive_although_a_connection_is_lost_that_never_was() -> None:
    """It may have been given to the link after that connection, and wait for the next."""
    target = Target()
    record = target.order()
    assert any(isinstance(message, Announce) for message in target.said())
    target.hear(lost(was_open=False, announced=NO_EPOCH))
    assert target.target.give_ups == []
    target.fail(record)
    assert target.pool.held


def test_what_a_connection_did_not_carry_goes_on_by_the_next() -> None:
    """Whoever is there names those who will have written it."""
    target, record, attempt = announced()
    target.hear(lost(announced=attempt.epoch - 1))
    assert target.target.give_ups == []
    target.hear(elsewhere("10.0.0.2"))
    assert target.target.senders[-1] == SendersOrder(TransferId(attempt.epoch), (("end",),))
    target.report(record)
    assert record.push_over == "pushed"
    assert target.pool.held == set()


def test_a_goodbye_says_nothing_of_what_a_later_connection_carries() -> None:
    """Another engine has it, which may write until it says that it does not."""
    target, record, attempt = announced()
    target.hear(goodbye(announced_until=attempt.epoch - 1), elsewhere("10.0.0.1"))
    assert record.receive is not None
    target.target.give_up(record.receive, CANCELLED)
    target.fail(record)
    target.wait(QUARANTINE)
    assert target.pool.held
    target.hear(Fenced(attempt, clean=True))
    target.wait(SETTLE_SECONDS)
    assert target.pool.held == set()


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
        target.target.receive([letter])
    assert target.target.give_ups == []


def test_what_was_never_announced_is_not_held() -> None:
    target, record, attempt = announced()
    target.hear(Lost(P, "refused", was_open=False, fate=Fate.CLOSED, unsent=(attempt,)))
    target.fail(record)
    assert not target.blocks("quarantined")


# -- room ------------------------------------------------------------------------------------

WAIT = PushOffer(0, "no_room", ask_again=True)


def test_parked_and_quarantined_blocks_take_half_and_leave_the_rest_to_everybody() -> None:
    """A prefill engine stops while prompts wait for it: 25 of four blocks fit into half of 200."""
    target = Target(blocks=200, failures=1000)
    target.hear(OPENED)
    parked = []
    for number in range(50):
        record = target.arrive(number)
        if target.admit(record):
            parked.append(record)
    assert len(parked) == 25
    assert len(target.pool.held) == 100
    target.said()
    target.hear(lost(fate=Fate.SILENT))
    for record in parked:
        target.fail(record)
    target.wait(86_400)
    assert len(target.pool.held) == 100
    target.hear(OPENED)
    assert target.weigh(target.arrive(99)) == PushOffer(0, "no_room")
    target.hear(lost(fate=Fate.CLOSED))
    target.wait(QUARANTINE)
    target.dial(Fate.CLOSED, Fate.CLOSED)
    assert target.pool.held == set()
    assert target.weigh(target.arrive(100)).end == 55


def test_what_finds_no_room_waits_for_it_without_blocks() -> None:
    target = Target(blocks=16)
    first, second, third = (target.arrive(number) for number in range(3))
    assert target.admit(first)
    assert target.admit(second)
    assert target.weigh(third) == WAIT
    target.wait(1)
    assert target.weigh(third) == WAIT
    target.report(first)
    target.wait(1)
    assert target.admit(third)


def test_what_waits_for_room_is_computed_here_when_the_deadline_is_over() -> None:
    target = Target(blocks=8)
    assert target.admit(target.arrive(0))
    waiting = target.arrive(1)
    target.hear(Queued(Attempt("push 1", NO_EPOCH)))
    assert target.weigh(waiting) == WAIT
    assert target.target.waits(waiting)
    target.wait(DEADLINE)
    assert not target.target.waits(waiting)
    assert target.weigh(waiting) == PushOffer(0, "no_room")


def test_nobody_goes_past_one_that_waits_for_room() -> None:
    """Or a large prompt would wait behind small ones for ever."""
    target = Target(blocks=16)
    first, large, small = (target.arrive(number) for number in range(3))
    target.target.order(first, 0, 16, 55)
    target.target.order(target.arrive(3), 0, 32, 55)
    assert target.weigh(large) == WAIT
    assert target.weigh(small, 32) == WAIT
    target.wait(0)  # the engine asks about the first of its queue first
    assert not target.target.waits(small)
    assert target.weigh(small, 32).end == 55


OTHER = "10.0.0.2:9300"


def test_a_prefill_engine_that_hangs_leaves_the_others_room() -> None:
    """Of 64 blocks half may be parked, and half of that for each of two."""
    target = Target(blocks=64)
    for number in range(4):
        assert target.admit(target.arrive(number))
    elsewhere = target.arrive(4, address=OTHER)
    here = target.arrive(5)
    assert target.weigh(here) == WAIT
    assert target.admit(elsewhere), "nothing that others wait for is its"
    for number in range(6, 9):
        assert target.admit(target.arrive(number, address=OTHER))
    assert target.weigh(target.arrive(9, address=OTHER)) == WAIT
    target.report(elsewhere)
    target.wait(0)
    assert target.weigh(here) == WAIT
    assert target.admit(target.arrive(10, address=OTHER))


def test_one_that_was_alone_and_hangs_leaves_others_half_as_much_again() -> None:
    target = Target(blocks=80, failures=1000)
    target.hear(OPENED)
    hanging = [target.arrive(number) for number in range(10)]
    assert all(map(target.admit, hanging))
    target.said()
    target.hear(lost(fate=Fate.SILENT))
    for record in hanging:
        target.fail(record)
    target.wait(3600)
    assert all(target.admit(target.arrive(number, address=OTHER)) for number in range(10, 15))
    assert target.weigh(target.arrive(15, address=OTHER)) == WAIT
    assert target.weigh(target.arrive(16)) == PushOffer(0, "no_room")
    assert target.weigh(target.arrive(17, address="10.0.0.3:9300")) == WAIT
    assert len(target.pool.held) == 60


def test_one_alone_has_all_the_room() -> None:
    target = Target(blocks=64)
    for number in range(8):
        assert target.admit(target.arrive(number))
    assert target.weigh(target.arrive(8)) == WAIT
    assert target.weigh(target.arrive(9, address=OTHER)) == WAIT, "and what waits goes first"


def test_one_that_is_larger_than_the_share_of_its_prefill_engine_goes_alone() -> None:
    target = Target(blocks=14)
    target.arrive(0, address=OTHER)
    first, second = target.arrive(1), target.arrive(2)
    assert target.admit(first)
    assert target.weigh(second) == WAIT
    target.report(first)
    target.wait(0)
    assert target.admit(second)


def test_what_never_fits_is_computed_here() -> None:
    target = Target(blocks=7)
    assert target.weigh(target.arrive(0)) == PushOffer(0, "too_large")


def test_what_the_decode_engine_has_takes_no_room() -> None:
    target = Target(FULL, WINDOW, blocks=10)
    assert target.weigh(target.arrive(0)) == PushOffer(0, "too_large")
    assert target.weigh(target.arrive(1), 16).end == 55


@pytest.mark.parametrize("groups", [(FULL,), (FULL, WINDOW), (FULL, STATE)])
@pytest.mark.parametrize("floor", [0, 16, 32])
def test_the_room_that_is_weighed_is_what_is_taken(groups: tuple[Group, ...], floor: int) -> None:
    target = Target(*groups)
    tables = [
        [] if g is STATE else [100 * i + b for b in range(50, 54)] for i, g in enumerate(groups)
    ]
    view = View(tables, [70, 71])
    record = RequestRecord(view, ChunkChain(b"namespace", 16))
    end, _ = target.target.reach(record)
    target.target.order(record, floor, floor, end)
    shape = ChunkShape(BLOCK, groups, NULL)
    assert shape.pushed_blocks(floor, floor, end) == len(target.pool.held)
    assert target.blocks("parked") == len(target.pool.held)


def test_what_is_parked_and_quarantined_is_counted() -> None:
    target, record, attempt = announced()
    assert (target.blocks("parked"), target.blocks("quarantined")) == (4, 0)
    target.hear(Bound(attempt))
    target.fail(record)
    assert (target.blocks("parked"), target.blocks("quarantined")) == (0, 4)
    target.hear(Fenced(attempt, clean=True))
    target.wait(SETTLE_SECONDS)
    assert target.blocks("quarantined") == 0


# -- claims ----------------------------------------------------------------------------------


def claims(target: Target) -> list[tuple[str, ...]]:
    return [message.pushes for message in target.said() if isinstance(message, Claim)]


def test_what_waits_for_blocks_is_claimed_until_it_has_them() -> None:
    target = Target()
    first, second = target.arrive(0), target.arrive(1)
    assert target.said() == [Claim(("push 0",), DEADLINE), Claim(("push 1",), DEADLINE)]
    for _ in range(10):
        target.wait(DEADLINE / 2)
        assert claims(target) == [("push 0", "push 1")]
    target.hear(Queued(Attempt("push 0", NO_EPOCH)))
    assert target.admit(first)
    target.wait(DEADLINE / 2)
    assert claims(target) == [("push 1",)]
    target.target.abandoned(second.view.request_id)
    assert target.said() == [Cancel(Attempt("push 1", NO_EPOCH))]
    target.wait(DEADLINE)
    target.wait(DEADLINE)
    assert claims(target) == []


def test_a_claim_is_renewed_before_a_prefill_engine_lets_it_go() -> None:
    target = Target(deadline=80_000.0)
    target.arrive(0)
    (claim,) = target.said()
    assert isinstance(claim, Claim)
    assert claim.patience == LONGEST_PATIENCE
    target.wait(LONGEST_PATIENCE / 2)
    assert claims(target) == [("push 0",)]


def test_what_is_declined_is_not_claimed_any_more() -> None:
    target = Target()
    record = target.arrive(0)
    target.said()
    target.target.decline(record, "below_min_tokens")
    assert target.said() == [Cancel(Attempt("push 0", NO_EPOCH))]
    target.target.abandoned(record.view.request_id)
    target.wait(DEADLINE)
    assert target.said() == []
    assert target.counted("pushes_skipped", "below_min_tokens") == 1


def test_claims_are_made_anew_when_their_connection_is_lost() -> None:
    target = Target()
    target.hear(OPENED)
    record = target.arrive(0)
    target.hear(Queued(Attempt("push 0", NO_EPOCH)))
    target.said()
    target.hear(lost())
    assert claims(target) == [("push 0",)]
    target.hear(OPENED)
    target.wait(DEADLINE)
    assert target.weigh(record) == PushOffer(0, "unanswered")  # it may be another run of the engine


def test_claims_are_said_in_parts() -> None:
    """A message has an end, however many wait."""
    target = Target()
    target.hear(OPENED)
    for number in range(MAX_CLAIMED + 1):
        target.arrive(number)
    target.said()
    target.hear(lost())
    assert [len(part) for part in claims(target)] == [MAX_CLAIMED, 1]


def test_a_claim_for_which_the_link_is_lost_is_not_said_in_a_loop() -> None:
    target = Target()
    target.hear(OPENED)
    target.arrive(0)
    target.said()
    target.hear(lost())
    assert claims(target) == [("push 0",)]
    for _ in range(3):
        target.hear(OPENED, lost())
        target.wait(ANEW_SECONDS / 4)
        assert claims(target) == []
    target.wait(ANEW_SECONDS / 4)
    assert claims(target) == [("push 0",)]


def test_what_is_claimed_from_an_engine_that_is_not_there_is_computed_here() -> None:
    target = Target(failures=1)
    record, other = target.arrive(0), target.arrive(1, address="10.0.0.2:9300")
    target.hear(lost(was_open=False))
    assert target.weigh(record) == PushOffer(0, "lost")
    assert target.weigh(other).end == 55
    assert target.weigh(target.arrive(2)) == PushOffer(0, "peer_out_of_use")
    assert target.counted("pushes_skipped", "lost") == 1


def test_what_a_prefill_engine_refuses_while_it_is_claimed_is_computed_here() -> None:
    target = Target()
    record = target.arrive(0)
    target.said()
    target.hear(Failed(Attempt("push 0", NO_EPOCH), "the prefill ended before it began"))
    assert target.weigh(record) == PushOffer(0, "failed")
    target.target.abandoned(record.view.request_id)
    assert target.said() == []


@pytest.mark.parametrize("first", ["claimed", "announced"])
def test_of_two_requests_of_one_name_the_second_is_computed_here_and_nobody_is_blamed(
    first: str,
) -> None:
    """A prefill engine answers for the first alone."""
    target = Target(failures=1)
    target.hear(OPENED)
    one = target.arrive(0)
    target.hear(Queued(Attempt("push 0", NO_EPOCH)))
    if first == "announced":
        assert target.admit(one)
    target.said()
    two = target.arrive(0, request_id="another")
    assert target.weigh(two) == PushOffer(0, "id_in_use")
    target.target.decline(two, "id_in_use")
    target.target.abandoned("another")
    assert target.said() == []
    target.wait(0.9 * DEADLINE)
    assert target.counted("pushes_skipped", "id_in_use") == 1
    if first == "claimed":
        assert target.said() == [Claim(("push 0",), DEADLINE)]
        assert target.admit(one)
    target.report(one)
    assert target.weigh(target.arrive(0)).end == 55


def test_what_is_not_needed_is_not_declined_for_another_request_of_its_name() -> None:
    target = Target()
    target.arrive(0)
    target.said()
    push = PushParameters("push 0", P)
    record = RequestRecord(View([[1]], push=push, request_id="another"), ChunkChain(b"name", 16))
    target.target.decline(record, "below_min_tokens")
    assert target.said() == []


# -- what a prefill engine does not have -------------------------------------------------------


def test_what_a_prefill_engine_does_not_have_is_not_waited_for() -> None:
    target, record, attempt = announced()
    target.hear(Absent(attempt))
    target.wait(0.9)
    target.hear(Absent(attempt))
    assert target.target.give_ups == []
    target.wait(0.1)
    assert target.target.give_ups == [attempt.epoch]
    assert target.said() == [Cancel(attempt)]
    target.fail(record, reason="given_up")
    assert target.counted("pushes_given_up", "absent") == 1
    assert target.target.reach(RequestRecord(View([[50]]), ChunkChain(b"namespace", 16)))[0] == 55


@pytest.mark.parametrize("word", [Queued, Bound])
def test_what_a_prefill_engine_has_is_waited_for_however_busy_it_is(
    word: type[Queued] | type[Bound],
) -> None:
    target, _, attempt = announced()
    target.hear(Absent(attempt), word(attempt))
    target.wait(0.9 * DEADLINE)
    assert target.target.give_ups == []


def test_a_claim_that_is_taken_up_is_waited_for_when_it_is_announced() -> None:
    target = Target()
    target.hear(OPENED)
    record = target.arrive(0)
    target.hear(Absent(Attempt("push 0", NO_EPOCH)), Queued(Attempt("push 0", NO_EPOCH)))
    target.wait(5 * DEADLINE)  # the engine is full
    assert target.admit(record)
    target.wait(0.9 * DEADLINE)
    assert target.target.give_ups == []


def test_what_would_take_long_to_compute_here_is_waited_for_as_long() -> None:
    target, _, attempt = announced()
    target.cost.computed(0, 100, 20.0)  # 11 s for 55 tokens
    slow = target.order(View([[60, 61, 62, 63]], request_id="slow"))
    assert slow.receive is not None
    target.hear(Absent(Attempt(PUSH, slow.receive)), Queued(attempt))
    target.wait(10.9)
    assert target.target.give_ups == []
    target.wait(0.2)
    assert target.target.give_ups == [slow.receive]


def test_no_more_is_computed_instead_than_there_is_time_for() -> None:
    """A prefill engine whose front is slow makes nobody else compute all that it is to compute."""
    target = Target()
    target.cost.computed(0, 100, 20.0)
    records = [target.arrive(number) for number in range(100)]
    target.hear(*(Absent(Attempt(f"push {number}", NO_EPOCH)) for number in range(100)))
    for _ in range(120):
        target.wait(0.5)
        for record in records:
            if not record.push_over:
                target.weigh(record)
    given_up = [record for record in records if record.push_over]
    assert len(given_up) == 5  # 11 s each: the first at 11 s, the second at 22 s
    for record in given_up:
        record.counted = True  # they are computed
    target.wait(0)
    target.weigh(records[50])
    assert records[50].push_over == "absent"


def test_while_nobody_knows_what_computing_takes_one_at_a_time_is_tried() -> None:
    target = Target()
    records = [target.arrive(number) for number in range(3)]
    target.hear(*(Absent(Attempt(f"push {number}", NO_EPOCH)) for number in range(3)))
    target.wait(1)
    assert [target.weigh(record).reason for record in records] == ["absent", "", ""]
    records[0].counted = True
    target.wait(0)
    assert [target.weigh(record).reason for record in records[1:]] == ["absent", ""]


def test_an_engine_that_says_nothing_is_given_up_later_and_is_out_of_use() -> None:
    """It may be in a long step."""
    target = Target(failures=1)
    target.hear(OPENED)
    record = target.order()
    target.wait(0.2 * DEADLINE)
    assert target.target.give_ups == []
    target.wait(0.1 * DEADLINE)
    assert target.target.give_ups == [record.receive]
    target.fail(record, reason="given_up")
    assert target.counted("pushes_given_up", "unanswered") == 1
    other = RequestRecord(View([[50]]), ChunkChain(b"namespace", 16))
    assert target.target.reach(other) == (0, "peer_out_of_use")


def test_an_engine_that_has_too_much_to_do_is_not_out_of_use() -> None:
    target = Target(failures=1)
    target.hear(OPENED)
    record = target.order()
    assert record.receive is not None
    target.hear(Queued(Attempt(PUSH, record.receive)))
    target.fail(record, reason="deadline")
    assert target.counted("pushes_given_up", "deadline") == 1
    other = RequestRecord(View([[50]]), ChunkChain(b"namespace", 16))
    assert target.target.reach(other)[0] == 55


# -- what one can see --------------------------------------------------------------------------


def test_a_push_that_has_failed_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    target, record, attempt = announced()
    target.hear(Failed(attempt, "the prefill ended before the whole prompt was computed"))
    record.offer = offers.Offer(prompt=56, pushed=55)
    with caplog.at_level("WARNING", "lamina_kv.control"):
        target.fail(record, reason="given_up")
        target.wait(0)
    (line,) = caplog.messages
    assert "request request" in line
    assert P in line
    assert "ended before the whole prompt" in line
    story = offers.describe("request", record.offer, record.delivery, ())
    assert "push FAILED (the prefill ended before the whole prompt was computed)" in story
    assert "recomputed 56" in story
    assert "pushed" not in story


def test_pushes_that_fail_together_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    target = Target(blocks=2000, failures=1000)
    target.hear(OPENED)
    records = [target.arrive(number) for number in range(100)]
    others = [target.arrive(number, address=OTHER) for number in range(100, 103)]
    assert all(map(target.admit, (*records, *others)))
    target.said()
    target.hear(lost())
    for record in records[:50]:
        target.fail(record)
    for record in others:
        target.fail(record, reason="deadline")
    target.wait(1)
    for record in records[50:]:
        target.fail(record)
        target.wait(0)
    first, second = caplog.messages
    assert f"50 pushes from {P} have failed (the first one: request request 0, gone)" in first
    assert f"3 pushes from {OTHER} have failed" in second
    target.wait(QUIET_SECONDS)
    assert (
        f"50 pushes from {P} have failed (the first one: request request 50" in caplog.messages[2]
    )


def test_a_request_that_has_ended_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    target, record, _ = announced()
    assert record.receive is not None
    target.target.give_up(record.receive, CANCELLED)
    target.fail(record, reason="given_up")
    target.wait(0)
    assert caplog.messages == []


@pytest.mark.parametrize(("start", "pushed"), [(40, False), (39, True)])
def test_less_than_a_chunk_is_computed_here(start: int, pushed: bool) -> None:
    """Of 55 tokens 15 are missing, and a chunk has 16."""
    target = Target()
    record = target.arrive(0)
    offer = target.target.weigh(record, 32, start)
    assert offer == (PushOffer(55) if pushed else PushOffer(0, "below_min_tokens"))


# -- what is published ---------------------------------------------------------------------------


def test_links_and_peers_that_are_not_used_are_published() -> None:
    target = Target(failures=1)
    other = EngineCard("decode", b"model", False, (), ())

    def published() -> dict[Series, float]:
        target.target.gauges()
        target.gauges.update(target.meter.drain().gauges)
        return target.gauges

    links, used = ("push_links", ("prefill",)), ("push_peer_in_use", (P,))
    record = target.order()
    target.hear(Opened("decode", "decode", other))
    assert published()[links] == 0, "a decode engine is told of by the other side"
    assert used not in published(), "requests name peers that were never reached"
    target.hear(OPENED)
    assert (published()[links], published()[used]) == (1, 1)
    target.hear(lost())
    target.report(record, Outcome.FAILED)
    assert (published()[links], published()[used]) == (0, 0)


def test_addresses_that_requests_name_are_no_series_and_wash_out_no_breaker() -> None:
    """A series stays for ever. And a prefill engine that fails must not be in use again because
    a router names others, be they there or not."""
    target = Target(failures=1)
    target.hear(OPENED)
    target.report(target.order(), Outcome.FAILED)
    for number in range(2 * REMEMBERED_PEERS):
        record = target.arrive(number, address=f"10.1.0.{number}:1")
        if number % 2:
            gone = Lost(f"10.1.0.{number}:1", "refused", was_open=False, fate=Fate.CLOSED)
            target.hear(gone)
            assert target.weigh(record) == PushOffer(0, "lost")
        target.target.gauges()
    assert target.weigh(target.arrive(9999)) == PushOffer(0, "peer_out_of_use")
    peers = [labels for name, labels in target.meter.drain().gauges if name == "push_peer_in_use"]
    assert peers == [(P,)]


# -- who may say that it is there ----------------------------------------------------------------


def test_ranks_are_told_who_sends_once_its_peer_is_known() -> None:
    target = Target(ranks=2)
    record = target.order()
    assert target.target.senders == []
    target.hear(OPENED)
    order = SendersOrder(TransferId(record.receive or 0), (("end 0",), ("end 1",)))
    assert target.target.senders == [order]
    other = target.order(View([[60, 61, 62, 63]], request_id="other"))
    (_, order) = target.target.senders
    assert order == SendersOrder(TransferId(other.receive or 0), (("end 0",), ("end 1",)))


def test_another_run_of_a_prefill_engine_has_other_senders() -> None:
    target = Target()
    target.hear(OPENED, lost())
    record = target.order()
    assert target.target.senders == []
    target.hear(Opened(P, "two", SenderCard("two", False, ("other end",))))
    order = SendersOrder(TransferId(record.receive or 0), (("other end",),))
    assert target.target.senders == [order]


def test_nobody_is_believed_about_a_push_that_was_given_up() -> None:
    target = Target()
    record = target.order()
    target.target.give_up(TransferId(record.receive or 0), CANCELLED)
    target.hear(OPENED)
    assert target.target.senders == []


# -- when time alone changes something ------------------------------------------------------------


def test_an_idle_engine_is_to_step_when_a_peer_is_to_be_asked_or_a_quarantine_ends() -> None:
    target, record, attempt = announced()
    assert target.target.due == inf
    target.hear(lost())
    target.fail(record)
    assert target.target.due == SILENCE
    target.wait(SILENCE)
    assert target.target.due == 2 * SILENCE, "it was asked, and has not answered"
    target.hear(OPENED, Fenced(attempt, clean=True))
    assert target.target.due == SILENCE + SETTLE_SECONDS
    target.wait(SETTLE_SECONDS)
    assert target.target.due == inf
