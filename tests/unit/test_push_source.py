"""The prefill engine's side of a push: what is sent when, out of which blocks, for how long those
are held, and what is said to the decode engine. What happens under every order of events is shown
in ``tests/protocol``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import msgspec
import pytest
from driven_planner import Pool

from lamina_kv.config import PushConfig
from lamina_kv.control.cost import Costs
from lamina_kv.control.leases import LeaseBook
from lamina_kv.control.offers import Offer
from lamina_kv.control.push import endings as push_endings
from lamina_kv.control.push import source as push_source
from lamina_kv.control.push.queue import DESTINATION_WAIT, LONGEST_WAIT, WAIT_SHARE
from lamina_kv.control.push.source import (
    ENDING,
    OF_ANOTHER,
    TOO_BUSY,
    WITHDRAWN,
    PushSource,
)
from lamina_kv.control.push.target import PEER_FAULTS
from lamina_kv.control.requests import BoundaryState, PushParameters, RequestRecord
from lamina_kv.control.shape import ChunkShape
from lamina_kv.control.transfers import TransferTable
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.keys import CHECKPOINT, ChunkChain, Epoch, prompt_digest
from lamina_kv.observe.metrics import Series
from lamina_kv.plan import (
    TORN,
    Binding,
    LoadMode,
    Outcome,
    PushOrder,
    PushStop,
    TransferId,
    TransferReceipt,
)
from lamina_kv.push.cards import EngineCard, RankCard, RowCard, decode_card
from lamina_kv.push.letters import Fate, Letter, Lost, Opened
from lamina_kv.push.messages import (
    LONGEST_PATIENCE,
    MAX_ANSWER,
    MAX_UNCLEAN,
    NO_BLOCK,
    NO_EPOCH,
    TOO_LATE,
    Absent,
    Announce,
    Attempt,
    BlockTable,
    Bound,
    Cancel,
    Claim,
    Failed,
    Fenced,
    LinkMessage,
    Queued,
    encode,
)
from lamina_kv.tiers.regard import USUAL
from push_books import ByHand, ClockByHand, push_books

BLOCK = 16
FULL = Group(GroupKind.FULL, BLOCK)
WINDOW = Group(GroupKind.WINDOW, BLOCK, window=BLOCK + 1)
STATE = Group(GroupKind.STATE, BLOCK)
NULL = -1
D = "decode"
PUSH = "5b1c"
ATTEMPT = Attempt(PUSH, 7)
DEADLINE, SILENCE = 60.0, 5.0
PAGE = 100


def card(incarnation: str, groups: Sequence[Group], blocks: int = 1000) -> EngineCard:
    row = RowCard(0, PAGE, PAGE, 1, tuple(range(len(groups))))
    shapes = tuple((g.kind.value, g.block_tokens, g.window) for g in groups)
    return EngineCard(incarnation, b"model", False, shapes, (RankCard(0, b"", blocks, (row,)),))


@dataclass
class View:
    tables: list[list[int]]
    num_prompt_tokens: int = 56
    push: PushParameters | None = field(default_factory=lambda: PushParameters(PUSH, None))
    states: list[int] = field(default_factory=list)
    salt: int = 0
    request_id: str = "request"
    recompute_tokens: int = 1
    root_extra: bytes = b""
    regard = USUAL

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens

    def tokens(self) -> Sequence[int]:
        return [self.salt + i for i in range(self.num_prompt_tokens)]

    def chunk_extra(self, start: int, end: int) -> bytes:
        return b""

    def blocks(self, group: int) -> Sequence[int]:
        return self.tables[group]

    def state_blocks(self, group: int, end: int) -> Sequence[int]:
        return self.states


def record_of(view: View) -> RequestRecord:
    return RequestRecord(view, ChunkChain(b"namespace", 16))


class Ranks:
    """A way to the ranks beside plans, and what was said on it."""

    def __init__(self) -> None:
        self.is_open = True
        self.said: list[Binding] = []

    def send(self, binding: Binding) -> None:
        self.said.append(binding)


class Source(ByHand):
    """A source, with the ranks and the link that it needs."""

    def __init__(
        self,
        *groups: Group,
        max_inflight: int = 1 << 30,
        blocks: int = 1000,
        channel: Ranks | None = None,
        ranks: int = 1,
    ) -> None:
        self.groups = groups or (FULL,)
        self.pool = Pool()
        self.cost = Costs()
        self.leases = LeaseBook(self.pool)
        self.transfers = TransferTable(ranks)
        config = PushConfig(deadline=DEADLINE, silence=SILENCE, max_inflight=max_inflight)
        self.clock = ClockByHand()
        shape = ChunkShape(BLOCK, self.groups, NULL)
        self.source = PushSource(
            config,
            push_books(shape, self.transfers, self.leases, self.clock),
            card("prefill", self.groups, blocks),
            self.cost,
            channel=channel,
        )
        self.view = View([[10, 11, 12, 13] for _ in self.groups])
        self.record = record_of(self.view)

    def connect(self, peer: str = D, *, blocks: int = 1000) -> None:
        self.source.receive([Opened(peer, peer, card(peer, self.groups, blocks))])

    def lose(self, peer: str = D) -> None:
        self.source.receive([Lost(peer, "gone", was_open=True, fate=Fate.CLOSED)])

    def waits(self, record: RequestRecord) -> bool:
        """Once time enough has passed for a destination."""
        before = self.now
        self.now += LONGEST_WAIT
        try:
            return self.source.waits(record)
        finally:
            self.now = before

    def hear(self, message: LinkMessage, peer: str = D) -> None:
        self.source.receive([Letter(peer, message)])

    def admit(self, floor: int = 0, record: RequestRecord | None = None) -> None:
        self.source.admitted(record or self.record, floor)

    def step(self, start: int = 0, end: int = 0) -> list[PushOrder]:
        """A step that computes tokens ``start..end`` of the request, if any."""
        if end:
            self.source.progress(self.record, start, end)
        self.source.plan()
        orders = list(self.source.orders)
        self.source.orders.clear()
        return orders

    def finish(self, computed: int = 56) -> None:
        assert self.view.push is not None
        self.source.abandoned(self.view.push, self.view.request_id)
        self.source.finished(self.record, computed, self.view.tables)

    def drain(self, *orders: PushOrder, reason: str = "") -> None:
        outcome = Outcome.FAILED if reason else Outcome.DONE
        for order in orders:
            transfer = self.transfers.get(order.transfer)
            assert transfer is not None
            assert transfer.apply(0, TransferReceipt(order.transfer, outcome, reason=reason))
            assert transfer.lease is not None
            transfer.lease.release()
            self.source.settle(transfer)

    def said(self) -> list[LinkMessage]:
        said = [letter.message for letter in self.source.letters]
        self.source.letters.clear()
        return said

    def stops(self) -> list[PushStop]:
        stops = list(self.source.stops)
        self.source.stops.clear()
        return stops


def announce(
    *tables: BlockTable,
    start: int = 0,
    end: int = 55,
    attempt: Attempt = ATTEMPT,
    salt: int = 0,
    epoch: Epoch = CHECKPOINT,
) -> Announce:
    digest = prompt_digest([salt + i for i in range(56)], b"", b"", epoch)
    return Announce(
        attempt, digest, start, end, 30.0, tables or (BlockTable(start // BLOCK, (50, 51, 52, 53)),)
    )


def pages(order: PushOrder) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    return [(part.group, part.sources, part.targets) for part in order.pages]


def bound(source: Source, floor: int = 0) -> Source:
    source.connect()
    source.admit(floor)
    source.hear(announce())
    assert source.said() == [Bound(ATTEMPT)]
    return source


def withdraw(source: Source, push: str = PUSH) -> None:
    source.source.withdraw(push, "carrier")
    source.source.unwanted.remove("carrier")


# -- what is sent when -----------------------------------------------------------------------


@pytest.mark.parametrize("first", ["the request", "the announcement"])
def test_whichever_comes_first_waits_for_the_other(first: str) -> None:
    source = Source()
    source.connect()
    if first == "the request":
        source.admit()
        assert source.step(0, 32) == []
        source.hear(announce())
    else:
        source.hear(announce())
        assert source.said() == [Absent(ATTEMPT)]
        source.admit()
    assert source.said() == [Bound(ATTEMPT)]
    assert [peer.incarnation for peer in source.source.peers] == [D]
    assert decode_card(source.source.peers[0].card) == card(D, (FULL,))


def test_each_step_sends_the_blocks_that_it_fills_and_the_last_one_the_rest() -> None:
    source = bound(Source())
    sent = []
    for start, end in ((0, 8), (8, 40), (40, 55), (55, 56)):
        for order in source.step(start, end):
            sent.append((start, pages(order), order.computed, order.last))
            assert (order.peer, order.epoch, order.patience) == (D, 7, 30.0)
    assert sent == [
        (8, [(0, (10, 11), (50, 51))], False, False),
        (40, [(0, (12, 13), (52, 53))], False, True),
    ]


@pytest.mark.parametrize("word", ["nothing", "announced", "another"])
def test_a_prompt_waits_a_moment_for_its_destination(word: str) -> None:
    """From when it came, on this engine's own clock. Its first step may be all of it."""
    source = Source()
    source.connect()
    source.now = 5.0
    source.source.arrived(source.record)
    source.now += DESTINATION_WAIT / 2
    if word == "announced":
        source.hear(announce())
    record = source.record
    if word == "another":  # of the same name, that is no part of the push
        record = record_of(View([[20, 21, 22, 23]], request_id="another"))
        source.source.arrived(record)
    assert source.source.waits(record) == (word == "nothing")
    source.now = 5.0 + DESTINATION_WAIT
    assert not source.source.waits(record)


