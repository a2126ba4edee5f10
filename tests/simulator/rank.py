"""One rank of the engine: a cache full of stamps, and a real executor on it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import cast

import numpy as np
import torch

from lamina_kv.bench.faulty_store import FaultyStore
from lamina_kv.data.executor import Executor, Outcomes, Tiers
from lamina_kv.data.far import FarTier
from lamina_kv.data.movers import make_mover
from lamina_kv.data.movers.base import Mover
from lamina_kv.data.movers.cuda import CudaMover
from lamina_kv.data.movers.fences import Fence
from lamina_kv.data.near import Indices, NearSlab
from lamina_kv.data.shared_memory import MemoryFile
from lamina_kv.geometry import DIRECT_IO_ALIGNMENT, OBJECT_HEADER_BYTES
from lamina_kv.plan import ChunkKey, LoadMode, LoadOrder, TierName, TransferId
from lamina_kv.tiers import KINDS
from lamina_kv.tiers.config import TierConfig
from lamina_kv.tiers.contract import Fate, Piece, Store, Tenant
from lamina_kv.tiers.objects import verify
from simulator.content import Ledger, Stamps, Violation
from simulator.device import SimulatedDevice
from simulator.faults import WRITE_TIME, Growth, Mail, RainyMover, Sky
from simulator.forward import Pages, Part
from simulator.options import Far, Options, Sort
from simulator.request import Blocks, Run
from simulator.step import Step
from simulator.stores import Bytes, RainyStore
from simulator.virtual import World
from stores import MemoryStore, Shelf

_NAMESPACE = "51" * 16

DEVICE_TIME = 30.0
"""Deadlines that the slowest device takes at most for what is in the windows of all loads. It
carries out what was launched, also of loads that are given up: past this they hang."""


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
        stalled: seconds for which jobs of pools of a kind have stalled so far.
        world: where threads and time are virtual; None where they are real.
        clock: the time.
        slack: seconds by which that may be wrong.
        store: directory of disks.
        shelves: what is in tiers in memory, by tier and rank.
        objects: what was written last of a chunk to any far tier, and by which rank.
        violations: what pool threads have found.
    """

    sky: Sky
    ledger: Ledger
    pump: Callable[[], None]
    stall: Callable[..., None]
    stalled: Callable[[str], float]
    world: World | None
    clock: Callable[[], float]
    slack: float
    store: Path
    shelves: dict[tuple[TierName, int], Shelf]
    objects: dict[ChunkKey, tuple[int, Bytes]] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)


