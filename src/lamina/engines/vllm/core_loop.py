"""The loop of vLLM's engine core, as threads beside it need it: it can be woken.

Without a request to run, the core waits on its input queue and looks at nothing else. So what comes
from another engine would wait for a client's next request. vLLM has a message that says nothing and
ends the wait: whoever has news for the scheduler puts one there.

An engine in its caller's process has no such loop. There the caller decides when it steps.
"""

from __future__ import annotations

from queue import Queue
from typing import Any

from vllm.v1.engine import EngineCoreRequestType


class CoreLoop:
    """The loop that steps a connector's scheduler side, once it runs."""

    def __init__(self) -> None:
        self._input: Queue[tuple[EngineCoreRequestType, Any]] | None = None

    def begins(self, input_queue: Queue[tuple[EngineCoreRequestType, Any]]) -> None:
        """The loop begins, and will look for work once before it waits."""
        self._input = input_queue

    def wake(self) -> None:
        """Have the core look for work. Any thread may call this."""
        if self._input is not None:
            self._input.put_nowait((EngineCoreRequestType.WAKEUP, None))
