"""A planner with an engine around it that answers for its ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lamina_kv.config import load_config
from lamina_kv.control.offers import Offer
from lamina_kv.control.planner import Planner
from lamina_kv.control.probes import LEAST_PAUSE
from lamina_kv.control.push.pushes import Pushes
from lamina_kv.control.reporting.residency import Describe
from lamina_kv.control.requests import PushParameters
from lamina_kv.control.shape import ChunkShape
from lamina_kv.control.transfers import Kind
from lamina_kv.keys import CHECKPOINT, ChunkChain
from lamina_kv.observe.metrics import Meter, Readings
from lamina_kv.observe.traces import ServedRequest
from lamina_kv.plan import (
    Ask,
    ChunkKey,
    LoadOrder,
    Move,
    NearSlots,
    Outcome,
    RankReport,
    Receipt,
    StepPlan,
    TierName,
    TierReport,
    TransferId,
    TransferReceipt,
)
from lamina_kv.push.cards import EngineCard
from lamina_kv.tiers.contract import Index
from lamina_kv.tiers.regard import USUAL, Regard
from lamina_kv.tiers.slots import SlotIndex
from stores import stored_chunks

if TYPE_CHECKING:
    from lamina_kv.observe.spans import Spans

BLOCK, CHUNK, CHUNK_BYTES = 16, 32, 1000

PER_SLOT = CHUNK // BLOCK
"""Pages of a near slot, where no group has smaller blocks."""

NAMESPACE = b"namespace"

FAR = TierName("disk")
"""The far tier of an engine that has one."""


class Pool:
    """A block pool that only counts references."""

    def __init__(self) -> None:
        self.references: Counter[int] = Counter()

    def hold(self, blocks: Sequence[int]) -> None:
        self.references.update(blocks)

    def free(self, blocks: Sequence[int]) -> None:
        self.references.subtract(blocks)
        assert min(self.references.values()) >= 0, "released twice"

    @property
    def held(self) -> set[int]:
        return set(+self.references)


@dataclass
class View:
    """A request of an engine whose blocks are numbered from ``first_block``."""

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int = 0
    recompute_tokens: int = 1
    root_extra: bytes = b""
    regard: Regard = USUAL
    first_block: int = 1
    extras: dict[int, bytes] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.push: PushParameters | None = None
        self.num_prompt_tokens = self.num_prompt_tokens or len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def tokens(self) -> Sequence[int]:
        return self.token_ids

    def chunk_extra(self, start: int, end: int) -> bytes:
        return self.extras.get(start, b"")

    def blocks(self, group: int = 0) -> Sequence[int]:
        if group in self.tables:
            return self.tables[group]
        return range(self.first_block, self.first_block + len(self.token_ids) // BLOCK + 1)

    def state_blocks(self, group: int, end: int) -> Sequence[int]:
        return self.tables[group]


class Engine:
    """Drives a planner as an engine would, and answers for its ranks.

    Args:
        extra: the configuration; a far tier is added if there are slots for it.
        ranks: how many ranks there are.
        near_slots: slots of the near tier.
        near_ready: of these, how many every rank may use at the start; None for all.
        far_slots: slots of the far tier; 0 for none.
        far: more keys of the far tier's configuration.
        stored: what the far tier holds, by slot; one mapping for all ranks, or one for each.
        tiers: each rank's far tiers, where the configuration has other ones.
        clock: the planner's clock, where that is not ``now``.
        on_end: called with requests that have ended.
        describe: labels of chunks, if somebody listens.
        spans: is told what is done for requests.

    Attributes:
        begun: what was published before anything had happened.
    """

    def __init__(
        self,
        extra: dict[str, object] | None = None,
        *,
        ranks: int = 1,
        near_slots: int = 100,
        near_ready: int | None = None,
        far_slots: int = 0,
        far: Mapping[str, object] | None = None,
        stored: Mapping[int, ChunkKey] | Sequence[Mapping[int, ChunkKey]] = (),
        tiers: Sequence[TierReport] = (),
        leases_loads: bool = False,
        recomputes: bool = True,
        loads: bool = True,
        saves: bool = True,
        card: EngineCard | None = None,
        shape: ChunkShape | None = None,
        clock: Callable[[], float] | None = None,
        on_end: Callable[[ServedRequest], None] | None = None,
        describe: Describe | None = None,
        spans: Spans | None = None,
    ) -> None:
        settings: dict[str, object] = dict(extra or {})
        if far_slots:
            tier = {"kind": "disk", "name": FAR, "path": "/store", "capacity": "1GiB"}
            settings.setdefault("tiers", [tier | dict(far or {})])
        self.pool = Pool()
        self.meter = Meter()
        self.now = 0.0
        self.ranks = ranks
        held = [stored] * ranks if isinstance(stored, Mapping) else stored or [{}] * ranks

        def tiers_of(rank: int) -> tuple[TierReport, ...]:
            if tiers or not far_slots:
                return tuple(tiers)
            return (TierReport(FAR, far_slots, stored_chunks(held[rank], keys=rank == 0)),)

        ready = near_slots if near_ready is None else near_ready
        reports = [
            RankReport(
                rank,
                near_slots,
                CHUNK_BYTES,
                tiers_of(rank),
                near=NearSlots(ready, near_slots),
            )
            for rank in range(ranks)
        ]
        self.planner = Planner(
            load_config(settings, {}),
            shape or ChunkShape.uniform(BLOCK, CHUNK),
            NAMESPACE,
            self.pool,
            reports,
            self.meter,
            leases_loads=leases_loads,
            recomputes=recomputes,
            loads=loads,
            saves=saves,
            card=card,
            on_end=on_end,
            describe=describe,
            spans=spans,
            clock=clock or (lambda: self.now),
        )
        self.begun = self.meter.drain()

    @property
    def pushes(self) -> Pushes:
        """What goes to other engines and comes from them, where the configuration has pushes."""
        assert self.planner.pushes is not None
        return self.planner.pushes

    def wait(self, seconds: float) -> None:
        """Step with nothing to run for that long."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1)
            self.step()

    def step(self, *progress: tuple[str, int]) -> StepPlan:
        runs = [(name, 0, end) for name, end in progress]
        return self.planner.plan_step(runs, forward=bool(runs))

    def answer(
        self,
        *transfers: TransferId,
        outcome: Outcome = Outcome.DONE,
        ranks: Sequence[int] | None = None,
        reason: str = "test",
        lost: bool = False,
        present: bytes = b"",
        seconds: float = 0.0,
        moved: int | None = None,
    ) -> None:
        if moved is None:
            moved = CHUNK_BYTES if outcome is Outcome.DONE else 0
        for rank in range(self.ranks) if ranks is None else ranks:
            items = tuple(
                TransferReceipt(
                    transfer,
                    outcome,
                    moved,
                    seconds=seconds,
                    active=seconds,
                    lost=lost,
                    present=present,
                    reason=reason,
                )
                for transfer in transfers
            )
            self.planner.receive([Receipt(rank, items)])

    def pin(self, ready: int, most: int, rank: int = 0) -> None:
        """A rank may use so many near slots by now, and so many in the end."""
        self.planner.receive([Receipt(rank, near=NearSlots(ready, most))])

    def lookup(self, view: View, floor: int = 0, **given: Any) -> Offer:
        """Look a request up until it need not ask again; what it waits for comes near."""
        for _ in range(1000):
            offer = self.planner.lookup(view, floor, **given)
            if not offer.ask_again:
                return offer
            self.settle_moves()
        raise AssertionError("the request waits for ever")

    def save(self, view: View) -> StepPlan:
        """Run a request to its end and let everything it saves arrive."""
        offer = self.lookup(view)
        self.planner.admitted(view.request_id, offer.tokens)
        plan = self.step((view.request_id, view.num_tokens))
        self.answer(*(load.transfer for load in plan.loads))
        self.answer(*(save.transfer for save in plan.saves))
        self.planner.finished(view.request_id, view.num_tokens, [view.blocks()])
        return plan

    def spoil(self, view: View, how: str) -> None:
        """Make what a request has computed worth nothing: ``preempted``, ``reset``,
        ``distrusted``."""
        if how == "preempted":
            self.planner.lookup(view, 0)
        elif how == "reset":
            self.planner.reset()
        else:
            self.planner.distrust()

    def settle_moves(self) -> StepPlan:
        """Plan a step in which nothing runs, and let what far tiers are to do go well: they have no
        chunk that they are asked for."""
        plan = self.step()
        self.answer(*(move.transfer for move in (*outward(plan), *inward(plan))))
        for ask in asks(plan):
            self.answer(ask.transfer, present=bytes(len(ask.keys)))
        return plan

    def probe(self, *, well: bool) -> None:
        """Wait until the far tier is probed, and answer."""
        while not (asked := probes(self.step())):
            self.now += LEAST_PAUSE
        self.answer(*asked, outcome=Outcome.DONE if well else Outcome.FAILED, reason="no_answer")

    def write_all(self) -> None:
        """Let everything that was saved reach the far tiers, which say that they lack it."""
        for _ in range(1000):
            if not self.planner.has_work:
                return
            for ask in asks(self.step()):
                self.answer(ask.transfer, present=bytes(len(ask.keys)))
            live = self.planner._books.transfers.live()
            self.answer(*[move.id for move in live if move.kind is Kind.MOVE_OUT])
        raise AssertionError("there is always something to do")

    def forget_near(self) -> None:
        """Near loses every chunk."""
        for key in list(self.near.visible):
            self.near.drop(key)

    @property
    def near(self) -> SlotIndex:
        """Control's index of the near tier."""
        return self.planner._books.catalog.near

    @property
    def far(self) -> Index:
        """Control's index of the first far tier."""
        return next(iter(self.planner._books.catalog.far.values())).index

    def slots(self, request_id: str, group: int = 0) -> list[int]:
        """Near slots of a request's chunks that are visible, in prefix order."""
        keys = self.planner._requests[request_id].known_keys()[group]
        return [self.near.visible[key] for key in keys if key in self.near.visible]

    def keys(self, plan: StepPlan, group: int = 0) -> list[ChunkKey]:
        """Chunks that a plan saves of one group, in its order, while the saves are on their way."""
        transfers = self.planner._books.transfers
        saves = [transfers.get(save.transfer) for save in plan.saves if save.group == group]
        return [key for transfer in saves if transfer is not None for key in transfer.keys]

    @property
    def leases(self) -> int:
        """Leases on engine blocks, near slots and places in far tiers."""
        slotted = [self.near, *(far.index for far in self.planner._books.catalog.far.values())]
        tiers = sum(index.leased for index in slotted if isinstance(index, SlotIndex))
        return len(self.pool.held) + tiers

    def readings(self) -> Readings:
        return self.meter.drain()

    def count(self, name: str, *labels: str) -> float:
        return self.readings().counters.get((name, labels), 0)