class Rank:
    """See the module.

    Args:
        number: the rank.
        options: the engine.
        around: what it lives in.
        leader: the rank that keeps chunks for this one; None if it keeps its own.

    Attributes:
        leads: whether it keeps chunks itself.
    """

    def __init__(
        self, number: int, options: Options, around: Surroundings, leader: Rank | None = None
    ) -> None:
        self.number = number
        self.leads = leader is None
        self.mail = Mail(around.sky)
        self._options = options
        self._around = around
        self._salts = around.ledger.salts[number]
        self.pages = Pages(options.blocks, options.rows, self._salts, around.ledger)
        geometry = self._geometry = options.geometry()
        flat = torch.from_numpy(self.pages.memory.reshape(-1).view(np.uint8))
        self._device = self._make_device(flat) if options.device else None
        self._forwards: deque[Fence] = deque()
        self._misreads: list[Misread] = []
        if self._device is None:
            mover = make_mover(geometry, [flat])
        else:
            mover = CudaMover(geometry, [flat], self._device)
        self.files = leader.files if leader else (MemoryFile.create(),)
        capacity = options.host_slots * geometry.object_bytes
        self._slab = NearSlab(geometry, capacity, partial(mover.allocate_host, file=self.files[0]))
        if self._device is not None:  # a real thread pins it, and a seed is to be a history
            mover.await_near(self._slab, np.array([self._slab.page_count - 1]))
        self._scratch = mover.allocate_host(geometry.object_bytes).numpy()
        self._targets: dict[tuple[int, int], Target] = {}
        self._under_way: dict[TransferId, float] = {}
        growth = None
        if options.grows:
            growth = Growth(Random(around.sky.random.random()), around.violations)
        rainy = cast(Mover, RainyMover(mover, around.sky, self._check_write, around.stall, growth))
        config = options.config(around.store)
        self._stores: dict[TierName, RainyStore] = {}
        if leader is None:
            for tier, section in zip(options.tiers, config.tiers, strict=True):
                self._stores[TierName(tier.name)] = self._open(tier, section)
        far = tuple(
            FarTier(
                name,
                cast(Store, store),
                shard=number,
                length=geometry.chunk_bytes,
                timeout=options.deadline,
            )
            for name, store in self._stores.items()
        )
        self.executor = Executor(
            rank=number,
            tiers=Tiers(self._slab, far, leader is not None),
            mover=rainy,
            config=config.load,
        )

    def _make_device(self, memory: torch.Tensor) -> SimulatedDevice:
        world = self._around.world
        device = SimulatedDevice(
            [memory],
            self._around.sky.random,
            world,
            copy_engines=bool((self.number + self._options.rows) % 2),
        )
        device.check_load = self._check_arrival
        if world is not None:
            world.devices.append(device)
        return device

    def _open(self, tier: Far, section: TierConfig) -> RainyStore:
        around, name = self._around, TierName(tier.name)
        if tier.sort is Sort.DISK or tier.entry is not None:
            size = self._geometry.object_bytes
            tenant = Tenant(_NAMESPACE, {}, self.number, None, size, self.number)
            store: Store = KINDS[section.kind].open(section, tenant)
            if tier.entry is not None:
                store = FaultyStore(store)
        else:
            slotted = tier.sort is Sort.SLOTS
            store = MemoryStore(
                around.shelves.setdefault((name, self.number), Shelf()),
                slots=tier.room if slotted else 0,
                room=tier.room,
                readers=tier.readers,
                batch=tier.batch,
            )
        return RainyStore(
            store,
            name,
            around.sky,
            self.number,
            self._geometry.chunk_bytes,
            around.objects,
            around.stall,
            around.violations,
        )

    def run(self, step: Step, parts: Sequence[Part]) -> tuple[Outcomes, list[Misread]]:
        """One step, as a worker of vLLM goes through it."""
        executor, around = self.executor, self._around
        began, stalled = around.clock(), around.stalled("load")
        self._note_loads(step, began)
        executor.begin_step(step.plan)
        around.pump()
        self._prepare(step)
        if step.loads_now:
            executor.start_loads()
        waited = self._forward(parts) if parts else 0.0
        if not step.loads_now:
            executor.start_loads()
        around.pump()
        asked = around.clock()
        if parts and around.sky.random.random() < 0.1:  # draft models run after the question
            outcomes = executor.collect()
            executor.end_step()
        else:
            executor.end_step()
            ended = around.clock()
            outcomes = executor.collect()
            if around.clock() - ended > around.slack:
                raise Violation("the engine's thread waited for loads that nobody waits for")
        self._check_outcomes(step, outcomes, asked, waited)
        self._read_tokens()
        # Nothing that a far tier does makes a forward wait.
        longest = around.stalled("load") - stalled
        if waited > longest + around.slack:
            raise Violation(f"the forward waited {waited:.3f} s, it may wait {longest:.3f} s")
        misreads, self._misreads = self._misreads, []
        return outcomes, misreads

    def _prepare(self, step: Step) -> None:
        """Engines write to blocks of a step before its forward: they zero and copy them."""
        orders = [order for order in step.plan.loads if order.mode is LoadMode.LAYERWISE]
        blocks = [block for order in orders for pages in order.pages for block in pages.blocks]
        if blocks:
            self._submit(lambda: self.pages.scribble(blocks))

    def _submit(self, work: Callable[[], None]) -> None:
        """Have the engine's stream do something, on a CPU at once."""
        if self._device is None:
            work()
        else:
            self._device.launch(work)

    def _read_tokens(self) -> None:
        """What a forward has sampled is known to the host once it has run. An engine that plans a
        step ahead looks at the forward before."""
        if self._device is not None:
            self._forwards.append(self._device.record(self._device.current_stream()))
            while len(self._forwards) > self._options.asynchronous:
                self._forwards.popleft().wait()

    def _forward(self, parts: Sequence[Part]) -> float:
        executor, clock = self.executor, self._around.clock
        if not executor.moves_rows:
            self._compute(parts, slice(None))
            return 0.0
        waited = 0.0
        for row in range(self._options.rows):
            layer = f"layer.{row}"
            began = clock()
            executor.wait_layer(layer)
            waited += clock() - began
            self._compute(parts, slice(row, row + 1))
            if self._around.sky.random.random() < 0.95:  # a layer that has no hook, else
                executor.layer_written(layer)
            self._around.pump()
        return waited

    def _compute(self, parts: Sequence[Part], rows: slice) -> None:
        self._submit(partial(self._compute_now, parts, rows))

    def _compute_now(self, parts: Sequence[Part], rows: slice) -> None:
        if not self._options.ring_blocks:
            self._write(parts, rows)
        for part in parts:
            if (found := self.pages.misread(part, rows)) is not None:
                part.spoiled = True
                if part.trusted:
                    text = f"rank {self.number}: {found[1]}"
                    self._misreads.append(Misread(part.item.run, found[0], text))
        if self._options.ring_blocks:  # what is written takes the place of what was read
            self._write(parts, rows)

    def _write(self, parts: Sequence[Part], rows: slice) -> None:
        for part in parts:
            self.pages.write(part, rows)

    # -- what must hold ------------------------------------------------------------------------

    def _note_loads(self, step: Step, began: float) -> None:
        for order in step.plan.loads:
            target = Target(order, step.loads[order.transfer])
            for pages in order.pages:
                for block, page in zip(pages.blocks.tolist(), pages.near.tolist(), strict=True):
                    self._targets[block, page] = target
            if order.mode is LoadMode.PARKED:
                self._under_way[order.transfer] = began

    def _check_write(self, near: Indices, pages: Indices) -> bool:
        """A load is about to write: the blocks must still be its request's. Returns whether all of
        it is for loads between steps."""
        parked = True
        for block, page in zip(pages.tolist(), near.tolist(), strict=True):
            target = self._targets.get((block, page))
            held = target is not None and target.blocks.may_be_written(block)
            if target is None or target.over or not held:
                whose = "nobody" if target is None else target.order.request_id
                over = "that has ended" if target is None or target.over else "that has lost it"
                text = f"block {block} is written by a load for {whose} {over}"
                self._around.violations.append(Violation(text))
            parked &= target is not None and target.order.mode is LoadMode.PARKED
        return parked

    def _check_arrival(self, near: Indices, pages: Indices) -> None:
        """The device writes what was launched. The blocks of a load in a step may be somebody
        else's by now, whose work comes behind it."""
        for block, page in zip(pages.tolist(), near.tolist(), strict=True):
            target = self._targets.get((block, page))
            if target is None or target.over:
                text = f"block {block} is written by a load that was reported as over"
            elif target.order.mode is LoadMode.PARKED and not target.blocks.may_be_written(block):
                text = f"block {block} is written late for {target.order.request_id}, has lost it"
            else:
                continue
            self._around.violations.append(Violation(text))

    def _check_outcomes(self, step: Step, outcomes: Outcomes, asked: float, waited: float) -> None:
        over = {item.transfer for item in outcomes.receipt.transfers}
        for target in self._targets.values():
            target.over |= target.order.transfer in over
        if len(self._targets) > 1000:
            self._targets = {k: t for k, t in self._targets.items() if not t.over}
        for order in step.plan.loads:
            if order.mode is LoadMode.LAYERWISE and order.transfer not in over:
                if self._device is None:
                    raise Violation(f"load {order.transfer} has no outcome at the end of its step")
                self._under_way[order.transfer] = asked  # copies that are launched, and no more
        for transfer, began in list(self._under_way.items()):
            if transfer in over:
                del self._under_way[transfer]
            elif asked - began > self._longest_load() + waited:  # it is given up between steps
                raise Violation(
                    f"load {transfer} is still under way {asked - began:.3f} s after its order"
                )

    def _longest_load(self) -> float:
        """Seconds after which a load is over, whatever happens. A device carries out what was
        launched."""
        launched = DEVICE_TIME if self._device is not None else WRITE_TIME
        return self._options.deadline * (1 + launched) + self._around.slack

    def near(self, slot: int) -> Stamps:
        """The stamps of a chunk in a near slot, without this rank's and its rows' own. Shape
        ``(rows, chunk_tokens)``."""
        return self._stamps(self._slab.object(slot))

    def far(self, tier: TierName, place: int, key: ChunkKey) -> Stamps | None:
        """:meth:`near` of a chunk in a far tier; None if that does not deliver it whole."""
        store, length = self._stores[tier].inner, self._geometry.chunk_bytes
        (fate,) = store.read([Piece(key, place, self._scratch)], 60.0)
        whole = fate is Fate.DONE and verify(self._scratch, key, self.number, length)
        return self._stamps(self._scratch) if whole else None

    def _stamps(self, content: Bytes) -> Stamps:
        end = OBJECT_HEADER_BYTES + self._geometry.chunk_bytes
        stamps: Stamps = content[OBJECT_HEADER_BYTES:end].copy().view(np.uint64)
        return stamps.reshape(self._options.rows, -1) ^ self._salts[:, None]

    def damage(self, tier: Far) -> list[ChunkKey]:
        """Flip a bit of what is in a far tier, behind the back of everybody. Returns the chunk that
        it belongs to, if that is known."""
        random = self._around.sky.random
        if tier.sort is Sort.DISK:
            self._damage_disk()
            return []
        shelf = self._around.shelves.get((TierName(tier.name), self.number))
        if shelf is None or not shelf.held:
            return []
        place = random.choice(list(shelf.held))
        key, content = shelf.held[place]
        spoiled = bytearray(content)
        position = random.randrange(OBJECT_HEADER_BYTES + self._geometry.chunk_bytes)
        spoiled[position] ^= 1 << random.randrange(8)
        shelf.held[place] = key, bytes(spoiled)
        return [key]

    def _damage_disk(self) -> None:
        random = self._around.sky.random
        for slab in self._around.store.rglob(f"rank-{self.number}.slab"):
            with slab.open("r+b") as file:
                objects = slab.stat().st_size // DIRECT_IO_ALIGNMENT
                whole = OBJECT_HEADER_BYTES + self._geometry.chunk_bytes
                position = random.randrange(objects) * DIRECT_IO_ALIGNMENT + random.randrange(whole)
                file.seek(position)
                byte = file.read(1)[0]
                file.seek(position)
                file.write(bytes([byte ^ 1 << random.randrange(8)]))
                file.flush()
                os.fsync(file.fileno())

    def vanish(self) -> None:
        """Others remove some of what is in stores where they can."""
        random = self._around.sky.random
        for store in self._stores.values():
            share = random.random()
            store.vanish(lambda _, share=share: random.random() < share)

    @property
    def is_idle(self) -> bool:
        """Whether no parked load is under way and control knows everything."""
        return not self._under_way and self.mail.is_empty
