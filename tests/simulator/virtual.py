"""Virtual threads and virtual time: a seed decides which job runs when.

Lamina's data side has its threads, events and clock from three modules. Inside :meth:`World.entered`
they are replaced: a job runs when somebody waits or when the simulator says so, whole and on the
thread that waits; time passes when nothing is left to run before a timeout. A job can be as slow
as the weather wants, up to never, and is then late, not absent: it still runs when it comes back.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from heapq import heappop, heappush
from random import Random
from types import SimpleNamespace
from unittest.mock import patch

from lamina.data.worker_pool import Job, WorkerPool

_PATCHED = {
    "lamina.data.executor.WorkerPool": "pool",
    "lamina.data.write_through.WorkerPool": "pool",
    "lamina.data.executor.threading": "threading",
    "lamina.data.load_pipeline.threading": "threading",
    "lamina.data.load_pipeline.time": "time",
    "lamina.data.save_pipeline.time": "time",
    "lamina.data.write_through.time": "time",
}


class World:
    """Every virtual thread there is, and the clock.

    Args:
        random: decides the order of jobs.
        delay: how long a job of the pool of that name is under way before it runs, in seconds;
            infinity until :meth:`hurry`.

    Attributes:
        now: the time, in seconds.
        failures: what jobs raised, oldest first.
    """

    def __init__(self, random: Random, delay: Callable[[str], float]) -> None:
        self.now = 1000.0
        self.random = random
        self.failures: list[Exception] = []
        self._delay = delay
        self._pools: list[VirtualPool] = []

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Lamina's data side lives in this world while the context is open."""
        parts = {
            "pool": self._make_pool,
            "threading": SimpleNamespace(
                Event=lambda: VirtualEvent(self),
                Lock=threading.Lock,
                Condition=threading.Condition,
            ),
            "time": SimpleNamespace(perf_counter=self.read, monotonic=self.read),
        }
        with ExitStack() as stack:
            for target, part in _PATCHED.items():
                stack.enter_context(patch(target, parts[part]))
            yield

    def read(self) -> float:
        """The clock."""
        return self.now

    def pump(self, most: int) -> None:
        """Run up to ``most`` jobs that are due."""
        for _ in range(self.random.randint(0, most)):
            if not self._run_one():
                return

    def settle(self) -> None:
        """Run every job that is due."""
        while self._run_one():
            pass

    def hurry(self) -> None:
        """Make every job due that is under way, however slow it was going to be."""
        for pool in self._pools:
            pool.busy = [(self.now, job) for _, job in pool.busy]

    def wait(self, done: Callable[[], bool], timeout: float) -> bool:
        """Run jobs until ``done``, or until ``timeout`` seconds have passed."""
        end = self.now + timeout
        while not done():
            if self._run_one():
                continue
            soonest = min((due for pool in self._pools for due, _ in pool.busy), default=math.inf)
            self.now = min(max(soonest, self.now), end)
            if soonest > end:
                return done()
        return True

    def _make_pool(
        self, name: str, threads: int, cores: frozenset[int] | None = None
    ) -> VirtualPool:
        pool = VirtualPool(self, name, threads)
        self._pools.append(pool)
        return pool

    def _run_one(self) -> bool:
        due = []
        for pool in self._pools:
            pool.take(self._delay)
            due += [(pool, entry) for entry in pool.busy if entry[0] <= self.now]
        if not due:
            return False
        pool, entry = due[self.random.randrange(len(due))] if len(due) > 1 else due[0]
        pool.busy.remove(entry)
        try:
            entry[1]()
        except Exception as error:
            self.failures.append(error)
        return True


class VirtualPool(WorkerPool):
    """A :class:`~lamina.data.worker_pool.WorkerPool` whose threads are entries in a list.

    Attributes:
        busy: for each thread that has a job: when the job runs, and the job.
    """

    def __init__(self, world: World, name: str, threads: int) -> None:
        self._world = world
        self._name = name
        self._size = threads
        self._count = 0
        self._waiting: list[tuple[tuple[float, int], int, Job]] = []
        self.busy: list[tuple[float, Job]] = []

    def submit(self, priority: tuple[float, int], job: Job) -> None:
        """See :class:`~lamina.data.worker_pool.WorkerPool`."""
        self._count += 1
        heappush(self._waiting, (priority, self._count, job))

    def depth(self) -> int:
        """See :class:`~lamina.data.worker_pool.WorkerPool`."""
        return len(self._waiting)

    def close(self, timeout: float) -> bool:
        """See :class:`~lamina.data.worker_pool.WorkerPool`."""
        return self._world.wait(lambda: not self._waiting and not self.busy, timeout)

    def take(self, delay: Callable[[str], float]) -> None:
        """Give every idle thread its next job."""
        while self._waiting and len(self.busy) < self._size:
            job = heappop(self._waiting)[2]
            self.busy.append((self._world.now + delay(self._name), job))


class VirtualEvent:
    """A :class:`threading.Event` that runs jobs while it is waited for.

    Args:
        world: whose jobs.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._set = False

    def is_set(self) -> bool:
        """See :class:`threading.Event`."""
        return self._set

    def set(self) -> None:
        """See :class:`threading.Event`."""
        self._set = True

    def clear(self) -> None:
        """See :class:`threading.Event`."""
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        """See :class:`threading.Event`."""
        return self._world.wait(self.is_set, math.inf if timeout is None else timeout)
