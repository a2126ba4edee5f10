"""The one place where the data side starts threads.

Every thread begins alike: it chooses the device that its work is for, takes the cores that it may
run on, and runs. A new thread's device is the first of the machine, whatever the engine chose on
its own thread, and its cores are those of whoever started it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass


def _nothing() -> None:
    """There is no device to choose."""


@dataclass(frozen=True, slots=True)
class Threads:
    """How the threads of one rank begin.

    Attributes:
        enter: the first call of every thread, see
            :meth:`~lamina_kv.data.movers.base.Mover.enter_thread`.
        cores: cores that they may run on; None leaves what they inherit.
    """

    enter: Callable[[], None] = _nothing
    cores: frozenset[int] | None = None

    def start(
        self, name: str, run: Callable[[], None], died: Callable[[BaseException], None]
    ) -> threading.Thread:
        """Start a daemon thread.

        Args:
            name: of the thread, behind ``lamina-``.
            run: its work.
            died: called on the thread with the error if it could not begin, or if ``run`` raised.
                It answers those who count on the thread, for as long as that takes.
        """

        def body() -> None:
            try:
                self.enter()
                if self.cores is not None:
                    with suppress(OSError):  # slower where the cores are others' by now
                        os.sched_setaffinity(0, self.cores)
                run()
            except BaseException as error:
                died(error)

        thread = threading.Thread(target=body, name=f"lamina-{name}", daemon=True)
        thread.start()
        return thread


def usable_cores() -> frozenset[int]:
    """Cores that some thread of this process may run on. Engines pin their threads one by one, so
    the caller's own affinity says little."""
    cores: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):
            cores |= os.sched_getaffinity(int(task))
    return frozenset(cores)
