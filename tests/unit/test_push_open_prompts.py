"""A prompt whose destination becomes known while its last step runs leaves in that step, once, and
whatever happens meanwhile its blocks are held for as long as they are read.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from test_push_source import (
    ATTEMPT,
    DEADLINE,
    FULL,
    NULL,
    PUSH,
    STATE,
    STATES,
    WINDOW,
    D,
    Ranks,
    Source,
    announce,
    stand,
)

from lamina_kv.control.push.open_prompts import OpenPrompts, Taken
from lamina_kv.geometry import Group
from lamina_kv.plan import Binding, Outcome, PushPages, PushStop, TransferId, TransferReceipt
from lamina_kv.push.inbox import MAX_BYTES, Inbox, Mailbox
from lamina_kv.push.letters import Fate, Letter, Lost, Opened
from lamina_kv.push.messages import (
    NO_EPOCH,
    Announce,
    Attempt,
    BlockTable,
    Bound,
    Cancel,
    Claim,
    Failed,
    Fenced,
    Queued,
)

OTHER = "another decode engine"
WHOLE = (PushPages(0, (10, 11, 12, 13), (50, 51, 52, 53)),)


def offering(*groups: Group) -> tuple[Source, Ranks]:
    """A prompt of which the last step is planned, and nobody has said where it goes."""
    ranks = Ranks()
    source = Source(*groups, channel=ranks)
    source.connect()
    source.connect(OTHER)
    source.admit()
    return source, ranks


def gather(source: Source) -> TransferId:
    assert source.step(40, 56) == []
    (transfer,) = source.source.gathers
    source.source.gathers.clear()
    return transfer


def bindings(source: Source) -> list[Binding]:
    bindings = list(source.source.bindings)
    source.source.bindings.clear()
    return bindings


def drops(source: Source) -> list[TransferId]:
    drops = list(source.source.drops)
    source.source.drops.clear()
    return drops


def end(source: Source, transfer: TransferId, reason: str = "", rank: int = 0) -> None:
    """A rank says that it has ended."""
    outcome = Outcome.FAILED if reason else Outcome.DONE
    live = source.transfers.get(transfer)
    assert live is not None
    if live.apply(rank, TransferReceipt(transfer, outcome, reason=reason)):
        assert live.lease is not None
        live.lease.release()
        source.source.settle(live)


def is_clean(source: Source) -> bool:
    return not (source.pool.held or len(source.transfers) or source.source.pending)


def test_a_destination_that_comes_while_the_last_step_runs_is_told_to_the_ranks() -> None:
    source, ranks = offering()
    assert source.step(0, 40) == []
    assert not source.source.gathers
    transfer = gather(source)
    assert source.pool.held == {10, 11, 12, 13}
    assert source.source.take(D, announce())
    (binding,) = ranks.said
    assert binding.peer.incarnation == D
    assert (binding.order.transfer, binding.order.epoch) == (transfer, ATTEMPT.epoch)
    assert (binding.order.pages, binding.order.last) == (WHOLE, True)
    assert binding.order.patience == 30.0
    assert not source.source.take(D, announce())

    source.finish()
    assert source.step() == []  # nothing twice
    assert bindings(source) == [binding]  # whoever was not reached
    assert not drops(source)
    assert source.said() == [Bound(ATTEMPT)]
    assert source.step() == []
    assert source.pool.held == {10, 11, 12, 13}
    end(source, transfer)
    assert source.said() == []
    assert is_clean(source)


def test_what_comes_when_the_step_is_being_planned_is_told_to_the_ranks_at_once() -> None:
    """The link has handed it to control, because nothing was offered yet."""
    source, ranks = offering()
    transfer = gather(source)
    source.hear(announce())
    assert [binding.order.transfer for binding in ranks.said] == [transfer]
    assert source.said() == [Bound(ATTEMPT)]
    assert source.step() == []
    assert bindings(source) == ranks.said
    end(source, transfer)
    source.finish()
    assert is_clean(source)


def test_what_has_drained_before_control_looks_is_over() -> None:
    source, _ = offering()
    transfer = gather(source)
    assert source.source.take(D, announce())
    end(source, transfer)
    source.finish()
    assert source.said() == [Bound(ATTEMPT)]
    assert is_clean(source)
    assert source.step() == []


@pytest.mark.parametrize("engine", ["serial", "plans a step ahead"])
def test_nobody_takes_what_has_been_withdrawn(engine: str) -> None:
    """The next plan but one is made when the step is over, whatever the engine."""
    source, ranks = offering()
    transfer = gather(source)
    if engine == "serial":
        source.finish()
    else:
        source.step()
        assert not drops(source)
        source.finish()
    source.step()
    assert drops(source) == [transfer]
    assert not source.source.take(D, announce())
    assert not ranks.said
    source.hear(announce())
    (order,) = source.step()
    assert (order.pages, order.computed, order.last) == (WHOLE, True, True)
    source.drain(order)
    assert is_clean(source)


def its_router_withdraws_it(source: Source) -> None:
    source.source.withdraw(PUSH, "carrier")


def nobody_has_come_for_it(source: Source) -> None:
    source.now += DEADLINE
    source.step()


def the_engine_ends(source: Source) -> None:
    source.finish()
    source.source.end(at_once=False)


def the_engine_ends_before_it(source: Source) -> None:
    source.source.end(at_once=False)
    source.finish()


@pytest.mark.parametrize(
    "given_up",
    [
        its_router_withdraws_it,
        nobody_has_come_for_it,
        the_engine_ends,
        the_engine_ends_before_it,
    ],
)
def test_who_takes_a_prompt_when_control_has_just_looked_gets_it(
    given_up: Callable[[Source], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link's thread has it before control takes it back."""
    source, _ = offering()
    transfer = gather(source)
    withdraw = OpenPrompts.withdraw

    def a_moment_later(prompts: OpenPrompts, push: str) -> Taken | None:
        prompts.take(D, announce())
        return withdraw(prompts, push)

    monkeypatch.setattr(OpenPrompts, "withdraw", a_moment_later)
    given_up(source)
    assert source.said() == [Bound(ATTEMPT)]
    source.step()
    end(source, transfer)
    source.finish()
    assert not source.said()
    assert is_clean(source)


