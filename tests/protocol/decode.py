"""A decode engine: the real :class:`PushTarget`, the real :class:`Receives` of its ranks, and
memory that knows what was written to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lamina_kv.control.leases import LeaseBook
from lamina_kv.control.push.target import CANCELLED, PushOffer, PushTarget
from lamina_kv.control.requests import PushParameters, RequestRecord
from lamina_kv.control.transfers import TransferTable
from lamina_kv.data.push_receives import Receives
from lamina_kv.geometry import GroupKind
from lamina_kv.plan import TransferId
from lamina_kv.push.inbox import Inbox, Mailbox
from lamina_kv.push.letters import Letter
from lamina_kv.push.messages import Delivered, encode
from lamina_kv.push.transports.base import Notice, Peer
from protocol.engine import (
    BLOCK,
    BREAKER,
    COST,
    METER,
    PATIENCE,
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
from protocol.prefill import Write
from push_books import ByHand, ClockByHand, push_books

Parts = tuple[Label | None, ...]
"""What a page holds, stretch by stretch."""


@dataclass
class Request:
    """A request of the engine.

    Attributes:
        address: the prefill engine that it names.
        since: the engine's clock when it came.
        stage: ``queued``, ``parked``, ``resumed``, ``losing`` (its blocks are to be taken away and
            given anew), ``recomputed``.
        end: tokens that it goes on from if it is resumed.
        epoch: its transfer; 0 for none.
    """

    case: PushCase
    address: str
    view: View
    record: RequestRecord
    since: float
    stage: str = "queued"
    end: int = 0
    epoch: int = 0


@dataclass(frozen=True)
class Arrived:
    """A write that its sender takes for done, and the rank has not taken up."""

    rank: int
    epoch: int
    write: Write
    content: tuple[Label | None, ...]


class Decode(ByHand):
    """See the module.

    Attributes:
        inbox: what the link has, and the engine has not looked at.
        boxes: what of that is of each connection.
        outbox: what the link was given and has not looked at.
        arrived: writes that wait for their rank to look; it does so more than once a second.
        pages: per rank and block, what is there.
        promised: per block, attempts that were told of it while it was never free.
    """

    def __init__(self, index: int, life: int, options: Options) -> None:
        self.index = index
        self.life = life
        self.incarnation = f"D{index}.{life}"
        self.options = options
        self.pool = Pool(options.blocks)
        self.leases = LeaseBook(self.pool)
        self.transfers = TransferTable(options.decode_ranks)
        self.clock = ClockByHand()
        self.target = PushTarget(
            options.config,
            push_books(options.shape, self.transfers, self.leases, self.clock, METER, BREAKER),
            card_of(
                self.incarnation,
                options.decode_ranks,
                len(options.groups),
                max(options.prefill_ranks, options.decode_ranks),
                replicated=options.replicated,
                blocks=options.blocks,
            ),
            COST,
        )
        self.receives = [Receives(self.incarnation) for _ in range(options.decode_ranks)]
        self.requests: dict[str, Request] = {}
        self.pages: list[list[Parts]] = [[()] * options.blocks for _ in range(options.decode_ranks)]
        self.bell = Bell()
        self.inbox = Inbox(self.bell)
        self.boxes: dict[int, Mailbox] = {}
        self.outbox: list[Letter] = []
        self.arrived: list[Arrived] = []
        self.promised: list[set[int]] = [set() for _ in range(options.blocks)]

    # -- the engine --------------------------------------------------------------------------

    @property
    def awake(self) -> bool:
        """Whether the engine steps: an idle one does nothing before it is woken."""
        return bool(
            self.requests or self.bell.rung or self.transfers.pending or self.target.pending
        )

    def arrive(self, name: str, push: str, prompt: str, case: PushCase, address: str) -> None:
        """A request comes; it waits until there are blocks for it."""
        prompt = f"not {prompt}" if case.misled else prompt
        view = View(
            name,
            prompt,
            case.tokens,
            PushParameters(push, address),
            [[] for _ in self.options.groups],
        )
        request = self.requests[name] = Request(case, address, view, record_of(view), self.now)
        self.target.arrived(request.record)

    def _schedule(self) -> None:
        """Give blocks to requests that wait for some, first to those that had some."""
        waiting = [r for r in self.requests.values() if r.stage == "losing"]
        waiting += [r for r in self.requests.values() if r.stage == "queued"]
        self.target._room._step = -1  # of a former step, which has no number here
        for request in waiting:
            offer = self._weigh(request)
            if offer.ask_again:
                continue
            if self.pool.room() < self._needed(request):
                return
            if request.stage == "queued":
                self._admit(request, offer)
            else:
                self._allocate(request)
                request.stage = "recomputed"
            request.record.counted = request.stage == "recomputed"

    def _weigh(self, request: Request) -> PushOffer:
        """What a push can do for a request that has no blocks."""
        floor = request.case.floor
        if request.stage == "losing":
            return PushOffer(0)
        if self.target.waits(request.record):
            return PushOffer(0, ask_again=True)
        return self.target.weigh(request.record, floor, floor)

    def _admit(self, request: Request, offer: PushOffer) -> None:
        """A request gets all its blocks."""
        case, view, record = request.case, request.view, request.record
        request.end = offer.end
        self._allocate(request)
        for index in range(case.floor // BLOCK):
            for group, table in enumerate(view.tables):
                if table:
                    self._have(table[index], (view.prompt, group, index, BLOCK))
        if not offer.end:
            request.stage = "recomputed"
            self.target.decline(record, offer.reason or "not_needed")
            return
        request.stage = "parked"
        self.target.order(record, case.floor, case.floor, request.end)
        assert record.receive is not None
        request.epoch = record.receive
        for table in view.tables:
            for block in table[case.floor // BLOCK :]:  # what the engine has others may read
                self.promised[block].add(request.epoch)
        for blocks in view.states.values():
            self.promised[blocks[0]].add(request.epoch)

    def _needed(self, request: Request) -> int:
        return sum(
            1 if shape.kind is GroupKind.STATE else -(-request.case.tokens // BLOCK)
            for shape in self.options.groups
        )

    def _allocate(self, request: Request) -> None:
        self._look_at_freed()
        for group, shape in enumerate(self.options.groups):
            if shape.kind is GroupKind.STATE:
                request.view.states[group] = [self.pool.allocate()]
            else:
                blocks = -(-request.case.tokens // BLOCK)
                request.view.tables[group] = [self.pool.allocate() for _ in range(blocks)]

    def _have(self, block: int, label: Label) -> None:
        for pages in self.pages:
            pages[block] = (label,)

    def end(self, name: str) -> None:
        """A request is over, or its client has gone; the engine is done with its blocks."""
        request = self.requests.pop(name)
        self.target.abandoned(name)
        if request.record.receive is not None:
            self.target.give_up(request.record.receive, CANCELLED)
            request.record.ended = True
        self.exchange()
        self.pool.free(request.view.held())
        self._look_at_freed()

    def step(self, *, carry_out: bool = True) -> None:
        """Schedule, plan a step, and hear what the ranks have to report.

        Args:
            carry_out: whether the ranks take up the plan before anything else happens.
        """
        self._schedule()
        self.exchange()
        self.target.tick()
        if not carry_out:
            self.exchange()
            return
        for rank, receives in enumerate(self.receives):
            for order in self.target.orders:
                receives.expect(order)
            for owed in self.target.senders:
                receives.owed_by(owed.transfer, owed.ends[rank])
            for transfer in self.target.give_ups:
                receives.give_up(transfer, "given up")
        self.target.orders.clear()
        self.target.senders.clear()
        self.target.give_ups.clear()
        self.exchange()
        self._learn()

    def run_out(self, epoch: int) -> None:
        """The deadline of a receive passes on every rank."""
        for receives in self.receives:
            receives.give_up(TransferId(epoch), "deadline")

    @property
    def expected(self) -> list[int]:
        """Epochs that a rank waits for."""
        return sorted({epoch for receives in self.receives for epoch in receives._expected})

    # -- what comes back ---------------------------------------------------------------------

    def notice(self, end: str, rank: int, message: Delivered) -> None:
        """A prefill rank says that all is there."""
        self.take_up(rank)
        self.receives[rank].notice(Notice(Peer(end), encode(message)))

    def _learn(self) -> None:
        """Take in what the ranks have to report."""
        for rank, receives in enumerate(self.receives):
            for request_id, receipt in receives.ended():
                transfer = self.transfers.get(receipt.transfer)
                if transfer is None or not transfer.apply(rank, receipt):
                    continue
                request = self.requests.get(request_id)
                mine = request is not None and request.epoch == transfer.id
                self.target.settle(transfer, request.record if mine and request else None)
                if mine and request is not None:
                    self._settled(request)
        self.exchange()
        self._look_at_freed()

    def _settled(self, request: Request) -> None:
        if request.stage != "parked":
            raise ProtocolViolationError(f"{request.view.request_id} is settled twice")
        if request.record.push_over == "pushed":
            request.stage = "resumed"
            self.check_content(request)
            return
        # The engine takes all its blocks away and gives it others.
        request.stage = "losing"
        self.pool.free(request.view.held())
        request.view.tables = [[] for _ in self.options.groups]
        request.view.states.clear()

    def exchange(self) -> None:
        """Hear what the link has to say, and give it what is to be said."""
        self.bell.rung = False
        self.target.receive(self.inbox.take())
        self.outbox += self.target.letters
        self.target.letters.clear()

    # -- memory ------------------------------------------------------------------------------

    def take_up(self, rank: int) -> None:
        """A rank looks at what has arrived; only then it is in its memory."""
        arrived, self.arrived = self.arrived, []
        for item in arrived:
            if item.rank == rank:
                self.land(rank, item.epoch, item.write, item.content)
            else:
                self.arrived.append(item)

    def land(self, rank: int, epoch: int, write: Write, content: Sequence[Label | None]) -> None:
        """A write is in the memory."""
        part, parts = write.route.remote
        for _, source, target in write.pages:
            if epoch not in self.promised[target]:
                raise ProtocolViolationError(
                    f"a write of {epoch} lands in block {target}, which is not its any more"
                )
            for request in self.requests.values():
                if request.stage == "resumed" and target in request.view.held():
                    raise ProtocolViolationError(
                        f"a write of {epoch} lands in block {target} of a request that runs"
                    )
            page = self.pages[rank][target]
            page = page if len(page) == parts else (None,) * parts
            self.pages[rank][target] = (*page[:part], content[source], *page[part + 1 :])

    def check_content(self, request: Request) -> None:
        """All that a resumed request reads is its own prompt's."""
        for group, shape in enumerate(self.options.groups):
            if shape.kind is GroupKind.STATE:
                wanted = [(request.end // BLOCK - 1, request.view.states[group][0])]
            else:
                first = shape.first_token(request.end) // BLOCK
                wanted = list(enumerate(request.view.tables[group]))
                wanted = wanted[first : -(-request.end // BLOCK)]
            for index, block in wanted:
                filled = min(BLOCK, request.end - index * BLOCK)
                for pages in self.pages:
                    page = pages[block]
                    if not page or not all(
                        label is not None
                        and label[:3] == (request.view.prompt, group, index)
                        and label[3] >= filled
                        for label in page
                    ):
                        raise ProtocolViolationError(
                            f"{request.view.request_id} runs on {page} for block {index} of "
                            f"group {group}"
                        )

    def _look_at_freed(self) -> None:
        for block in self.pool.take_freed():
            self.promised[block].clear()
            for pages in self.pages:
                pages[block] = ()

    def check_waits(self) -> None:
        """No request waits longer than deadlines say: one for room, one for its push, and for
        those before it."""
        for name, request in self.requests.items():
            if self.now - request.since > 3 * PATIENCE:
                raise ProtocolViolationError(f"{name} of {self.incarnation} waits for ever")

    def check_clean(self) -> None:
        """Nothing is left of any push."""
        left = {
            "blocks": any(self.pool.references),
            "leases": self.leases.leased_blocks,
            "transfers": len(self.transfers),
            "receives": bool(self.expected),
            "pushes": bool(self.target._inbound),
            "requests": bool(self.requests),
            "arrived": bool(self.arrived),
        }
        if any(left.values()):
            raise ProtocolViolationError(f"left behind on {self.incarnation}: {left}")
