"""The decode engine's side of pushes: what is announced, expected, given up, and quarantined.

::

    ANNOUNCED ──bound──▶ BOUND ──delivered by all──▶ over, the request runs
        │                  │ failed, link lost, deadline, abort
        └──────────────────┴──▶ QUARANTINED ── fenced ──▶ over

``docs/push.md`` is the protocol.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from math import inf

from lamina_kv.config import PushConfig
from lamina_kv.control.books import Books
from lamina_kv.control.breakers import CircuitBreaker
from lamina_kv.control.cost import Costs
from lamina_kv.control.push.claims import ANSWER_SHARE, Backlog, Claimed, Claims, Whereabouts
from lamina_kv.control.push.failures import Failures
from lamina_kv.control.push.inbound import GiveUp, Inbound, PushOffer, Sender, Stage, Unpushed
from lamina_kv.control.push.room import Fit, Room
from lamina_kv.control.requests import RequestRecord
from lamina_kv.control.transfers import Kind, State, Transfer
from lamina_kv.geometry import GroupKind
from lamina_kv.plan import TORN, ReceiveOrder, SendersOrder, TransferId
from lamina_kv.push.cards import EngineCard, SenderCard, ends_of_senders
from lamina_kv.push.letters import Letter, Lost, News, Opened
from lamina_kv.push.messages import (
    LONGEST_PATIENCE,
    NO_BLOCK,
    NO_EPOCH,
    TOO_LATE,
    Absent,
    Announce,
    Attempt,
    BlockTable,
    Bound,
    Cancel,
    Failed,
    Fenced,
    Queued,
)

CANCELLED = "cancelled"
"""Reason of a receive that its request did not live to see: no fault of its peer."""

ABSENT = "the request has not come to the prefill engine"
UNANSWERED = "the prefill engine does not answer"
DEADLINE = "deadline"


SETTLE_SECONDS = 1.0
"""When its sender says that nothing is on its way, what has come may still wait to be taken up."""


PEER_FAULTS = frozenset({TORN, "unreachable", TOO_LATE})
"""Reasons of a peer that say something about it; others say something about a request."""

log = logging.getLogger("lamina_kv.control")

REMEMBERED_PEERS = 1024
"""Prefill engines that are known, and addresses whose failures are remembered."""


class PushTarget:
    """See the module. A part of the planner.

    Args:
        config: the ``push`` section.
        books: what the parts of the planner share.
        card: this engine.
        cost: what computing takes.

    Attributes:
        orders: receives for the next plan.
        senders: who sends those, and earlier ones.
        give_ups: receives that the next plan ends.
        letters: messages for the link.
    """

    def __init__(self, config: PushConfig, books: Books, card: EngineCard, cost: Costs) -> None:
        self.orders: list[ReceiveOrder] = []
        self.senders: list[SendersOrder] = []
        self.give_ups: list[TransferId] = []
        self.letters: list[Letter] = []
        self._config = config
        self._breaker = books.config.breaker
        self._shape = shape = books.shape
        self._transfers = books.transfers
        self._leases = books.leases
        self._meter = books.meter
        self._clock = books.clock
        self._card = card
        self._open: dict[str, Sender] = {}
        self._cost = cost
        self._min_tokens = shape.chunk_tokens if config.min_tokens == "auto" else config.min_tokens
        self._room = Room(int(config.max_parked * card.ranks[0].num_blocks))
        self._claims = Claims(min(config.deadline, LONGEST_PATIENCE), self.letters)
        self._inbound: dict[TransferId, Inbound] = {}
        self._announced: dict[tuple[str, str], Inbound] = {}
        self._backlog = Backlog(config.deadline / ANSWER_SHARE)
        self._breakers: dict[str, CircuitBreaker] = {}
        self._asks: dict[str, float] = {}
        self._failures = Failures(log)
        self._known: dict[str, None] = {}

    # -- lookup and admission ----------------------------------------------------------------

    def arrived(self, record: RequestRecord) -> None:
        """A request waits for its blocks. What is computed for it is to be held until it has
        them."""
        if self.reach(record)[0]:
            self._claim(record)

    def waits(self, record: RequestRecord) -> bool:
        """Whether a request need not be looked at: it was told to wait for room, and in this pass
        over the engine's queue one before it was, too."""
        claimed = self._claims.get(record.view.request_id)
        return (
            claimed is not None
            and claimed.crowded is not None
            and self._room.is_crowded(claimed.address, self._clock.step)
            and self._clock.now - claimed.crowded < self._config.deadline
        )

    def weigh(self, record: RequestRecord, floor: int, start: int) -> PushOffer:
        """Whether a request that has no blocks yet is to be pushed to.

        Args:
            record: the request.
            floor: tokens that the engine has.
            start: tokens that it will have without the push.
        """
        end, why = self.reach(record)
        if end <= start:
            return PushOffer(0, why)
        if end - start < self._min_tokens:
            return PushOffer(0, Unpushed.BELOW_MIN_TOKENS)
        need = self._shape.pushed_blocks(floor, start, end)
        if need > self._room.most:
            return PushOffer(0, Unpushed.TOO_LARGE)
        claimed = self._claim(record)
        if claimed is None:
            return PushOffer(0, record.push_over)
        compute = self._cost.prefill_seconds(start, end)
        if claimed.whereabouts.is_given_up(
            self._clock.now, self._config.deadline, self._backlog.behind(compute)
        ):
            self._forgo(claimed, compute)
            return PushOffer(0, record.push_over)
        alone = self._claims.only_from(claimed.address)
        fit = self._room.fit(claimed.address, need, alone=alone, step=self._clock.step)
        if fit is Fit.NOW:
            return PushOffer(end)
        if claimed.crowded is None:
            claimed.crowded = self._clock.now
        too_long = self._clock.now - claimed.crowded >= self._config.deadline
        return PushOffer(0, Unpushed.NO_ROOM, ask_again=fit is Fit.LATER and not too_long)

    def abandoned(self, request_id: str) -> None:
        """A request has ended; if it never got blocks, nothing is needed of its push."""
        if (claimed := self._claims.get(request_id)) is not None:
            self._claims.withdraw(claimed)

    def _claim(self, record: RequestRecord) -> Claimed | None:
        """Claim what is computed for a request, unless its name is another one's."""
        if self._is_named_twice(record):
            self._skip(record, Unpushed.ID_IN_USE)
            return None
        return self._claims.add(record, self._clock.now)

    def _is_named_twice(self, record: RequestRecord) -> bool:
        """Whether a router has given the name of a request's push to another one, which came first
        and is not over. A prefill engine would answer for that one alone."""
        push = record.view.push
        assert push is not None
        assert push.prefill is not None
        name = push.prefill, push.id
        first = self._claims.named(*name) or self._announced.get(name)
        return first is not None and first.record is not record

    def _forgo(self, claimed: Claimed, compute: float | None) -> None:
        """The prefill engine does not have a request that is claimed from it."""
        absent = claimed.whereabouts.absent is not None
        self._claims.withdraw(claimed)
        self._skip(claimed.record, (GiveUp.ABSENT if absent else GiveUp.UNANSWERED).value)
        self._backlog.add(claimed.record, compute)
        if not absent:
            self._breaker_of(claimed.address).judge(False, UNANSWERED)

    def _skip(self, record: RequestRecord, why: str) -> None:
        record.push_over = why
        self._meter.count("pushes_skipped", 1, reason=why)

    def reach(self, record: RequestRecord) -> tuple[int, str]:
        """Tokens that a push would bring the request to, and if there are none, why.

        The end is cut before anything is asked for, because a state that is too far ahead cannot
        be cut afterwards.
        """
        push = record.view.push
        if push is None or push.prefill is None:
            return 0, ""
        if record.push_over:
            return 0, record.push_over
        if self._shape.in_place:
            return 0, Unpushed.STATES_IN_PLACE  # none stands still at the end for long enough
        if not self._breaker_of(push.prefill).allows:
            return 0, Unpushed.PEER_OUT_OF_USE
        end = record.view.num_prompt_tokens - record.view.recompute_tokens
        if self._shape.recurrent:
            end = end // self._shape.resume_tokens * self._shape.resume_tokens
        return max(0, end), ""

    def order(self, record: RequestRecord, floor: int, start: int, end: int) -> None:
        """Announce where the prefill engine writes a request's prompt.

        Args:
            record: the request; it has its blocks.
            floor: tokens that the engine has.
            start: tokens that it will have without the push.
            end: tokens that it is to have with it.
        """
        push, view = record.view.push, record.view
        assert push is not None
        assert push.prefill is not None
        tables = tuple(
            self._table(record, group, floor, start, end)
            for group in range(len(self._shape.groups))
        )
        held = tuple(b for table in tables for b in table.blocks if b != NO_BLOCK)
        transfer = self._transfers.open(
            Transfer(Kind.RECEIVE, view.request_id, step=self._clock.step, expires=inf, size=0)
        )
        attempt = Attempt(push.id, transfer.id)
        claimed = self._claims.remove(view.request_id)
        compute = self._cost.prefill_seconds(start, end)
        inbound = Inbound(
            attempt,
            push.prefill,
            record,
            self._leases.take(held),
            Whereabouts(self._clock.now) if claimed is None else claimed.whereabouts,
            compute,
            self._breaker_of(push.prefill).ordered(),
        )
        self._inbound[transfer.id] = inbound
        self._announced.setdefault((inbound.address, push.id), inbound)
        self._room.park(inbound.address, len(held))
        record.receive = transfer.id
        patience = self._config.deadline
        self.orders.append(ReceiveOrder(transfer.id, view.request_id, patience))
        self._name_senders(inbound)
        announce = Announce(attempt, record.prompt_digest(), start, end, patience, tables)
        self.letters.append(Letter(push.prefill, announce))

    def decline(self, record: RequestRecord, why: str = Unpushed.NOT_NEEDED) -> None:
        """Nothing is needed of a push that the router meant for the request.

        Args:
            record: the request; it has its blocks.
            why: a word for metrics.
        """
        push = record.view.push
        if push is not None and push.prefill is not None and not record.push_over:
            self._claims.remove(record.view.request_id)
            self._skip(record, why)
            if self._is_named_twice(record):
                return  # the other one's is needed
            self.letters.append(Letter(push.prefill, Cancel(Attempt(push.id, NO_EPOCH))))

    def _table(
        self, record: RequestRecord, group: int, floor: int, start: int, end: int
    ) -> BlockTable:
        shape = self._shape.groups[group]
        if shape.kind is GroupKind.STATE:
            return BlockTable(
                end // shape.block_tokens - 1, tuple(record.view.state_blocks(group, end)[:1])
            )
        first = self._shape.first_pushed(group, floor, start, end)
        blocks = record.view.blocks(group)[first : -(-end // shape.block_tokens)]
        null = self._shape.null_block
        return BlockTable(first, tuple(NO_BLOCK if block == null else block for block in blocks))

    def _breaker_of(self, address: str) -> CircuitBreaker:
        if address not in self._breakers:
            while len(self._breakers) >= REMEMBERED_PEERS:
                del self._breakers[min(self._breakers, key=self._is_worth_keeping)]
            name = f"pushes from {address}"
            self._breakers[address] = CircuitBreaker(name, self._breaker, self._clock.ticked)
        return self._breakers[address]

    def _is_worth_keeping(self, address: str) -> tuple[bool, bool]:
        """Which breakers to forget last. Requests name addresses, rightly or not, and must not make
        those be forgotten that prefill engines have."""
        return address in self._known, not self._breakers[address].closed

    # -- what happens ------------------------------------------------------------------------

    def receive(self, news: Iterable[News]) -> None:
        """Take in what the link has to say."""
        fenced = set()
        for item in news:
            match item:
                case Opened(peer, _, SenderCard() as card, machine):
                    self._opened(peer, Sender(card, machine))
                case Lost():
                    self._lost(item)
                case Letter(peer, Queued(attempt)):
                    if (whereabouts := self._whereabouts(peer, attempt)) is not None:
                        whereabouts.here = True
                case Letter(peer, Absent(attempt)):
                    whereabouts = self._whereabouts(peer, attempt)
                    if whereabouts is not None and whereabouts.absent is None:
                        whereabouts.absent = self._clock.now
                case Letter(peer, Bound(attempt)):
                    inbound = self._meant(peer, attempt)
                    if inbound is not None and inbound.stage is Stage.ANNOUNCED:
                        inbound.whereabouts.here = True
                        inbound.stage = Stage.BOUND
                case Letter(peer, Failed(attempt, _)) if attempt.epoch == NO_EPOCH:
                    if (claimed := self._claims.named(peer, attempt.push)) is not None:
                        self._claims.remove(claimed.record.view.request_id)
                        self._skip(claimed.record, GiveUp.FAILED.value)
                case Letter(peer, Failed(attempt, reason)):
                    inbound = self._meant(peer, attempt)
                    if inbound is not None and not inbound.reason:
                        inbound.blameless = reason not in PEER_FAULTS
                        self.give_up(TransferId(attempt.epoch), reason, GiveUp.FAILED)
                case Letter(peer, Fenced(attempt, clean)):
                    if self._meant(peer, attempt) is not None:
                        patience = SETTLE_SECONDS if clean else self._config.quarantine
                        self._fence(TransferId(attempt.epoch), self._clock.now + patience)
                        fenced.add(peer)
                case _:
                    pass  # not ours to answer
        for peer in fenced:
            if not self._unfenced(peer):
                self._asks.pop(peer, None)

    def _meant(self, peer: str, attempt: Attempt) -> Inbound | None:
        """The push that a peer speaks of, if it is one of its own."""
        inbound = self._inbound.get(TransferId(attempt.epoch))
        if inbound is None or (inbound.address, inbound.attempt) != (peer, attempt):
            return None
        return inbound

    def _whereabouts(self, peer: str, attempt: Attempt) -> Whereabouts | None:
        """Of the request that a peer speaks of, if it is one that it is to compute."""
        spoken_of: Claimed | Inbound | None
        if attempt.epoch == NO_EPOCH:
            spoken_of = self._claims.named(peer, attempt.push)
        else:
            spoken_of = self._meant(peer, attempt)
        return None if spoken_of is None else spoken_of.whereabouts

    def give_up(self, transfer: TransferId, reason: str, cause: GiveUp = GiveUp.CANCELLED) -> None:
        """A push will not be waited for any longer.

        Args:
            transfer: the receive.
            reason: why, for people.
            cause: the same, as metrics have it.
        """
        inbound = self._inbound.get(transfer)
        if inbound is None or inbound.reason:
            return
        inbound.reason, inbound.cause = reason, cause
        self.give_ups.append(transfer)
        self.letters.append(Letter(inbound.address, Cancel(inbound.attempt)))

    def settle(self, transfer: Transfer, record: RequestRecord | None) -> None:
        """Take in a receive that has ended on every rank."""
        self._transfers.close(transfer)
        inbound = self._inbound[transfer.id]
        good = transfer.state is State.DONE
        reason = inbound.reason or transfer.reason
        if record is not None and record.receive == transfer.id:
            record.receive = None
            record.push_over = "pushed" if good else "push_failed"
            record.delivery.seconds = transfer.seconds
            record.delivery.push_failed = "" if good else reason
        self._meter.count("pushes", 1, outcome="received" if good else "given_up")
        if good:
            self._meter.observe("push_wait_seconds", transfer.seconds)
        else:
            self._failed(transfer, inbound, reason)
        breaker = self._breaker_of(inbound.address)
        if good or not (inbound.cause is GiveUp.CANCELLED or inbound.blameless):
            breaker.judge(good, reason, trying=inbound.trying)
        elif inbound.trying:
            breaker.try_again()
        if good or inbound.untold:
            self._release(transfer.id)
            return
        inbound.stage = Stage.QUARANTINED
        self._room.quarantine(inbound.address, len(inbound.lease.blocks))
        self._asks.setdefault(inbound.address, self._clock.now + self._config.silence)

    def _failed(self, transfer: Transfer, inbound: Inbound, reason: str) -> None:
        """A push has not come to anything: say so, and to its peer as well."""
        if inbound.cause is None and reason == DEADLINE:
            # One that queues where there is much to do says nothing about its peer. If nothing is
            # done there at all, those that come after it are not taken up.
            queued = inbound.stage is Stage.ANNOUNCED and inbound.whereabouts.here
            inbound.blameless |= queued
        cause = GiveUp.DEADLINE if reason == DEADLINE else GiveUp.WIRE
        self.give_up(transfer.id, reason, cause)
        assert inbound.cause is not None
        self._meter.count("pushes_given_up", 1, reason=inbound.cause.value)
        if inbound.cause is not GiveUp.CANCELLED:
            self._failures.add(inbound.address, transfer.request_id, reason)

    def tick(self) -> None:
        """Time has passed: renew claims, give up what is not taken up, end quarantines, and call
        peers again that are gone."""
        self._failures.tick(self._clock.now)
        self._claims.renew(self._clock.now)
        self._backlog.tick()
        self._look_for_absent()
        self._ask()
        ended = [
            transfer
            for transfer, inbound in self._inbound.items()
            if inbound.stage is Stage.QUARANTINED and inbound.is_over(self._clock.now)
        ]
        for transfer in ended:
            self._release(transfer)

    def _look_for_absent(self) -> None:
        """Do not wait for what a prefill engine does not have."""
        for transfer, inbound in self._inbound.items():
            if inbound.stage is not Stage.ANNOUNCED or inbound.reason or inbound.whereabouts.here:
                continue
            seconds = self._backlog.behind(inbound.compute)
            if inbound.whereabouts.is_given_up(self._clock.now, self._config.deadline, seconds):
                inbound.blameless = inbound.whereabouts.absent is not None
                if inbound.blameless:
                    self.give_up(transfer, ABSENT, GiveUp.ABSENT)
                else:
                    self.give_up(transfer, UNANSWERED, GiveUp.UNANSWERED)
                self._backlog.add(inbound.record, inbound.compute)

    @property
    def pending(self) -> bool:
        """Whether a quarantine is about to end by itself."""
        soon = self._clock.now + SETTLE_SECONDS
        return any(i.fenced and i.ends <= soon for i in self._inbound.values())

    @property
    def due(self) -> float:
        """Control's clock at the next moment when :meth:`tick` ends a quarantine or asks a peer;
        infinite if there is none."""
        quarantined = (i for i in self._inbound.values() if i.stage is Stage.QUARANTINED)
        quarantines = (i.ends for i in quarantined if i.fenced)  # of the others peers are asked
        return min((*quarantines, *self._asks.values()), default=inf)

    def _name_senders(self, inbound: Inbound) -> None:
        """Tell the ranks whom they may believe, once their peer has said who it is."""
        if (peer := self._open.get(inbound.address)) is not None:
            ranks, replicated = len(self._card.ranks), self._card.replicated
            ends = ends_of_senders(peer.card, ranks, replicated=replicated)
            self.senders.append(SendersOrder(TransferId(inbound.attempt.epoch), ends))

    def _opened(self, address: str, sender: Sender) -> None:
        self._open[address] = sender
        self._known.pop(address, None)
        self._known[address] = None
        while len(self._known) > REMEMBERED_PEERS:
            del self._known[next(iter(self._known))]
        # What was announced while a former incarnation was dying may have waited for this
        # connection: only its answer is a fence.
        self._asks.pop(address, None)
        for inbound in self._inbound.values():
            if inbound.address != address:
                continue
            inbound.connected(sender, self._clock.now, self._config.quarantine)
            if inbound.reason:
                self.letters.append(Letter(address, Cancel(inbound.attempt)))
                if not inbound.fenced:
                    # It may be idle when the last of it has drained, and look only if it is asked.
                    self._asks[address] = self._clock.now + self._config.silence
            else:
                self._name_senders(inbound)

    def _lost(self, lost: Lost) -> None:
        """A connection is over. It says nothing of what was announced on a later one, and what was
        announced on a former one another run of the prefill engine may know."""
        sender = self._open.pop(lost.peer, None)
        if lost.was_open:
            self._claims.forgotten(lost.peer, self._clock.now)
        elif unreached := self._claims.at(lost.peer):
            for claimed in unreached:
                self._claims.remove(claimed.record.view.request_id)
                self._skip(claimed.record, GiveUp.LOST.value)
            self._breaker_of(lost.peer).judge(False, lost.reason)
        held = False
        for transfer, inbound in list(self._inbound.items()):
            if inbound.address != lost.peer:
                continue
            if inbound.attempt in lost.unsent:
                inbound.untold = True
            elif not (inbound.untold or inbound.incarnation):
                if inbound.attempt.epoch > lost.announced:
                    continue
                assert sender is not None
                inbound.told(sender)
            inbound.blameless |= lost.goodbye is not None and not inbound.reason
            if lost.goodbye is not None and lost.goodbye.fences(inbound.attempt.epoch):
                self._fence(transfer, self._clock.now + SETTLE_SECONDS)
            elif not (inbound.fenced or inbound.untold):
                inbound.lost(lost.fate, self._clock.now, self._config.quarantine)
            held = held or not (inbound.fenced or inbound.untold)
            self.give_up(transfer, lost.reason, GiveUp.LOST)
            if inbound.untold and inbound.stage is Stage.QUARANTINED:
                self._release(transfer)  # its request had ended before this was known
        if held:
            self._asks[lost.peer] = self._clock.now + self._config.silence

    def _ask(self) -> None:
        """Ask peers again that could still write."""
        for address in [address for address, due in self._asks.items() if due <= self._clock.now]:
            del self._asks[address]
            for inbound in self._unfenced(address):
                self.letters.append(Letter(address, Cancel(inbound.attempt)))
                self._asks[address] = self._clock.now + self._config.silence

    def _unfenced(self, address: str) -> list[Inbound]:
        """Pushes that are given up and that a peer could still write to."""
        given_up = (i for i in self._inbound.values() if i.address == address and i.reason)
        return [inbound for inbound in given_up if not inbound.fenced]

    def _fence(self, transfer: TransferId, until: float) -> None:
        inbound = self._inbound.get(transfer)
        if inbound is not None:
            inbound.fenced = True
            inbound.until = min(inbound.until, until)
            self.give_up(transfer, "ended by the prefill engine", GiveUp.FAILED)

    def _release(self, transfer: TransferId) -> None:
        inbound = self._inbound.pop(transfer)
        name = inbound.address, inbound.attempt.push
        if self._announced.get(name) is inbound:
            del self._announced[name]
        quarantined = inbound.stage is Stage.QUARANTINED
        self._room.leave(inbound.address, len(inbound.lease.blocks), quarantined=quarantined)
        inbound.lease.release()

    def gauges(self) -> None:
        """Write to the meter what blocks are leased for, and which prefill engines are connected
        and used. Nothing is told of an address that nobody has ever answered at: requests name
        them, rightly or not, and a series stays for ever."""
        self._meter.gauge("push_blocks", self._room.parked, state="parked")
        self._meter.gauge("push_blocks", self._room.quarantined, state="quarantined")
        self._meter.gauge("push_links", len(self._open), side="prefill")
        for address, breaker in self._breakers.items():
            if address in self._known:
                self._meter.gauge("push_peer_in_use", float(breaker.closed), peer=address)
