"""Threads that run jobs, the most urgent first. Every job is answered for."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from lamina_kv.data.threads import Threads

log = logging.getLogger("lamina_kv.data")

Job = Callable[[], None]

Lost = Callable[[BaseException], None]
"""Called with the error if a job raised, or was never run. It must not raise."""


class _Task(NamedTuple):
    priority: tuple[float, int]
    number: int
    job: Job
    lost: Lost


class WorkerPool:
    """A few threads over one priority queue.

    A job returns, or its ``lost`` is called; never both, and never neither. A thread that cannot
    work leaves the jobs to the others. The last one stays and calls ``lost`` for every job, so that
    whoever waits for one learns of it.

    Args:
        name: prefix of the threads' names.
        count: how many threads.
        threads: how they begin.
    """

    def __init__(self, name: str, count: int, threads: Threads | None = None) -> None:
        self._name = name
        self._tasks: list[_Task] = []
        self._order = itertools.count()
        self._running = 0
        self._working = count
        self._closing = False
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        begin = threads or Threads()
        self._threads = [
            begin.start(f"{name}-{i}", self._work, self._died) for i in range(count)
        ]  # fmt: skip

    def submit(self, priority: tuple[float, int], job: Job, lost: Lost) -> None:
        """Queue ``job``; lower priorities run first, equal ones in the order of submission.

        Args:
            priority: compared as a tuple.
            job: what to run, on a thread of the pool.
            lost: called there with the error if the job raises, or cannot be run any more.
        """
        with self._lock:
            heapq.heappush(self._tasks, _Task(priority, next(self._order), job, lost))
            self._more.notify()

    def depth(self) -> int:
        """Jobs that no thread has taken yet."""
        return len(self._tasks)

    def await_idle(self, timeout: float) -> bool:
        """Wait until there is no job; False if that took longer than ``timeout`` seconds."""
        with self._lock:
            return self._idle.wait_for(lambda: not (self._tasks or self._running), timeout)

    def close(self, timeout: float) -> bool:
        """Run what is queued, then stop.

        Returns:
            Whether every thread ended within ``timeout`` seconds.
        """
        with self._lock:
            self._closing = True
            self._more.notify_all()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        self._serve(None)

    def _died(self, error: BaseException) -> None:
        with self._lock:
            self._working -= 1
            last = not self._working
        if last:
            log.error(
                "no thread of %r can work any more, all of its transfers fail until the engine is "
                "restarted: %r", self._name, error,
            )  # fmt: skip
            self._serve(error)

    def _serve(self, error: BaseException | None) -> None:
        """Run jobs until the pool is closed, or fail them if there is an ``error``."""
        while (task := self._next()) is not None:
            try:
                self._carry_out(task, error)
            finally:
                self._over()
            del task  # an idle thread keeps nothing alive

    def _carry_out(self, task: _Task, error: BaseException | None) -> None:
        if error is not None:
            task.lost(error)
            return
        try:
            task.job()
        except BaseException as raised:  # whatever ends a job early, somebody waits for it
            log.exception("a job of %s raised", threading.current_thread().name)
            task.lost(raised)

    def _next(self) -> _Task | None:
        with self._lock:
            while not self._tasks:
                if self._closing:
                    return None
                self._more.wait()
            self._running += 1
            return heapq.heappop(self._tasks)

    def _over(self) -> None:
        with self._lock:
            self._running -= 1
            if not (self._tasks or self._running):
                self._idle.notify_all()
