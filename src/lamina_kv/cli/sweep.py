"""``lamina-kv sweep``: frees the space of a shared directory, as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path

from rich.console import Console

from lamina_kv.quantities import duration, size_of
from lamina_kv.tiers.contract import StoreError
from lamina_kv.tiers.directory.lease import RENEW_SECONDS, Lease, LeaseLost
from lamina_kv.tiers.directory.root import read_marker
from lamina_kv.tiers.directory.sweeper import Limits, Swept, sweep
from lamina_kv.values import SIZE, WrongValueError

_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)")
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}

_SKEW_SECONDS = 60.0
"""Files that are younger than the present by more than this are said."""


class _Stopped(Exception):
    """The process was asked to end."""


def run(
    path: Path, capacity: str | None, max_age: str | None, *, once: bool, interval: float
) -> int:
    """Sweep once, or until the process is asked to end (SIGTERM, SIGINT).

    Args:
        path: the directory.
        capacity: bytes of chunks that may stay, as text.
        max_age: how long a chunk may be unused, as text.
        once: whether to sweep once.
        interval: seconds between two sweeps if not.

    Returns:
        The exit code: 1 if something is wrong with the arguments or the directory.
    """
    console = Console(soft_wrap=True, markup=False, highlight=False)
    try:
        sweeper = _Sweeper(path, _limits(capacity, max_age), console)
        with _told_to_stop() as stop:
            sweeper.turn(stop, says_all=True, may_fail=once)
            while not once and not stop.wait(sweeper.keep(interval)):
                if sweeper.is_due:
                    sweeper.turn(stop)
        sweeper.end()
    except (StoreError, OSError) as error:
        console.print(str(error), style="red")
        return 1
    return 0


class _Sweeper:
    """Sweeps again and again, with one lease.

    Args:
        path: the directory.
        limits: what may stay.
        console: where to say what was done.

    Attributes:
        is_due: whether the next sweep is due after what :meth:`keep` said to wait.

    Raises:
        StoreError: if it is no shared directory.
        OSError: if it cannot be read.
    """

    def __init__(self, path: Path, limits: Limits, console: Console) -> None:
        self._path = path
        self._limits = limits
        self._console = console
        self._lease = Lease()
        self._waits_for = ""  # who has the lease
        self._last = 0.0
        self.is_due = False
        with self._opened():
            pass

    def turn(
        self, stop: threading.Event, *, says_all: bool = False, may_fail: bool = False
    ) -> None:
        """Sweep, if nobody else does.

        Args:
            stop: set when this is to end.
            says_all: whether a sweep that did nothing is said, too.
            may_fail: whether to raise what goes wrong, or to say it.
        """
        self._last = time.monotonic()
        try:
            with self._opened() as root:
                self._sweep(root, stop, says_all=says_all)
        except _Stopped:
            self._console.print(f"{self._path}: asked to end")
        except LeaseLost:
            self._console.print(f"{self._path}: another process has taken over")
        except (StoreError, OSError) as error:
            if may_fail:
                raise
            self._console.print(f"{self._path}: not swept: {error}")

    def keep(self, interval: float) -> float:
        """Keep the lease between two sweeps; returns how many seconds to wait for now."""
        left = self._last + interval - time.monotonic()
        self.is_due = left <= RENEW_SECONDS
        if not self.is_due and not self._waits_for:
            with suppress(LeaseLost, StoreError, OSError), self._opened() as root:
                self._lease.now(root)
        return max(0.0, min(left, RENEW_SECONDS))

    def end(self) -> None:
        """Give the lease back."""
        with suppress(StoreError, OSError), self._opened() as root:
            self._lease.release(root)

    def _sweep(self, root: int, stop: threading.Event, *, says_all: bool) -> None:
        if not self._lease.take(root):
            if self._waits_for != self._lease.holder:
                self._waits_for = self._lease.holder
                self._console.print(f"{self._path}: {self._waits_for} sweeps it, nothing is done")
            return
        self._waits_for = ""

        def go_on() -> None:
            if stop.is_set():
                raise _Stopped
            self._lease.keep(root)

        now = self._lease.now(root)
        swept = sweep(Path(f"/proc/self/fd/{root}"), self._limits, now, go_on)
        if says_all or swept.did:
            for line in _report(swept):
                self._console.print(f"{self._path}: {line}")

    @contextmanager
    def _opened(self) -> Iterator[int]:
        root = os.open(self._path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            read_marker(root, self._path)
            yield root
        finally:
            os.close(root)


def _report(swept: Swept) -> Iterator[str]:
    """What a sweep did, for people."""
    said = [f"{swept.chunks} chunks, {size_of(swept.size)}"]
    if swept.freed:
        size, age = size_of(swept.freed_size), duration(swept.age)
        said.append(f"freed {swept.freed}, {size}, unused for {age} or longer")
    else:
        said.append("freed none")
    if swept.unfinished:
        said.append(f"deleted {swept.unfinished} unfinished files")
    if swept.folders:
        said.append(f"deleted {swept.folders} empty folders")
    yield "; ".join(said) + f" ({swept.seconds:.1f} s)"
    if swept.kept or swept.unread:
        yield (
            f"not deleted: {swept.kept} files; not read: {swept.unread} files or folders "
            f"({swept.error}). The rest was swept. Sweep as their owner, or check the file system"
        )
    if swept.ahead > _SKEW_SECONDS:
        yield (
            f"chunks are up to {duration(swept.ahead)} younger than the present: the clock of some "
            "machine is wrong"
        )


def _limits(capacity: str | None, max_age: str | None) -> Limits:
    if capacity is None and max_age is None:
        raise StoreError("say what may stay: --capacity SIZE, --max-age AGE, or both")
    return Limits(
        inf if capacity is None else _bytes(capacity),
        inf if max_age is None else _seconds(max_age),
    )


def _bytes(text: str) -> int:
    try:
        return int(str(SIZE.parse(text)))
    except WrongValueError as wrong:
        raise StoreError(f"--capacity must be {str(wrong) or SIZE.words}, got {text!r}") from None


def _seconds(text: str) -> float:
    match = _AGE.fullmatch(text.strip())
    if not match:
        raise StoreError(f'--max-age must be a time such as "7d", "12h" or "30min", got {text!r}')
    return float(match[1]) * _UNITS[match[2]]


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """An event that is set by SIGTERM and SIGINT."""
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