@pytest.mark.parametrize("seconds", [0.01, 0.5, 100.0])
def test_a_prompt_that_takes_long_waits_for_a_decode_engine_that_is_in_a_step(
    seconds: float,
) -> None:
    source = Source()
    source.connect()
    source.cost.computed(0, 100, seconds * 100 / 56)
    source.source.arrived(source.record)
    wait = min(max(seconds * WAIT_SHARE, DESTINATION_WAIT), LONGEST_WAIT)
    source.now = wait * 0.99
    assert source.source.waits(source.record)
    source.now = wait * 1.01
    assert not source.source.waits(source.record)


@pytest.mark.parametrize("first", ["the request", "the claim"])
def test_a_decode_engine_that_has_seen_a_request_says_soon_where_it_goes_or_has_no_room(
    first: str,
) -> None:
    source = Source()
    source.connect()
    source.cost.computed(0, 100, 100.0)
    if first == "the request":
        source.source.arrived(source.record)
    source.now = 0.005
    source.hear(CLAIM)
    if first == "the claim":
        source.now = 0.005 + DESTINATION_WAIT / 2
        source.source.arrived(source.record)
    source.now = 0.005 + DESTINATION_WAIT * 0.9
    assert source.source.waits(source.record)
    source.hear(CLAIM)  # once more, and it has no room yet
    source.now = 0.005 + DESTINATION_WAIT
    assert not source.source.waits(source.record)


def test_what_was_computed_before_goes_at_once_and_before_the_step() -> None:
    source = Source()
    source.connect()
    source.admit()
    source.step(0, 40)
    source.hear(announce())
    first, second = source.step(40, 56)
    assert (pages(first), first.computed, first.last) == ([(0, (10, 11), (50, 51))], True, False)
    assert (pages(second), second.computed, second.last) == (
        [(0, (12, 13), (52, 53))],
        False,
        True,
    )


def test_a_prefix_hit_goes_with_the_first_step() -> None:
    """Not before it: another request may be computing what was hit."""
    source = bound(Source(), floor=32)
    (order,) = source.step(32, 48)
    assert (pages(order), order.computed) == ([(0, (10, 11, 12), (50, 51, 52))], False)


def test_what_the_decode_engine_has_is_not_sent() -> None:
    source = Source()
    source.connect()
    source.admit()
    source.hear(announce(BlockTable(2, (52, NO_BLOCK)), start=32))
    (order,) = source.step(0, 56)
    assert (pages(order), order.last) == ([(0, (12,), (52,))], True)


@pytest.mark.parametrize("pages_at_once", [0, 1, 2, 3])
def test_what_is_computed_leaves_in_parts_whose_blocks_come_back_one_by_one(
    pages_at_once: int,
) -> None:
    source = Source(max_inflight=max(1, pages_at_once * PAGE))
    source.connect()
    source.admit()
    source.step(0, 56)
    source.finish()
    source.hear(announce())
    orders = source.step()
    sources = [pages(order)[0][1] for order in orders]
    assert sum(sources, ()) == (10, 11, 12, 13)
    assert all(len(part) == max(1, pages_at_once) for part in sources[:-1])
    assert [order.last for order in orders] == [False] * (len(orders) - 1) + [True]
    assert all(order.computed for order in orders)
    assert not source.source.pending
    for order, part in zip(orders, sources, strict=True):
        assert set(part) <= source.pool.held
        source.drain(order)
        assert not set(part) & source.pool.held


def test_what_a_step_computes_leaves_in_the_step_however_much_is_on_its_way() -> None:
    """And however large it is: how much is on the wire is for the ranks to see to."""
    source = bound(Source(max_inflight=1))
    first, second = source.step(0, 32), source.step(32, 56)
    assert [len(first), len(second)] == [1, 1]
    assert not first[0].computed
    assert not second[0].computed


def test_preempted_and_back_it_goes_on_where_it_was() -> None:
    source = bound(Source())
    (first,) = source.step(0, 32)
    source.view.tables = [[]]
    assert source.step() == []
    source.view.tables = [[20, 21, 22, 23]]
    source.record.lose_blocks()
    source.admit()
    assert source.step(0, 32) == []
    (second,) = source.step(32, 56)
    assert pages(second) == [(0, (22, 23), (52, 53))]
    source.drain(first, second)
    assert source.said() == []


def test_back_from_a_preemption_its_blocks_hold_nothing_before_it_runs() -> None:
    """They may be given to it for a load that takes its time."""
    source = bound(Source())
    source.step(0, 8)
    source.step(8, 15)
    source.view.tables = [[]]
    source.step()
    source.view.tables = [[20, 21, 22, 23]]
    source.record.lose_blocks()
    source.admit(floor=48)
    source.record.load = TransferId(99)
    assert source.step() == []
    (order,) = source.step(48, 56)
    assert (pages(order)[0][1], order.computed) == ((20, 21, 22, 23), False)


def test_back_from_a_preemption_less_may_be_computed_than_was() -> None:
    source = Source()
    source.admit()
    source.step(0, 56)
    source.record.lose_blocks()
    source.admit()
    source.connect()
    source.hear(announce())
    assert source.step() == []


