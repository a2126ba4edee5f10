"""The prefill engine's side of pushes: what is bound, sent, stopped, and fenced.

::

    WAITING ──announcement and request──▶ BOUND ──all sent, all drained──▶ over
       │                                    │ a write fails, the request ends too early
       └── patience, refusal ──▶ STOPPED ◀──┘ cancel, link lost
                                    └── all drained ──▶ fenced, over

``docs/push.md`` is the protocol.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from math import inf
from typing import TypeVar

from lamina.config import PushConfig
from lamina.control.cost import CostModel
from lamina.control.leases import BlockLease, LeaseBook
from lamina.control.push_endings import Endings
from lamina.control.requests import BoundaryState, ChunkShape, PushParameters, RequestRecord
from lamina.control.transfers import Kind, State, Transfer, TransferTable
from lamina.geometry import GroupKind
from lamina.observe.metrics import Meter
from lamina.plan import (
    TORN,
    LoadMode,
    PeerOrder,
    PushOrder,
    PushPages,
    PushStop,
    TransferId,
)
from lamina.push.cards import EngineCard, ShapeMismatchError, encode_card
from lamina.push.cards import match as match_cards
from lamina.push.letters import Letter, Lost, News, Opened
from lamina.push.messages import (
    LONGEST_PATIENCE,
    NO_BLOCK,
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
    LinkMessage,
    Queued,
)

log = logging.getLogger("lamina.control")

Key = TypeVar("Key")

REMEMBERED = 4096
"""Pushes that are over and still known to requests and announcements that come late."""

PEER_NAME = 8
"""Characters of an incarnation that name a decode engine in metrics."""

EXPECTED = 4096
"""Requests that a decode engine may have spoken of before they are here. Further ones are not
looked out for."""

TOO_BUSY = "the prefill engine has too much to do to compute it in time"
"""No fault: as many others come in time as can. Said only where others run, and wait."""

DECLINED = "the decode engine had declined it"
"""Why a push is over of which its decode engine has said that it needs nothing."""

ENDING = "the prefill engine is shutting down"

OF_ANOTHER = "this push is another decode engine's"
"""Why a decode engine has no say in a push."""

DESTINATION_WAIT = 0.01
"""Seconds for which a request waits for its destination, at least. A router asks both engines at
once, and what is announced after a step was planned leaves when that is over."""

WAIT_SHARE = 0.1
"""As long as its decode engine has not spoken of it, a request waits for this share of what its
prompt takes: the engine may be in a step, and what leaves row by row is there as much earlier as
it takes to send."""

LONGEST_WAIT = 0.1
"""Seconds; steps of a decode engine that take longer are rare."""

HELD_SHARE = 2
"""Of the engine's blocks one in so many may be held for requests that have ended and whose
destination is not known."""


class Stage(Enum):
    """How far an outbound push is."""

    WAITING = "waiting"
    BOUND = "bound"
    STOPPED = "stopped"
    """Nothing more is sent; something may still be on its way."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of a prompt the blocks of its request hold.

    Attributes:
        losses: how often the engine had taken the request's blocks away. Once it has done so again,
            nothing of this is true any more.
        computed: tokens that are known to be computed before the step that is being planned.
        planned: those that are computed when that step is over.
    """

    losses: int = 0
    computed: int = 0
    planned: int = 0


@dataclass(slots=True)
class Outbound:
    """A push that a router has named, or a decode engine.

    Attributes:
        push: the router's id.
        expires: control's clock after which nobody waits for it any more.
        request: the request's id, once it is here.
        arrived: control's clock when it came.
        ended: whether it has ended.
        claimed: control's clock when its decode engine first spoke of it.
        record: the request, once the engine has given it blocks.
        peer: incarnation of the decode engine that was the first to claim or announce it, and that
            alone has a say in it; empty until then.
        announce: what it has announced.
        stage: how far it is.
        noted: what was last said of the request's progress; see :attr:`progress`.
        sent: per group, index in the prompt of the first block that was not ordered.
        states: per recurrent group, the newest boundary state: tokens that it stands behind, block,
            lease.
        tables: block ids per group, once the request has ended.
        held: hold on those blocks, until everything is ordered.
        moving: transfers that are not terminal.
        ordered: whether everything is ordered.
        torn: whether a write has failed.
        let_go_at: control's clock after which, if it was stopped, its blocks are not held any
            more, although something may still read them: it will not be believed.
    """

    push: str
    expires: float
    request: str = ""
    arrived: float = -inf
    ended: bool = False
    claimed: float = -inf
    record: RequestRecord | None = None
    peer: str = ""
    announce: Announce | None = None
    stage: Stage = Stage.WAITING
    noted: Progress = Progress()
    sent: list[int] = field(default_factory=list)
    states: dict[int, tuple[int, int, BlockLease]] = field(default_factory=dict)
    tables: tuple[tuple[int, ...], ...] | None = None
    held: BlockLease | None = None
    moving: set[TransferId] = field(default_factory=set)
    ordered: bool = False
    torn: bool = False
    let_go_at: float = inf

    @property
    def waits_here(self) -> bool:
        """Whether its request is here and has no blocks."""
        return bool(self.request) and self.record is None

    @property
    def attempt(self) -> Attempt:
        """What its decode engine calls it."""
        return Attempt(self.push, NO_EPOCH) if self.announce is None else self.announce.attempt

    def is_for(self, peer: str) -> bool:
        """Whether it has no destination yet, and ``peer`` may give it one."""
        return self.announce is None and self.peer in ("", peer)

    @property
    def progress(self) -> Progress:
        """How much of the prompt its blocks hold."""
        if self.record is None:
            return Progress()
        losses = self.record.losses
        # The blocks of a request that has ended are held.
        if self.tables is None and self.noted.losses != losses:
            return Progress(losses)
        return self.noted

    def let_go(self) -> None:
        """Give up every hold that belongs to no transfer."""
        if self.held is not None:
            self.held.release()
            self.held = None
        for _, _, lease in self.states.values():
            lease.release()
        self.states.clear()


class Undelivered:
    """Blocks of prompts whose destination is not known: each block counts once, however many
    prompts begin with it, and what is still being computed counts as much as it will take."""

    def __init__(self) -> None:
        self._reserved: dict[str, int] = {}
        self._reserved_blocks = 0
        self._held: dict[str, tuple[int, ...]] = {}
        self._holders: Counter[int] = Counter()

    def reserve(self, push: str, blocks: int) -> None:
        """A prompt will be computed, and take so many blocks."""
        self.drop(push)
        self._reserved[push] = blocks
        self._reserved_blocks += blocks

    def hold(self, push: str, blocks: tuple[int, ...]) -> None:
        """A prompt has ended, and these blocks are held for it."""
        self.drop(push)
        self._held[push] = blocks
        self._holders.update(blocks)

    def drop(self, push: str) -> None:
        """A prompt has a destination, or will have none. Idempotent."""
        self._reserved_blocks -= self._reserved.pop(push, 0)
        for block in self._held.pop(push, ()):
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]

    def is_reserved(self, push: str) -> bool:
        """Whether there is room for a prompt when it ends."""
        return push in self._reserved

    def with_blocks(self, blocks: Iterable[int]) -> int:
        """How many blocks are held, if these are, too."""
        return len(self._holders) + sum(block not in self._holders for block in set(blocks))

    def with_prompt(self, push: str, blocks: int) -> int:
        """How many blocks will be held, if a prompt is computed that takes so many."""
        reserved = self._reserved_blocks - self._reserved.get(push, 0)
        return len(self._holders) + reserved + blocks

    @property
    def blocks(self) -> int:
        """How many are held now."""
        return len(self._holders)


@dataclass(frozen=True, slots=True)
class Sendable:
    """Pages of one group that can be sent.

    Attributes:
        group: the group.
        upto: index in the prompt of the first block that is not among them.
        sources: block ids here.
        targets: block ids there.
    """

    group: int
    upto: int
    sources: tuple[int, ...]
    targets: tuple[int, ...]


class PushSource:
    """See the module. A part of the planner.

    Args:
        config: the ``push`` section.
        shape: tokens and groups of chunks.
        card: this engine.
        transfers: all transfers of the engine.
        leases: holds on engine blocks.
        meter: where figures go.
        cost: what computing takes.

    Attributes:
        orders: pages for the next plan.
        stops: pushes that the next plan ends.
        peers: decode engines that the next plan makes known.
        gone: decode engines that are not connected any more.
        letters: messages for the link.
        unwanted: requests whose decode engines need nothing of them any more.
    """

    def __init__(
        self,
        config: PushConfig,
        shape: ChunkShape,
        card: EngineCard,
        transfers: TransferTable,
        leases: LeaseBook,
        meter: Meter,
        *,
        cost: CostModel,
    ) -> None:
        self._cost = cost
        self.orders: list[PushOrder] = []
        self.stops: list[PushStop] = []
        self.peers: list[PeerOrder] = []
        self.gone: list[str] = []
        self.letters: list[Letter] = []
        self.unwanted: list[str] = []
        self._config = config
        self._shape = shape
        self._card = card
        self._transfers = transfers
        self._leases = leases
        self._meter = meter
        self._outbound: dict[str, Outbound] = {}
        self._expected: dict[str, set[str]] = {}
        self._of_transfer: dict[TransferId, Outbound] = {}
        self._backlog: Counter[str] = Counter()
        self._open: dict[str, EngineCard] = {}
        self._refusals: dict[str, str] = {}
        self._ending = ""
        self._told: set[str] = set()
        self._endings = Endings()
        self._forgone: dict[str, float] = {}
        self._declined: OrderedDict[str, str] = OrderedDict()
        self._undelivered = Undelivered()
        self._next: set[str] = set()  # pushes whose requests wait, and could begin
        self._busy = False  # whether one has begun since the last step, or ran in it
        self._ran = False
        self._yielding: dict[str, float] = {}
        self._max_held = card.ranks[0].num_blocks // HELD_SHARE
        self._page_bytes = [
            sum(row.page_bytes for rank in card.ranks for row in rank.rows if group in row.groups)
            for group in range(len(shape.groups))
        ]
        token_bytes = sum(self._page_bytes[g] / shape.groups[g].block_tokens for g in shape.paged)
        self._part_tokens = max(
            *(group.block_tokens for group in shape.groups),
            int(config.max_inflight * len(card.ranks) // max(1.0, token_bytes)),
        )

    # -- requests ----------------------------------------------------------------------------

    def arrived(self, record: RequestRecord, now: float) -> None:
        """A request is here and waits for its blocks.

        Args:
            record: the request.
            now: control's clock.
        """
        push = record.view.push
        if push is None or push.prefill is not None:
            return
        out = self._outbound.get(push.id)
        if out is None:
            if push.id in self._declined:
                if self._declined[push.id] == DECLINED:
                    self._forgo(record.view.request_id, now)
                return
            out = self._outbound[push.id] = Outbound(push.id, now + self._config.deadline)
        if not out.request:  # a second request under the same id is the router's mistake
            out.request, out.arrived = record.view.request_id, now
            self._come(out)
            self._next.add(push.id)
            self._say_where(out)

    def waits(self, record: RequestRecord, now: float, floor: int = 0) -> bool:
        """Whether a request should not begin yet. Where its prompt goes is not known, and it has
        only just come, so that it may be said in time for its rows to leave one by one; or too many
        blocks are held for such prompts, or will be, for this one to be held as well. Or nobody
        needs it any more, and the engine may be about to end it, or others wait whose prompts
        somebody needs.

        Args:
            record: the request.
            now: control's clock.
            floor: tokens that the engine has of it.
        """
        push = record.view.push
        if push is None or push.prefill is not None or record.push_over:
            return False
        told = self._forgone.get(record.view.request_id, -inf)
        if now < told + DESTINATION_WAIT:
            return True
        if push.id in self._declined:
            return self._yields(record, now)
        out = self._outbound.get(push.id)
        if out is None or out.request != record.view.request_id or out.stage is not Stage.WAITING:
            return False
        if out.announce is not None:
            seconds = self._cost.costs.prefill_seconds(floor, record.view.num_prompt_tokens)
            # An estimate that is far too long would never change if nothing were computed.
            spared = not self._busy or self._next <= {out.push}
            if spared or now + (seconds or 0.0) <= out.expires:
                return False
            self._forgo_of(out, now)
            self._fail(out, TOO_BUSY)
            return True
        if now < self._expected_until(out, record, floor):
            return True
        need = self._shape.pushed_blocks(0, 0, record.view.num_prompt_tokens)
        if self._undelivered.with_prompt(out.push, need) <= self._max_held:
            return False
        self._next.discard(out.push)
        return True

    def _expected_until(self, out: Outbound, record: RequestRecord, floor: int) -> float:
        """Control's clock after which a destination is not to be expected soon. A decode engine
        claims a push when it sees the request, and says where it goes in the same moment, or has no
        room for it yet."""
        if out.peer:
            return out.claimed + DESTINATION_WAIT
        seconds = self._cost.costs.prefill_seconds(floor, record.view.num_prompt_tokens) or 0.0
        return out.arrived + min(max(DESTINATION_WAIT, seconds * WAIT_SHARE), LONGEST_WAIT)

    def _yields(self, record: RequestRecord, now: float) -> bool:
        """Whether a request that nobody needs any more waits for others that somebody needs. Else
        an engine that has too much to do would compute nothing that comes in time."""
        since = self._yielding.setdefault(record.view.request_id, now)
        return bool(self._next) and now - since < self._config.deadline

    def admitted(self, record: RequestRecord, floor: int, now: float) -> None:
        """A request has got its blocks, perhaps not for the first time.

        Args:
            record: the request.
            floor: tokens that the engine has, with what is loaded.
            now: control's clock.
        """
        push = record.view.push
        if push is None or push.prefill is not None:
            return
        self._yielding.pop(record.view.request_id, None)
        self._next.discard(push.id)
        if record.push_over:
            return
        out = self._outbound.get(push.id)
        if out is None:
            if push.id in self._declined:
                record.push_over = self._declined[push.id]
                return
            out = self._outbound[push.id] = Outbound(push.id, now + self._config.deadline)
        mine = out.record is None or out.record is record
        if not mine or out.request not in ("", record.view.request_id):
            return  # a second request under the same id is the router's mistake
        out.request, out.record = record.view.request_id, record
        self._come(out)
        self._busy = True
        if out.announce is None:
            out.expires = max(out.expires, now + self._config.deadline)
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
            self._ran = True
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
        self._yielding.pop(request_id, None)
        self._forgone.pop(request_id, None)
        out, reason = self._outbound.get(push.id), "the prefill ended before it began"
        if out is not None and out.request == request_id:
            out.ended = True
        if out is None and push.id not in self._declined:
            _remember(self._declined, push.id, reason)  # it may be announced yet
        elif out is not None and out.record is None and out.request in ("", request_id):
            self._fail(out, reason)

    def finished(
        self, record: RequestRecord, computed: int, blocks: Sequence[Sequence[int]]
    ) -> None:
        """A request has ended; its blocks are freed after this call."""
        out = self._of(record)
        if out is None or out.ordered or out.stage is Stage.STOPPED:
            return
        out.noted = Progress(record.losses, computed, computed)
        loading = record.load is not None and record.story.mode is LoadMode.PARKED
        if loading or computed < self._end(out):  # the engine counts what is being loaded
            self._fail(out, "the prefill ended before the whole prompt was computed")
            return
        if self._ending and out.announce is None:
            self._fail(out, self._ending)
            return
        out.tables = tuple(tuple(table) for table in blocks)
        null = self._shape.null_block
        held = tuple(block for table in out.tables for block in table if block != null)
        if out.announce is None:
            sure = self._undelivered.is_reserved(out.push)
            if not sure and self._undelivered.with_blocks(held) > self._max_held:
                self._fail(out, "too many blocks are held for other pushes")
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

    def plan(self, *, step: int, now: float) -> None:
        """Order what can be sent of every push that has a destination."""
        self._busy, self._ran = self._ran, False
        for out in list(self._outbound.values()):
            if out.expires <= now and out.stage is not Stage.STOPPED:
                if out.waits_here and out.announce is not None:
                    self._forgo_of(out, now)
                self._fail(out, TOO_BUSY if out.waits_here else TOO_LATE)
            elif out.stage is Stage.BOUND and not out.ordered:
                self._order(out, step, now)
            elif out.stage is Stage.STOPPED:
                self._let_go(out, now)
            # Until the engine says more, what this step computes is all that there is.
            if (noted := out.noted).computed != noted.planned:
                out.noted = replace(noted, computed=noted.planned)

    def _let_go(self, out: Outbound, now: float) -> None:
        """Of a push that nobody will believe, do not hold the blocks for ever that a peer which is
        stopped keeps from draining."""
        if out.let_go_at == inf:
            out.let_go_at = now + self._config.silence
        if now < out.let_go_at:
            return
        for transfer_id in out.moving:
            transfer = self._transfers.get(transfer_id)
            assert transfer is not None
            assert transfer.lease is not None
            transfer.lease.release()
            transfer.overdue = True

    def _order(self, out: Outbound, step: int, now: float) -> None:
        if self._lacks_state(out):
            self._fail(out, "the state at the end was not kept")
            return
        progress = out.progress
        for reached in self._parts(out, progress.computed):
            if out.stage is Stage.BOUND and not out.ordered:
                self._send(out, self._due(out, reached), step, now, computed=True)
        if out.stage is Stage.BOUND and not out.ordered:
            self._send(out, self._due(out, progress.planned), step, now, computed=False)

    def _parts(self, out: Outbound, reached: int) -> Iterable[int]:
        """Ends of parts of the first ``reached`` tokens: blocks come back part by part, and not
        when all of a long prompt has drained."""
        sent = zip(self._shape.groups, out.sent, strict=True)
        first = min((group.block_tokens * index for group, index in sent), default=0)
        return (*range(first + self._part_tokens, reached, self._part_tokens), reached)

    def _due(self, out: Outbound, reached: int) -> list[Sendable]:
        """What was not ordered yet of the first ``reached`` tokens."""
        assert out.announce is not None
        due = []
        for group, (shape, table) in enumerate(
            zip(self._shape.groups, out.announce.tables, strict=True)
        ):
            first, end = out.sent[group], table.first + len(table.blocks)
            if shape.kind is GroupKind.STATE:
                upto = end if reached >= out.announce.end else first
                sources = self._state_blocks(out, group) if upto > first else ()
            else:
                upto = (
                    end if reached >= out.announce.end else min(end, reached // shape.block_tokens)
                )
                sources = self._blocks(out, group)[first:upto]
            if upto <= first or len(sources) < upto - first:
                continue
            targets = table.blocks[first - table.first : upto - table.first]
            pairs = [p for p in zip(sources, targets, strict=True) if p[1] != NO_BLOCK]
            due.append(
                Sendable(group, upto, tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))
            )
        return due

    def _send(
        self, out: Outbound, due: list[Sendable], step: int, now: float, *, computed: bool
    ) -> None:
        announce = out.announce
        assert announce is not None
        sources = tuple(source for part in due for source in part.sources)
        if self._shape.null_block in sources:
            self._fail(out, "a block that is wanted has fallen out of its window")
            return
        size = sum(len(part.sources) * self._page_bytes[part.group] for part in due)
        sent = {part.group: part.upto for part in due}
        complete = all(
            sent.get(group, out.sent[group]) >= table.first + len(table.blocks)
            for group, table in enumerate(announce.tables)
        )
        if not (sources or complete):
            return
        transfer = self._transfers.open(
            Kind.PUSH,
            out.push,
            step=step,
            expires=inf,
            size=size,
            chunks=(),
            lease=self._leases.take(sources),
        )
        out.moving.add(transfer.id)
        self._of_transfer[transfer.id] = out
        self._backlog[out.peer] += size
        pages = tuple(PushPages(d.group, d.sources, d.targets) for d in due if d.sources)
        self.orders.append(
            PushOrder(
                transfer.id,
                out.peer,
                announce.attempt.epoch,
                pages,
                computed,
                complete,
                max(0.0, out.expires - now),
            )
        )
        for part in due:
            out.sent[part.group] = part.upto
        if complete:
            out.ordered = True
            self._give_back(out)

    def _blocks(self, out: Outbound, group: int) -> Sequence[int]:
        if out.tables is not None:
            return out.tables[group]
        return () if out.record is None else out.record.view.blocks(group)

    def _state_blocks(self, out: Outbound, group: int) -> Sequence[int]:
        assert out.announce is not None
        end, block, _ = out.states.get(group, (0, 0, None))
        return (block,) if end == out.announce.end else ()

    def _lacks_state(self, out: Outbound) -> bool:
        """Whether a state that is wanted has been passed by."""
        announce = out.announce
        assert announce is not None
        return out.progress.computed >= announce.end and any(
            out.sent[group] <= announce.tables[group].first and not self._state_blocks(out, group)
            for group in self._shape.recurrent
        )

    # -- what happens ------------------------------------------------------------------------

    def receive(self, news: Iterable[News], now: float) -> None:
        """Take in what the link has to say."""
        for item in news:
            match item:
                case Opened(peer, _, EngineCard() as card):
                    self._open_peer(peer, card)
                case Lost(peer):
                    self._lose_peer(peer, now)
                case Letter(peer, Claim(pushes, patience)):
                    for push in pushes:
                        self._claimed(peer, push, patience, now)
                case Letter(peer, Announce() as announce):
                    self._announced(peer, announce, now)
                case Letter(peer, Cancel(attempt)):
                    self._cancelled(peer, attempt, now)
                case _:
                    pass  # not ours to answer

    def settle(self, transfer: Transfer) -> None:
        """Take in a part of a push that has ended on every rank."""
        self._transfers.close(transfer)
        out = self._of_transfer.pop(transfer.id)
        out.moving.discard(transfer.id)
        self._backlog[out.peer] -= transfer.size
        out.torn |= transfer.reason == TORN
        if transfer.state is State.FAILED:
            self._meter.count("failures", 1, kind=f"push_{transfer.reason or 'unknown'}")
            self._fail(out, transfer.reason or "a write failed")
        else:
            self._meter.count("push_bytes", transfer.moved_bytes)
            self._meter.observe("push_seconds", transfer.seconds)
        self._end_if_drained(out)

    def distrust(self, step: int) -> None:
        """What was computed from ``step`` on may rest on a load that failed."""
        suspects = {
            self._of_transfer[transfer.id].push
            for transfer in self._transfers.live()
            if transfer.kind is Kind.PUSH and transfer.step >= step
        }
        for push in suspects:
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
        for peer, size in list(self._backlog.items()):
            self._meter.gauge("push_backlog_bytes", size, peer=peer[:PEER_NAME])
            if not size and peer not in self._open:
                del self._backlog[peer]

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
            waits = out.stage is Stage.WAITING and (not out.request or out.tables is not None)
            if at_once or waits:
                self._fail(out, ENDING)

    def _open_peer(self, peer: str, card: EngineCard) -> None:
        self._open[peer] = card
        try:
            match_cards(self._card, card)
        except ShapeMismatchError as error:
            self._refusals[peer] = str(error)
            log.warning("decode engine %s cannot be served: %s", peer, error)

    def _lose_peer(self, peer: str, now: float) -> None:
        self._open.pop(peer, None)
        self._refusals.pop(peer, None)
        for out in [out for out in self._outbound.values() if out.peer == peer]:
            if out.announce is not None:
                self._stop(out)
            else:  # if it is there, it claims it again
                out.expires = min(out.expires, now + self._config.silence)
        if peer in self._told:
            self._told.discard(peer)
            self.gone.append(peer)

    def _claimed(self, peer: str, push: str, patience: float, now: float) -> None:
        if peer not in self._open or not patience > 0:
            return
        out = self._outbound.get(push)
        refusal = self._refusal(peer, out) or self._declined.get(push, "")
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
                out.claimed = now
            out.peer, out.expires = peer, now + self._bounded(patience)
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

    def _announced(self, peer: str, announce: Announce, now: float) -> None:
        if peer not in self._open:
            return  # said before it was lost, and given up since
        attempt = announce.attempt
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
        if out is None and not refusal and (out := self._expect(peer, attempt.push)) is None:
            refusal = "too many announced requests have not come to the prefill engine"
        if refusal:
            self._say(peer, Failed(attempt, refusal))
            self._say(peer, self._fence(peer, attempt))
            if out is not None and out.is_for(peer):
                self._fail(out, refusal)  # nobody else will ask for it
            return
        assert out is not None
        out.peer, out.announce = peer, announce
        out.expires = now + self._bounded(announce.patience)
        self._undelivered.drop(out.push)
        if out.record is None:
            if out.request:
                self._next.add(out.push)
            self._say_where(out)
        else:
            self._bind(out)

    def _bind(self, out: Outbound) -> None:
        announce = out.announce
        if out.record is None or announce is None or out.stage is not Stage.WAITING:
            return
        refusal = self._misfit(out.record, announce, self._open[out.peer])
        if refusal:
            self._fail(out, refusal)
            return
        out.stage = Stage.BOUND
        out.sent = [table.first for table in announce.tables]
        if out.peer not in self._told:
            self._told.add(out.peer)
            self.peers.append(PeerOrder(out.peer, encode_card(self._open[out.peer])))
        self.letters.append(Letter(out.peer, Bound(announce.attempt)))

    def _misfit(self, record: RequestRecord, announce: Announce, peer: EngineCard) -> str:
        if self._shape.in_place:
            # A decode engine may keep its states otherwise, and has nothing against this one.
            return (
                "the next step overwrites a recurrent state here before it is sent: serve the "
                "prefill engine with --enable-prefix-caching, too"
            )
        view = record.view
        prompt = view.num_prompt_tokens
        if record.prompt_digest() != announce.digest:
            return (
                "the engines were given different prompts, or compute them with different "
                "weights: check that both have the same tokenizer, chat template, adapter and "
                "salt, and that weights changed at run time have the same name on both"
            )
        if not 0 <= announce.start <= announce.end <= prompt or announce.end == 0:
            return f"tokens {announce.start}..{announce.end} of a prompt of {prompt}"
        if len(announce.tables) != len(self._shape.groups):
            return f"{len(announce.tables)} tables for {len(self._shape.groups)} groups"
        blocks = min(rank.num_blocks for rank in peer.ranks)
        for group, table in zip(self._shape.groups, announce.tables, strict=True):
            upto = table.first + len(table.blocks)
            fits = table.first >= 0 and upto == -(-announce.end // group.block_tokens)
            if group.kind is GroupKind.STATE:
                fits = fits and len(table.blocks) == 1 and announce.end % group.block_tokens == 0
            if not fits:
                return f"a table of blocks {table.first}..{upto} for tokens up to {announce.end}"
            if not all(block == NO_BLOCK or 0 <= block < blocks for block in table.blocks):
                return f"block ids beyond the decode engine's {blocks}"
        return ""

    def _cancelled(self, peer: str, attempt: Attempt, now: float) -> None:
        if attempt.epoch == NO_EPOCH:
            self._decline(peer, attempt.push, now)
        elif (out := self._under_way(peer, attempt)) is not None:
            self._forgo_of(out, now)
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

    def _decline(self, peer: str, push: str, now: float) -> None:
        """A decode request needs nothing. If one that was announced bears the same name, it is
        another one, and keeps what it has."""
        out = self._outbound.get(push)
        if out is None:
            if push not in self._declined:
                _remember(self._declined, push, DECLINED)
        elif out.is_for(peer):
            self._forgo_of(out, now)
            self._forget(out, DECLINED)

    def _forgo_of(self, out: Outbound, now: float) -> None:
        if out.request and not (out.ended or out.ordered):
            self._forgo(out.request, now)

    def _forgo(self, request: str, now: float) -> None:
        """What comes of a request is of no use to its decode engine."""
        self.unwanted.append(request)
        self._forgone[request] = now

    def _fence(self, peer: str, attempt: Attempt) -> Fenced:
        """What there is to say of an attempt that is over, or never was."""
        return Fenced(attempt, clean=self._endings.clean(peer, attempt.epoch))

    def _retire(self, out: Outbound, reason: str) -> None:
        """No request or announcement that comes later begins the push anew."""
        self._next.discard(out.push)
        if out.push not in self._declined:
            _remember(self._declined, out.push, reason)
        if out.record is not None:
            out.record.push_over = out.record.push_over or reason

    def _forget(self, out: Outbound, reason: str) -> None:
        self._retire(out, reason)
        self._give_back(out)
        self._come(out)
        del self._outbound[out.push]

    def _fail(self, out: Outbound, reason: str) -> None:
        if out.stage is Stage.STOPPED:
            return
        log.info("push %s is given up: %s", out.push, reason)
        if out.peer:
            self._say(out.peer, Failed(out.attempt, reason))
        self._retire(out, reason)
        self._stop(out)

    def _stop(self, out: Outbound) -> None:
        if out.stage is Stage.STOPPED:
            return
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