@pytest.mark.parametrize("why", ["announced", "no way", "half"])
def test_nothing_is_gathered_that_nobody_could_take(why: str) -> None:
    ranks = Ranks()
    source = Source(channel=ranks)
    source.connect()
    source.admit()
    ranks.is_open = why != "no way"
    if why == "announced":
        source.hear(announce())
    source.step(0, 55 if why == "half" else 56)
    assert not source.source.gathers


def test_where_ranks_are_reached_nobody_waits_for_a_destination() -> None:
    ranks = Ranks()
    source = Source(channel=ranks)
    source.source.arrived(source.record)
    assert not source.source.waits(source.record)
    ranks.is_open = False
    assert source.source.waits(source.record)


@pytest.mark.parametrize(
    "wrong",
    [
        announce(salt=1),
        announce(BlockTable(0, (50, 51, 52, 1000))),
        announce(BlockTable(1, (50, 51, 52, 53))),
        announce(attempt=Attempt("of nobody", 7)),
    ],
)
def test_what_does_not_fit_is_left_to_control(wrong: Announce) -> None:
    source, ranks = offering()
    gather(source)
    assert not source.source.take(D, wrong)
    assert not source.source.take("a stranger", announce())
    assert not ranks.said
    assert source.source.take(D, announce())


def test_control_says_why_an_announcement_is_refused() -> None:
    source, ranks = offering()
    transfer = gather(source)
    assert not source.source.take(D, announce(salt=1))
    source.hear(announce(salt=1))
    said = source.said()
    assert isinstance(said[0], Failed)
    assert said[1] == Fenced(ATTEMPT, clean=True)
    source.step()
    assert drops(source) == [transfer]
    assert is_clean(source)
    assert not ranks.said