@pytest.mark.parametrize("announced", [False, True])
def test_a_prefill_under_which_weights_have_changed_is_not_pushed(announced: bool) -> None:
    source = Source()
    source.connect()
    source.admit()
    if announced:
        source.hear(announce())
        source.said()
    source.source.bar(source.record)
    if not announced:
        source.hear(announce())
    assert [type(message) for message in source.said()] == [Failed, Fenced]
    assert source.step(0, 56) == []


# -- blocks ----------------------------------------------------------------------------------


def test_blocks_are_leased_until_their_writes_have_drained() -> None:
    source = bound(Source())
    (first,) = source.step(0, 32)
    (second,) = source.step(32, 56)
    source.finish()
    assert source.pool.held == {10, 11, 12, 13}
    source.drain(first)
    assert source.pool.held == {12, 13}
    source.drain(second)
    assert source.pool.held == set()
    assert source.said() == []


def test_blocks_of_a_request_that_has_ended_are_held_for_its_destination() -> None:
    source = Source()
    source.connect()
    source.admit()
    source.step(0, 56)
    source.finish()
    assert source.pool.held == {10, 11, 12, 13}
    assert source.source.due == DEADLINE
    source.hear(announce())
    (order,) = source.step()
    assert (pages(order), order.computed, order.last) == (
        [(0, (10, 11, 12, 13), (50, 51, 52, 53))],
        True,
        True,
    )
    source.drain(order)
    assert source.pool.held == set()


def test_blocks_are_not_held_for_longer_than_the_deadline() -> None:
    source = Source()
    source.admit()
    source.step(0, 56)
    source.finish()
    source.now = DEADLINE - 1
    source.step()
    assert source.pool.held
    source.now = DEADLINE
    source.step()
    assert source.pool.held == set()
    source.connect()
    source.hear(announce())
    assert source.said() == [Failed(ATTEMPT, TOO_LATE), Fenced(ATTEMPT, clean=True)]


def test_blocks_are_not_held_for_a_push_that_its_router_has_withdrawn() -> None:
    source = Source()
    source.connect()
    source.admit()
    source.step(0, 56)
    source.finish()
    assert source.pool.held
    withdraw(source)
    assert source.pool.held == set()
    assert not source.source.unwanted, "its request has ended"
    source.hear(announce())
    assert source.said() == [Failed(ATTEMPT, WITHDRAWN), Fenced(ATTEMPT, clean=True)]


def test_a_request_whose_push_was_withdrawn_is_to_end() -> None:
    source = Source()
    source.source.arrived(source.record)
    source.admit()
    source.step(0, 32)
    withdraw(source)
    assert source.source.unwanted == ["request"]


def test_a_push_that_is_withdrawn_before_anybody_knows_it_is_refused() -> None:
    source = Source()
    source.connect()
    withdraw(source)
    source.hear(Claim((PUSH,), 30.0))
    assert source.said() == [Failed(Attempt(PUSH, NO_EPOCH), WITHDRAWN)]


def test_a_request_that_its_withdrawal_has_overtaken_is_to_end() -> None:
    source = Source()
    source.connect()
    withdraw(source)
    source.source.unwanted.clear()
    source.source.arrived(source.record)
    assert source.source.unwanted == ["request"]


@pytest.mark.parametrize("word", [Claim((PUSH,), 30.0), announce()])
def test_a_push_of_which_a_decode_engine_has_spoken_is_not_withdrawn(word: LinkMessage) -> None:
    """The router may know less than the engine: an answer is lost on its way, for example."""
    source = Source()
    source.connect()
    source.admit()
    source.hear(word)
    source.step(0, 56)
    source.finish()
    source.said()
    withdraw(source)
    assert source.pool.held
    assert not source.said()
    assert not source.source.unwanted


def test_only_a_share_of_the_blocks_is_held_for_destinations_that_are_not_known() -> None:
    source = Source(blocks=7)
    source.connect()
    source.admit()
    source.step(0, 56)
    source.finish()
    assert source.pool.held == set()
    source.hear(announce())
    failed, fenced = source.said()
    assert isinstance(failed, Failed)
    assert "too many blocks" in failed.reason
    assert fenced == Fenced(ATTEMPT, clean=True)


def test_a_peer_that_is_stopped_does_not_keep_the_blocks_of_what_was_stopped() -> None:
    source = bound(Source())
    source.step(0, 56)
    source.hear(Cancel(ATTEMPT))
    source.step()
    source.now += SILENCE - 1
    source.step()
    assert source.pool.held
    source.now += 1
    source.step()
    assert source.pool.held == set()
    assert source.said() == []  # it is still on its way


# -- what ends it ----------------------------------------------------------------------------


def test_a_cancel_stops_what_is_on_its_way_and_is_answered_when_nothing_is() -> None:
    source = bound(Source())
    (order,) = source.step(0, 32)
    source.hear(Cancel(ATTEMPT))
    assert source.stops() == [PushStop(D, 7)]
    assert source.step(32, 56) == []
    assert source.said() == []
    source.drain(order, reason="stopped")
    assert source.said() == [Fenced(ATTEMPT, clean=True)]
    source.hear(Cancel(ATTEMPT))
    assert source.said() == [Fenced(ATTEMPT, clean=True)]
    source.hear(announce())
    assert source.said() == [Failed(ATTEMPT, "over"), Fenced(ATTEMPT, clean=True)]
    assert source.step() == []


def test_a_write_that_fails_ends_the_push_and_its_fence_is_not_clean() -> None:
    source = bound(Source())
    (first,) = source.step(0, 32)
    (second,) = source.step(32, 56)
    source.drain(first, reason=TORN)
    assert source.said() == [Failed(ATTEMPT, TORN)]
    source.drain(second, reason="stopped")
    assert source.said() == [Fenced(ATTEMPT, clean=False)]
    source.hear(Cancel(ATTEMPT))
    assert source.said() == [Fenced(ATTEMPT, clean=False)]


def test_a_request_that_ends_early_fails_its_push() -> None:
    source = bound(Source())
    (order,) = source.step(0, 32)
    source.finish(32)
    (failed,) = source.said()
    assert isinstance(failed, Failed)
    source.drain(order, reason="stopped")
    assert source.said() == [Fenced(ATTEMPT, clean=True)]
    assert source.pool.held == set()


def test_a_request_that_ends_while_its_prompt_is_loaded_fails_its_push() -> None:
    """The engine counts what is being loaded as computed."""
    source = bound(Source())
    source.record.load = TransferId(99)
    source.record.offer = Offer(mode=LoadMode.PARKED)
    source.finish(55)
    failed, fenced = source.said()
    assert isinstance(failed, Failed)
    assert fenced == Fenced(ATTEMPT, clean=True)
    assert source.step() == []
    assert source.pool.held == set()


def test_patience_counts_from_the_announcement() -> None:
    source = Source()
    source.connect()
    source.hear(announce())
    source.now = 20.0
    source.admit()
    (order,) = source.step(0, 16)
    assert order.patience == 10.0
    source.now = 30.0
    assert source.step(16, 56) == []
    assert Failed(ATTEMPT, TOO_LATE) in source.said()


def test_an_announcement_whose_request_never_comes_is_forgotten() -> None:
    source = Source()
    source.connect()
    source.hear(announce())
    source.now = 30.0
    source.step()
    assert source.said() == [
        Absent(ATTEMPT),
        Failed(ATTEMPT, TOO_LATE),
        Fenced(ATTEMPT, clean=True),
    ]
    source.admit()
    source.step(0, 56)
    source.finish()
    assert source.pool.held == set()


