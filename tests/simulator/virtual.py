"""Virtual threads and virtual time: a seed decides which job runs when.

Lamina's data side has its threads, locks and clock from a few modules. Inside
:meth:`World.entered` they are replaced: a job runs when somebody waits or when the simulator says
so, and time passes when nothing is left to run before a timeout. A job may also stall half-way
(:meth:`World.stall`), for as long as the weather wants, and goes on behind the back of those who
have given it up. Only one thread runs at any moment, and which one is no accident.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from heapq import heappop, heappush
from random import Random
from types import SimpleNamespace, TracebackType
from unittest.mock import patch

from lamina_kv.data.threads import Threads
from lamina_kv.data.worker_pool import Job, Lost, WorkerPool
from simulator.content import Violation
from simulator.device import SimulatedDevice

_PATCHED = {
    "lamina_kv.data.executor.WorkerPool": "pool",
    "lamina_kv.data.moving.WorkerPool": "pool",
    "lamina_kv.data.executor.threading": "threading",
    "lamina_kv.data.load_pipeline.threading": "threading",
    "lamina_kv.data.executor.time": "time",
    "lamina_kv.data.load_pipeline.time": "time",
    "lamina_kv.data.loads.time": "time",
    "lamina_kv.data.moving.time": "time",
    "lamina_kv.data.movers.device_fence.WorkerPool": "pool",
    "lamina_kv.data.movers.device_fence.time": "time",
    "lamina_kv.data.row_fences.time": "time",
    "lamina_kv.data.save_pipeline.time": "time",
}


STALLING = ("load", "read", "write")
"""Pools of these names have jobs that call :meth:`World.stall`; others stall before they begin."""

ON_DEVICE = ("load", "land", "save", "clock")
"""Pools of these names have jobs that wait for a device, if there is one."""


class World:
    """Every virtual thread there is, and the clock.

    Args:
        random: decides the order of jobs.
        delay: for the name of a pool, for how long its next job stalls, in seconds; infinity
            until :meth:`hurry`.

    Attributes:
        now: the time, in seconds.
        failures: what jobs raised, oldest first.
        devices: devices, which run in the same time.
    """

    def __init__(self, random: Random, delay: Callable[[str], float]) -> None:
        self.now = 1000.0
        self.random = random
        self.failures: list[Exception] = []
        self.devices: list[SimulatedDevice] = []
        self._delay = delay
        self._pools: list[VirtualPool] = []
        self._running: VirtualThread | None = None
        self._stalled = Counter[str]()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Lamina's data side lives in this world while the context is open."""
        parts = {
            "pool": self._make_pool,
            "threading": SimpleNamespace(
                Event=lambda: VirtualEvent(self),
                Condition=lambda: VirtualCondition(self),
                Lock=threading.Lock,
            ),
            "time": SimpleNamespace(
                perf_counter=self.read, monotonic=self.read, thread_time=lambda: 0.0
            ),
        }
        with ExitStack() as stack:
            for target, part in _PATCHED.items():
                stack.enter_context(patch(target, parts[part]))
            # What a killed engine has left to the end of its process ends with the world.
            stack.enter_context(patch("lamina_kv.data.movers.host_memory._kept", []))
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
        """Make everything due that stalls."""
        for pool in self._pools:
            for thread in pool.threads:
                thread.due = min(thread.due, self.now)

    def kill(self) -> None:
        """Nothing that is under way goes on."""
        for pool in self._pools:
            for thread in pool.threads:
                if thread.strand is not None:
                    thread.strand.kill()
        for pool in self._pools:
            pool.threads.clear()
            pool.waiting.clear()
        for device in self.devices:
            device.kill()

    def wait(self, done: Callable[[], bool], timeout: float) -> bool:
        """Run jobs until ``done``, or until ``timeout`` seconds have passed.

        Raises:
            Violation: if that would be never.
        """
        end = self.now + timeout
        while not done():
            if self._run_one():
                continue
            soonest = self._soonest()
            if done():  # an event that was due at once has passed
                return True
            if min(soonest, end) == math.inf:
                raise Violation("somebody waits, without a deadline, for what never comes")
            self.now = max(self.now, min(soonest, end))
            if soonest > end:
                return done()
        return True

    def wait_for(self, done: Callable[[], bool], seconds: float = math.inf) -> bool:
        """Wait for a device: a job stalls, and others go on meanwhile.

        Args:
            done: whether the device is there.
            seconds: how long the caller waits; no job does so with an end.

        Returns:
            Whether it is.

        Raises:
            Violation: if that would be for ever.
        """
        thread = self._running
        if thread is None or thread.strand is None:
            return self.wait(done, seconds)
        while not done():
            thread.until = done
            thread.strand.stall()
        thread.until = None
        return True

    def stall(self, seconds: float | None = None) -> None:
        """Called inside a job, where it may take its time: others go on.

        Args:
            seconds: for how long; None for as long as the weather wants. Nothing happens to a job
                for which the weather wants nothing.
        """
        thread = self._running
        if thread is not None and thread.strand is not None and thread.stalls_for:
            seconds = thread.stalls_for if seconds is None else seconds
            thread.due = self.now + seconds
            self._stalled[_kind(thread.pool)] += seconds
            thread.strand.stall()

    def stalled(self, kind: str) -> float:
        """Seconds for which jobs of pools of a kind have stalled so far, of those that are under
        way up to now."""
        left = (
            max(0.0, thread.due - self.now)
            for pool in self._pools
            for thread in pool.threads
            if _kind(thread.pool) == kind
        )
        return self._stalled[kind] - sum(left)

    def _go_on(self, thread: VirtualThread) -> bool:
        """Run a thread's job until it is over or stalls; says whether it is over."""
        waits = bool(self.devices) and thread.pool.startswith(ON_DEVICE)
        if not (thread.stalls_for or waits):
            thread.job()
            return True
        if thread.strand is None:
            thread.strand = Strand(thread.job)
        before, self._running = self._running, thread
        try:
            return thread.strand.go_on()
        finally:
            self._running = before

    def _make_pool(self, name: str, count: int, threads: Threads | None = None) -> VirtualPool:
        pool = VirtualPool(self, name, count)
        self._pools.append(pool)
        return pool

    def _soonest(self) -> float:
        """When a thread or a device can go on; infinity if none can by itself."""
        threads = (t for pool in self._pools for t in pool.threads if t.until is None)
        soonest = min((thread.due for thread in threads), default=math.inf)
        return min(soonest, *(device.soonest(self.now) for device in self.devices), math.inf)

    def _run_one(self) -> bool:
        due: list[tuple[VirtualPool, VirtualThread]] = []
        for pool in self._pools:
            pool.take(self._delay)
            due += [(pool, thread) for thread in pool.threads if thread.is_due(self.now)]
        devices = [device for device in self.devices if device.soonest(self.now) <= self.now]
        if devices and self.random.randrange(len(due) + len(devices)) >= len(due):
            return self.random.choice(devices).run_one(self.now)
        if not due:
            return False
        pool, thread = due[self.random.randrange(len(due))] if len(due) > 1 else due[0]
        pool.threads.remove(thread)
        try:
            if not self._go_on(thread):
                pool.threads.append(thread)
        except Exception as error:
            self.failures.append(error)
            thread.lost(error)
        return True


