"""Threads that ask a slow file system many small questions at once, and may hang in it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class _Answer(Generic[T]):
    def __init__(self, job: Callable[[], T]) -> None:
        self.job = job
        self.wanted = True
        self.ended = threading.Event()
        self.result: T | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        if self.wanted:
            try:
                self.result = self.job()
            except BaseException as error:  # who asked is to hear of it
                self.error = error
        self.ended.set()


class Fan:
    """Runs jobs on a few daemon threads. One that hangs keeps its thread, and nothing else.

    Args:
        name: of the threads.
        width: how many there are; they start when they are needed first.
    """

    def __init__(self, name: str, width: int) -> None:
        self.width = width
        self._name = name
        self._jobs: queue.SimpleQueue[_Answer[object] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = False

    def run(self, jobs: Sequence[Callable[[], T]], timeout: float) -> list[T] | None:
        """Run jobs, all at once as far as there are threads.

        Args:
            jobs: what to run.
            timeout: seconds until nobody waits for them any more.

        Returns:
            What each returned; None if it took too long.

        Raises:
            BaseException: what the first job raised that did.
        """
        self._start()
        due = time.monotonic() + timeout
        answers = [_Answer(job) for job in jobs]
        for answer in answers:
            self._jobs.put(answer)  # type: ignore[arg-type]
        try:
            for answer in answers:
                if not answer.ended.wait(max(0.0, due - time.monotonic())):
                    return None
        finally:
            for answer in answers:
                answer.wanted = False
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        return [answer.result for answer in answers]  # type: ignore[misc]

    def close(self) -> None:
        """Let the threads end; one that hangs is left alone. Idempotent."""
        with self._lock:
            if self._started:
                self._started = False
                for _ in range(self.width):
                    self._jobs.put(None)

    def _start(self) -> None:
        with self._lock:
            if not self._started:
                self._started = True
                for number in range(self.width):
                    threading.Thread(
                        target=self._work, name=f"{self._name}-{number}", daemon=True
                    ).start()

    def _work(self) -> None:
        while (answer := self._jobs.get()) is not None:
            answer.run()
            del answer