def test_a_request_that_never_got_blocks_fails_its_push() -> None:
    source = Source()
    source.connect()
    source.hear(announce())
    source.said()
    source.source.abandoned(PushParameters(PUSH, None), "request")
    failed, fenced = source.said()
    assert isinstance(failed, Failed)
    assert fenced == Fenced(ATTEMPT, clean=True)


@pytest.mark.parametrize("first", ["the request", "the word"])
def test_a_push_that_is_not_needed_holds_nothing(first: str) -> None:
    source = Source()
    source.connect()
    if first == "the request":
        source.admit()
        source.step(0, 56)
        source.finish()
        assert source.pool.held
        source.hear(Cancel(Attempt(PUSH, NO_EPOCH)))
    else:
        source.hear(Cancel(Attempt(PUSH, NO_EPOCH)))
        source.admit()
        source.step(0, 56)
        source.finish()
    assert source.pool.held == set()
    assert source.said() == []
    assert not source.source.pending


def test_a_push_that_is_over_is_not_begun_anew_by_a_preemption() -> None:
    source = bound(Source())
    source.drain(*source.step(0, 56))
    source.record.lose_blocks()
    source.admit()
    source.step(0, 56)
    source.finish()
    assert source.pool.held == set()


def test_a_lost_peer_stops_its_pushes_and_no_others() -> None:
    source = bound(Source())
    source.connect("other")
    view = View([[30, 31, 32, 33]], push=PushParameters("other push", None))
    source.admit(record=record_of(view))
    source.hear(announce(attempt=Attempt("other push", 9)), "other")
    source.step(0, 16)
    source.lose()
    assert source.stops() == [PushStop(D, 7)]
    assert source.source.gone == [D]
    assert source.said() == [Bound(Attempt("other push", 9))]


def test_a_peer_that_comes_back_is_made_known_anew() -> None:
    source = bound(Source())
    source.step(0, 16)
    source.source.peers.clear()
    source.lose()
    source.connect()
    again = Attempt("again", 8)
    source.admit(record=record_of(View([[20, 21, 22, 23]], push=PushParameters("again", None))))
    source.hear(announce(attempt=again))
    assert source.said() == [Bound(again)]
    assert [peer.incarnation for peer in source.source.peers] == [D]


def test_a_word_from_a_connection_that_is_gone_changes_nothing() -> None:
    source = Source()
    source.admit()
    source.connect()
    source.lose()
    source.hear(announce())
    assert source.said() == []
    assert source.step(0, 56) == []


# -- names that a router uses twice ------------------------------------------------------------


def again_elsewhere(source: Source) -> None:
    """The engine takes the request's blocks away and gives it others, for a load that takes its
    time: they hold what somebody else had in them."""
    source.view.tables = [[]]
    source.record.lose_blocks()
    source.step()
    source.view.tables = [[20, 21, 22, 23]]
    source.admit(floor=48)
    source.record.load = TransferId(99)


@pytest.mark.parametrize("peer", [D, "other"])
def test_a_decline_of_another_request_does_not_touch_a_push_under_way(peer: str) -> None:
    """Nor what is known of the request's blocks."""
    source = bound(Source())
    source.connect("other")
    (first,) = source.step(0, 32)
    source.hear(Cancel(Attempt(PUSH, NO_EPOCH)), peer)
    again_elsewhere(source)
    source.drain(first)
    assert source.step() == []
    (second,) = source.step(48, 56)
    assert (pages(second)[0][1], second.computed, second.last) == ((22, 23), False, True)


@pytest.mark.parametrize("told", ["before", "after"])
def test_blocks_that_a_request_has_lost_are_not_sent(told: str) -> None:
    """Whatever is heard, and whether or not anybody says that it has others."""
    source = Source()
    source.connect()
    source.admit()
    source.step(0, 56)
    if told == "before":
        source.hear(announce())
    source.record.lose_blocks()
    source.view.tables = [[20, 21, 22, 23]]
    if told == "after":
        source.hear(announce())
    assert source.step() == []
    (order,) = source.step(0, 56)
    assert (pages(order)[0][1], order.computed) == ((20, 21, 22, 23), False)


def test_a_decline_of_somebody_else_does_not_forbid_the_announcement_of_an_owner() -> None:
    source = Source()
    source.connect()
    source.connect("other")
    source.hear(announce())
    source.said()
    source.hear(Cancel(Attempt(PUSH, NO_EPOCH)), "other")
    source.admit()
    assert source.said() == [Bound(ATTEMPT)]


def test_an_announcement_that_is_refused_does_not_end_the_push_of_another() -> None:
    source = bound(Source())
    other = msgspec.structs.replace(card("other", (FULL,)), model=b"another")
    source.source.receive([Opened("other", "other", other)])
    source.hear(announce(attempt=Attempt(PUSH, 3)), "other")
    failed, fenced = source.said()
    assert (type(failed), fenced) == (Failed, Fenced(Attempt(PUSH, 3), clean=True))
    assert len(source.step(0, 56)) == 1


def test_a_request_whose_push_is_over_begins_nothing_anew_however_long_ago_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(push_source, "REMEMBERED", 2)
    source = bound(Source())
    source.drain(*source.step(0, 56))
    for number in range(3):
        source.hear(Cancel(Attempt(f"declined {number}", NO_EPOCH)))
    source.record.lose_blocks()
    source.admit()
    source.step(0, 56)
    source.finish()
    assert source.pool.held == set()


def test_what_a_load_that_failed_was_computed_on_is_not_sent_as_computed() -> None:
    """Of a push that has no destination yet nothing is on its way that could say so."""
    source = Source()
    source.connect()
    source.admit()
    source.step(0, 56)
    source.source.distrust(0)
    source.hear(announce())
    assert source.step() == []
    (order,) = source.step(16, 56)
    assert (pages(order)[0][1], order.computed) == ((10, 11, 12, 13), False)


# -- what is remembered ------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [TORN, ""])
def test_an_attempt_that_is_not_remembered_may_be_torn(
    monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    monkeypatch.setattr(push_endings, "REMEMBERED", 2)
    source = bound(Source())
    source.drain(*source.step(0, 56), reason=outcome)
    for epoch in range(8, 11):
        source.hear(Cancel(Attempt("never announced", epoch)))
    source.said()
    source.hear(Cancel(ATTEMPT))
    assert source.said() == [Fenced(ATTEMPT, clean=False)]
    source.hear(announce())
    assert source.said() == [Failed(ATTEMPT, "over"), Fenced(ATTEMPT, clean=False)]
    source.connect("other")
    source.hear(Cancel(Attempt("never announced", 1)), "other")
    assert source.said() == [Fenced(Attempt("never announced", 1), clean=True)]


def test_what_one_decode_engine_says_makes_no_others_attempt_be_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(push_endings, "REMEMBERED", 2)
    source = bound(Source())
    source.connect("other")
    source.hear(Cancel(ATTEMPT))
    for epoch in range(8, 11):
        source.hear(Cancel(Attempt("never announced", epoch)), "other")
    source.said()
    source.hear(Cancel(ATTEMPT))
    assert source.said() == [Fenced(ATTEMPT, clean=True)]


def test_decode_engines_of_which_nothing_is_known_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_endings, "REMEMBERED_PEERS", 2)
    endings = push_endings.Endings()
    for peer in ("first", "second", "first", "third"):
        endings.note(peer, 1, clean=False)
    assert [endings.over(peer, 1) for peer in ("first", "second", "third")] == [True, False, True]


