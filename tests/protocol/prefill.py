"""A prefill engine: the real :class:`PushSource`, requests that are computed step by step, and
ranks whose writes are on their way until the history says what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lamina_kv.control.leases import LeaseBook
from lamina_kv.control.offers import Offer
from lamina_kv.control.push.source import PushSource
from lamina_kv.control.requests import BoundaryState, PushParameters, RequestRecord
from lamina_kv.control.transfers import TransferTable
from lamina_kv.data.push_gathers import Bound, Gathers
from lamina_kv.geometry import GroupKind
from lamina_kv.plan import (
    Binding,
    LoadMode,
    Outcome,
    PeerOrder,
    PushOrder,
    TransferId,
    TransferReceipt,
)
from lamina_kv.push.cards import Route, decode_card, routes
from lamina_kv.push.inbox import Inbox, Mailbox
from lamina_kv.push.letters import Letter
from lamina_kv.push.messages import Delivered, Fenced
from protocol.engine import (
    BLOCK,
    COST,
    METER,
    NULL,
    Bell,
    Label,
    Options,
    Pool,
    ProtocolViolationError,
    PushCase,
    View,
    card_of,
    record_of,
)
from push_books import ByHand, ClockByHand, push_books

PARKED_LOAD = TransferId(1_000_000)

Meanwhile = Callable[[], None]


def nothing() -> None:
    """Nothing happens meanwhile."""


Attempt = tuple[str, int]
"""A decode engine's incarnation and its epoch."""


@dataclass
class Write:
    """Pages on their way to one rank.

    Attributes:
        route: which part of each page, and to whom.
        pages: group, source block, target block.
    """

    route: Route
    pages: tuple[tuple[int, int, int], ...]


@dataclass
class Sending:
    """An order that has not drained."""

    transfer: TransferId
    last: bool
    writes: list[Write]


@dataclass
class Stream:
    """The orders of one attempt on one rank."""

    failure: str = ""
    delivered: bool = False
    sendings: list[Sending] = field(default_factory=list)


@dataclass
class Rank:
    """One rank's wire, as :mod:`lamina_kv.data.push_wire` has it.

    Attributes:
        known: routes to decode engines that control has made known.
        streams: attempts that are not over.
        failed: attempts that are over and have failed.
        gathers: prompts that wait for a destination.
        heard: destinations that are on their way beside the plans.
        begun: parts of pushes that were begun.
        receipts: what control has not been told yet.
        notices: for the world to carry: who says it, to which rank, what.
    """

    rank: int
    end: str
    known: dict[str, tuple[Route, ...]] = field(default_factory=dict)
    streams: dict[Attempt, Stream] = field(default_factory=dict)
    failed: dict[Attempt, str] = field(default_factory=dict)
    gathers: Gathers[TransferId] = field(default_factory=Gathers)
    heard: list[Binding] = field(default_factory=list)
    begun: set[TransferId] = field(default_factory=set)
    receipts: list[TransferReceipt] = field(default_factory=list)
    notices: list[tuple[str, int, Delivered]] = field(default_factory=list)

    def begin(self, order: PushOrder) -> None:
        if order.transfer in self.begun:
            raise ProtocolViolationError(f"transfer {order.transfer} is sent twice")
        self.begun.add(order.transfer)
        name = (order.peer, order.epoch)
        stream = self.streams.setdefault(name, Stream(self.failed.get(name, "")))
        pages = tuple(
            (part.group, source, target)
            for part in order.pages
            for source, target in zip(part.sources, part.targets, strict=True)
        )
        writes = [Write(route, pages) for route in self.known[order.peer] if pages]
        sending = Sending(order.transfer, order.last, [] if stream.failure else writes)
        stream.sendings.append(sending)
        self.settle(name)

    def settle(self, name: Attempt) -> None:
        """Report what has drained, in order."""
        stream = self.streams[name]
        while stream.sendings and not stream.sendings[0].writes:
            sending = stream.sendings.pop(0)
            if sending.last and not stream.failure:
                stream.delivered = True
                for route in self.known.get(name[0], ()):
                    self.notices.append((self.end, route.rank, Delivered(*name)))
            outcome = Outcome.FAILED if stream.failure else Outcome.DONE
            self.receipts.append(TransferReceipt(sending.transfer, outcome, reason=stream.failure))
        if not stream.sendings and (stream.failure or stream.delivered):
            del self.streams[name]
            if stream.failure:
                self.failed[name] = stream.failure

    def writes(self) -> list[tuple[Attempt, Stream, Sending, Write]]:
        """Everything that is on its way."""
        return [
            (name, stream, sending, write)
            for name, stream in self.streams.items()
            for sending in stream.sendings
            for write in sending.writes
        ]


