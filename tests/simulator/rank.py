"""One rank of the engine: a cache full of stamps, and a real executor on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch

from lamina.data.executor import Executor, Outcomes
from lamina.data.load_pipeline import Piece, RowSource
from lamina.data.movers import make_mover
from lamina.data.shared_memory import MemoryFile
from lamina.data.sources import tier_sources
from lamina.data.tiers.disk import DiskReader, DiskTier, StoreNamespace
from lamina.data.tiers.host import HostTier
from lamina.geometry import DIRECT_IO_ALIGNMENT, align_up
from lamina.plan import ChunkKey, LoadMode, LoadOrder, TierName, TransferId
from simulator.content import Ledger, Stamps, Violation
from simulator.faults import WRITE_TIME, Mail, RainyDisk, RainySource, Sky
from simulator.forward import Pages, Part
from simulator.options import Options
from simulator.request import Blocks, Run
from simulator.step import Step

_NAMESPACE = StoreNamespace("51" * 16, {})


@dataclass(frozen=True, slots=True)
class Misread:
    """Something that a request read was not what it should be.

    Attributes:
        run: the reader.
        index: which of its blocks was wrong.
        text: what was wrong.
    """

    run: Run
    index: int
    text: str


@dataclass(eq=False, slots=True)
class Target:
    """Where a load may write.

    Attributes:
        order: the load.
        blocks: what its request was given.
        over: whether it has ended.
    """

    order: LoadOrder
    blocks: Blocks
    over: bool = False


@dataclass(slots=True)
class Surroundings:
    """What a rank lives in.

    Attributes:
        sky: what goes wrong.
        ledger: names stamps.
        pump: lets threads run for a while.
        stall: called by a thread where it may take its time.
        leased: whether control holds a block.
        clock: the time.
        slack: seconds by which that may be wrong.
        store: directory of the disk tier.
        violations: what pool threads have found.
    """

    sky: Sky
    ledger: Ledger
    pump: Callable[[], None]
    stall: Callable[..., None]
    leased: Callable[[int], bool]
    clock: Callable[[], float]
    slack: float
    store: Path
    violations: list[Violation] = field(default_factory=list)


class Rank:
    """See the module.

    Args:
        number: the rank.
        options: the engine.
        around: what it lives in.
        leader: the rank that keeps chunks for this one; None if it keeps its own.
    """

    def __init__(
        self, number: int, options: Options, around: Surroundings, leader: Rank | None = None
    ) -> None:
        self.number = number
        self.mail = Mail(around.sky)
        self._options = options
        self._around = around
        self._salts = around.ledger.salts[number]
        self.pages = Pages(options.blocks, options.rows, self._salts, around.ledger)
        geometry = self._geometry = options.geometry()
        flat = torch.from_numpy(self.pages.memory.reshape(-1).view(np.uint8))
        mover = make_mover(geometry, [flat])
        slab, table = leader.files if leader else (MemoryFile.create(), MemoryFile.create())
        self.files = (slab, table)
        capacity = options.host_slots * geometry.chunk_bytes
        self._host = HostTier(geometry, capacity, partial(mover.allocate_host, file=slab))
        self._disk: DiskTier | DiskReader | None = None
        self._staging = mover.allocate_host(max(geometry.extent_bytes))
        if leader and leader._disk:
            self._disk = DiskReader(
                path=around.store,
                namespace=_NAMESPACE,
                rank=leader.number,
                extent_bytes=geometry.extent_bytes,
                slots=leader._disk.slots,
                direct=leader._disk.direct,
                table=table,
            )
        elif options.disk_slots:
            disk = DiskTier(
                path=around.store,
                namespace=_NAMESPACE,
                rank=number,
                extent_bytes=geometry.extent_bytes,
                capacity=options.disk_slots * sum(map(align_up, geometry.extent_bytes)),
                table=table,
            )
            self._disk = cast(DiskTier, RainyDisk(disk, around.sky))
        self._targets: dict[tuple[int, ChunkKey], Target] = {}
        self._parked: dict[TransferId, float] = {}
        sources: dict[TierName, RowSource] = {
            tier: RainySource(
                source,
                around.sky,
                options.chunk_blocks,
                options.takes_back or tier is TierName.DISK,
                self._check_write,
                around.stall,
            )
            for tier, source in tier_sources(self._host, self._disk, mover, geometry).items()
        }
        self.executor = Executor(
            rank=number,
            geometry=geometry,
            mover=mover,
            host=self._host,
            disk=self._disk,
            config=options.config(around.store).load,
            sources=sources,
            follows=leader is not None,
        )

    def run(self, step: Step, parts: Sequence[Part]) -> tuple[Outcomes, list[Misread]]:
        """One step, as a worker of vLLM goes through it."""
        executor, around = self.executor, self._around
        began = around.clock()
        self._note_loads(step, began)
        loads = len(self._parked)  # those that were released early
        loads += sum(order.mode is LoadMode.LAYERWISE for order in step.plan.loads)
        executor.begin_step(step.plan)
        around.pump()
        if step.loads_now:
            executor.start_loads()
        misreads: list[Misread] = []
        waited = self._forward(parts, misreads) if parts else 0.0
        if not step.loads_now:
            executor.start_loads()
        around.pump()
        asked = around.clock()
        if parts and around.sky.random.random() < 0.1:  # draft models run after the question
            outcomes = executor.collect()
            executor.end_step()
        else:
            executor.end_step()
            outcomes = executor.collect()
        self._check_outcomes(step, outcomes, asked)
        # A load that is stuck is given up alone; those that it has kept waiting begin anew.
        longest = loads * self._options.deadline * (1 + WRITE_TIME)
        if waited > longest + around.slack:
            raise Violation(f"the forward waited {waited:.3f} s, it may wait {longest:.3f} s")
        return outcomes, misreads

    def _forward(self, parts: Sequence[Part], misreads: list[Misread]) -> float:
        executor, clock = self.executor, self._around.clock
        if not executor.moves_rows:
            self._compute(parts, slice(None), misreads)
            return 0.0
        waited = 0.0
        for row in range(self._options.rows):
            layer = f"layer.{row}"
            began = clock()
            executor.wait_layer(layer)
            waited += clock() - began
            self._compute(parts, slice(row, row + 1), misreads)
            if self._around.sky.random.random() < 0.95:  # a layer that has no hook, else
                executor.layer_written(layer)
            self._around.pump()
        return waited

    def _compute(self, parts: Sequence[Part], rows: slice, misreads: list[Misread]) -> None:
        if not self._options.ring_blocks:
            self._write(parts, rows)
        for part in parts:
            if (found := self.pages.misread(part, rows)) is not None:
                part.spoiled = True
                if part.trusted:
                    text = f"rank {self.number}: {found[1]}"
                    misreads.append(Misread(part.item.run, found[0], text))
        if self._options.ring_blocks:  # what is written takes the place of what was read
            self._write(parts, rows)

    def _write(self, parts: Sequence[Part], rows: slice) -> None:
        for part in parts:
            self.pages.write(part, rows)

    # -- what must hold ------------------------------------------------------------------------

    def _note_loads(self, step: Step, began: float) -> None:
        for order in step.plan.loads:
            target = Target(order, step.loads[order.transfer])
            for chunk in order.chunks:
                for block in chunk.blocks:
                    self._targets[block, chunk.key] = target
            if order.mode is LoadMode.PARKED:
                self._parked[order.transfer] = began

    def _check_write(self, piece: Piece) -> None:
        """A load is about to write: the blocks must still be its request's."""
        chunks = (piece.pages // self._options.chunk_blocks).tolist()
        for block, chunk in zip(piece.blocks.tolist(), chunks, strict=True):
            target = self._targets.get((block, piece.keys[chunk]))
            held = target is not None and target.blocks.may_be_written(block)
            if not self._options.hand_off:
                held = held or self._around.leased(block)  # it was released early
            if target is None or target.over or not held:
                whose = "nobody" if target is None else target.order.request_id
                over = "that has ended" if target is None or target.over else "that has lost it"
                text = f"block {block} is written by a load for {whose} {over}"
                self._around.violations.append(Violation(text))

    def _check_outcomes(self, step: Step, outcomes: Outcomes, asked: float) -> None:
        over = {item.transfer for item in outcomes.receipt.transfers}
        for target in self._targets.values():
            target.over |= target.order.transfer in over
        if len(self._targets) > 1000:
            self._targets = {k: t for k, t in self._targets.items() if not t.over}
        for order in step.plan.loads:
            if order.mode is LoadMode.LAYERWISE and order.transfer not in over:
                raise Violation(f"load {order.transfer} has no outcome at the end of its step")
        for transfer, began in list(self._parked.items()):
            if transfer in over:
                del self._parked[transfer]
            # One that was released early has its time anew.
            elif asked - began > 2 * self._options.deadline + self._around.slack:
                raise Violation(
                    f"load {transfer} is still under way {asked - began:.3f} s after its order"
                )

    def held(self, tier: TierName, slot: int, key: ChunkKey) -> Stamps | None:
        """The stamps of a chunk in a tier, without this rank's and its rows' own.

        Returns:
            Shape ``(rows, chunk_tokens)``; None if the tier does not deliver it.
        """
        rows = range(self._options.rows)
        if tier is TierName.HOST:
            extents = [self._host.extent(row, slot) for row in rows]
        else:
            assert self._disk is not None
            extents = []
            for row in rows:
                into = self._staging.numpy()[: self._geometry.extent_bytes[row]].reshape(1, -1)
                if not self._disk.read_row(row, [slot], [key], into).good.all():
                    return None
                extents.append(into[0].copy())
        stamps: Stamps = np.stack([extent.view(np.uint64) for extent in extents])
        stamps ^= self._salts[:, None]
        return stamps

    def damage_disk(self) -> None:
        """Flip a bit of what is on disk, behind the back of everybody."""
        random = self._around.sky.random
        for slab in self._around.store.rglob(f"rank-{self.number}.slab"):
            with slab.open("r+b") as file:
                # Extents are much shorter than the page that each of them starts at.
                pages = slab.stat().st_size // DIRECT_IO_ALIGNMENT
                extent = min(self._geometry.extent_bytes)
                position = random.randrange(pages) * DIRECT_IO_ALIGNMENT + random.randrange(extent)
                file.seek(position)
                byte = file.read(1)[0]
                file.seek(position)
                file.write(bytes([byte ^ 1 << random.randrange(8)]))
                file.flush()
                os.fsync(file.fileno())

    @property
    def is_idle(self) -> bool:
        """Whether no parked load is under way and control knows everything."""
        return not self._parked and self.mail.is_empty