@pytest.mark.parametrize("epoch", [NO_EPOCH, 7])
def test_a_cancel_of_somebody_who_is_no_decode_engine_here_changes_nothing(epoch: int) -> None:
    """On an engine that decodes as well, prefill engines are heard, too."""
    source = Source()
    source.connect()
    source.source.arrived(source.record)
    source.hear(Cancel(Attempt(PUSH, epoch)), "10.0.0.9:9300")
    assert source.source.unwanted == []
    source.hear(announce())
    assert Queued(ATTEMPT) in source.said()


def test_what_a_decode_engine_announces_without_a_request_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is kept, whatever it is. Others have room."""
    monkeypatch.setattr(push_source, "MAX_ANNOUNCED", 3 * 5)
    source = Source()
    source.connect()
    source.connect("other")
    attempts = [Attempt(f"push {n}", 10 + n) for n in range(5)]
    announcements = [announce(attempt=attempt) for attempt in attempts]
    for announcement in announcements[:3]:
        source.hear(announcement)
    assert source.said() == [Absent(attempt) for attempt in attempts[:3]]
    source.hear(announcements[3])
    failed, fenced = source.said()
    assert isinstance(failed, Failed)
    assert "too many blocks" in failed.reason
    assert fenced == Fenced(attempts[3], clean=True)
    source.hear(announcements[4], peer="other")
    assert source.said() == [Absent(attempts[4])]
    source.hear(Cancel(attempts[0]))
    source.said()
    source.hear(announce(attempt=Attempt("push 3", 20)))
    assert source.said() == [Absent(Attempt("push 3", 20))]


def test_an_announcement_that_comes_twice_is_one_however_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(push_endings, "REMEMBERED", 2)
    source = bound(Source())
    for epoch in range(8, 12):
        source.hear(Cancel(Attempt("never announced", epoch)))
    source.said()
    source.hear(announce())
    assert source.said() == []
    assert len(source.step(0, 56)) == 1


def test_a_request_that_ended_before_its_announcement_is_not_waited_for() -> None:
    source = Source()
    source.connect()
    source.source.abandoned(PushParameters(PUSH, None), "request")
    source.hear(announce())
    failed, fenced = source.said()
    assert failed == Failed(ATTEMPT, "the prefill ended before it began")
    assert fenced == Fenced(ATTEMPT, clean=True)


# -- what nobody wants any more ------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["queued", "runs", "bound"])
def test_a_request_that_its_decode_engine_does_without_is_to_end(stage: str) -> None:
    """It is not begun in the moment that the engine takes to end it."""
    source = Source()
    source.connect()
    source.source.arrived(source.record)
    if stage != "queued":
        source.admit()
        source.step(0, 32)
    if stage == "bound":
        source.hear(announce())
    source.hear(Cancel(ATTEMPT if stage == "bound" else UNANNOUNCED))
    assert source.source.unwanted == ["request"]
    assert source.source.waits(source.record) == (stage == "queued")
    assert not source.waits(source.record)  # nobody ends it, then
    source.source.abandoned(PushParameters(PUSH, None), "request")
    assert not source.source.waits(source.record)


@pytest.mark.parametrize("word", ["nothing", "claim", "announcement"])
def test_a_request_that_was_declined_before_it_came_is_to_end(word: str) -> None:
    source = Source()
    source.connect()
    if word == "claim":
        source.hear(CLAIM)
    elif word == "announcement":
        source.hear(announce())
    source.hear(Cancel(ATTEMPT if word == "announcement" else UNANNOUNCED))
    source.source.arrived(source.record)
    assert source.source.unwanted == ["request"]


def test_a_request_that_has_ended_early_is_not_to_end_again() -> None:
    """What it has sent is still on its way when it is cancelled."""
    source = bound(Source())
    source.step(0, 32)
    orders = source.step(32, 48)
    source.finish(40)
    source.hear(Cancel(ATTEMPT))
    assert source.source.unwanted == []
    source.drain(*orders)
    assert source.source._queue._forgone == {}


@pytest.mark.parametrize("why", ["ended", "of another", "lost", "over"])
def test_no_other_request_is_to_end(why: str) -> None:
    source = Source()
    source.connect()
    source.connect("other")
    source.source.arrived(source.record)
    source.hear(announce())
    source.admit()
    if why == "ended":
        source.step(0, 56)
        source.finish()
        source.hear(Cancel(ATTEMPT))
    elif why == "of another":
        source.hear(Cancel(ATTEMPT), "other")
        source.hear(Cancel(UNANNOUNCED), "other")
    elif why == "lost":
        source.lose()
    else:  # another request of the same name
        source.drain(*source.step(0, 56))
        source.source.arrived(record_of(View([[1]], request_id="another")))
    assert source.source.unwanted == []


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (announce(salt=1), "different prompts"),
        (announce(epoch=Epoch("v2")), "different weights"),
        (announce(end=57), "tokens 0..57 of a prompt of 56"),
        (announce(start=56, end=40), "tokens 56..40"),
        (announce(BlockTable(0, ()), end=0), "tokens 0..0"),
        (announce(BlockTable(0, (50,)), BlockTable(0, (50,))), "2 tables for 1 groups"),
        (announce(BlockTable(0, (50, 51, 52))), "a table of blocks 0..3"),
        (announce(BlockTable(-1, (49, 50, 51, 52, 53))), "a table of blocks -1..4"),
        (announce(BlockTable(0, (50, 51, 52, 1000))), "beyond the decode engine's 1000"),
        (announce(BlockTable(0, (50, 51, 52, -2))), "beyond the decode engine's 1000"),
    ],
)
def test_an_announcement_that_does_not_fit_the_prompt_is_refused(
    wrong: Announce, words: str
) -> None:
    source = Source()
    source.connect()
    source.admit()
    source.hear(wrong)
    failed, fenced = source.said()
    assert isinstance(failed, Failed)
    assert words in failed.reason
    assert fenced == Fenced(ATTEMPT, clean=True)
    assert source.step(0, 56) == []
    source.finish()
    assert source.pool.held == set()


@pytest.mark.parametrize(
    ("table", "end"),
    [
        (BlockTable(0, (60, 61, 62)), 48),
        (BlockTable(3, ()), 48),
        (BlockTable(1, (60,)), 48),
        (BlockTable(3, (60,)), 55),
    ],
)
def test_a_state_goes_into_the_one_block_where_the_prompt_ends(table: BlockTable, end: int) -> None:
    """It would never be sent, and what it waits for be held."""
    source = Source(FULL, STATE)
    source.connect()
    source.admit()
    full = BlockTable(0, tuple(range(50, 50 - -end // BLOCK)))
    source.hear(announce(full, table, end=end))
    failed, fenced = source.said()
    assert isinstance(failed, Failed)
    assert "a table of blocks" in failed.reason
    assert fenced == Fenced(ATTEMPT, clean=True)
    assert not source.source.pending


@pytest.mark.parametrize("word", ["claim", "announcement"])
def test_nobody_is_believed_to_wait_for_longer_than_minutes(word: str) -> None:
    source = Source()
    source.connect()
    long = 1e9
    if word == "claim":
        source.hear(Claim((PUSH,), long))
    else:
        source.hear(msgspec.structs.replace(announce(), patience=long))
    source.now = 0.9 * LONGEST_PATIENCE
    source.step()
    source.said()
    source.now = LONGEST_PATIENCE
    source.step()
    (failed, *_) = source.said()
    assert isinstance(failed, Failed)
    assert failed.reason == TOO_LATE


@pytest.mark.parametrize("patience", [0.0, -1.0, float("nan")])
def test_who_does_not_wait_is_refused(patience: float) -> None:
    source = Source()
    source.connect()
    source.hear(Claim((PUSH,), patience))
    assert source.said() == []
    source.hear(msgspec.structs.replace(announce(), patience=patience))
    failed, _ = source.said()
    assert isinstance(failed, Failed)
    assert "patience" in failed.reason


def test_a_decode_engine_may_speak_of_so_many_requests_that_are_not_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next is not looked out for; of those that come others take the place."""
    monkeypatch.setattr(push_source, "EXPECTED", 2)
    source = Source()
    source.connect()
    source.connect("another")
    source.hear(Claim(("push 0", "push 1", "push 2"), DEADLINE))
    assert source.said() == [Absent(Attempt(f"push {n}", NO_EPOCH)) for n in range(3)]
    assert len(source.source._outbound) == 2
    source.hear(announce())
    failed, fenced = source.said()
    assert isinstance(failed, Failed)
    assert failed.reason not in PEER_FAULTS
    assert fenced == Fenced(ATTEMPT, clean=True)
    source.hear(Claim(("push 3",), DEADLINE), "another")
    assert len(source.source._outbound) == 3
    source.source.arrived(other(0))
    source.source.arrived(other(2))  # as if nobody had spoken of it
    source.said()
    source.hear(Claim(("push 2", "push 4"), DEADLINE))
    assert source.said() == [
        Queued(Attempt("push 2", NO_EPOCH)),
        Absent(Attempt("push 4", NO_EPOCH)),
    ]
    assert "push 4" in source.source._outbound
    source.hear(Cancel(Attempt("push 4", NO_EPOCH)))
    source.hear(Claim(("push 5",), DEADLINE))
    assert "push 5" in source.source._outbound
    source.lose()
    source.lose("another")
    source.now = DEADLINE
    source.step()
    assert source.source._expected == {}


