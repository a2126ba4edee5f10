"""A server that may be killed at any moment: the simulated engine on a disk tier, which tells
whoever watches what it is about to change and what it takes to be durable.

Everything is told before it is done, so what was heard is never less than what has happened.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, Self
from unittest.mock import patch

import numpy as np

from lamina_kv.plan import ChunkKey, StepPlan, TierName
from lamina_kv.tiers.contract import StoreError
from lamina_kv.tiers.disk.aio import Operation
from lamina_kv.tiers.disk.data import Slab
from lamina_kv.tiers.slots import SlotIndex
from simulator.content import Violation
from simulator.engine import Simulator
from simulator.faults import Weather
from simulator.history import Prompts
from simulator.options import Options
from simulator.rank import Rank
from simulator.stores import Past
from simulator.watch import Watch
from soak.damage import SECTOR, Write
from soak.memory import Found, Memory

DISK = TierName("disk")

STEPS = 400
"""After which a server that nobody has killed ends in order."""
BUSY = 8


@dataclass(frozen=True)
class Fate:
    """How one server lives.

    Attributes:
        seed: decides what its clients want.
        options: the engine.
        documents: seeds of prompts; a server that has one in common with another finds its chunks.
        weather: what goes wrong.
        virtual: whether threads and time are virtual; the server kills itself then.
        points: changes of the store, or parts of them, that it lives to see, if it is virtual.
    """

    seed: int
    options: Options
    documents: tuple[int, ...]
    weather: Weather
    virtual: bool
    points: int


class Teller:
    """Speaks to whoever watches, from any thread.

    Args:
        pipe: to them.
        points: after so many calls of :meth:`point` the process kills itself; 0 never does.
    """

    def __init__(self, pipe: Connection, points: int) -> None:
        self._pipe = pipe
        self._points = points
        self._one_at_a_time = threading.Lock()

    def say(self, *what: object) -> None:
        """The other end has it when this returns, even if the process ends then."""
        with self._one_at_a_time:
            self._pipe.send(what)

    def point(self) -> None:
        """A moment at which an end may be worse than at others."""
        self._points -= 1
        if self._points == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Warnings(logging.Handler):
    """Keeps what was warned of.

    Attributes:
        lines: the texts.
    """

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """See :class:`logging.Handler`."""
        self.lines.append(record.getMessage())


class Doomed(Simulator):
    """See the module.

    Args:
        fate: how it lives.
        store: the directory of its disk tier, the only far one.
        memory: what must be there.
        teller: whom to tell.
        warnings: what Lamina has warned of.
    """

    def __init__(
        self, fate: Fate, store: Path, memory: Memory, teller: Teller, warnings: Warnings
    ) -> None:
        # Whether its chunks can be read is looked at here, and not by the watch.
        past = Past(chunks=dict(memory.content), damaged={DISK})
        super().__init__(fate.seed, fate.options, store, past=past, virtual=fate.virtual)
        self._memory = memory
        self._teller = teller
        self._warnings = warnings

    def __enter__(self) -> Self:
        """Open the store and look whether everything is there."""
        with patch.object(Watch, "_check_contents"):
            super().__enter__()
        disk = self._planner._books.catalog.far[DISK].index
        assert isinstance(disk, SlotIndex)
        found = [
            Found(rank.number, slot, key, rank.far(DISK, slot, key))
            for rank in self._ranks
            if rank.leads
            for slot, key in _stored(rank)
        ]
        visible = dict(disk.visible)
        self._memory.check(found, visible)
        self._watch.check_tiers()
        if disk.used != len(visible):
            raise Violation(f"{disk.used} slots are in use for {len(visible)} chunks")
        unread = [chunk for chunk in found if chunk.stamps is None]
        slots = {chunk.slot for chunk in unread}
        self._teller.say("opened", slots, visible, self._warnings.lines)
        if not unread:
            self._watch.damaged.discard(DISK)
        for chunk in unread:  # nobody has said what is in it
            self._watch._chunks.setdefault(chunk.key, _NOTHING)
        self._watch.planned = partial(  # type: ignore[method-assign]
            self._tell_plan, self._watch.planned
        )
        disk.filled = partial(self._tell_durable, disk.filled)  # type: ignore[method-assign]
        return self

    def _tell_plan(self, planned: Callable[[StepPlan], None], plan: StepPlan) -> None:
        planned(plan)
        for orders in plan.tiers:
            if orders.tier == DISK and (orders.outward or orders.drops):
                chunks = self._watch._chunks
                writes = [(move.key, move.far, chunks[move.key]) for move in orders.outward]
                self._teller.say("ordered", writes, orders.drops)

    def _tell_durable(self, filled: Callable[..., None], key: ChunkKey, **known: bool) -> None:
        filled(key, **known)
        self._teller.say("reported", key)


def _stored(rank: Rank) -> Iterator[tuple[int, ChunkKey]]:
    """Slots of a rank's part of the store, and the keys that it says are there."""
    stored = rank._stores[DISK].inner.stored(keys=True)
    assert stored is not None
    assert stored.keys is not None
    for slot, key in zip(stored.slots.tolist(), stored.keys, strict=True):
        yield slot, ChunkKey(key.tobytes())


