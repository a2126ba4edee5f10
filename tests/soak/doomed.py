"""A server that may be killed at any moment: the simulated engine on a disk tier, which tells
whoever watches what it is about to change and what it takes to be durable.

Everything is told before it is done, so what was heard is never less than what has happened.
"""

from __future__ import annotations

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

from lamina.data.tiers.disk import StoreError
from lamina.data.tiers.disk_index import DiskIndex
from lamina.data.tiers.disk_slab import Slab
from lamina.plan import ChunkKey, StepPlan, TierName
from simulator.content import Violation
from simulator.engine import Simulator
from simulator.faults import Weather
from simulator.history import Prompts
from simulator.options import Options
from soak.memory import Found, Memory

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
        store: the directory of its disk tier.
        memory: what must be there.
        teller: whom to tell.
        warnings: what Lamina has warned of.
    """

    def __init__(
        self, fate: Fate, store: Path, memory: Memory, teller: Teller, warnings: Warnings
    ) -> None:
        super().__init__(fate.seed, fate.options, store, virtual=fate.virtual)
        self._memory = memory
        self._teller = teller
        self._warnings = warnings

    def __enter__(self) -> Self:
        """Open the store and look whether everything is there."""
        super().__enter__()
        disk = self._planner._catalog.disk
        assert disk is not None
        found = [
            Found(
                rank.number, chunk.slot, chunk.key, rank.held(TierName.DISK, chunk.slot, chunk.key)
            )
            for rank in self._ranks
            for chunk in rank.executor.report().stored
        ]
        visible = dict(disk._visible)
        self._memory.check(found, visible)
        self._watch.check_tiers()
        if disk.used != len(visible):
            raise Violation(f"{disk.used} slots are in use for {len(visible)} chunks")
        unread = [chunk for chunk in found if chunk.stamps is None]
        slots = {chunk.slot for chunk in unread}
        self._teller.say("opened", slots, visible, self._warnings.lines)
        self._watch.disk_is_damaged = bool(unread)
        self._watch._chunks |= self._memory.content
        for chunk in unread:  # a damaged index may name a chunk that there never was
            self._watch._chunks.setdefault(chunk.key, _NOTHING)
        self._watch.planned = partial(self._tell_plan, self._watch.planned)
        disk.publish = partial(self._tell_durable, disk.publish)
        return self

    def _tell_plan(self, planned: Callable[[StepPlan], None], plan: StepPlan) -> None:
        planned(plan)
        if plan.writes or plan.drop_disk:
            chunks = self._watch._chunks
            writes = [(order.key, order.disk_slot, chunks[order.key]) for order in plan.writes]
            self._teller.say("ordered", writes, plan.drop_disk)

    def _tell_durable(self, publish: Callable[..., None], key: ChunkKey, **known: bool) -> None:
        publish(key, **known)
        self._teller.say("reported", key)


_NOTHING = np.zeros(1, np.uint64)


def serve(pipe: Connection, fate: Fate, store: Path, memory: Memory) -> None:
    """Be a server until the end: that of the work, or an earlier one."""
    log = logging.getLogger("lamina")
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
    write, sync = Slab.write, Slab.sync

    def tell_write(slab: Slab, row: int, slots: Any, extents: Any) -> None:
        size = slab._strides[row]
        starts = [slab._bases[row] + slot * size for slot in slots.tolist()]
        file = os.readlink(f"/proc/self/fd/{slab._file}")
        teller.say("writing", file, [(start, start + size) for start in starts])
        half = len(slots) // 2
        if half:
            write(slab, row, slots[:half], extents[:half])
            teller.point()
        write(slab, row, slots[half:], extents[half:])
        teller.point()

    def tell_sync(slab: Slab) -> None:
        teller.point()
        sync(slab)
        teller.say("synced", os.readlink(f"/proc/self/fd/{slab._file}"))
        teller.point()

    def between(change: Callable[..., None]) -> Callable[..., None]:
        def with_points(*arguments: object) -> None:
            teller.point()
            change(*arguments)
            teller.point()

        return with_points

    with ExitStack() as stack:
        for target, name, replacement in (
            (Slab, "write", tell_write),
            (Slab, "sync", tell_sync),
            (DiskIndex, "forget", between(DiskIndex.forget)),
            (DiskIndex, "record", between(DiskIndex.record)),
        ):
            stack.enter_context(patch.object(target, name, replacement))
        yield