def test_an_engine_of_another_shape_is_refused_whatever_it_announces() -> None:
    source = Source()
    other = msgspec.structs.replace(card(D, (FULL,)), model=b"another")
    source.source.receive([Opened(D, D, other)])
    source.admit()
    source.hear(announce())
    failed, fenced = source.said()
    assert isinstance(failed, Failed)
    assert "same model" in failed.reason
    assert fenced == Fenced(ATTEMPT, clean=True)


def test_one_push_has_one_destination() -> None:
    source = bound(Source())
    source.connect("other")
    second = Attempt(PUSH, 3)
    source.hear(announce(attempt=second), "other")
    assert source.said() == [
        Failed(second, OF_ANOTHER),
        Fenced(second, clean=True),
    ]
    source.hear(announce())  # twice is once
    source.hear(Cancel(ATTEMPT), "other")
    assert source.said() == [Fenced(ATTEMPT, clean=True)]
    assert len(source.step(0, 56)) == 1


def test_a_second_request_under_one_name_is_no_part_of_the_push() -> None:
    source = bound(Source())
    second = record_of(View([[90, 91, 92, 93]]))
    source.admit(record=second)
    source.source.finished(second, 56, [[90, 91, 92, 93]])
    assert source.pool.held == set()
    (order,) = source.step(0, 56)
    assert pages(order)[0][1] == (10, 11, 12, 13)


# -- claims ----------------------------------------------------------------------------------

CLAIM = Claim((PUSH,), DEADLINE)
UNANNOUNCED = Attempt(PUSH, NO_EPOCH)


def other(number: int, *, first_block: int = 100) -> RequestRecord:
    """A request of another push, whose blocks are its own."""
    blocks = [first_block + 4 * number + i for i in range(4)]
    push = PushParameters(f"push {number}", None)
    return record_of(View([blocks], push=push, request_id=f"request {number}"))


def compute(source: Source, record: RequestRecord) -> None:
    """A request gets its blocks, and ends."""
    source.admit(record=record)
    source.source.progress(record, 0, 56)
    source.step()
    source.source.finished(record, 56, cast(View, record.view).tables)


@pytest.mark.parametrize("first", ["the request", "the claim"])
def test_a_decode_engine_hears_when_what_it_claims_is_here(first: str) -> None:
    source = Source()
    source.connect()
    if first == "the request":
        source.source.arrived(source.record)
        assert source.said() == []
        source.hear(CLAIM)
    else:
        source.hear(CLAIM)
        assert source.said() == [Absent(UNANNOUNCED)]
        source.source.arrived(source.record)
    assert source.said() == [Queued(UNANNOUNCED)]
    source.hear(CLAIM)
    assert source.said() == [Queued(UNANNOUNCED)]  # the first may have been lost
    source.hear(announce())
    assert source.said() == [Queued(ATTEMPT)]
    source.admit()
    assert source.said() == [Bound(ATTEMPT)]


def test_what_was_announced_is_queued_when_it_comes() -> None:
    source = Source()
    source.connect()
    source.hear(announce())
    assert source.said() == [Absent(ATTEMPT)]
    source.source.arrived(source.record)
    assert source.said() == [Queued(ATTEMPT)]


def test_what_is_claimed_is_held_for_as_long_as_it_is_claimed() -> None:
    source = Source()
    source.connect()
    compute(source, source.record)
    for _ in range(10):
        assert not source.source.pending, "nothing is done for it until then"
        assert source.source.due == source.now + DEADLINE
        source.now += 0.9 * DEADLINE
        source.hear(CLAIM)
        source.step()
    assert source.pool.held == {10, 11, 12, 13}
    source.hear(announce())
    (order,) = source.step()
    source.drain(order)
    assert source.pool.held == set()


@pytest.mark.parametrize("end", ["patience", "cancel", "lost"])
def test_a_claim_that_ends_holds_nothing(end: str) -> None:
    source = Source()
    source.connect()
    source.hear(CLAIM)
    compute(source, source.record)
    source.said()
    if end == "cancel":
        source.hear(Cancel(UNANNOUNCED))
    else:
        if end == "lost":
            source.lose()
            source.step()
            assert source.pool.held  # the connection may come back
        source.now += SILENCE if end == "lost" else DEADLINE
        source.step()
    assert source.pool.held == set()
    assert not source.source.pending
    assert (Failed(UNANNOUNCED, TOO_LATE) in source.said()) == (end == "patience")


def test_a_claim_outlives_its_connection() -> None:
    source = Source()
    source.connect()
    source.hear(CLAIM)
    compute(source, source.record)
    source.lose()
    source.connect()
    source.hear(CLAIM)
    source.now += 2 * SILENCE
    source.step()
    source.said()
    source.hear(announce())
    assert source.said() == [Bound(ATTEMPT)]


def test_who_claims_first_has_the_only_say() -> None:
    source = Source()
    source.connect()
    source.connect("other")
    source.hear(CLAIM)
    source.said()
    source.hear(CLAIM, "other")
    assert source.said() == [Failed(UNANNOUNCED, OF_ANOTHER)]
    second = Attempt(PUSH, 3)
    source.hear(announce(attempt=second), "other")
    source.hear(Cancel(UNANNOUNCED), "other")
    assert source.said() == [Failed(second, OF_ANOTHER), Fenced(second, clean=True)]
    source.admit()
    source.hear(announce())
    assert source.said() == [Bound(ATTEMPT)]


def test_what_will_not_be_pushed_is_not_claimed() -> None:
    source = Source()
    source.connect()
    source.source.arrived(source.record)
    source.source.abandoned(PushParameters(PUSH, None), "request")
    source.hear(CLAIM)
    (failed,) = source.said()
    assert isinstance(failed, Failed)
    assert failed.attempt == UNANNOUNCED


