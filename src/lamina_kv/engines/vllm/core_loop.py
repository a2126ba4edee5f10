"""The loop of vLLM's engine core: it can be woken, and told between two steps to end requests.

Without a request to run, the core waits on its input queue and looks at nothing else. So what comes
from another engine would wait for a client's next request. vLLM has a message that says nothing and
ends the wait: whoever has news for the scheduler puts one there.

Told to end, it aborts its requests or lets them run out, and steps while a connector has work.

An engine in its caller's process has no such loop. There the caller decides when it steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from math import inf

from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState
from vllm.v1.request import RequestStatus

LATE = 1.0
"""Seconds by which the core may be woken too late. So one timer serves all who ask for about the
same moment."""


class CoreLoop:
    """The loop that steps a connector's scheduler side, once it runs.

    Attributes:
        on_end: called by the core's thread when the loop is told to end, before it does anything
            for that.
    """

    def __init__(self) -> None:
        self.on_end: Callable[[], None] = lambda: None
        self._core: EngineCoreProc | None = None
        self._unwanted: list[str] = []
        self._alarm = -inf

    def begins(self, core: EngineCoreProc) -> None:
        """The loop begins, and will look for work once before it waits."""
        self._core = core

    def turns(self) -> None:
        """The core is between two steps."""
        core = self._core
        if core is not None and core.shutdown_state is EngineShutdownState.REQUESTED:
            self.on_end()
        if self._unwanted and core is not None:
            unwanted, self._unwanted = self._unwanted, []
            ended = core.scheduler.finish_requests(unwanted, RequestStatus.FINISHED_ABORTED)
            core._send_abort_outputs(ended)  # somebody waits for them all the same

    def abort(self, requests: Iterable[str]) -> None:
        """Have requests end before the next step, answered as aborted. Those that have ended are
        passed over. Only the core's thread may call this, but at any time."""
        if self._core is not None:
            self._unwanted += requests

    def wake_after(self, seconds: float) -> None:
        """Have the core look for work after so many seconds, or up to :data:`LATE` later."""
        now = time.monotonic()
        if seconds < inf and not now < self._alarm <= now + seconds + LATE:
            self._alarm = now + seconds + LATE / 2  # no earlier, by any clock
            timer = threading.Timer(self._alarm - now, self.wake)
            timer.daemon = True
            timer.start()

    def wake(self) -> None:
        """Have the core look for work. Any thread may call this."""
        if self._core is not None:
            self._core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