_NOTHING = np.zeros(1, np.uint64)


def serve(pipe: Connection, fate: Fate, store: Path, memory: Memory) -> None:
    """Be a server until the end: that of the work, or an earlier one."""
    log = logging.getLogger("lamina_kv")
    log.handlers = [warnings := Warnings(logging.WARNING)]
    log.propagate = False
    teller = Teller(pipe, fate.points)
    try:
        with watched(teller), Doomed(fate, store, memory, teller, warnings) as simulator:
            live(simulator, fate)
        teller.say("ended")
    except StoreError as error:
        teller.say("refused", str(error))
    except Exception:
        teller.say("failed", traceback.format_exc())


def live(simulator: Simulator, fate: Fate) -> None:
    """Many requests that compute a lot, some that hang up, a cache that forgets."""
    random = Random(fate.seed)
    longest = fate.options.longest
    prompts = [Prompts(Random(seed), longest) for seed in fate.documents]
    simulator.weather = fate.weather
    for _ in range(STEPS):
        dice = random.random()
        active = simulator.active
        if dice < 0.6 and len(active) < BUSY:
            simulator.submit(*random.choice(prompts).draw())
        elif dice < 0.63 and active:
            simulator.abort(random.choice(active))
        elif dice < 0.65:
            simulator.preempt()
        elif dice < 0.70:
            simulator.forget_prefixes()
        elif dice < 0.703 and fate.weather != Weather():
            simulator.reset()
        simulator.step()
    simulator.drain()


@contextmanager
def watched(teller: Teller) -> Iterator[None]:
    """Every change of a store is told, or at least a good moment to die."""
    move, sync = Slab.move, Slab.sync

    def tell_move(slab: Slab, operation: Operation, offsets: Any, addresses: Any, size: int) -> Any:
        if operation is not Operation.WRITE:
            return move(slab, operation, offsets, addresses, size)
        teller.point()
        teller.say("writing", slab_file(slab), list(writes(slab, offsets, addresses, size)))
        half = len(offsets) // 2
        errors = []
        for part in (slice(half), slice(half, None)):
            errors.append(move(slab, operation, offsets[part], addresses[part], size))
            teller.point()
        return np.concatenate(errors)

    def tell_sync(slab: Slab) -> None:
        teller.point()
        sync(slab)
        teller.say("synced", slab_file(slab))
        teller.point()

    with ExitStack() as stack:
        stack.enter_context(patch.object(Slab, "move", tell_move))
        stack.enter_context(patch.object(Slab, "sync", tell_sync))
        # Else last uses would be written at the end only.
        stack.enter_context(patch("lamina_kv.tiers.disk.heads.RECENCY_SECONDS", 0.0))
        yield


def slab_file(slab: Slab) -> str:
    """Where a slab is now."""
    return os.readlink(f"/proc/self/fd/{slab._file}")


def writes(slab: Slab, offsets: Any, addresses: Any, size: int) -> Iterator[Write]:
    """What is about to be written, of tables only the sectors that change."""
    objects = set(slab.layout.objects(np.arange(slab.layout.slots)).tolist())
    with Path(slab_file(slab)).open("rb") as file:
        for offset, address in zip(offsets.tolist(), addresses.tolist(), strict=True):
            if offset in objects:
                yield Write(offset, size)
                continue
            after = ctypes.string_at(address, size)
            file.seek(offset)
            before = file.read(size).ljust(size, b"\0")
            for at in range(0, size, SECTOR):
                sector = before[at : at + SECTOR]
                if sector != after[at : at + SECTOR]:
                    yield Write(offset + at, SECTOR, sector)