def test_a_claim_is_refused_where_the_announcement_would_be() -> None:
    source = Source()
    wrong = msgspec.structs.replace(card(D, (FULL,)), model=b"another")
    source.source.receive([Opened(D, D, wrong)])
    source.hear(CLAIM)
    (failed,) = source.said()
    assert isinstance(failed, Failed)
    assert "same model" in failed.reason


def test_prompts_without_a_destination_take_half_of_the_blocks_and_others_wait() -> None:
    """Of 16 blocks two prompts of four hold the half."""
    source = Source(blocks=16)
    source.connect()
    records = [other(number) for number in range(4)]
    for record in records:
        source.source.arrived(record)
    source.hear(Claim(tuple(f"push {n}" for n in range(4)), DEADLINE))
    assert not source.waits(records[0])
    source.admit(record=records[0])
    assert not source.waits(records[1])
    source.admit(record=records[1])
    assert source.waits(records[2])  # they will hold them when they have ended
    for record in records[:2]:
        compute(source, record)
    assert source.waits(records[2])
    source.hear(announce(attempt=Attempt("push 3", 9)))
    assert not source.waits(records[3])  # it has a destination
    source.hear(announce(attempt=Attempt("push 0", 8)))
    assert not source.waits(records[2])


def test_what_waits_for_its_destination_waits_no_longer_when_none_is_left() -> None:
    source = Source(blocks=16)
    source.connect()
    for number in range(2):
        compute(source, other(number))
    source.source.arrived(source.record)
    source.hear(CLAIM)
    assert source.waits(source.record)
    source.hear(Cancel(UNANNOUNCED))
    assert not source.waits(source.record)


def test_only_blocks_without_a_destination_count_and_each_once() -> None:
    """Not those of saves, of pushes that are under way, or of a prefix that prompts share."""
    source = Source(blocks=16)
    source.connect()
    source.leases.take(tuple(range(500, 516)))
    shared = [record_of(View([[10, 11, 12, 20 + n]], push=PushParameters(f"shared {n}", None),
                             request_id=f"shared {n}")) for n in range(5)]  # fmt: skip
    for record in shared:
        compute(source, record)
    assert source.said() == []
    assert source.pool.held >= {10, 11, 12, *range(20, 25)}


def test_what_cannot_be_computed_in_time_is_not_begun() -> None:
    source = Source()
    source.connect()
    source.cost.computed(0, 100, 20.0)  # 11 s for 56 tokens
    source.source.arrived(source.record)
    source.source.arrived(other(1))
    source.hear(announce())  # 30 s
    source.said()
    source.now = 18.0
    source.admit(record=other(2))
    assert not source.source.waits(source.record)
    source.now = 20.0
    source.source.waits(source.record)
    assert source.said() == [Failed(ATTEMPT, TOO_BUSY), Fenced(ATTEMPT, clean=True)]
    assert source.source.unwanted == ["request"]


def test_an_estimate_refuses_nothing_where_nobody_else_waits() -> None:
    source = Source()
    source.connect()
    source.cost.computed(0, 100, 500.0)
    source.admit(record=other(1))
    source.source.arrived(source.record)
    source.hear(announce())
    assert not source.waits(source.record)


def test_an_engine_that_computes_nothing_refuses_nothing_by_an_estimate() -> None:
    """The first prompt of all may take long. If all that follow were refused, none would be
    computed from which it could learn otherwise. Another always waits."""
    source = Source()
    source.connect()
    source.cost.computed(0, 100, 500.0)
    records = [other(number) for number in range(6)]
    for number, record in enumerate(records):
        source.source.arrived(record)
        source.hear(announce(attempt=Attempt(f"push {number}", number + 1)))
    assert not source.waits(records[0])
    source.admit(record=records[0])
    assert source.waits(records[1])
    source.source.progress(records[0], 0, 56)
    source.step()
    assert source.waits(records[2]), "it runs"
    source.source.finished(records[0], 56, cast(View, records[0].view).tables)
    source.step()
    assert not source.waits(records[3])
    assert source.source.unwanted == ["request 1", "request 2"]


def test_what_the_engine_never_came_to_is_nobodys_fault() -> None:
    """Of a long queue only the head is looked at."""
    source = Source()
    source.connect()
    source.source.arrived(source.record)
    source.hear(announce())
    source.said()
    source.now = 30.0
    source.step()
    assert source.said() == [Failed(ATTEMPT, TOO_BUSY), Fenced(ATTEMPT, clean=True)]
    assert TOO_BUSY not in PEER_FAULTS
    assert source.source.unwanted == ["request"]


def test_what_nobody_needs_any_more_lets_others_go_first() -> None:
    source = Source(blocks=16)
    source.connect()
    unneeded, needed, full = (other(number) for number in range(3))
    for record in (unneeded, needed):
        source.source.arrived(record)
    source.hear(Cancel(Attempt("push 0", NO_EPOCH)))
    source.now = 1.0
    assert source.source.waits(unneeded)
    source.admit(record=needed)
    assert not source.source.waits(unneeded)
    source.admit(record=full)
    source.source.arrived(source.record)
    assert source.source.waits(unneeded)
    source.now = 2.0
    assert source.source.waits(source.record)  # there is no room for it
    assert not source.source.waits(unneeded)
    source.hear(announce())
    assert source.source.waits(unneeded)
    source.now += DEADLINE
    assert not source.source.waits(unneeded)  # it has waited long enough


def test_a_prompt_for_which_there_was_room_is_held_when_it_ends() -> None:
    source = Source(blocks=16)
    source.connect()
    first, second, third = (other(number) for number in range(3))
    source.admit(record=first)
    source.admit(record=second)
    compute(source, third)  # for this one there was none
    assert source.said() == []
    source.source.finished(first, 56, cast(View, first.view).tables)
    source.source.progress(second, 0, 56)
    source.step()
    source.source.finished(second, 56, cast(View, second.view).tables)
    assert set(cast(View, second.view).tables[0]) <= source.pool.held


# -- groups ----------------------------------------------------------------------------------


def test_of_a_window_only_what_the_end_needs_is_sent() -> None:
    source = Source(FULL, WINDOW)
    source.view.tables = [[10, 11, 12, 13], [NULL, NULL, 22, 23]]
    source.connect()
    source.admit()
    source.hear(announce(BlockTable(0, (50, 51, 52, 53)), BlockTable(2, (62, 63))))
    (order,) = source.step(0, 56)
    assert pages(order) == [(0, (10, 11, 12, 13), (50, 51, 52, 53)), (1, (22, 23), (62, 63))]
    assert order.last


def test_a_block_that_has_fallen_out_of_its_window_fails_the_push() -> None:
    source = Source(FULL, WINDOW)
    source.view.tables = [[10, 11, 12, 13], [NULL, NULL, NULL, 23]]
    source.connect()
    source.admit()
    source.step(0, 56)
    source.finish()
    source.hear(announce(BlockTable(0, (50, 51, 52, 53)), BlockTable(2, (62, 63))))
    source.said()
    assert source.step() == []
    failed, fenced = source.said()
    assert isinstance(failed, Failed)
    assert "window" in failed.reason
    assert fenced == Fenced(ATTEMPT, clean=True)
    assert source.pool.held == set()


def hybrid() -> Source:
    source = Source(FULL, STATE)
    source.view.tables = [[10, 11, 12, 13], []]
    source.connect()
    source.admit()
    return source


STATES = announce(BlockTable(0, (50, 51, 52)), BlockTable(2, (70,)), end=48)


