"""The prefill engine's side of pushes: what is bound, sent, stopped, and fenced.

::

    WAITING ──announcement and request──▶ BOUND ──all sent, all drained──▶ over
       │                                    │ a write fails, the request ends too early
       └── patience, refusal ──▶ STOPPED ◀──┘ cancel, link lost
                                    └── all drained ──▶ fenced, over

A prompt that a step completes while its push is WAITING is offered to the link's thread, which may
bind it before control looks (:mod:`lamina_kv.control.push.open_prompts`). Whoever ends such a push
withdraws its offer first.

``docs/push.md`` is the protocol.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf
from typing import TypeVar

from lamina_kv.config import PushConfig
from lamina_kv.control.books import Books
from lamina_kv.control.cost import Costs
from lamina_kv.control.push.endings import Endings
from lamina_kv.control.push.fit import misfit
from lamina_kv.control.push.open_prompts import OpenPrompts, RanksChannel, Taken
from lamina_kv.control.push.outbound import Outbound, Progress, Stage
from lamina_kv.control.push.queue import PushQueue
from lamina_kv.control.push.sender import PushSender
from lamina_kv.control.push.undelivered import Undelivered
from lamina_kv.control.requests import BoundaryState, PushParameters, RequestRecord
from lamina_kv.control.transfers import State, Transfer
from lamina_kv.plan import PUSHED, Binding, LoadMode, PeerOrder, PushOrder, PushStop, TransferId
from lamina_kv.push.cards import EngineCard, ShapeMismatchError, encode_card
from lamina_kv.push.cards import match as match_cards
from lamina_kv.push.letters import Letter, Lost, News, Opened
from lamina_kv.push.messages import (
    LONGEST_PATIENCE,
    NO_EPOCH,
    TOO_LATE,
    Absent,
    Announce,
    Attempt,
    Bound,
    Cancel,
    Claim,
    Failed,
    Fenced,
    Goodbye,
    LinkMessage,
    Queued,
)

log = logging.getLogger("lamina_kv.control")

Key = TypeVar("Key")

REMEMBERED = 4096
"""Pushes that are over and still known to requests and announcements that come late."""

PEER_NAME = 8
"""Characters of an incarnation that name a decode engine in metrics."""

MAX_ANNOUNCED = 1 << 20
"""Block ids that a decode engine may have announced and that are not bound or sent yet: of twenty
full caches of an engine. What they are for is not known, and they are kept in memory."""

EXPECTED = 4096
"""Requests that a decode engine may have spoken of before they are here. Further ones are not
looked out for."""

TOO_BUSY = "the prefill engine has too much to do to compute it in time"
"""No fault: as many others come in time as can. Said only where others run, and wait."""

DECLINED = "the decode engine had declined it"
"""Why a push is over of which its decode engine has said that it needs nothing."""

WITHDRAWN = "its router has withdrawn it"
"""Why a push is over that no decode engine has accepted."""

ENDING = "the prefill engine is shutting down"

OF_ANOTHER = "this push is another decode engine's"
"""Why a decode engine has no say in a push."""

HELD_SHARE = 2
"""Of the engine's blocks one in so many may be held for requests that have ended and whose
destination is not known."""


class PushSource:
    """See the module. A part of the planner.

    Args:
        config: the ``push`` section.
        books: what the parts of the planner share.
        card: this engine.
        cost: what computing takes.
        channel: a way to the ranks beside plans; None if there is none.

    Attributes:
        stops: pushes that the next plan ends.
        peers: decode engines that the next plan makes known.
        gone: decode engines that are not connected any more.
        letters: messages for the link.
    """

    def __init__(
        self,
        config: PushConfig,
        books: Books,
        card: EngineCard,
        cost: Costs,
        *,
        channel: RanksChannel | None = None,
    ) -> None:
        self.stops: list[PushStop] = []
        self.peers: list[PeerOrder] = []
        self.gone: list[str] = []
        self.letters: list[Letter] = []
        self._config = config
        self._shape = books.shape
        self._card = card
        self._leases = books.leases
        self._meter = books.meter
        self._clock = books.clock
        self._outbound: dict[str, Outbound] = {}
        self._expected: dict[str, set[str]] = {}
        self._open: dict[str, EngineCard] = {}
        self._refusals: dict[str, str] = {}
        self._ending = ""
        self._told: set[str] = set()
        self._endings = Endings()
        self._weights: Counter[str] = Counter()  # block ids that each peer has announced
        self._declined: OrderedDict[str, str] = OrderedDict()
        self._undelivered = Undelivered()
        self._max_held = card.ranks[0].num_blocks // HELD_SHARE
        self._queue = PushQueue(config, cost)
        self._sender = PushSender(config, books, card)
        self._open_prompts = OpenPrompts(books.shape, self._bounded(inf), channel)

    @property
    def orders(self) -> list[PushOrder]:
        """Pages for the next plan."""
        return self._sender.orders

    @property
    def gathers(self) -> list[TransferId]:
        """Prompts without a destination whose rows the next plan has the ranks keep."""
        return self._sender.gathers

    @property
    def bindings(self) -> list[Binding]:
        """Destinations of such prompts, for the next plan."""
        return self._sender.bindings

    @property
    def drops(self) -> list[TransferId]:
        """Such prompts that get none, for the next plan."""
        return self._sender.drops

    def take(self, peer: str, announce: Announce) -> bool:
        """An announcement has come, and control may be busy: see :meth:`OpenPrompts.take
        <lamina_kv.control.push.open_prompts.OpenPrompts.take>`. Called by the link's thread."""
        return self._open_prompts.take(peer, announce)

    @property
    def unwanted(self) -> list[str]:
        """Requests whose decode engines need nothing of them any more."""
        return self._queue.unwanted

    # -- requests ----------------------------------------------------------------------------

    def arrived(self, record: RequestRecord) -> None:
        """A request is here and waits for its blocks.

        Args:
            record: the request.
        """
        push = record.view.push
        if push is None or push.prefill is not None:
            return
        out = self._outbound.get(push.id)
        if out is None:
            if push.id in self._declined:
                if self._declined[push.id] in (DECLINED, WITHDRAWN):
                    self._queue.forgo(record.view.request_id, self._clock.now)
                return
            out = self._outbound[push.id] = Outbound(
                push.id, self._clock.now + self._config.deadline
            )
        if not out.request:  # a second request under the same id is the router's mistake
            out.request, out.arrived = record.view.request_id, self._clock.now
            self._come(out)
            self._queue.joins(push.id)
            self._say_where(out)

    def waits(self, record: RequestRecord, floor: int = 0) -> bool:
        """Whether a request should not begin yet. Where its prompt goes is not known, and it has
        only just come, so that it may be said in time for its rows to leave one by one; or too many
        blocks are held for such prompts, or will be, for this one to be held as well. Or nobody
        needs it any more, and the engine may be about to end it, or others wait whose prompts
        somebody needs.

        Args:
            record: the request.
            floor: tokens that the engine has of it.
        """
        push = record.view.push
        if push is None or push.prefill is not None or record.push_over:
            return False
        if self._queue.is_about_to_end(record.view.request_id, self._clock.now):
            return True
        if push.id in self._declined:
            return self._queue.yields(record.view.request_id, self._clock.now)
        out = self._outbound.get(push.id)
        if out is None or out.request != record.view.request_id or out.stage is not Stage.WAITING:
            return False
        if out.announce is not None:
            if self._queue.is_in_time(out, record, floor, self._clock.now):
                return False
            self._forgo_of(out)
            self._fail(out, TOO_BUSY)
            return True
        if not self._open_prompts.reach_ranks and self._clock.now < self._queue.expected_until(
            out, record, floor
        ):
            return True
        need = self._shape.pushed_blocks(0, 0, record.view.num_prompt_tokens)
        if self._undelivered.with_prompt(out.push, need) <= self._max_held:
            return False
        self._queue.leaves(push.id)
        return True

    def admitted(self, record: RequestRecord, floor: int) -> None:
        """A request has got its blocks, perhaps not for the first time.

        Args:
            record: the request.
            floor: tokens that the engine has, with what is loaded.
        """
        push = record.view.push
        if push is None or push.prefill is not None:
            return
        self._queue.begins(record.view.request_id, push.id)
        if record.push_over:
            return
        out = self._outbound.get(push.id)
        if out is None:
            if push.id in self._declined:
                record.push_over = self._declined[push.id]
                return
            out = self._outbound[push.id] = Outbound(
                push.id, self._clock.now + self._config.deadline
            )
        mine = out.record is None or out.record is record
        if not mine or out.request not in ("", record.view.request_id):
            return  # a second request under the same id is the router's mistake
        out.request, out.record = record.view.request_id, record
        self._come(out)
        self._queue.works()
        if out.announce is None:
            out.expires = max(out.expires, self._clock.now + self._config.deadline)
            need = self._shape.pushed_blocks(0, 0, record.view.num_prompt_tokens)
            if self._undelivered.with_prompt(out.push, need) <= self._max_held:
                self._undelivered.reserve(out.push, need)
        for group in self._shape.recurrent if floor else ():
            # The state that it begins with may be the one that is wanted, and not stay for long.
            for block in record.view.state_blocks(group, floor)[:1]:
                self.state(record, BoundaryState(record.view.request_id, group, block, floor))
        self._bind(out)

    def progress(self, record: RequestRecord, start: int, end: int) -> None:
        """A request runs in the step that is being planned.

        Args:
            record: the request.
            start: its tokens that are computed before the step.
            end: those that are computed when the step is over.
        """
        out = self._of(record)
        if out is not None:
            self._queue.runs()
            # What it began with may be computed by another request, or loaded, in its first step.
            out.noted = Progress(record.losses, start if out.progress.planned else 0, end)

    def state(self, record: RequestRecord, state: BoundaryState) -> None:
        """A recurrent state stands at a boundary when the step is over."""
        out = self._of(record)
        if out is None or out.ordered or out.stage is Stage.STOPPED or state.end > self._end(out):
            return
        former = out.states.get(state.group)
        if former is None or former[0] <= state.end:
            if former is not None:
                former[2].release()
            out.states[state.group] = (state.end, state.block, self._leases.take((state.block,)))

    def abandoned(self, push: PushParameters, request_id: str) -> None:
        """A request has ended; if it never got blocks, nothing will come of its push."""
        if push.prefill is not None:
            return
        self._queue.ended(request_id)
        out, reason = self._outbound.get(push.id), "the prefill ended before it began"
        if out is not None and out.request == request_id:
            out.ended = True
        if out is None and push.id not in self._declined:
            _remember(self._declined, push.id, reason)  # it may be announced yet
        elif out is not None and out.record is None and out.request in ("", request_id):
            self._fail(out, reason)

    def withdraw(self, push: str, request_id: str) -> None:
        """A router has found no decode engine for a push: nothing is held for it any longer. If a
        decode engine has spoken of it all the same, that one has the say.

        Args:
            push: the router's name for it.
            request_id: the request by which it says so, which is to end.
        """
        self.unwanted.append(request_id)
        out = self._outbound.get(push)
        if out is None:
            if push not in self._declined:
                _remember(self._declined, push, WITHDRAWN)
            return
        if not out.peer:
            self._withdraw(out)
        if not out.peer:
            self._forgo_of(out)
            self._fail(out, WITHDRAWN)

    def finished(
        self, record: RequestRecord, computed: int, blocks: Sequence[Sequence[int]]
    ) -> None:
        """A request has ended; its blocks are freed after this call."""
        out = self._of(record)
        if out is not None:
            self._heed(out)
        if out is None or out.ordered or out.stage is Stage.STOPPED:
            return
        out.noted = Progress(record.losses, computed, computed)
        loading = record.load is not None and record.offer.mode is LoadMode.PARKED
        if loading or computed < self._end(out):  # the engine counts what is being loaded
            self._fail(out, "the prefill ended before the whole prompt was computed")
            return
        if self._ending and out.announce is None:
            self._fail_unless_taken(out, self._ending)
            return
        out.tables = tuple(tuple(table) for table in blocks)
        null = self._shape.null_block
        held = tuple(block for table in out.tables for block in table if block != null)
        if out.announce is None:
            sure = self._undelivered.is_reserved(out.push)
            if not sure and self._undelivered.with_blocks(held) > self._max_held:
                self._fail_unless_taken(out, "too many blocks are held for other pushes")
                return
            self._undelivered.hold(out.push, held)
        out.held = self._leases.take(held)

    def _of(self, record: RequestRecord) -> Outbound | None:
        push = record.view.push
        out = None if push is None else self._outbound.get(push.id)
        return out if out is not None and out.record is record else None

    def _end(self, out: Outbound) -> int:
        """Tokens that the decode engine wants, or will at most."""
        if out.announce is not None:
            return out.announce.end
        assert out.record is not None
        return out.record.view.num_prompt_tokens - 1

    # -- the step ----------------------------------------------------------------------------

    def plan(self) -> None:
        """Order what can be sent of every push that has a destination."""
        self._queue.stepped()
        for out in list(self._outbound.values()):
            if out.expires <= self._clock.now:
                self._withdraw(out)
            else:
                self._heed(out)
            if out.expires <= self._clock.now and out.stage is not Stage.STOPPED:
                if out.waits_here and out.announce is not None:
                    self._forgo_of(out)
                self._fail(out, TOO_BUSY if out.waits_here else TOO_LATE)
            elif out.stage is Stage.BOUND and not out.ordered:
                if problem := self._sender.order(out):
                    self._fail(out, problem)
            elif out.stage is Stage.STOPPED:
                self._sender.let_go(out)
            elif out.stage is Stage.WAITING:
                self._offer(out)
            # Until the engine says more, what this step computes is all that there is.
            if (noted := out.noted).computed != noted.planned:
                out.noted = replace(noted, computed=noted.planned)

    def _offer(self, out: Outbound) -> None:
        """Whoever announces the prompt that this step completes is to have it at once."""
        if out.offer is not None:
            out.offered += 1
            # An engine may plan the next step before this one has run.
            if (out.tables is not None or out.offered > 1) and (problem := self._withdraw(out)):
                self._fail(out, problem)
            return
        if out.record is None or self._shape.in_place or not self._open_prompts.reach_ranks:
            return
        prompt, progress = out.record.view.num_prompt_tokens, out.progress
        if progress.computed < prompt <= progress.planned:
            self._open_prompts.publish(self._sender.gather(out))

    def _withdraw(self, out: Outbound) -> str:
        """Let nobody take what is gathered of a prompt. If somebody has, it is bound.

        Returns:
            Why nothing of the prompt may be believed; empty if that is not so.
        """
        if out.offer is None:
            return ""
        if (taken := self._open_prompts.withdraw(out.push)) is not None:
            self._adopt(out, taken)
            return ""
        return self._sender.drop(out)

    def _heed(self, out: Outbound) -> None:
        """If somebody has taken what is gathered of a prompt, it is bound."""
        if out.offer is not None and (taken := self._open_prompts.taken(out.push)) is not None:
            self._adopt(out, taken)

    def _adopt(self, out: Outbound, taken: Taken) -> None:
        """The ranks know of an announcement; now control does."""
        out.peer, out.announce = taken.peer, taken.announce
        out.expires = self._clock.now + self._bounded(taken.announce.patience)
        self._undelivered.drop(out.push)
        self._sender.adopt(out, taken)
        self._bound(out)

    # -- what happens ------------------------------------------------------------------------

    def receive(self, news: Iterable[News]) -> None:
        """Take in what the link has to say."""
        for item in news:
            match item:
                case Opened(peer, _, EngineCard() as card):
                    self._open_peer(peer, card)
                case Lost(peer):
                    self._lose_peer(peer)
                case Letter(peer, Claim(pushes, patience)):
                    for push in pushes:
                        self._claimed(peer, push, patience)
                case Letter(peer, Announce() as announce):
                    self._announced(peer, announce)
                case Letter(peer, Cancel(attempt)):
                    self._cancelled(peer, attempt)
                case _:
                    pass  # not ours to answer

    def settle(self, transfer: Transfer) -> None:
        """Take in a part of a push that has ended on every rank."""
        out = self._sender.owner(transfer)
        if out.offer == transfer.id:
            problem = self._withdraw(out)
            if out.announce is None:  # its step has failed
                self._fail(out, problem)
                return
        self._sender.settle(transfer)
        if transfer.state is State.FAILED:
            kind = f"push_{transfer.reason or 'unknown'}"
            self._meter.count("failures", 1, tier=PUSHED, kind=kind)
            self._fail(out, transfer.reason or "a write failed")
        else:
            self._meter.count("push_bytes", transfer.moved_bytes)
            self._meter.observe("push_seconds", transfer.seconds)
        self._end_if_drained(out)

    def distrust(self, step: int) -> None:
        """What was computed from ``step`` on may rest on a load that failed."""
        for push in self._sender.sent_since(step):
            self._fail(self._outbound[push], "a load failed under the prefill")
        # What runs is rewound, and says how far when it runs again.
        for out in self._outbound.values():
            if out.tables is None:
                out.noted = Progress(out.progress.losses)

    def bar(self, record: RequestRecord) -> None:
        """Weights of a request, or of its adapter, are others now: what it holds was computed by
        several."""
        if (out := self._of(record)) is not None:
            self._fail(out, "weights or an adapter changed under the prefill")

    def gauges(self) -> None:
        """Write to the meter how many blocks are held for destinations that are not known, which
        decode engines are connected, and what is on its way to each."""
        self._meter.gauge("push_blocks", self._undelivered.blocks, state="undelivered")
        self._meter.gauge("push_links", len(self._open), side="decode")
        backlog = self._sender.backlog
        for peer, size in list(backlog.items()):
            self._meter.gauge("push_backlog_bytes", size, peer=peer[:PEER_NAME])
            if not size and peer not in self._open:
                del backlog[peer]

    @property
    def pending(self) -> bool:
        """Whether something of a prompt that has ended is to be sent in a later step."""
        return any(
            out.held is not None and out.announce is not None for out in self._outbound.values()
        )

    @property
    def due(self) -> float:
        """Control's clock at the next moment when :meth:`plan` gives up a prompt that is held for
        a destination; infinite if there is none."""
        outbound = self._outbound.values()
        return min((out.expires for out in outbound if out.held is not None), default=inf)

    def end(self, *, at_once: bool) -> None:
        """The engine ends. Requests that are here may still run out, and are pushed; no other will
        come, and what has run out is held for nobody.

        Args:
            at_once: whether nothing more will be sent.
        """
        self._ending = ENDING
        for out in list(self._outbound.values()):
            self._heed(out)
            waits = out.stage is Stage.WAITING and (not out.request or out.tables is not None)
            if at_once:
                self._fail(out, ENDING)
            elif waits:
                self._fail_unless_taken(out, ENDING)

    def goodbye(self, peer: str) -> Goodbye:
        """The last word to a decode engine, after :meth:`end`: then nothing is begun any more.
        Called by the link's thread while the engine waits for that to close."""
        live = [out.announce for out in self._outbound.values() if out.peer == peer]
        epochs = [announce.attempt.epoch for announce in live if announce is not None]
        return self._endings.goodbye(peer, epochs)

    def _open_peer(self, peer: str, card: EngineCard) -> None:
        self._open[peer] = card
        try:
            match_cards(self._card, card)
        except ShapeMismatchError as error:
            self._refusals[peer] = str(error)
            log.warning("decode engine %s cannot be served: %s", peer, error)
        else:
            self._open_prompts.admit(card)

    def _lose_peer(self, peer: str) -> None:
        self._open_prompts.dismiss(peer)
        for out in self._outbound.values():
            self._heed(out)
        self._open.pop(peer, None)
        self._refusals.pop(peer, None)
        for out in [out for out in self._outbound.values() if out.peer == peer]:
            if out.announce is not None:
                self._stop(out)
            else:  # if it is there, it claims it again
                out.expires = min(out.expires, self._clock.now + self._config.silence)
        if peer in self._told:
            self._told.discard(peer)
            self.gone.append(peer)

    def _claimed(self, peer: str, push: str, patience: float) -> None:
        if peer not in self._open or not patience > 0:
            return
        out = self._outbound.get(push)
        refusal = self._refusal(peer, out) or self._declined.get(push, "")
        if out is not None and out.offer is not None:
            if not refusal:
                self._open_prompts.reserve(push, out.peer or peer)
            self._heed(out)
        if out is not None and out.peer not in ("", peer):
            refusal = OF_ANOTHER
        if refusal:
            self._say(peer, Failed(Attempt(push, NO_EPOCH), refusal))
            return
        if out is None and (out := self._expect(peer, push)) is None:
            self._say(peer, Absent(Attempt(push, NO_EPOCH)))
            return
        if out.announce is None:
            if not out.peer:
                out.claimed = self._clock.now
            out.peer, out.expires = peer, self._clock.now + self._bounded(patience)
            self._say_where(out)

    def _expect(self, peer: str, push: str) -> Outbound | None:
        """Look out for a request of which a decode engine has spoken; None if it has spoken of too
        many."""
        expected = self._expected.setdefault(peer, set())
        if len(expected) >= EXPECTED:
            return None
        expected.add(push)
        out = self._outbound[push] = Outbound(push, inf)
        return out

    def _come(self, out: Outbound) -> None:
        """A request is not looked out for any more."""
        expected = self._expected.get(out.peer, set())
        expected.discard(out.push)
        if not expected:
            self._expected.pop(out.peer, None)

    def _bounded(self, patience: float) -> float:
        """For how long a decode engine is believed to wait without another word."""
        return min(patience, max(LONGEST_PATIENCE, self._config.deadline))

    def _refusal(self, peer: str, out: Outbound | None) -> str:
        """Why nothing can be pushed to a decode engine, or nothing of that push; else empty."""
        if self._ending and (out is None or not out.request):
            return self._ending
        return self._refusals.get(peer, "")

    def _say_where(self, out: Outbound) -> None:
        """Whether its request is here."""
        if out.peer:
            self._say(out.peer, Queued(out.attempt) if out.request else Absent(out.attempt))

    def _announced(self, peer: str, announce: Announce) -> None:
        if peer not in self._open:
            return  # said before it was lost, and given up since
        attempt = announce.attempt
        out = self._outbound.get(attempt.push)
        if out is not None and out.is_for(peer):
            # It may have come when the step was being planned.
            if not self._endings.over(peer, attempt.epoch) and self._open_prompts.take(
                peer, announce
            ):
                self._heed(out)
                return
            if problem := self._withdraw(out):
                self._fail(out, problem)
        if self._under_way(peer, attempt) is not None:
            return
        out = self._outbound.get(attempt.push)
        refusal = self._refusal(peer, out)
        if self._endings.over(peer, attempt.epoch):
            refusal = "over"
        elif not announce.patience > 0:
            refusal = f"a patience of {announce.patience} s"
        elif out is not None and out.peer not in ("", peer):
            refusal = OF_ANOTHER
        elif out is not None and out.announce is not None:
            refusal = "this push is bound to another request"
        elif out is None and not refusal:
            refusal = self._declined.get(attempt.push, "")
        weight = sum(1 + len(table.blocks) for table in announce.tables)
        if not refusal and self._weights[peer] + weight > MAX_ANNOUNCED:
            refusal = "too many blocks are announced to the prefill engine at once"
        if out is None and not refusal and (out := self._expect(peer, attempt.push)) is None:
            refusal = "too many announced requests have not come to the prefill engine"
        if refusal:
            self._say(peer, Failed(attempt, refusal))
            self._say(peer, self._fence(peer, attempt))
            if out is not None and out.is_for(peer):
                self._fail(out, refusal)  # nobody else will ask for it
            return
        assert out is not None
        out.peer, out.announce, out.weight = peer, announce, weight
        self._weights[peer] += weight
        out.expires = self._clock.now + self._bounded(announce.patience)
        self._undelivered.drop(out.push)
        if out.record is None:
            if out.request:
                self._queue.joins(out.push)
            self._say_where(out)
        else:
            self._bind(out)

    def _bind(self, out: Outbound) -> None:
        announce = out.announce
        if out.record is None or announce is None or out.stage is not Stage.WAITING:
            return
        refusal = misfit(
            self._shape,
            out.record.view.num_prompt_tokens,
            out.record.prompt_digest(),
            announce,
            min(rank.num_blocks for rank in self._open[out.peer].ranks),
        )
        if refusal:
            self._fail(out, refusal)
            return
        out.sent = [table.first for table in announce.tables]
        self._bound(out)

    def _bound(self, out: Outbound) -> None:
        assert out.announce is not None
        out.stage = Stage.BOUND
        if out.peer not in self._told:
            self._told.add(out.peer)
            self.peers.append(PeerOrder(out.peer, encode_card(self._open[out.peer])))
        self.letters.append(Letter(out.peer, Bound(out.announce.attempt)))

    def _cancelled(self, peer: str, attempt: Attempt) -> None:
        if peer not in self._open:
            return  # a prefill engine, or one that is lost
        if attempt.epoch == NO_EPOCH:
            self._decline(peer, attempt.push)
            return
        if (out := self._outbound.get(attempt.push)) is not None:
            self._heed(out)
        if (out := self._under_way(peer, attempt)) is not None:
            self._forgo_of(out)
            self._retire(out, DECLINED)
            self._stop(out)
        else:
            if not self._endings.over(peer, attempt.epoch):
                self._endings.note(peer, attempt.epoch, clean=True)
            self._say(peer, self._fence(peer, attempt))

    def _under_way(self, peer: str, attempt: Attempt) -> Outbound | None:
        """The push that an attempt is at, unless it is over or never was."""
        out = self._outbound.get(attempt.push)
        if out is None or out.announce is None:
            return None
        return out if (out.peer, out.announce.attempt) == (peer, attempt) else None

    def _decline(self, peer: str, push: str) -> None:
        """A decode request needs nothing. If one that was announced bears the same name, it is
        another one, and keeps what it has."""
        out = self._outbound.get(push)
        if out is not None and out.is_for(peer):
            self._withdraw(out)
        if out is None:
            if push not in self._declined:
                _remember(self._declined, push, DECLINED)
        elif out.is_for(peer):
            self._forgo_of(out)
            self._forget(out, DECLINED)

    def _forgo_of(self, out: Outbound) -> None:
        if out.request and not (out.ended or out.ordered):
            self._queue.forgo(out.request, self._clock.now)

    def _fence(self, peer: str, attempt: Attempt) -> Fenced:
        """What there is to say of an attempt that is over, or never was."""
        return Fenced(attempt, clean=self._endings.clean(peer, attempt.epoch))

    def _retire(self, out: Outbound, reason: str) -> None:
        """No request or announcement that comes later begins the push anew."""
        self._queue.leaves(out.push)
        if out.push not in self._declined:
            _remember(self._declined, out.push, reason)
        if out.record is not None:
            out.record.push_over = out.record.push_over or reason

    def _forget(self, out: Outbound, reason: str) -> None:
        self._retire(out, reason)
        self._give_back(out)
        self._come(out)
        self._weights[out.peer] -= out.weight
        if not self._weights[out.peer]:
            del self._weights[out.peer]
        del self._outbound[out.push]

    def _fail(self, out: Outbound, reason: str) -> None:
        if out.stage is Stage.STOPPED:
            return
        log.info("push %s is given up: %s", out.push, reason)
        self._withdraw(out)
        if out.peer:
            self._say(out.peer, Failed(out.attempt, reason))
        self._retire(out, reason)
        self._stop(out)

    def _fail_unless_taken(self, out: Outbound, reason: str) -> None:
        """Give up a push that waits, unless somebody has taken its prompt in this moment."""
        self._withdraw(out)
        if out.stage is Stage.WAITING:
            self._fail(out, reason)

    def _stop(self, out: Outbound) -> None:
        if out.stage is Stage.STOPPED:
            return
        self._withdraw(out)
        self._retire(out, "this push is over")
        out.stage = Stage.STOPPED
        self._meter.count("pushes", 1, outcome="stopped")
        self._give_back(out)
        if out.moving and out.announce is not None:
            self.stops.append(PushStop(out.peer, out.announce.attempt.epoch))
        self._end_if_drained(out)

    def _give_back(self, out: Outbound) -> None:
        """Give up every hold on a prompt's blocks that belongs to no transfer."""
        self._undelivered.drop(out.push)
        out.let_go()

    def _end_if_drained(self, out: Outbound) -> None:
        if out.moving or not (out.ordered or out.stage is Stage.STOPPED):
            return
        if out.push not in self._outbound:
            return
        self._forget(out, "this push is over")
        if out.announce is not None:
            self._endings.note(out.peer, out.announce.attempt.epoch, clean=not out.torn)
            if out.stage is Stage.STOPPED:
                self._say(out.peer, Fenced(out.announce.attempt, clean=not out.torn))
            else:
                self._meter.count("pushes", 1, outcome="sent")

    def _say(self, peer: str, message: LinkMessage) -> None:
        if peer in self._open:
            self.letters.append(Letter(peer, message))


def _remember(known: OrderedDict[Key, str], key: Key, why: str) -> None:
    known[key] = why
    while len(known) > REMEMBERED:
        known.popitem(last=False)
