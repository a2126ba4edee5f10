"""What a bench is doing, while it does it."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.status import Status
from rich.table import Table

_REDRAWN = 0.1
"""Seconds between two pictures of a bar."""


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
        line = self._line(what)
        if self._status is not None:
            self._status.update(line)
        else:
            self._console.print(line, highlight=False)

    def bar(self, what: str, total: int) -> Callable[[int], None]:
        """The next step begins, and is long: on a terminal with a bar.

        Args:
            what: the step.
            total: how much there is to do.

        Returns:
            To be called with how much more is done.
        """
        self.say(what)
        done, shown = 0, self._began

        def more(amount: int) -> None:
            nonlocal done, shown
            done += amount
            now = time.monotonic()
            if self._status is not None and now - shown > _REDRAWN:
                shown = now
                line = Table.grid(padding=(0, 1))
                bar = ProgressBar(total, done, width=30)
                line.add_row(self._line(what), bar, f"{100 * done // max(1, total)} %")
                self._status.update(line)

        return more

    def _line(self, what: str) -> str:
        return f"{time.monotonic() - self._began:4.0f} s  {what}"