def stand(source: Source, end: int, block: int) -> None:
    source.source.state(source.record, BoundaryState("request", 1, block, end))


def test_a_state_is_sent_with_the_step_at_whose_end_it_stands() -> None:
    source = hybrid()
    source.hear(STATES)
    stand(source, 32, 80)
    (first,) = source.step(0, 32)
    assert (pages(first), first.last) == ([(0, (10, 11), (50, 51))], False)
    stand(source, 48, 81)
    assert source.pool.held == {10, 11, 81}
    (second,) = source.step(32, 48)
    assert (pages(second), second.last) == ([(0, (12,), (52,)), (1, (81,), (70,))], True)
    source.drain(first, second)
    assert source.pool.held == set()


def test_a_state_is_kept_for_its_destination_and_no_later_one_is() -> None:
    source = hybrid()
    stand(source, 48, 81)
    source.step(0, 48)
    stand(source, 64, 82)
    source.step(48, 56)
    source.finish()
    source.hear(STATES)
    (order,) = source.step()
    assert pages(order)[1] == (1, (81,), (70,))
    source.drain(order)
    assert source.pool.held == set()


def test_a_state_where_the_hit_ends_is_sent_from_where_the_engine_has_it() -> None:
    source = Source(FULL, STATE)
    source.view.tables, source.view.states = [[10, 11, 12, 13], []], [85, 86]
    source.connect()
    source.admit(floor=48)
    source.hear(STATES)
    (order,) = source.step(48, 56)
    assert pages(order)[1] == (1, (85,), (70,))


def test_a_state_that_was_passed_by_fails_the_push() -> None:
    source = hybrid()
    stand(source, 32, 80)
    source.step(0, 56)
    source.finish()
    source.hear(STATES)
    source.said()
    source.step()
    failed, fenced = source.said()
    assert isinstance(failed, Failed)
    assert "state" in failed.reason
    assert fenced == Fenced(ATTEMPT, clean=True)
    assert source.pool.held == set()


def test_no_state_is_kept_for_a_push_that_was_stopped() -> None:
    source = hybrid()
    source.hear(STATES)
    (order,) = source.step(0, 32)
    source.hear(Cancel(ATTEMPT))
    stand(source, 48, 81)
    source.step(32, 48)
    source.drain(order, reason="stopped")
    assert source.pool.held == set()


def test_a_push_that_was_cancelled_before_its_request_came_is_not_begun() -> None:
    source = Source()
    source.connect()
    source.hear(announce())
    source.hear(Cancel(ATTEMPT))
    source.admit()
    source.step(0, 56)
    source.finish()
    assert source.pool.held == set()


def test_a_request_that_ends_before_it_begins_is_told_of() -> None:
    source = Source()
    source.connect()
    source.hear(announce())
    source.said()
    source.source.abandoned(PushParameters(ATTEMPT.push, None), "request")
    failed, fenced = source.said()
    assert isinstance(failed, Failed)
    assert fenced == Fenced(ATTEMPT, clean=True)


def test_what_is_on_its_way_to_each_decode_engine_is_published() -> None:
    source = Source()
    meter = source.source._meter
    seen: dict[Series, float] = {}

    def published() -> dict[Series, float]:
        source.source.gauges()
        seen.update(meter.drain().gauges)
        return seen

    name = "0123456789abcdef"
    links, backlog = ("push_links", ("decode",)), ("push_backlog_bytes", ("01234567",))
    source.connect(name)
    source.hear(announce(), name)
    source.admit()
    (order,) = source.step(0, 56)
    assert published()[links] == 1
    assert published()[backlog] > 0
    source.lose(name)
    assert published()[links] == 0
    source.drain(order)
    assert published()[backlog] == 0
    assert not source.source._sender.backlog, "nothing is kept of a peer that is gone"


# -- the engine ends -----------------------------------------------------------------------------


def test_an_engine_that_ends_says_what_it_will_not_send() -> None:
    source = Source()
    source.connect()
    source.hear(announce())
    source.said()
    source.source.end(at_once=False)
    attempt = ATTEMPT
    assert source.said() == [Failed(attempt, ENDING), Fenced(attempt, clean=True)]
    other = announce(attempt=Attempt("other", 9))
    source.hear(other)
    assert source.said() == [Failed(other.attempt, ENDING), Fenced(other.attempt, clean=True)]
    source.hear(Claim(("third",), DEADLINE))
    assert source.said() == [Failed(Attempt("third", NO_EPOCH), ENDING)]


def test_an_engine_that_ends_holds_nothing_for_a_destination() -> None:
    source = Source()
    source.admit()
    source.step(0, 56)
    source.finish()
    assert source.pool.held
    source.source.end(at_once=False)
    assert source.pool.held == set()
    assert not source.source.pending


def test_a_request_that_runs_out_when_an_engine_is_told_to_end_is_pushed() -> None:
    """If its destination comes while it runs. It is not held for one."""
    source = Source()
    source.connect()
    source.admit()
    source.step(0, 32)
    source.source.end(at_once=False)
    source.hear(announce())
    assert source.said() == [Bound(ATTEMPT)]
    *_, order = source.step(32, 56)
    assert order.last


def test_a_request_without_a_destination_is_not_held_when_an_engine_ends() -> None:
    source = Source()
    source.admit()
    source.step(0, 56)
    source.source.end(at_once=False)
    source.finish()
    assert source.pool.held == set()
    assert not source.source.pending


def test_what_is_bound_when_an_engine_is_told_to_end_is_sent() -> None:
    source = bound(Source())
    source.said()
    source.source.end(at_once=False)
    (order,) = source.step(0, 56)
    source.drain(order)
    assert order.last
    assert source.said() == []


@pytest.mark.parametrize("reason", ["", TORN])
def test_an_engine_that_has_ended_fences_everything_but_what_may_be_on_its_way(reason: str) -> None:
    """Also what it has never heard of: nothing is begun any more."""
    source = bound(Source())
    (order,) = source.step(0, 32)
    source.source.end(at_once=True)
    epoch = ATTEMPT.epoch
    assert not source.source.goodbye(D).fences(epoch)
    assert source.source.goodbye(D).fences(epoch - 1)
    assert source.source.goodbye(D).fences(epoch + 1)
    assert source.source.goodbye("another").fences(epoch)
    source.drain(order, reason=reason)
    assert source.source.goodbye(D).fences(epoch) == (not reason)


def test_of_what_is_forgotten_or_too_much_to_name_something_may_be_on_its_way() -> None:
    endings, oldest = push_endings.Endings(), push_endings.REMEMBERED
    for epoch in range(2 * oldest):
        endings.note(D, epoch, clean=True)
    assert not endings.goodbye(D, ()).fences(oldest - 1)
    assert endings.goodbye(D, ()).fences(oldest)
    under_way = range(oldest, oldest + 2 * MAX_UNCLEAN + 1)
    goodbye = endings.goodbye(D, under_way)
    assert len(encode(goodbye)) < MAX_ANSWER
    assert not any(map(goodbye.fences, under_way))
    assert goodbye.fences(under_way[-1] + 1)


def test_nothing_is_sent_when_it_has_ended_and_what_moves_is_not_fenced() -> None:
    source = bound(Source())
    (order,) = source.step(0, 32)
    source.said()
    source.source.end(at_once=True)
    attempt = ATTEMPT
    assert source.said() == [Failed(attempt, ENDING)]
    assert source.step(32, 56) == []
    source.drain(order)
    assert source.said() == [Fenced(attempt, clean=True)]
