"""Threads that run jobs, the most urgent first."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable

log = logging.getLogger("lamina.data")

Job = Callable[[], None]

_CLOSED = (float("inf"), 0)


class WorkerPool:
    """A few daemon threads over one priority queue.

    Engines pin their own threads to cores and threads inherit that from whoever starts them, so
    a worker takes back every core the process may use.

    Args:
        name: prefix of the threads' names.
        threads: how many.
        cores: cores the threads may run on; None leaves what they inherit.
    """

    def __init__(self, name: str, threads: int, cores: frozenset[int] | None = None) -> None:
        self._queue: queue.PriorityQueue[tuple[tuple[float, int], int, Job | None]]
        self._queue = queue.PriorityQueue()
        self._order = itertools.count()
        self._cores = cores
        self._threads = [
            threading.Thread(target=self._run, name=f"lamina-{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, priority: tuple[float, int], job: Job) -> None:
        """Queue ``job``; lower priorities run first, equal ones in the order of submission."""
        self._queue.put((priority, next(self._order), job))

    def depth(self) -> int:
        """Jobs that no thread has taken yet."""
        return self._queue.qsize()

    def await_idle(self, timeout: float) -> bool:
        """Wait until there is no job; False if that took longer than ``timeout`` seconds."""
        with self._queue.all_tasks_done:
            return self._queue.all_tasks_done.wait_for(
                lambda: not self._queue.unfinished_tasks, timeout
            )

    def close(self, timeout: float) -> bool:
        """Run what is queued, then stop.

        Returns:
            Whether every thread ended within ``timeout`` seconds.
        """
        for _ in self._threads:
            self._queue.put((_CLOSED, next(self._order), None))
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        if self._cores is not None:
            os.sched_setaffinity(0, self._cores)
        while True:
            _, _, job = self._queue.get()
            if job is None:
                self._queue.task_done()
                return
            try:
                job()
            except Exception:
                log.exception("a job of %s raised", threading.current_thread().name)
            del job  # an idle thread keeps nothing alive
            self._queue.task_done()