def test_what_another_has_claimed_is_its_own() -> None:
    source, _ = offering()
    gather(source)
    source.hear(Claim((PUSH,), 30.0))
    assert not source.source.take(OTHER, announce())
    assert source.source.take(D, announce())
    source.hear(Claim((PUSH,), 30.0), OTHER)
    said = source.said()
    assert said[:2] == [Queued(Attempt(PUSH, NO_EPOCH)), Bound(ATTEMPT)]
    assert isinstance(said[2], Failed)


def test_a_claim_that_comes_too_late_is_told_so() -> None:
    source, _ = offering()
    gather(source)
    assert source.source.take(D, announce())
    source.hear(Claim((PUSH,), 30.0), OTHER)
    said = source.said()
    assert said[0] == Bound(ATTEMPT)
    assert isinstance(said[1], Failed)


@pytest.mark.parametrize("looked", [False, True])
def test_a_cancel_is_answered_when_what_was_taken_has_drained(looked: bool) -> None:
    source, _ = offering()
    transfer = gather(source)
    assert source.source.take(D, announce())
    if looked:
        source.step()
    source.hear(Cancel(ATTEMPT))
    assert source.said() == [Bound(ATTEMPT)]
    source.step()
    assert source.stops() == [PushStop(D, ATTEMPT.epoch)]
    assert [b.order.transfer for b in bindings(source)] == [transfer]
    assert source.pool.held
    end(source, transfer, "stopped")
    assert source.said() == [Fenced(ATTEMPT, clean=True)]
    source.finish()
    assert is_clean(source)


def test_a_link_that_is_lost_stops_what_was_taken() -> None:
    """Control hears of the loss, and never of the announcement."""
    source, _ = offering()
    transfer = gather(source)
    assert source.source.take(D, announce())
    source.lose()
    assert source.stops() == [PushStop(D, ATTEMPT.epoch)]
    assert source.pool.held
    assert not source.source.take(D, announce(attempt=Attempt(PUSH, 8)))
    end(source, transfer, "stopped")
    source.finish()
    assert is_clean(source)


@pytest.mark.parametrize("taken", [False, True])
def test_a_step_that_fails_fails_the_push(taken: bool) -> None:
    source, _ = offering()
    transfer = gather(source)
    if taken:
        assert source.source.take(D, announce())
    end(source, transfer, "step_failed")
    if not taken:
        source.hear(announce())
    said = [word for word in source.said() if not isinstance(word, Bound)]
    assert said == [Failed(ATTEMPT, "step_failed"), Fenced(ATTEMPT, clean=True)]
    source.finish()
    assert is_clean(source)
    assert source.step() == []


@pytest.mark.parametrize("announced", [False, True])
def test_one_rank_on_which_the_step_has_failed_is_enough(announced: bool) -> None:
    ranks = Ranks()
    source = Source(channel=ranks, ranks=2)
    source.connect()
    source.admit()
    transfer = gather(source)
    end(source, transfer, "step_failed", rank=1)
    if announced:
        source.hear(announce())
        assert source.said() == [Bound(ATTEMPT)]
        end(source, transfer)
    else:
        source.step()
        source.step()
        assert drops(source) == [transfer]
        source.hear(announce())
    assert source.said() == [Failed(ATTEMPT, "step_failed"), Fenced(ATTEMPT, clean=True)]
    assert is_clean(source)


def test_a_load_that_fails_under_it_fails_what_was_taken() -> None:
    source, _ = offering()
    transfer = gather(source)
    assert source.source.take(D, announce())
    source.source.distrust(0)
    said = source.said()
    assert said[0] == Bound(ATTEMPT)
    assert isinstance(said[1], Failed)
    end(source, transfer, "stopped")
    assert source.said() == [Fenced(ATTEMPT, clean=True)]


def test_a_preempted_prompt_that_was_taken_is_sent_all_the_same() -> None:
    source, _ = offering()
    transfer = gather(source)
    assert source.source.take(D, announce())
    source.record.lose_blocks()
    source.step()
    assert source.pool.held == {10, 11, 12, 13}
    source.admit()
    assert source.step(0, 56) == []
    assert not source.source.gathers
    end(source, transfer)
    assert is_clean(source)


