"""A prefill engine: the real :class:`PushSource`, requests that are computed step by step, and
ranks whose writes are on their way until the history says what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamina.control.leases import LeaseBook
from lamina.control.push_source import PushSource
from lamina.control.requests import BoundaryState, PushParameters, RequestRecord
from lamina.control.transfers import TransferTable
from lamina.geometry import GroupKind
from lamina.plan import LoadMode, Outcome, PushOrder, TransferId, TransferReceipt
from lamina.push.cards import Route, decode_card, routes
from lamina.push.letters import Letter, News
from lamina.push.messages import Delivered, Fenced
from protocol.engine import (
    BLOCK,
    COST,
    METER,
    NULL,
    Label,
    Options,
    Pool,
    ProtocolViolationError,
    PushCase,
    View,
    card_of,
    record_of,
)

PARKED_LOAD = TransferId(1_000_000)

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
    """One rank's wire, as :mod:`lamina.data.push_wire` has it.

    Attributes:
        known: routes to decode engines that control has made known.
        streams: attempts that are not over.
        failed: attempts that are over and have failed.
        receipts: what control has not been told yet.
        notices: for the world to carry: who says it, to which rank, what.
    """

    rank: int
    end: str
    known: dict[str, tuple[Route, ...]] = field(default_factory=dict)
    streams: dict[Attempt, Stream] = field(default_factory=dict)
    failed: dict[Attempt, str] = field(default_factory=dict)
    receipts: list[TransferReceipt] = field(default_factory=list)
    notices: list[tuple[str, int, Delivered]] = field(default_factory=list)

    def begin(self, order: PushOrder) -> None:
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


@dataclass
class Request:
    """A request of the engine.

    Attributes:
        stage: ``loading``, ``running``, ``preempted``.
        computed: its tokens, as the engine counts them: with those that are being loaded.
        layerwise: what arrives in its first step.
    """

    case: PushCase
    view: View
    record: RequestRecord
    stage: str = "running"
    computed: int = 0
    layerwise: list[tuple[int, Label]] = field(default_factory=list)


class Prefill:
    """See the module.

    Attributes:
        news: what the link will say.
        letters: what it was given, for the world to carry.
        content: of each block.
        fenced: attempts of which it has said that nothing will be sent.
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
            replicated=options.replicated,
        )
        self.source = PushSource(
            options.config, options.shape, card, self.transfers, self.leases, METER, cost=COST
        )
        self.ranks = [
            Rank(rank, f"{self.incarnation} {rank}") for rank in range(options.prefill_ranks)
        ]
        self.requests: dict[str, Request] = {}
        self.content: list[Label | None] = [None] * options.blocks
        self.news: list[News] = []
        self.letters: list[Letter] = []
        self.fenced: dict[Attempt, None] = {}
        self.now = 0.0

    # -- the engine --------------------------------------------------------------------------

    def arrive(self, push: str, case: PushCase) -> None:
        """A request comes and gets blocks."""
        tables: list[list[int]] = [[] for _ in self.options.groups]
        view = View(push, push, case.tokens, PushParameters(push, None), tables)
        request = self.requests[push] = Request(case, view, record_of(view))
        self._admit(request, case.hit, case.hit_tokens)

    def leave(self, push: str) -> None:
        """A request ends that never got blocks."""
        self.source.abandoned(PushParameters(push, None), push)
        self.exchange()

    def preempt(self, push: str) -> None:
        """The engine takes a request's blocks away."""
        request = self.requests[push]
        request.stage = "preempted"
        request.computed = 0
        self.pool.free(request.view.held())
        request.view.tables = [[] for _ in self.options.groups]
        request.view.states.clear()

    def readmit(self, push: str) -> None:
        """A preempted request is scheduled anew; what a tier had, it has."""
        request = self.requests[push]
        request.record.lose_blocks()
        parked = request.case.hit == "parked"
        self._admit(request, *(("parked", request.case.hit_tokens) if parked else ("none", 0)))

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
            request.record.story.mode = mode
        self.source.admitted(request.record, tokens, self.now)
        self.exchange()
        if hit != "parked":
            self.step()

    def loaded(self, push: str) -> None:
        """A parked load is over."""
        request = self.requests[push]
        request.stage = "running"
        request.record.load = None
        self._fill(self._pages(request, 0, request.computed))

    def end(self, push: str) -> None:
        """A request is over, or its client has gone."""
        request = self.requests.pop(push)
        self.source.finished(request.record, request.computed, request.view.tables)
        self.exchange()
        self.pool.free(request.view.held())

    def step(self) -> None:
        """Schedule, plan, run the model, and hear what the ranks have to report."""
        self.exchange()
        shape = self.options.shape
        ran: list[tuple[Request, int, int]] = []
        for request in self.requests.values():
            start, end = (
                request.computed,
                min(request.computed + self.options.chunk, request.case.tokens),
            )
            if request.stage != "running" or start == end:
                continue
            self._leave_window(request, start)
            self._allocate(request, end)
            for group in shape.recurrent if end % BLOCK == 0 else ():
                block = request.view.states[group][-1]
                self.source.state(
                    request.record, BoundaryState(request.view.request_id, group, block, end)
                )
            ran.append((request, start, end))
        for request, start, end in ran:
            self.source.progress(request.record, start, end)
        self.source.plan(step=0, now=self.now)
        orders = self._carry_out()
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
                card = decode_card(peer.card)
                rank.known[peer.incarnation] = routes(
                    rank.rank,
                    self.options.prefill_ranks,
                    len(card.ranks),
                    replicated=card.replicated,
                )
            for stop in source.stops:
                if (stream := rank.streams.get((stop.peer, stop.epoch))) is not None:
                    stream.failure = stream.failure or "stopped"
            for order in orders:
                self._check_order(rank, order)
                rank.begin(order)
        for given in (source.peers, source.gone, source.stops, source.orders):
            given.clear()
        return orders

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
        return index * BLOCK + filled >= self.requests[prompt].case.tokens - 1

    # -- blocks ------------------------------------------------------------------------------

    def _allocate(self, request: Request, end: int) -> None:
        tables = request.view.tables
        for group, shape in enumerate(self.options.groups):
            if shape.kind is GroupKind.STATE:
                if end % BLOCK == 0:
                    self.pool.free(request.view.states.get(group, []))
                    request.view.states[group] = [self.pool.allocate()]
                continue
            while len(tables[group]) * BLOCK < end:
                tables[group].append(self.pool.allocate())

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
        news, self.news = self.news, []
        self.source.receive(news, self.now)
        for letter in self.source.letters:
            if isinstance(letter.message, Fenced):
                self._check_fence((letter.peer, letter.message.attempt.epoch))
        self.letters += self.source.letters
        self.source.letters.clear()

    def _check_fence(self, attempt: Attempt) -> None:
        self.fenced[attempt] = None
        for rank in self.ranks:
            if any(name == attempt for name, *_ in rank.writes()):
                raise ProtocolViolationError(
                    f"{attempt} is said to be fenced, but something is on its way"
                )

    def check_sources(self) -> None:
        """Nothing that is being read, and will be believed, is free."""
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
        """Nothing is left of any push."""
        left = {
            "blocks": any(self.pool.references),
            "leases": self.leases.leased_blocks,
            "transfers": len(self.transfers),
            "writes": any(rank.writes() for rank in self.ranks),
            "pushes": self.source.pending or bool(self.source._outbound),
        }
        if any(left.values()):
            raise ProtocolViolationError(f"left behind on {self.incarnation}: {left}")
