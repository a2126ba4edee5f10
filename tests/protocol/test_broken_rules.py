"""The model sees what it is there to see: each rule of ``docs/push.md`` about when a block may be
used again, and about what each state leads to, is broken once, and a history shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import inf
from typing import Any

import pytest

from broken_transfers import identities_are_used_again, one_rank_is_enough
from lamina_kv.control.push import sender as push_sender
from lamina_kv.control.push import source as push_source
from lamina_kv.control.push import target as push_target
from lamina_kv.control.push.endings import Endings
from lamina_kv.control.push.inbound import GiveUp, Inbound, Sender
from lamina_kv.control.push.open_prompts import OpenPrompt, OpenPrompts, Taken
from lamina_kv.control.push.outbound import Outbound, Progress
from lamina_kv.control.push.room import Room
from lamina_kv.control.push.sender import PushSender
from lamina_kv.control.push.source import PushSource
from lamina_kv.control.push.target import PushTarget
from lamina_kv.control.requests import RequestRecord
from lamina_kv.control.transfers import Transfer
from lamina_kv.data.push_gathers import Gathers
from lamina_kv.data.push_receives import Receive, Receives
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.plan import Outcome, TransferId
from lamina_kv.push.inbox import Inbox, Mailbox
from lamina_kv.push.letters import Fate, Letter, Lost, News
from lamina_kv.push.messages import (
    Announce,
    Attempt,
    Delivered,
    Failed,
    Fenced,
    Goodbye,
    decode,
    encode,
)
from lamina_kv.push.transports.base import Notice
from protocol.engine import BLOCK, Options, PushCase
from protocol.prefill import Prefill
from protocol.walk import finds
from protocol.world import FAULTS, HURRIES

HISTORIES = 2000
"""Until a break is seen."""

UNBROKEN = 60

Patch = pytest.MonkeyPatch
Break = Callable[[Patch], None]

FULL = Group(GroupKind.FULL, BLOCK)
STATE = Group(GroupKind.STATE, BLOCK)
CASE, SHORT = PushCase(tokens=4), PushCase(tokens=2)
LARGE = PushCase(tokens=8), PushCase(tokens=8)
"""Of scarce blocks there are enough for both, and for nothing else."""


def world(kinds: str, budget: int, hurries: int = 0, *cases: PushCase, **others: Any) -> Options:
    faults = frozenset(kinds.split())
    assert faults <= FAULTS | HURRIES
    return Options(cases or (CASE,), faults=faults, budget=budget, hurries=hurries, **others)


GIVEN_UP = world("abort_decode deadline lag", 2, 1)
LATE = world("deadline abort_decode silent second silence", 2, 3)
TORN = world("write_fails", 1)
AGAIN = world("write_fails break_decode break_prefill", 2)
CRASHED = world("crash_prefill deadline", 2, 0)
ENDED = world("close_prefill", 1, 0, CASE, CASE)
FIRST = world("break_decode", 1, 0, SHORT, SHORT)
NOT_NEEDED = PushCase(decode=1, tokens=3, push="a", part="decode", floor=2)
TWICE = world(
    "",
    0,
    0,
    PushCase(tokens=4, push="a"),
    PushCase(decode=1, tokens=4, push="a", part="decode"),
    NOT_NEEDED,
)
"""A router that uses an id again."""
STOPPED = world("stop_prefill abort_decode", 2)
LATE_BOUND = world(
    "abort_decode abort_prefill preempt break_decode break_prefill", 2, 0, CASE, CASE, beside=True
)
"""A prefill engine whose ranks hear of destinations while a step runs."""
RANKS = world("", 0, 0, SHORT, prefill_ranks=2)


# -- the decode side, broken ---------------------------------------------------------------------


def nothing_is_quarantined(patch: Patch) -> None:
    settle = PushTarget.settle

    def and_release(target: PushTarget, transfer: Transfer, record: RequestRecord | None) -> None:
        settle(target, transfer, record)
        if transfer.id in target._inbound:
            target._release(transfer.id)

    patch.setattr(PushTarget, "settle", and_release)


def a_silent_peer_is_taken_for_dead(patch: Patch) -> None:
    lost = PushTarget._lost

    def closed(target: PushTarget, item: Lost) -> None:
        lost(target, replace(item, fate=Fate.CLOSED))

    patch.setattr(PushTarget, "_lost", closed)


def a_peer_that_answers_is_not_waited_for(patch: Patch) -> None:
    settle = PushTarget.settle

    def and_a_time(target: PushTarget, transfer: Transfer, record: RequestRecord | None) -> None:
        settle(target, transfer, record)
        if (inbound := target._inbound.get(transfer.id)) is not None:
            inbound.until = min(inbound.until, target._clock.now + target._config.quarantine)

    patch.setattr(PushTarget, "settle", and_a_time)
    patch.setattr(Inbound, "is_over", lambda inbound, now: now >= inbound.ends)


def what_has_come_is_not_waited_for(patch: Patch) -> None:
    patch.setattr(push_target, "SETTLE_SECONDS", 0.0)


def torn_writes_are_not_waited_for(patch: Patch) -> None:
    receive = PushTarget.receive

    def clean(target: PushTarget, news: Iterable[News]) -> None:
        heard: list[News] = []
        for item in news:
            if isinstance(item, Letter) and isinstance(item.message, Fenced):
                heard.append(Letter(item.peer, Fenced(item.message.attempt, clean=True)))
            else:
                heard.append(item)
        receive(target, heard)

    patch.setattr(PushTarget, "receive", clean)


def another_incarnation_is_a_fence(patch: Patch) -> None:
    opened = PushTarget._opened

    def fenced(target: PushTarget, address: str, sender: Sender) -> None:
        former = {i.attempt: i.incarnation for i in target._inbound.values()}
        opened(target, address, sender)
        for inbound in target._inbound.values():
            known = former[inbound.attempt] not in ("", sender.card.incarnation)
            if inbound.address == address and known:
                inbound.fenced, inbound.until, inbound.lingering = True, target._clock.now, 0.0

    patch.setattr(PushTarget, "_opened", fenced)


def another_incarnation_answers_for_the_former(patch: Patch) -> None:
    opened = PushTarget._opened

    def forget(target: PushTarget, address: str, sender: Sender) -> None:
        opened(target, address, sender)
        for inbound in target._inbound.values():
            inbound.lingering = 0.0

    patch.setattr(PushTarget, "_opened", forget)


def whoever_was_never_connected_knows_nothing(patch: Patch) -> None:
    lost = PushTarget._lost

    def untold(target: PushTarget, item: Lost) -> None:
        lost(target, item)
        for inbound in target._inbound.values():
            inbound.untold |= inbound.address == item.peer and not item.was_open

    patch.setattr(PushTarget, "_lost", untold)


def goodbyes_are_not_heard(patch: Patch) -> None:
    lost = PushTarget._lost

    def gone(target: PushTarget, item: Lost) -> None:
        lost(target, replace(item, goodbye=None))

    patch.setattr(PushTarget, "_lost", gone)


def what_is_given_up_is_not_cancelled(patch: Patch) -> None:
    def silently(
        target: PushTarget, transfer: TransferId, reason: str, cause: GiveUp = GiveUp.CANCELLED
    ) -> None:
        inbound = target._inbound.get(transfer)
        if inbound is not None and not inbound.reason:
            inbound.reason, inbound.cause = reason, cause
            target.give_ups.append(transfer)

    patch.setattr(PushTarget, "give_up", silently)
    patch.setattr(PushTarget, "_ask", lambda target: None)


def nobody_is_asked_again(patch: Patch) -> None:
    patch.setattr(PushTarget, "_ask", lambda target: None)


def failed_is_taken_for_fenced(patch: Patch) -> None:
    receive = PushTarget.receive

    def both(target: PushTarget, news: Iterable[News]) -> None:
        heard: list[News] = []
        for item in news:
            heard.append(item)
            if isinstance(item, Letter) and isinstance(item.message, Failed):
                heard.append(Letter(item.peer, Fenced(item.message.attempt, clean=True)))
        receive(target, heard)

    patch.setattr(PushTarget, "receive", both)


def what_the_engine_has_is_written_again(patch: Patch) -> None:
    table = PushTarget._table
    patch.setattr(
        PushTarget,
        "_table",
        lambda target, record, group, floor, start, end: table(target, record, group, 0, 0, end),
    )


def parked_blocks_are_not_leased(patch: Patch) -> None:
    order = PushTarget.order

    def unleased(target: PushTarget, record: RequestRecord, *args: int) -> None:
        order(target, record, *args)
        assert record.receive is not None
        target._inbound[record.receive].lease.release()

    patch.setattr(PushTarget, "order", unleased)


def any_number_of_blocks_is_parked(patch: Patch) -> None:
    made = Room.__init__
    patch.setattr(Room, "__init__", lambda room, most: made(room, 1_000_000))


# -- its ranks -----------------------------------------------------------------------------------


def one_sender_is_enough(patch: Patch) -> None:
    owed_by = Receives.owed_by

    def first(receives: Receives, transfer: TransferId, ends: Iterable[str]) -> None:
        receive = receives._expected.get(transfer)
        delivered = set() if receive is None else receive.delivered
        owed_by(receives, transfer, [*delivered, *ends][:1])

    patch.setattr(Receives, "owed_by", first)


def nobody_in_particular_must_deliver(patch: Patch) -> None:
    def there(receives: Receives, receive: Receive) -> None:
        del receives._expected[receive.order.transfer]
        receives._end(receive, Outcome.DONE, "")

    def any_end(receives: Receives, receive: Receive) -> None:
        if receive.delivered:
            there(receives, receive)

    patch.setattr(Receives, "_end_if_delivered", any_end)


def early_notices_are_dropped(patch: Patch) -> None:
    deliver = Receives._deliver

    def expected(receives: Receives, end: str, epoch: int) -> None:
        if epoch in receives._expected:
            deliver(receives, end, epoch)

    patch.setattr(Receives, "_deliver", expected)


def notices_for_a_former_engine_are_believed(patch: Patch) -> None:
    notice = Receives.notice

    def mine(receives: Receives, item: Notice) -> None:
        message = decode(item.body)
        assert isinstance(message, Delivered)
        renamed = Delivered(receives._incarnation, message.epoch)
        notice(receives, Notice(item.peer, encode(renamed)))

    patch.setattr(Receives, "notice", mine)


# -- the prefill side, broken --------------------------------------------------------------------


def what_is_stopped_is_fenced_at_once(patch: Patch) -> None:
    stop = PushSource._stop

    def and_fence(source: PushSource, out: Outbound) -> None:
        stop(source, out)
        if out.announce is not None:
            source._say(out.peer, Fenced(out.announce.attempt, clean=True))

    patch.setattr(PushSource, "_stop", and_fence)


def torn_is_said_to_be_clean(patch: Patch) -> None:
    patch.setattr(push_sender, "TORN", "nothing that a write says")


def failed_writes_are_ignored(patch: Patch) -> None:
    settle = PushSource.settle

    def done(source: PushSource, transfer: Transfer) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(source, "_fail", lambda out, reason: None)
            settle(source, transfer)

    patch.setattr(PushSource, "settle", done)


def sources_are_not_leased(patch: Patch) -> None:
    send = PushSender._send

    def unleased(sender: PushSender, *args: Any, **others: Any) -> str:
        before = {transfer.id for transfer in sender._transfers.live()}
        problem = send(sender, *args, **others)
        for transfer in sender._transfers.live():
            if transfer.id not in before and transfer.lease is not None:
                transfer.lease.release()
        return problem

    patch.setattr(PushSender, "_send", unleased)


def prompts_that_have_ended_are_not_held(patch: Patch) -> None:
    finished = PushSource.finished

    def freed(source: PushSource, record: RequestRecord, *args: Any) -> None:
        finished(source, record, *args)
        out = source._of(record)
        if out is not None and out.held is not None:
            out.held.release()

    patch.setattr(PushSource, "finished", freed)


def what_a_step_begins_with_is_taken_for_computed(patch: Patch) -> None:
    def progress(source: PushSource, record: RequestRecord, start: int, end: int) -> None:
        out = source._of(record)
        if out is not None:
            out.noted = Progress(record.losses, start, end)

    patch.setattr(PushSource, "progress", progress)


def what_a_step_computes_is_taken_for_computed(patch: Patch) -> None:
    progress = PushSource.progress

    def ahead(source: PushSource, record: RequestRecord, start: int, end: int) -> None:
        progress(source, record, start, end)
        out = source._of(record)
        if out is not None:
            out.noted = Progress(record.losses, end, end)

    patch.setattr(PushSource, "progress", ahead)


def a_request_keeps_what_it_had_computed(patch: Patch) -> None:
    patch.setattr(Outbound, "progress", property(lambda out: out.noted))


def an_unfinished_prompt_is_sent_as_whole(patch: Patch) -> None:
    finished = PushSource.finished

    def whole(source: PushSource, record: RequestRecord, computed: int, blocks: Any) -> None:
        record.load = None
        finished(source, record, record.view.num_prompt_tokens, blocks)

    patch.setattr(PushSource, "finished", whole)


def what_is_over_is_forgotten(patch: Patch) -> None:
    patch.setattr(Endings, "note", lambda endings, peer, epoch, *, clean: None)


def what_was_declined_is_forgotten(patch: Patch) -> None:
    patch.setattr(push_source, "_remember", lambda known, key, why: None)


def a_cancel_stops_nothing(patch: Patch) -> None:
    patch.setattr(PushSource, "_under_way", lambda source, peer, attempt: None)


def nobody_runs_out_of_patience(patch: Patch) -> None:
    plan = PushSource.plan

    def patient(source: PushSource) -> None:
        for out in source._outbound.values():
            out.expires = inf
        plan(source)

    patch.setattr(PushSource, "plan", patient)


def prompts_are_not_compared(patch: Patch) -> None:
    patch.setattr(push_source, "misfit", lambda *_: "")


def any_state_is_sent(patch: Patch) -> None:
    def newest(sender: PushSender, out: Outbound, group: int) -> Any:
        return [block for _, block, _ in [out.states[group]]] if group in out.states else ()

    patch.setattr(PushSender, "_state_blocks", newest)


def states_are_not_leased(patch: Patch) -> None:
    state = PushSource.state

    def unleased(source: PushSource, record: RequestRecord, item: Any) -> None:
        state(source, record, item)
        out = source._of(record)
        if out is not None and item.group in out.states:
            out.states[item.group][2].release()

    patch.setattr(PushSource, "state", unleased)


def anybody_may_decline_a_push(patch: Patch) -> None:
    patch.setattr(Outbound, "is_for", lambda out, peer: True)


def anybody_may_take_a_push_over(patch: Patch) -> None:
    announced = PushSource._announced

    def taken(source: PushSource, peer: str, announce: Announce) -> None:
        out = source._outbound.get(announce.attempt.push)
        if out is not None:
            out.peer, out.announce = peer, None
        announced(source, peer, announce)

    patch.setattr(PushSource, "_announced", taken)


def the_link_fences_what_it_hands_on(patch: Patch) -> None:
    letter = Inbox.letter

    def and_keep(inbox: Inbox, box: Mailbox, item: Letter, size: int) -> Attempt | None:
        news = dict(inbox._news)
        never = letter(inbox, box, item, size)
        if never is not None:
            inbox._news = news
        return never

    patch.setattr(Inbox, "letter", and_keep)


def an_idle_engine_is_not_woken(patch: Patch) -> None:
    def awake(prefill: Prefill) -> bool:
        return bool(prefill.requests or prefill.transfers.pending or prefill.source.pending)

    patch.setattr(Prefill, "awake", property(awake))


# -- late binding, broken -------------------------------------------------------------------------


def who_takes_what_is_withdrawn_is_obeyed(patch: Patch) -> None:
    patch.setattr(OpenPrompts, "withdraw", OpenPrompts.taken)


def what_was_taken_is_withdrawn(patch: Patch) -> None:
    withdraw = OpenPrompts.withdraw

    def unheard(offers: OpenPrompts, push: str) -> None:
        withdraw(offers, push)

    patch.setattr(OpenPrompts, "withdraw", unheard)
    patch.setattr(OpenPrompts, "taken", lambda offers, push: None)


def the_link_fences_what_is_being_sent(patch: Patch) -> None:
    letter = Inbox.letter

    def and_keep(inbox: Inbox, box: Mailbox, item: Letter, size: int) -> Attempt | None:
        before, take = inbox._next, inbox._take
        never = letter(inbox, box, item, size)
        if isinstance(item.message, Announce) and inbox._next == before:
            inbox._take = lambda peer, announce: False
            letter(inbox, box, item, size)
            inbox._take = take
        return never

    patch.setattr(Inbox, "letter", and_keep)


def a_binding_that_comes_twice_is_obeyed_twice(patch: Patch) -> None:
    patch.setattr(Gathers, "bind", lambda gathers, bound: bound.binding.order.transfer)


def a_goodbye_fences_what_is_under_way(patch: Patch) -> None:
    goodbye = Endings.goodbye
    patch.setattr(Endings, "goodbye", lambda ends, peer, under_way: goodbye(ends, peer, ()))


def a_goodbye_fences_what_is_torn(patch: Patch) -> None:
    patch.setattr(Endings, "goodbye", lambda ends, peer, under_way: Goodbye.but_for(0, under_way))


def plans_carry_no_bindings(patch: Patch) -> None:
    patch.setattr(PushSource, "bindings", property(lambda source: []))


def what_was_taken_is_not_waited_for(patch: Patch) -> None:
    adopt = PushSender.adopt

    def and_forget(sender: PushSender, out: Outbound, taken: Taken) -> None:
        adopt(sender, out, taken)
        out.moving.clear()

    patch.setattr(PushSender, "adopt", and_forget)


def what_is_gathered_is_not_leased(patch: Patch) -> None:
    gather = PushSender.gather

    def unleased(sender: PushSender, out: Outbound) -> OpenPrompt:
        offer = gather(sender, out)
        transfer = sender._transfers.get(offer.transfer)
        assert transfer is not None
        assert transfer.lease is not None
        transfer.lease.release()
        return offer

    patch.setattr(PushSender, "gather", unleased)


# -- what the model sees -------------------------------------------------------------------------

BREAKS: dict[Break, Options] = {
    nothing_is_quarantined: GIVEN_UP,
    a_silent_peer_is_taken_for_dead: STOPPED,
    a_peer_that_answers_is_not_waited_for: LATE,
    what_has_come_is_not_waited_for: GIVEN_UP,
    torn_writes_are_not_waited_for: TORN,
    another_incarnation_is_a_fence: CRASHED,
    another_incarnation_answers_for_the_former: CRASHED,
    whoever_was_never_connected_knows_nothing: FIRST,
    goodbyes_are_not_heard: ENDED,
    what_is_given_up_is_not_cancelled: GIVEN_UP,
    nobody_is_asked_again: STOPPED,
    failed_is_taken_for_fenced: world("abort_prefill second", 1, 4),
    what_the_engine_has_is_written_again: world("deadline", 0, 0, PushCase(tokens=4, floor=2)),
    parked_blocks_are_not_leased: GIVEN_UP,
    one_sender_is_enough: RANKS,
    nobody_in_particular_must_deliver: RANKS,
    one_rank_is_enough: world("deadline", 1, 0, prefill_ranks=2, decode_ranks=2),
    early_notices_are_dropped: world("tarry", 1),
    notices_for_a_former_engine_are_believed: world("crash_decode", 1, 0, SHORT, SHORT),
    identities_are_used_again: world("abort_decode deadline", 1, 0, CASE, CASE),
    what_is_stopped_is_fenced_at_once: GIVEN_UP,
    torn_is_said_to_be_clean: TORN,
    failed_writes_are_ignored: TORN,
    sources_are_not_leased: GIVEN_UP,
    prompts_that_have_ended_are_not_held: world("", 0),
    what_a_step_begins_with_is_taken_for_computed: world(
        "", 0, 0, PushCase(tokens=5, hit="layerwise", hit_tokens=4)
    ),
    what_a_step_computes_is_taken_for_computed: world("", 0, 0, PushCase(tokens=5)),
    a_request_keeps_what_it_had_computed: world(
        "preempt", 1, 0, CASE, PushCase(tokens=5, hit="parked", hit_tokens=4), narrow=True
    ),
    an_unfinished_prompt_is_sent_as_whole: world(
        "abort_prefill", 1, 0, PushCase(tokens=5, hit="parked", hit_tokens=4)
    ),
    what_is_over_is_forgotten: AGAIN,
    what_was_declined_is_forgotten: world("", 0, 0, PushCase(tokens=3, floor=2)),
    a_cancel_stops_nothing: GIVEN_UP,
    nobody_runs_out_of_patience: world("never_prefill never_decode", 1),
    prompts_are_not_compared: world("", 0, 0, PushCase(misled=True)),
    any_state_is_sent: world("", 0, 0, PushCase(tokens=7), groups=(FULL, STATE), chunk=4),
    states_are_not_leased: world("", 0, 0, PushCase(tokens=7), groups=(FULL, STATE)),
    any_number_of_blocks_is_parked: world("stop_prefill", 1, 0, *LARGE, scarce=True),
    anybody_may_decline_a_push: world("", 0, 0, PushCase(tokens=6, push="a"), NOT_NEEDED),
    anybody_may_take_a_push_over: TWICE,
    the_link_fences_what_it_hands_on: GIVEN_UP,
    an_idle_engine_is_not_woken: world("never_prefill", 1),
    who_takes_what_is_withdrawn_is_obeyed: LATE_BOUND,
    what_was_taken_is_withdrawn: LATE_BOUND,
    the_link_fences_what_is_being_sent: LATE_BOUND,
    a_binding_that_comes_twice_is_obeyed_twice: LATE_BOUND,
    a_goodbye_fences_what_is_under_way: ENDED,
    a_goodbye_fences_what_is_torn: world("close_prefill write_fails", 2),
    plans_carry_no_bindings: world("deaf", 1, beside=True),
    what_was_taken_is_not_waited_for: LATE_BOUND,
    what_is_gathered_is_not_leased: LATE_BOUND,
}
"""Each break, and a world in which it shows."""


def named(options: Options) -> str:
    """The same in every process, whatever its hash seed: workers compare what they collect."""
    return " ".join(sorted(options.faults))


@pytest.mark.parametrize("rule", BREAKS, ids=lambda rule: rule.__name__)
def test_a_broken_rule_is_seen(rule: Break, monkeypatch: Patch) -> None:
    rule(monkeypatch)
    assert finds(BREAKS[rule], HISTORIES), "nothing is seen of it"


UNLIKELY = (
    world("break_decode silent break_prefill stop_prefill second silence abort_decode", 3, 3),
    world("break_decode silent crash_prefill second silence deadline write_fails", 3, 3),
    world(
        "hang_prefill break_decode silent silence moment patience abort_prefill", 3, 4, CASE, SHORT
    ),
    world("stop_prefill crash_prefill silence second abort_decode", 3, 4, *LARGE, scarce=True),
)
"""Worlds in which much goes wrong: each has shown a fault."""


@pytest.mark.slow
@pytest.mark.parametrize("options", UNLIKELY, ids=named)
def test_much_goes_wrong(options: Options) -> None:
    assert not finds(options, 400)


@pytest.mark.soak
@pytest.mark.parametrize("options", dict.fromkeys(BREAKS.values()), ids=named)
def test_nothing_is_seen_where_nothing_is_broken(options: Options) -> None:
    assert not finds(options, UNBROKEN)
