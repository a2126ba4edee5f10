"""The decode engine's side of pushes: what is announced, expected, given up, and quarantined.

::

    ANNOUNCED ──bound──▶ BOUND ──delivered by all──▶ over, the request runs
        │                  │ failed, link lost, deadline, abort
        └──────────────────┴──▶ QUARANTINED ── fenced ──▶ over

``docs/push.md`` is the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from math import inf

from lamina.config import BreakerConfig, PushConfig
from lamina.control.breakers import CircuitBreaker
from lamina.control.leases import BlockLease, LeaseBook
from lamina.control.requests import ChunkShape, RequestRecord
from lamina.control.transfers import Kind, State, Transfer, TransferTable
from lamina.geometry import GroupKind
from lamina.observe.metrics import Meter
from lamina.plan import TORN, ReceiveOrder, TransferId
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
)

CANCELLED = "cancelled"
"""Reason of a receive that its request did not live to see: no fault of its peer."""


SETTLE_SECONDS = 1.0
"""When its sender says that nothing is on its way, what has come may still wait to be taken up."""


PEER_FAULTS = frozenset({TORN, "unreachable", "too late", "too_late"})
"""Reasons of a peer that say something about it; others say something about a request."""

REMEMBERED_PEERS = 1024
"""Prefill engines whose failures are remembered."""


class Stage(Enum):
    """How far an inbound push is."""

    ANNOUNCED = "announced"
    BOUND = "bound"
    QUARANTINED = "quarantined"
    """Given up, and its blocks are leased because something may still be on its way to them."""


@dataclass(slots=True)
class Inbound:
    """A push that was announced.

    Attributes:
        attempt: its name.
        address: the prefill engine's.
        lease: hold on its blocks.
        stage: how far it is.
        reason: why it was given up; empty while it was not.
        fenced: whether its sender has said that nothing is on its way any more.
        untold: whether nobody was ever told of its blocks.
        trying: whether it is the one try of its peer's breaker.
        blameless: whether its peer has said why not, and that is no fault of the peer's.
        until: control's clock after which a quarantine ends by itself.
    """

    attempt: Attempt
    address: str
    lease: BlockLease
    trying: bool
    blameless: bool = False
    stage: Stage = Stage.ANNOUNCED
    reason: str = ""
    fenced: bool = False
    untold: bool = False
    until: float = inf


class PushTarget:
    """See the module. A part of the planner.

    Args:
        config: the ``push`` section.
        breaker: the ``breaker`` section.
        shape: tokens and groups of chunks.
        transfers: all transfers of the engine.
        leases: holds on engine blocks.
        meter: where figures go.
        clock: monotonic seconds, for the breakers.

    Attributes:
        orders: receives for the next plan.
        give_ups: receives that the next plan ends.
        letters: messages for the link.
    """

    def __init__(
        self,
        config: PushConfig,
        breaker: BreakerConfig,
        shape: ChunkShape,
        transfers: TransferTable,
        leases: LeaseBook,
        meter: Meter,
        clock: Callable[[], float],
    ) -> None:
        self.orders: list[ReceiveOrder] = []
        self.give_ups: list[TransferId] = []
        self.letters: list[Letter] = []
        self._config = config
        self._breaker = breaker
        self._shape = shape
        self._transfers = transfers
        self._leases = leases
        self._meter = meter
        self._clock = clock
        self._inbound: dict[TransferId, Inbound] = {}
        self._breakers: dict[str, CircuitBreaker] = {}
        self._asks: dict[str, float] = {}
        self._now = 0.0

    # -- lookup and admission ----------------------------------------------------------------

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
            return 0, "states_in_place"  # none stands still at the end for long enough
        if not self._breaker_of(push.prefill).allows:
            return 0, "peer_out_of_use"
        end = record.view.num_prompt_tokens - record.view.recompute_tokens
        if self._shape.recurrent:
            end = end // self._shape.resume_tokens * self._shape.resume_tokens
        return max(0, end), ""

    def order(self, record: RequestRecord, floor: int, start: int, end: int, *, step: int) -> None:
        """Announce where the prefill engine writes a request's prompt.

        Args:
            record: the request; it has its blocks.
            floor: tokens that the engine has.
            start: tokens that it will have without the push.
            end: tokens that it is to have with it.
            step: the step whose plan will carry the order.
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
            Kind.RECEIVE, view.request_id, step=step, expires=inf, size=0, chunks=()
        )
        attempt = Attempt(push.id, transfer.id)
        self._inbound[transfer.id] = Inbound(
            attempt,
            push.prefill,
            self._leases.take(held),
            self._breaker_of(push.prefill).ordered(),
        )
        record.receive = transfer.id
        patience = self._config.deadline
        self.orders.append(ReceiveOrder(transfer.id, view.request_id, patience))
        announce = Announce(attempt, record.prompt_digest(), start, end, patience, tables)
        self.letters.append(Letter(push.prefill, announce))

    def decline(self, record: RequestRecord) -> None:
        """Nothing is needed of a push that the router meant for the request."""
        push = record.view.push
        if push is not None and push.prefill is not None and not record.push_over:
            record.push_over = "not_needed"
            self.letters.append(Letter(push.prefill, Cancel(Attempt(push.id, NO_EPOCH))))

    def _table(
        self, record: RequestRecord, group: int, floor: int, start: int, end: int
    ) -> BlockTable:
        shape = self._shape.groups[group]
        if shape.kind is GroupKind.STATE:
            return BlockTable(
                end // shape.block_tokens - 1, tuple(record.view.state_blocks(group, end)[:1])
            )
        # A window is not loaded where the rest is pushed; what the engine has of it must not be
        # written to.
        first = start if shape.kind is GroupKind.FULL else max(floor, shape.first_token(end))
        first //= shape.block_tokens
        blocks = record.view.blocks(group)[first : -(-end // shape.block_tokens)]
        null = self._shape.null_block
        return BlockTable(first, tuple(NO_BLOCK if block == null else block for block in blocks))

    def _breaker_of(self, address: str) -> CircuitBreaker:
        if address not in self._breakers:
            while len(self._breakers) >= REMEMBERED_PEERS:  # requests name them, rightly or not
                del self._breakers[next(iter(self._breakers))]
            name = f"pushes from {address}"
            self._breakers[address] = CircuitBreaker(name, self._breaker, self._clock)
        return self._breakers[address]

    # -- what happens ------------------------------------------------------------------------

    def receive(self, news: Iterable[News], now: float) -> None:
        """Take in what the link has to say."""
        for item in news:
            match item:
                case Opened(peer):
                    self._opened(peer)
                case Lost():
                    self._lost(item, now)
                case Letter(peer, Bound(attempt)):
                    inbound = self._meant(peer, attempt)
                    if inbound is not None and inbound.stage is Stage.ANNOUNCED:
                        inbound.stage = Stage.BOUND
                case Letter(peer, Failed(attempt, reason)):
                    inbound = self._meant(peer, attempt)
                    if inbound is not None and not inbound.reason:
                        inbound.blameless = reason not in PEER_FAULTS
                        self.give_up(TransferId(attempt.epoch), reason)
                case Letter(peer, Fenced(attempt, clean)):
                    if self._meant(peer, attempt) is not None:
                        patience = SETTLE_SECONDS if clean else self._config.quarantine
                        self._fence(TransferId(attempt.epoch), now + patience)
                case _:
                    pass  # not ours to answer

    def _meant(self, peer: str, attempt: Attempt) -> Inbound | None:
        """The push that a peer speaks of, if it is one of its own."""
        inbound = self._inbound.get(TransferId(attempt.epoch))
        if inbound is None or (inbound.address, inbound.attempt) != (peer, attempt):
            return None
        return inbound

    def give_up(self, transfer: TransferId, reason: str) -> None:
        """A push will not be waited for any longer."""
        inbound = self._inbound.get(transfer)
        if inbound is None or inbound.reason:
            return
        inbound.reason = reason
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
            record.story.seconds = transfer.seconds
            if not good:
                record.story.failed, record.story.reason = True, reason
        self._meter.count("pushes", 1, outcome="received" if good else "given_up")
        if good:
            self._meter.observe("push_wait_seconds", transfer.seconds)
        breaker = self._breaker_of(inbound.address)
        if good or not (reason == CANCELLED or inbound.blameless):
            breaker.judge(good, reason, trying=inbound.trying)
        elif inbound.trying:
            breaker.try_again()
        if good or inbound.untold:
            self._release(transfer.id)
            return
        self.give_up(transfer.id, reason)
        inbound.stage = Stage.QUARANTINED
        self._asks.setdefault(inbound.address, self._now + self._config.silence)

    def tick(self, now: float) -> None:
        """Time has passed: end quarantines, and call peers again that are gone."""
        self._now = now
        self._ask(now)
        ended = [
            transfer
            for transfer, inbound in self._inbound.items()
            if inbound.stage is Stage.QUARANTINED and inbound.until <= now
        ]
        for transfer in ended:
            self._release(transfer)

    @property
    def pending(self) -> bool:
        """Whether a quarantine is about to end."""
        soon = self._now + SETTLE_SECONDS
        return any(inbound.until <= soon for inbound in self._inbound.values())

    @property
    def due(self) -> float:
        """Control's clock at the next moment when :meth:`tick` ends a quarantine or asks a peer;
        infinite if there is none."""
        quarantines = (i.until for i in self._inbound.values() if i.stage is Stage.QUARANTINED)
        return min((*quarantines, *self._asks.values()), default=inf)

    @property
    def quarantined(self) -> int:
        """Pushes whose blocks are held although nobody waits for them."""
        return sum(inbound.stage is Stage.QUARANTINED for inbound in self._inbound.values())

    def _opened(self, address: str) -> None:
        # Not even another incarnation is a fence by itself: what was announced while the former one
        # was dying may have waited for this connection. It will answer.
        self._asks.pop(address, None)
        for inbound in self._inbound.values():
            if inbound.address != address:
                continue
            if not inbound.fenced:
                inbound.until = inf
            if inbound.reason:
                self.letters.append(Letter(address, Cancel(inbound.attempt)))

    def _lost(self, lost: Lost, now: float) -> None:
        held = False
        for transfer, inbound in list(self._inbound.items()):
            if inbound.address != lost.peer:
                continue
            if inbound.attempt in lost.unsent or self._take_back(inbound):
                inbound.untold = True
            elif inbound.fenced:
                pass
            elif lost.fate is Fate.SILENT:
                inbound.until = inf  # it could go on in the middle of a write
            else:
                inbound.until = min(inbound.until, now + self._config.quarantine)
            held = held or not (inbound.fenced or inbound.untold)
            self.give_up(transfer, lost.reason)
        if held:
            self._asks[lost.peer] = now + self._config.silence

    def _take_back(self, inbound: Inbound) -> bool:
        """Do not announce what was not announced yet. Whatever the link has may still arrive: it
        may wait for a later connection than the one that is reported as lost."""
        for letter in self.letters:
            if isinstance(letter.message, Announce) and letter.message.attempt == inbound.attempt:
                self.letters.remove(letter)
                return True
        return False

    def _ask(self, now: float) -> None:
        """Ask peers again that could still write."""
        for address in [address for address, due in self._asks.items() if due <= now]:
            del self._asks[address]
            for inbound in self._inbound.values():
                if inbound.address == address and inbound.reason and not inbound.fenced:
                    self.letters.append(Letter(address, Cancel(inbound.attempt)))
                    self._asks[address] = now + self._config.silence

    def _fence(self, transfer: TransferId, until: float) -> None:
        inbound = self._inbound.get(transfer)
        if inbound is not None:
            inbound.fenced = True
            inbound.until = min(inbound.until, until)
            self.give_up(transfer, "ended by the prefill engine")

    def _release(self, transfer: TransferId) -> None:
        inbound = self._inbound.pop(transfer)
        inbound.lease.release()