def outward(plan: StepPlan) -> tuple[Move, ...]:
    """Moves of a plan to far tiers."""
    return tuple(move for orders in plan.tiers for move in orders.outward)


def inward(plan: StepPlan) -> tuple[Move, ...]:
    """Moves of a plan from far tiers."""
    return tuple(move for orders in plan.tiers for move in orders.inward)


def drops(plan: StepPlan) -> tuple[int, ...]:
    """Slots of far tiers that a plan has forgotten."""
    return tuple(slot for orders in plan.tiers for slot in orders.drops)


def pages_of(order: LoadOrder, group: int = 0) -> list[tuple[int, int, int]]:
    """Pages of one group that a load brings: near slot, page within its slot, engine block."""
    (pages,) = [pages for pages in order.pages if pages.group == group] or [None]
    if pages is None:
        return []
    return [
        (near // PER_SLOT, near % PER_SLOT, block)
        for near, block in zip(pages.near.tolist(), pages.blocks.tolist(), strict=True)
    ]


def blocks_of(order: LoadOrder, group: int = 0) -> list[int]:
    """Engine blocks of one group that a load fills."""
    return [block for _, _, block in pages_of(order, group)]


def keys_of(tokens: list[int]) -> list[ChunkKey]:
    """Keys of a prompt's whole chunks in an engine of one group."""
    chain = ChunkChain(NAMESPACE, CHUNK, b"", 1, CHECKPOINT)
    chain.extend(tokens, lambda start, end: b"", end=len(tokens))
    return list(chain.groups[0])


def asks(plan: StepPlan) -> tuple[Ask, ...]:
    """Questions of a plan to far tiers."""
    return tuple(ask for orders in plan.tiers for ask in orders.asks)


def probes(plan: StepPlan) -> tuple[TransferId, ...]:
    """Probes of a plan, of far tiers that are out of use."""
    return tuple(orders.probe for orders in plan.tiers if orders.probe is not None)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [seed * 1000 + i for i in range(length)]
