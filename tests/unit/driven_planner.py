"""A planner with an engine around it that answers for its ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lamina.config import load_config
from lamina.control.cost import Costs
from lamina.control.decisions import DecisionRecord
from lamina.control.planner import Planner
from lamina.control.requests import ChunkShape, PushParameters
from lamina.observe.metrics import Meter, Readings
from lamina.plan import (
    ChunkKey,
    Outcome,
    RankReport,
    Receipt,
    StepPlan,
    StoredChunk,
    TransferId,
    TransferReceipt,
)
from lamina.push.cards import EngineCard

BLOCK, CHUNK, CHUNK_BYTES = 16, 32, 1000


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
    """Drives a planner as an engine would, and answers for its ranks."""

    def __init__(
        self,
        extra: dict[str, object] | None = None,
        *,
        ranks: int = 1,
        host_slots: int = 100,
        disk_slots: int = 0,
        stored: tuple[StoredChunk, ...] = (),
        reports_blocks: bool = True,
        leases_loads: bool = False,
        loads: bool = True,
        saves: bool = True,
        card: EngineCard | None = None,
        shape: ChunkShape | None = None,
        costs: Costs | None = None,
        on_decision: Callable[[DecisionRecord], None] | None = None,
    ) -> None:
        settings: dict[str, object] = dict(extra or {})
        if disk_slots:
            settings.setdefault("disk", {"path": "/store", "capacity": "1GiB"})
        self.pool = Pool()
        self.meter = Meter()
        self.now = 0.0
        self.ranks = ranks
        self.planner = Planner(
            load_config(settings, {}),
            shape or ChunkShape.uniform(BLOCK, CHUNK),
            b"namespace",
            self.pool,
            [RankReport(r, host_slots, disk_slots, CHUNK_BYTES, stored) for r in range(ranks)],
            self.meter,
            reports_blocks=reports_blocks,
            leases_loads=leases_loads,
            loads=loads,
            saves=saves,
            card=card,
            costs=costs,
            on_decision=on_decision,
            clock=lambda: self.now,
        )

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
        bad: tuple[ChunkKey, ...] = (),
    ) -> None:
        moved = CHUNK_BYTES if outcome is Outcome.DONE else 0
        for rank in range(self.ranks) if ranks is None else ranks:
            items = tuple(
                TransferReceipt(t, outcome, moved, bad_chunks=bad, reason="test") for t in transfers
            )
            self.planner.receive([Receipt(rank, items)])

    def save(self, view: View) -> StepPlan:
        """Run a request to its end and let everything it saves arrive."""
        hit = self.planner.lookup(view, 0)
        self.planner.admitted(view.request_id, hit.tokens)
        plan = self.step((view.request_id, view.num_tokens))
        self.answer(*(o.transfer for o in (*plan.loads, *plan.saves)))
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

    def settle_writes(self) -> StepPlan:
        plan = self.step()
        self.answer(*(w.transfer for w in plan.writes))
        return plan

    def readings(self) -> Readings:
        return self.meter.drain()

    def count(self, name: str, *labels: str) -> float:
        return self.readings().counters.get((name, labels), 0)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [seed * 1000 + i for i in range(length)]
