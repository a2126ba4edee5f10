"""A device that runs behind its host, as a GPU does: streams, fences and a mover on them.

Its memory is the host's. What is launched on a stream runs on the stream's own thread, in order,
and who launches does not wait. So a copy that nobody orders before a kernel comes too late here as
it does there; by :meth:`Stream.stopped` a test makes it come too late always and not by chance.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from lamina_kv.data.movers.base import Pairs
from lamina_kv.data.movers.cpu import CpuMover
from lamina_kv.data.movers.fences import Fence
from lamina_kv.geometry import CacheGeometry

PATIENCE = 60.0
"""Seconds after which something that must happen on the device has not."""


class StreamFence(Fence):
    """A place in a stream."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def wait(self) -> None:
        assert self._event.wait(PATIENCE), "a stream does not go on"

    def passed(self) -> bool:
        return self._event.is_set()

    def pass_(self) -> None:
        """The stream has come here."""
        self._event.set()


class Stream:
    """Runs what is launched on it, one thing after the other.

    Args:
        name: of its thread.
    """

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._waits: Fence | None = None
        self._thread = threading.Thread(target=self._run, name=f"stream-{name}", daemon=True)
        self._thread.start()

    def launch(self, kernel: Callable[[], object]) -> None:
        """Run ``kernel`` after all that was launched before."""
        self._work.put(kernel)

    def record(self) -> StreamFence:
        """A fence behind all that was launched before."""
        fence = StreamFence()
        self.launch(fence.pass_)
        return fence

    def hold(self, fence: Fence) -> None:
        """What is launched next runs after ``fence``; the caller does not wait."""

        def wait() -> None:
            self._waits = fence
            fence.wait()
            self._waits = None

        self.launch(wait)

    def settle(self) -> None:
        """Return when all that was launched has run, or waits for a fence that has not passed."""
        end = self.record()
        while not end.passed():
            waits = self._waits
            if waits is not None and not waits.passed():
                return
            time.sleep(0.001)

    def synchronize(self) -> None:
        """Wait for all that was launched.

        Raises:
            BaseException: what a kernel raised.
        """
        self.record().wait()
        if self._error is not None:
            raise self._error

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Inside, nothing runs that is launched there."""
        go = StreamFence()
        self.hold(go)
        try:
            yield
        finally:
            go.pass_()

    def close(self) -> None:
        """Run what is left, and end."""
        self._work.put(None)
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        while (kernel := self._work.get()) is not None:
            try:
                kernel()
            except BaseException as error:
                self._error = self._error or error


class DeviceMover(CpuMover):
    """Copies on two streams of its own, ordered by fences as on CUDA.

    Args:
        geometry: where pages are.
        allocations: what backs them.
        compute: the engine's stream.
    """

    shares_cores = False

    def __init__(
        self, geometry: CacheGeometry, allocations: Sequence[torch.Tensor], compute: Stream
    ) -> None:
        super().__init__(geometry, allocations)
        self._compute = compute
        self.loads, self.saves = Stream("load"), Stream("save")

    def load(
        self, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = True
    ) -> Fence:
        copy = super().load
        self.loads.hold(after)
        self.loads.launch(lambda: copy(rows, pairs, after))
        return self.loads.record()

    def save(
        self, rows: Sequence[int], pairs: Pairs, after: Fence, *, urgent: bool = False
    ) -> Fence:
        copy = super().save
        self.saves.hold(after)
        self.saves.launch(lambda: copy(rows, pairs, after))
        return self.saves.record()

    def fence_compute(self, *, timed: bool = False) -> Fence:
        return self._compute.record()

    def hold_compute(self, fence: Fence) -> None:
        self._compute.hold(fence)

    def close(self, *, process_ends: bool = False, timeout: float | None = None) -> bool:
        for stream in (self.loads, self.saves):
            stream.close()
        return super().close(process_ends=process_ends, timeout=timeout)
