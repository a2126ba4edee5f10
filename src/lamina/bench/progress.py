"""What a bench is doing, while it does it."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.status import Status


class Progress:
    """On a terminal one line that changes, elsewhere a line for every step.

    Args:
        console: where to; not where the results go.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, what: str) -> None:
        """The next step begins."""
        line = f"{time.monotonic() - self._began:4.0f} s  {what}"
        if self._status is not None:
            self._status.update(line)
        else:
            self._console.print(line, highlight=False)