def _kind(pool: str) -> str:
    return pool.partition("-")[0]


class VirtualThread:
    """A thread of a pool with a job.

    Args:
        pool: the name of its pool.
        job: the job.
        lost: to be told if it raises.
        stalls_for: seconds that it stalls half-way.
        due: when it can go on.

    Attributes:
        strand: the real thread that it needs to stall.
        until: what it waits for besides; None if nothing.
    """

    __slots__ = ("due", "job", "lost", "pool", "stalls_for", "strand", "until")

    def __init__(self, pool: str, job: Job, lost: Lost, stalls_for: float, due: float) -> None:
        self.pool = pool
        self.job = job
        self.lost = lost
        self.stalls_for = stalls_for
        self.due = due
        self.strand: Strand | None = None
        self.until: Callable[[], bool] | None = None

    def is_due(self, now: float) -> bool:
        """Whether it can go on."""
        return self.due <= now and (self.until is None or self.until())


class KilledError(BaseException):
    """Raised in a job that goes on no more."""


class Strand:
    """A job on a real thread, of which and the caller exactly one runs.

    Args:
        job: the job.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._over = self._killed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self) -> bool:
        """Run the job until it stalls or is over; says whether it is over."""
        self._mine.release()
        self._theirs.acquire()
        if self._over:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._over

    def stall(self) -> None:
        """Called inside the job: let the caller go on until it calls :meth:`go_on` again."""
        self._theirs.release()
        self._mine.acquire()
        if self._killed:
            raise KilledError

    def kill(self) -> None:
        """End the job where it stalls."""
        self._killed = True
        with suppress(KilledError):
            while not self.go_on():
                pass

    def _run(self) -> None:
        self._mine.acquire()
        try:
            self._job()
        except (Exception, KilledError) as error:
            self._error = error
        self._over = True
        self._theirs.release()


class VirtualPool(WorkerPool):
    """A :class:`~lamina_kv.data.worker_pool.WorkerPool` in a world.

    Args:
        world: the world.
        name: as there.
        size: how many threads.

    Attributes:
        threads: those that have a job.
        waiting: jobs that no thread has.
    """

    def __init__(self, world: World, name: str, size: int) -> None:
        self._world = world
        self._name = name
        self._size = size
        self._count = 0
        self.waiting: list[tuple[tuple[float, int], int, Job, Lost]] = []
        self.threads: list[VirtualThread] = []

    def submit(self, priority: tuple[float, int], job: Job, lost: Lost) -> None:
        """See :class:`~lamina_kv.data.worker_pool.WorkerPool`."""
        self._count += 1
        heappush(self.waiting, (priority, self._count, job, lost))

    def depth(self) -> int:
        """See :class:`~lamina_kv.data.worker_pool.WorkerPool`."""
        return len(self.waiting)

    def await_idle(self, timeout: float) -> bool:
        """See :class:`~lamina_kv.data.worker_pool.WorkerPool`. Who is polite does not wait here."""
        return not self.waiting and not self.threads

    def close(self, timeout: float) -> bool:
        """See :class:`~lamina_kv.data.worker_pool.WorkerPool`."""
        return self._world.wait(lambda: not self.waiting and not self.threads, timeout)

    def take(self, delay: Callable[[str], float]) -> None:
        """Give every idle thread its next job."""
        while self.waiting and len(self.threads) < self._size:
            _, _, job, lost = heappop(self.waiting)
            seconds = delay(self._name)
            if self._name.startswith(STALLING):
                thread = VirtualThread(self._name, job, lost, seconds, self._world.now)
            else:
                due = self._world.now + seconds
                thread = VirtualThread(self._name, job, lost, 0.0, due)
            self.threads.append(thread)


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


class VirtualCondition:
    """A :class:`threading.Condition` that runs jobs while it is waited for.

    No job stalls while it holds one, so there is nothing to lock.

    Args:
        world: whose jobs.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> None:
        """See :class:`threading.Condition`."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """See :class:`threading.Condition`."""

    def notify_all(self) -> None:
        """See :class:`threading.Condition`. Who waits looks again when a job has run."""

    def wait_for(self, done: Callable[[], bool], timeout: float) -> bool:
        """See :class:`threading.Condition`."""
        return self._world.wait(done, timeout)