class Channel:
    """The way to the ranks beside the plans.

    Args:
        ranks: the ranks.
        is_open: whether it is there.
    """

    def __init__(self, ranks: list[Rank], *, is_open: bool) -> None:
        self.is_open = is_open
        self._ranks = ranks

    def send(self, binding: Binding) -> None:
        for rank in self._ranks:
            rank.heard.append(binding)


@dataclass
class Request:
    """A request of the engine.

    Attributes:
        stage: ``waiting``, ``loading``, ``running``, ``preempted``.
        computed: its tokens, as the engine counts them: with those that are being loaded.
        layerwise: what arrives in its first step.
    """

    case: PushCase
    view: View
    record: RequestRecord
    stage: str = "running"
    computed: int = 0
    layerwise: list[tuple[int, Label]] = field(default_factory=list)


class Prefill(ByHand):
    """See the module.

    Attributes:
        inbox: what the link has, and the engine has not looked at.
        boxes: what of that is of each connection.
        letters: what the link was given, for the world to carry.
        content: of each block; of a free one nothing.
        fenced: attempts of which it has said that nothing will be sent.
        stopped: whether its process is.
        hung: whether its engine is, and its link is not.
    """

    def __init__(self, index: int, life: int, options: Options) -> None:
        self.index = index
        self.life = life
        self.incarnation = f"P{index}.{life}"
        self.options = options
        self.pool = Pool(options.blocks)
        self.leases = LeaseBook(self.pool)
        self.transfers = TransferTable(options.prefill_ranks)
        heads = max(options.prefill_ranks, options.decode_ranks)
        card = card_of(
            self.incarnation,
            options.prefill_ranks,
            len(options.groups),
            heads,
            options.blocks,
            replicated=options.replicated,
        )
        self.ranks = [
            Rank(rank, f"{self.incarnation} {rank}") for rank in range(options.prefill_ranks)
        ]
        self.clock = ClockByHand()
        self.source = PushSource(
            options.config,
            push_books(options.shape, self.transfers, self.leases, self.clock, METER),
            card,
            COST,
            channel=Channel(self.ranks, is_open=options.beside),
        )
        self.requests: dict[str, Request] = {}
        self.content: list[Label | None] = [None] * options.blocks
        self.bell = Bell()
        self.inbox = Inbox(self.bell, self.source.take)
        self.boxes: dict[int, Mailbox] = {}
        self.letters: list[Letter] = []
        self.fenced: dict[Attempt, None] = {}
        self.stopped = False
        self.hung = False

    # -- the engine --------------------------------------------------------------------------

    @property
    def awake(self) -> bool:
        """Whether the engine steps: an idle one does nothing before it is woken."""
        return bool(
            self.requests or self.bell.rung or self.transfers.pending or self.source.pending
        )

    @property
    def goes_on(self) -> bool:
        return not (self.stopped or self.hung)

    def arrive(self, name: str, push: str, prompt: str, case: PushCase) -> None:
        """A request comes; it waits until there are blocks for it."""
        parameters = PushParameters(push, None)
        view = View(name, prompt, case.tokens, parameters, [[] for _ in self.options.groups])
        request = Request(case, view, record_of(view), stage="waiting")
        self.requests[name] = request
        self.source.arrived(request.record)

    def preempt(self, name: str) -> None:
        """The engine takes a request's blocks away."""
        request = self.requests[name]
        request.stage = "preempted"
        request.computed = 0
        self.pool.free(request.view.held())
        request.view.tables = [[] for _ in self.options.groups]
        request.view.states.clear()

    def _schedule(self) -> None:
        """Give blocks to requests that wait for some, one after another."""
        for request in self.requests.values():
            if request.stage not in ("waiting", "preempted"):
                continue
            anew = request.stage == "preempted"
            case = request.case
            hit, tokens = case.hit, case.hit_tokens
            if anew and hit != "parked":  # what a tier had, it has
                hit, tokens = "none", 0
            if self.source.waits(request.record):
                continue
            if not self._has_room(request, max(tokens, self.options.chunk)):
                return
            if anew:
                request.record.lose_blocks()
            self._admit(request, hit, tokens)

    def _admit(self, request: Request, hit: str, tokens: int) -> None:
        request.stage = "loading" if hit == "parked" else "running"
        request.computed = tokens
        if tokens:
            self._allocate(request, tokens)
        pages = self._pages(request, 0, tokens)
        request.layerwise = pages if hit == "layerwise" else []
        if hit == "engine":
            self._fill(pages)
        elif hit != "none":
            request.record.load = PARKED_LOAD
            mode = LoadMode.PARKED if hit == "parked" else LoadMode.LAYERWISE
            request.record.offer = Offer(mode=mode)
        self.source.admitted(request.record, tokens)
        self.exchange()

    def loaded(self, name: str) -> None:
        """A parked load is over."""
        request = self.requests[name]
        request.stage = "running"
        request.record.load = None
        self._fill(self._pages(request, 0, request.computed))

    def end(self, name: str) -> None:
        """A request is over, or its client has gone."""
        request = self.requests.pop(name)
        assert request.view.push is not None
        self.source.abandoned(request.view.push, name)
        self.source.finished(request.record, request.computed, request.view.tables)
        self.exchange()
        self.pool.free(request.view.held())

    def step(self, planned: Meanwhile = nothing, ordered: Meanwhile = nothing) -> None:
        """Schedule, plan, run the model, and hear what the ranks have to report.

        Args:
            planned: what happens before the ranks have the plan.
            ordered: what happens before the model has run.
        """
        self._schedule()
        self.exchange()
        shape = self.options.shape
        ran: list[tuple[Request, int, int]] = []
        for request in list(self.requests.values()):
            start, end = (
                request.computed,
                min(request.computed + self.options.chunk, request.case.tokens),
            )
            if request.stage != "running" or start == end:
                continue
            self._leave_window(request, start)
            if not self._make_room(request, end):
                continue
            self._allocate(request, end)
            for group in shape.recurrent if end % BLOCK == 0 else ():
                block = request.view.states[group][-1]
                self.source.state(
                    request.record, BoundaryState(request.view.request_id, group, block, end)
                )
            ran.append((request, start, end))
        for request, start, end in ran:
            self.source.progress(request.record, start, end)
        self.source.plan()
        planned()
        orders = self._carry_out()
        ordered()
        self.exchange()
        before = list(self.content)
        for request, start, end in ran:
            if request.layerwise:
                self._fill(request.layerwise)
                request.layerwise, request.record.load = [], None
            self._fill(self._pages(request, start, end))
            request.computed = end
        self._check_computed(orders, before)
        self._learn()

    def _carry_out(self) -> list[PushOrder]:
        source = self.source
        orders = list(source.orders)
        for rank in self.ranks:
            for incarnation in source.gone:
                rank.known.pop(incarnation, None)
            for peer in source.peers:
                self._meet(rank, peer)
            for stop in source.stops:
                name = (stop.peer, stop.epoch)
                if (stream := rank.streams.get(name)) is not None:
                    stream.failure = stream.failure or "stopped"
                else:
                    rank.failed.setdefault(name, "stopped")
            for binding in source.bindings:
                self._bind(rank, binding)
            for dropped in source.drops:
                rank.gathers.end(dropped)
            for order in orders:
                self._check_order(rank, order)
                rank.begin(order)
            for gathered in source.gathers:
                if (bound := rank.gathers.begin(gathered, gathered)) is not None:
                    self._send_gathered(rank, bound.binding)
        source.peers.clear()
        source.gone.clear()
        source.stops.clear()
        source.orders.clear()
        source.gathers.clear()
        source.bindings.clear()
        source.drops.clear()
        return orders

    def _meet(self, rank: Rank, peer: PeerOrder) -> None:
        card = decode_card(peer.card)
        rank.known[peer.incarnation] = routes(
            rank.rank, self.options.prefill_ranks, len(card.ranks), replicated=card.replicated
        )

    def hear(self, rank: Rank) -> None:
        """A destination comes beside the plans."""
        self._bind(rank, rank.heard.pop(0))

    def _bind(self, rank: Rank, binding: Binding) -> None:
        if rank.gathers.bind(Bound(binding, 0.0)) is not None:
            self._send_gathered(rank, binding)

    def _send_gathered(self, rank: Rank, binding: Binding) -> None:
        self._meet(rank, binding.peer)
        self._check_order(rank, binding.order)
        rank.begin(binding.order)

    def _check_order(self, rank: Rank, order: PushOrder) -> None:
        if (order.peer, order.epoch) in self.fenced:
            raise ProtocolViolationError(f"pages of {order.epoch} are sent after its fence")
        if order.peer not in rank.known:
            raise ProtocolViolationError(f"rank {rank.rank} does not know {order.peer}")

    def _check_computed(self, orders: list[PushOrder], before: list[Label | None]) -> None:
        """What is sent before the forward must not be written by it, but for the last token's part
        of a block, which nobody needs."""
        for order in orders:
            for part in order.pages if order.computed else ():
                for source in part.sources:
                    was, now = before[source], self.content[source]
                    if was != now and not (
                        was and now and was[:3] == now[:3] and self._enough(was)
                    ):
                        raise ProtocolViolationError(f"block {source} is sent before it is written")

    def _enough(self, label: Label) -> bool:
        prompt, _, index, filled = label
        return index * BLOCK + filled >= self.options.tokens_of(prompt) - 1

    def close(self) -> set[Attempt]:
        """It is told to end, and does.

        Returns:
            Attempts of which something is still on its way, as far as control knows.
        """
        self.exchange()
        self.source.end(at_once=True)
        self.exchange()
        left = [(out.peer, out.announce) for out in self.source._outbound.values()]
        return {(peer, announce.attempt.epoch) for peer, announce in left if announce is not None}

    # -- blocks ------------------------------------------------------------------------------

    def _has_room(self, request: Request, end: int) -> bool:
        """Whether there are blocks for a request's first ``end`` tokens, with those it has."""
        end = min(end, request.case.tokens)
        needed = 0
        for group, shape in enumerate(self.options.groups):
            if shape.kind is GroupKind.STATE:
                needed += end % BLOCK == 0
            else:
                needed += -(-end // BLOCK) - len(request.view.tables[group])
        return self.pool.room() >= needed

    def _make_room(self, request: Request, end: int) -> bool:
        """Preempt the newest requests until there are blocks for one; false if that was the
        newest."""
        while not self._has_room(request, end):
            running = [name for name, r in self.requests.items() if r.stage == "running"]
            newest = running[-1]
            self.preempt(newest)
            if newest == request.view.request_id:
                return False
        return True

    def _new_block(self) -> int:
        self._scribble()
        return self.pool.allocate()

    def _scribble(self) -> None:
        """Whoever reads a freed block finds nothing of what it held."""
        for block in self.pool.take_freed():
            self.content[block] = None

    def _allocate(self, request: Request, end: int) -> None:
        tables = request.view.tables
        for group, shape in enumerate(self.options.groups):
            if shape.kind is GroupKind.STATE:
                if end % BLOCK == 0:
                    self.pool.free(request.view.states.get(group, []))
                    request.view.states[group] = [self._new_block()]
                continue
            while len(tables[group]) * BLOCK < end:
                tables[group].append(self._new_block())

    def _leave_window(self, request: Request, computed: int) -> None:
        for group in self.options.shape.sparse:
            shape = self.options.groups[group]
            if shape.kind is not GroupKind.WINDOW:
                continue
            table = request.view.tables[group]
            for index in range(min(len(table), max(0, computed - shape.window + 1) // BLOCK)):
                if table[index] != NULL:
                    self.pool.free([table[index]])
                    table[index] = NULL

    def _fill(self, pages: list[tuple[int, Label]]) -> None:
        """The model, or a load, writes."""
        for block, label in pages:
            self.content[block] = label

    def _pages(self, request: Request, start: int, end: int) -> list[tuple[int, Label]]:
        """Blocks of tokens ``start..end``, and what they hold when those are computed."""
        prompt, view = request.view.prompt, request.view
        pages: list[tuple[int, Label]] = []
        for group, table in enumerate(view.tables):
            for index in range(start // BLOCK, len(table)):
                if table[index] != NULL:
                    filled = min(BLOCK, end - index * BLOCK)
                    pages.append((table[index], (prompt, group, index, filled)))
        for group, blocks in view.states.items() if end % BLOCK == 0 else ():
            pages.append((blocks[0], (prompt, group, end // BLOCK - 1, BLOCK)))
        return pages

    # -- what comes back ---------------------------------------------------------------------

    def _learn(self) -> None:
        """Take in what the ranks have to report."""
        for rank in self.ranks:
            receipts, rank.receipts = rank.receipts, []
            for receipt in receipts:
                transfer = self.transfers.get(receipt.transfer)
                if transfer is not None and transfer.apply(rank.rank, receipt):
                    if transfer.lease is not None:
                        transfer.lease.release()
                    self.source.settle(transfer)
        self.exchange()

    def exchange(self) -> None:
        """Hear what the link has to say, and give it what is to be said."""
        self.bell.rung = False
        self.source.receive(self.inbox.take())
        for letter in self.source.letters:
            if isinstance(letter.message, Fenced):
                self.check_fence((letter.peer, letter.message.attempt.epoch))
        self.letters += self.source.letters
        self.source.letters.clear()
        self._scribble()

    def check_fence(self, attempt: Attempt) -> None:
        """A decode engine is told that nothing will be sent any more."""
        self.fenced[attempt] = None
        for rank in self.ranks:
            if any(name == attempt for name, *_ in rank.writes()):
                raise ProtocolViolationError(
                    f"{attempt} is said to be fenced, but something is on its way"
                )

    def check_sources(self) -> None:
        """Nothing that is being read, and will be believed, is free."""
        self._scribble()
        for rank in self.ranks:
            for name, stream, _, write in rank.writes():
                if stream.failure:
                    continue  # nobody will believe it
                for _, source, _ in write.pages:
                    if not self.pool.references[source]:
                        raise ProtocolViolationError(
                            f"block {source} is free while a write of {name} reads it"
                        )

    def check_clean(self) -> None:
        """Nothing is held for any push, and after another step nothing is known of one: what is
        overdue holds nothing and wakes nobody, so its receipts wait for that step."""
        blocks, leases = any(self.pool.references), self.leases.leased_blocks
        if not (blocks or leases) and all(t.overdue for t in self.transfers.live()):
            self.step()
        left = {
            "blocks": blocks,
            "leases": leases,
            "transfers": len(self.transfers),
            "writes": any(rank.writes() or rank.heard for rank in self.ranks),
            "gathers": any(rank.gathers._open or rank.gathers._early for rank in self.ranks),
            "pushes": self.source.pending or bool(self.source._outbound),
        }
        if any(left.values()):
            raise ProtocolViolationError(f"left behind on {self.incarnation}: {left}")
