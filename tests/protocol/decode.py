"""A decode engine: the real :class:`PushTarget`, the real :class:`Receives` of its ranks, and
memory that knows what was written to it."""

from __future__ import annotations

from dataclasses import dataclass

from lamina.control.leases import LeaseBook
from lamina.control.push_target import CANCELLED, PushTarget
from lamina.control.requests import PushParameters, RequestRecord
from lamina.control.transfers import TransferTable
from lamina.data.push_receives import Receives
from lamina.geometry import GroupKind
from lamina.plan import TransferId
from lamina.push.letters import Fate, Letter, Lost, News, Opened
from lamina.push.messages import Delivered, encode
from lamina.push.transports.base import Notice, Peer
from protocol.engine import (
    BLOCK,
    BREAKER,
    COST,
    METER,
    QUARANTINE,
    Label,
    Options,
    Pool,
    ProtocolViolationError,
    PushCase,
    View,
    card_of,
    no_time,
    record_of,
)
from protocol.prefill import Write

Parts = tuple[Label | None, ...]
"""What a page holds, stretch by stretch."""


@dataclass
class Request:
    """A request of the engine.

    Attributes:
        stage: ``parked``, ``resumed``, ``recomputed``.
        end: tokens that it goes on from if it is resumed.
        epoch: its transfer; 0 for none.
    """

    case: PushCase
    view: View
    record: RequestRecord
    stage: str
    end: int
    epoch: int


class Decode:
    """See the module.

    Attributes:
        news: what the link will say.
        outbox: what the link was given and has not looked at.
        pages: per rank and block, what is there.
        promised: per block, attempts that were told of it while it was never free.
        forgiven: attempts whose blocks were given up after a lost peer's quarantine.
        down: for each prefill engine, since when it has not been connected, as control knows.
    """

    def __init__(self, index: int, life: int, options: Options) -> None:
        self.index = index
        self.life = life
        self.incarnation = f"D{index}.{life}"
        self.options = options
        self.pool = Pool(options.blocks)
        self.leases = LeaseBook(self.pool)
        self.transfers = TransferTable(options.decode_ranks)
        self.target = PushTarget(
            options.config,
            BREAKER,
            options.shape,
            self.transfers,
            self.leases,
            METER,
            no_time,
            card=card_of(
                self.incarnation,
                options.decode_ranks,
                len(options.groups),
                max(options.prefill_ranks, options.decode_ranks),
                replicated=options.replicated,
                blocks=options.blocks,
            ),
            cost=COST,
        )
        self.receives = [Receives(self.incarnation) for _ in range(options.decode_ranks)]
        self.requests: dict[str, Request] = {}
        self.pages: list[list[Parts]] = [[()] * options.blocks for _ in range(options.decode_ranks)]
        self.news: list[News] = []
        self.outbox: list[Letter] = []
        self.promised: list[set[int]] = [set() for _ in range(options.blocks)]
        self.forgiven: set[int] = set()
        self.address: dict[int, str] = {}
        self.down: dict[str, float] = {}
        self.now = 0.0

    # -- the engine --------------------------------------------------------------------------

    def arrive(self, push: str, case: PushCase, address: str) -> None:
        """A request comes and gets all its blocks."""
        tables = [
            []
            if shape.kind is GroupKind.STATE
            else [self.pool.allocate() for _ in range(-(-case.tokens // BLOCK))]
            for shape in self.options.groups
        ]
        states = {group: [self.pool.allocate()] for group in self.options.shape.recurrent}
        prompt = f"not {push}" if case.misled else push
        parameters = PushParameters(push, address)
        view = View(push, prompt, case.tokens, parameters, tables, states)
        record = record_of(view)
        end, _ = self.target.reach(record)
        request = self.requests[push] = Request(case, view, record, "parked", end, 0)
        for index in range(case.floor // BLOCK):
            for group, table in enumerate(tables):
                if table:
                    self._have(table[index], (prompt, group, index, BLOCK))
        if end <= case.floor:
            request.stage = "recomputed"
            self.target.decline(record)
        else:
            self.target.order(record, case.floor, case.floor, end, step=0)
            assert record.receive is not None
            request.epoch = record.receive
            self.address[request.epoch] = address
            for block in view.held():
                self.promised[block].add(request.epoch)
        self.step()

    def _have(self, block: int, label: Label) -> None:
        for pages in self.pages:
            pages[block] = (label,)

    def end(self, push: str) -> None:
        """A request is over, or its client has gone; the engine is done with its blocks."""
        request = self.requests.pop(push)
        if request.record.receive is not None:
            self.target.give_up(request.record.receive, CANCELLED)
            request.record.ended = True
        self.exchange()
        self.pool.free(request.view.held())
        self._look_at_freed()

    def step(self) -> None:
        """Plan a step, and hear what the ranks have to report."""
        self.exchange()
        self.target.tick(self.now)
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
        request.stage = "recomputed"
        self.pool.free(request.view.held())
        request.view.tables = [[] for _ in self.options.groups]
        request.view.states.clear()

    def exchange(self) -> None:
        """Hear what the link has to say, and give it what is to be said."""
        news, self.news = self.news, []
        for item in news:
            match item:
                case Lost(peer, fate=Fate.SILENT):
                    self.down.pop(peer, None)
                case Lost(peer):
                    self.down.setdefault(peer, self.now)
                case Opened(peer):
                    self.down.pop(peer, None)
                case _:
                    pass
        self.target.receive(news, self.now)
        self.outbox += self.target.letters
        self.target.letters.clear()

    # -- memory ------------------------------------------------------------------------------

    def land(self, rank: int, epoch: int, write: Write, content: list[Label | None]) -> None:
        """A write arrives."""
        part, parts = write.route.remote
        for _, source, target in write.pages:
            if epoch not in self.promised[target]:
                if epoch in self.forgiven:
                    continue
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
            if self.pool.references[block]:
                continue
            for epoch in self.promised[block]:
                down = self.down.get(self.address[epoch])
                if down is not None and self.now - down >= QUARANTINE:
                    self.forgiven.add(epoch)
            self.promised[block].clear()
            for pages in self.pages:
                pages[block] = ()

    def check_clean(self) -> None:
        """Nothing is left of any push."""
        left = {
            "blocks": any(self.pool.references),
            "leases": self.leases.leased_blocks,
            "transfers": len(self.transfers),
            "receives": bool(self.expected),
            "pushes": bool(self.target._inbound),
            "requests": bool(self.requests),
        }
        if any(left.values()):
            raise ProtocolViolationError(f"left behind on {self.incarnation}: {left}")
