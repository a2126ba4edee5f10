"""Who waits for the device, so that a thread with other things to do need not look at it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from lamina_kv.data.movers.fences import Fence
from lamina_kv.data.threads import Threads

log = logging.getLogger("lamina_kv.data")


class FenceWatch:
    """Says when a fence has passed. Its thread sleeps in the driver meanwhile, and begins with the
    first fence: where fences have always passed there is none.

    Args:
        wake: called after each fence, on the thread of this.
        threads: how that begins.
    """

    def __init__(self, wake: Callable[[], None], threads: Threads) -> None:
        self._wake = wake
        self._threads = threads
        self._fences: queue.SimpleQueue[Fence | None] = queue.SimpleQueue()
        self._watched: set[Fence] = set()
        self._thread: threading.Thread | None = None

    def watch(self, fence: Fence) -> None:
        """Wake when ``fence`` has passed, once, however often it is named until then. Fences are
        waited for one after another: name those of one stream, in its order."""
        if fence in self._watched:
            return
        self._watched.add(fence)
        self._fences.put(fence)
        if self._thread is None:
            self._thread = self._threads.start("fences", self._run, self._died)

    def close(self) -> None:
        """Wait for no other fence. Does not wait for the one that is waited for."""
        self._fences.put(None)

    def _run(self) -> None:
        while (fence := self._fences.get()) is not None:
            try:
                fence.wait()
            except Exception:  # who looks at the fence meets the same error
                log.debug("a fence cannot be waited for", exc_info=True)
            self._watched.discard(fence)
            self._wake()

    def _died(self, error: BaseException) -> None:
        log.warning("nobody waits for the device, and what it has done is found late: %r", error)