def test_blocks_of_a_preempted_prompt_come_back_when_nobody_has_taken_it() -> None:
    source, _ = offering()
    transfer = gather(source)
    source.record.lose_blocks()
    source.step()
    source.step()
    assert drops(source) == [transfer]
    assert is_clean(source)


def test_an_engine_that_ends_sends_what_was_taken() -> None:
    source, _ = offering()
    transfer = gather(source)
    source.finish()
    assert source.source.take(D, announce())
    source.source.end(at_once=False)
    assert source.said() == [Bound(ATTEMPT)]
    end(source, transfer)
    assert is_clean(source)


def test_an_engine_that_ends_holds_nothing_for_who_has_not_come() -> None:
    source, _ = offering()
    gather(source)
    source.finish()
    source.source.end(at_once=False)
    assert not source.source.take(D, announce())
    assert is_clean(source)


def test_what_runs_out_of_patience_is_not_taken() -> None:
    source, _ = offering()
    gather(source)
    source.now = DEADLINE
    source.step()
    assert not source.source.take(D, announce())
    assert is_clean(source)


def test_a_window_that_has_moved_on_is_left_to_control() -> None:
    source, ranks = offering(WINDOW)
    source.view.tables[0][:2] = [NULL, NULL]
    gather(source)
    assert not source.source.take(D, announce())
    assert source.source.take(D, announce(BlockTable(2, (52, 53)), start=32))
    assert ranks.said[0].order.pages == (PushPages(0, (12, 13), (52, 53)),)


@pytest.mark.parametrize("stands", [32, 48])
def test_a_state_is_sent_if_it_stands_where_it_is_wanted(stands: int) -> None:
    source, ranks = offering(FULL, STATE)
    source.view.tables[1] = []
    stand(source, stands, 77)
    gather(source)
    assert source.source.take(D, STATES) == (stands == 48)
    sent = (PushPages(0, (10, 11, 12), (50, 51, 52)), PushPages(1, (77,), (70,)))
    assert [binding.order.pages for binding in ranks.said] == [sent] * (stands == 48)


# -- what the link does with an announcement -----------------------------------------------------


class Link:
    """An inbox with one connection of which control knows, or does not yet."""

    def __init__(self, *, known: bool = True) -> None:
        self.asked: list[Announce] = []
        self.inbox = Inbox(lambda: None, self._take)
        self.box = Mailbox()
        self.inbox.opened(self.box, Opened(D, D))
        if known:
            self.inbox.take()

    def _take(self, peer: str, announce: Announce) -> bool:
        assert peer == D
        self.asked.append(announce)
        return True

    def say(self, message: Announce | Cancel) -> Attempt | None:
        return self.inbox.letter(self.box, Letter(D, message), 1)


def test_what_is_being_sent_is_neither_fenced_by_the_link_nor_said_to_control() -> None:
    link = Link()
    assert link.say(announce()) is None
    assert link.asked == [announce()]
    assert link.say(Cancel(ATTEMPT)) is None
    assert link.inbox.take() == [Letter(D, Cancel(ATTEMPT))]


def test_who_control_does_not_know_yet_takes_nothing() -> None:
    """What it took would go on when its connection is lost before control has heard of it."""
    link = Link(known=False)
    assert link.say(announce()) is None
    assert not link.asked
    assert link.say(Cancel(ATTEMPT)) == ATTEMPT
    link.inbox.lost(link.box, Lost(D, "", was_open=True, fate=Fate.CLOSED), forget=True)
    assert link.inbox.take() == []


def test_a_connection_is_read_no_further_when_what_waits_has_reached_the_bound() -> None:
    link, resumed = Link(), []
    link.inbox.letter(link.box, Letter(D, Cancel(ATTEMPT)), MAX_BYTES - 1)
    assert not link.inbox.is_full(link.box, lambda: resumed.append(1))
    link.inbox.letter(link.box, Letter(D, Cancel(Attempt("another", 1))), 1)
    assert link.inbox.is_full(link.box, lambda: resumed.append(2))
    link.inbox.take()
    assert resumed == [2]
