"""What happened when, row by row, within the steps of one rank.

A recorder keeps spans in memory, for the bench, and appends them to a file if it is given one: a
trace in Chrome's JSON array format, which Perfetto (https://ui.perfetto.dev) and
``chrome://tracing`` draw. The format may lack its last bracket, so the file can be read at any
time, also behind a process that was killed. When no recorder is configured nothing is measured.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from lamina_kv.observe.files import new_file, write_all

log = logging.getLogger("lamina_kv.observe")

MOST_BYTES = 64 << 20
"""Bytes of a file, some 400,000 spans. A full one is renamed, and a new one begun: at most two
files are kept."""

EARLIER = "-earlier"
"""What the name of the file before the present one ends in."""

_PAUSE = 1.0
"""Seconds between two writes, and so what a killed process loses."""

_EPOCH = "epoch"
"""In the file: the time since the epoch, in seconds, at which the monotonic clock was 0."""

_TRACKS = 1000
"""Thread ids of each lane in the file, one for each track."""


class Lane(StrEnum):
    """Who was busy."""

    STEP = "step"
    """A step that runs the model, from its plan to the end of what the host does in it."""
    COMPUTE = "compute"
    WAIT = "wait"
    LOAD = "load"
    SAVE = "save"
    WRITE = "write"
    FETCH = "fetch"
    PUSH = "push"
    RECEIVE = "receive"
    """A push into this rank, from its order to its delivery or its end."""


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of work.

    Attributes:
        lane: who was busy.
        step: the step it belongs to.
        row: the row it worked on, -1 for none.
        start: seconds on the monotonic clock.
        end: likewise.
        size: bytes moved.
    """

    lane: Lane
    step: int
    row: int
    start: float
    end: float
    size: int = 0


class Timeline:
    """Collects spans; thread safe, bounded.

    Args:
        path: the file to append them to, soon after each; None keeps them in memory only. What was
            there is kept as the earlier file.
        rank: whose spans they are.
        limit: spans kept in memory; the oldest go first.
        most_bytes: bytes of one file.

    Raises:
        OSError: if the file cannot be made.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        rank: int = 0,
        limit: int = 200_000,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._spans: deque[Span] = deque(maxlen=limit)
        self._file = None if path is None else _TraceFile(path, rank, most_bytes)
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        if self._file is not None:
            name = "lamina-timeline"
            self._thread = threading.Thread(target=self._write, name=name, daemon=True)
            self._thread.start()

    @staticmethod
    def now() -> float:
        """The clock that spans are measured on."""
        return time.perf_counter()

    def add(
        self,
        lane: Lane,
        step: int,
        row: int,
        start: float,
        size: int = 0,
        *,
        end: float | None = None,
    ) -> None:
        """Record a span that ends at ``end``, or now."""
        end = time.perf_counter() if end is None else end
        self._spans.append(Span(lane, step, row, start, end, size))

    def spans(self) -> list[Span]:
        """All spans kept in memory, oldest first: with a file, those that are not written yet."""
        return list(self._spans)

    def close(self) -> None:
        """Write the rest. A second call does nothing."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()

    def _write(self) -> None:
        assert self._file is not None, "there is no thread without it"
        try:
            with self._file:
                over = False
                while not over:
                    over = self._ending.wait(_PAUSE)
                    self._file.append(self._taken())
        except OSError as error:  # whatever it is, the engine goes on
            log.warning("observe.timeline: nothing more is recorded: %s", error)

    def _taken(self) -> list[Span]:
        taken = []
        with suppress(IndexError):
            while True:
                taken.append(self._spans.popleft())
        return taken


class _TraceFile:
    """See the module. Spans of a lane that overlap are put on several tracks: the format has none
    that overlap on one, and Perfetto draws them wrong.

    Args:
        path: where.
        rank: whose spans they are.
        most_bytes: bytes of one file.
    """

    def __init__(self, path: Path, rank: int, most_bytes: int) -> None:
        self._path, self._rank, self._most = path, rank, most_bytes
        self._epoch = time.time() - time.perf_counter()
        self._ends: dict[Lane, list[float]] = {}  # of each track, where its last span ends
        if path.is_file() and path.stat().st_size:
            path.replace(path.with_stem(path.stem + EARLIER))
        self._begin()

    def __enter__(self) -> _TraceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, spans: list[Span]) -> None:
        """Write spans, in any order."""
        for start in range(0, len(spans), 1000):  # other threads of the process go first
            events = self._events(spans[start : start + 1000])
            write_all(self._file, _lines(events))
            if self._file.tell() >= self._most:
                self._file.close()
                self._path.replace(self._path.with_stem(self._path.stem + EARLIER))
                self._begin()

    def _begin(self) -> None:
        self._file = new_file(self._path)
        named = [self._named(0, "process_name", f"Lamina rank {self._rank}")]
        named[0]["args"][_EPOCH] = self._epoch
        for lane, ends in self._ends.items():
            named += (self._track(lane, track) for track in range(len(ends)))
        write_all(self._file, b"[\n" + _lines(named))

    def _events(self, spans: Iterable[Span]) -> Iterator[dict[str, Any]]:
        for span in sorted(spans, key=lambda span: span.start):
            ends = self._ends.setdefault(span.lane, [])
            track = next((n for n, end in enumerate(ends) if end <= span.start), len(ends))
            if track == len(ends):
                ends.append(0.0)
                yield self._track(span.lane, track)
            ends[track] = span.end
            yield {
                "name": f"row {span.row}" if span.row >= 0 else span.lane.value,
                "cat": span.lane.value,
                "ph": "X",
                "pid": self._rank,
                "tid": _thread_of(span.lane, track),
                "ts": (span.start + self._epoch) * 1e6,
                "dur": (span.end - span.start) * 1e6,
                "args": {"step": span.step, "bytes": span.size},
            }

    def _track(self, lane: Lane, track: int) -> dict[str, Any]:
        name = lane.value if not track else f"{lane.value} {track + 1}"
        return self._named(_thread_of(lane, track), "thread_name", name)

    def _named(self, thread: int, what: str, name: str) -> dict[str, Any]:
        return {"name": what, "ph": "M", "pid": self._rank, "tid": thread, "args": {"name": name}}


def _lines(events: Iterable[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(event)},\n" for event in events).encode()


def _thread_of(lane: Lane, track: int) -> int:
    return list(Lane).index(lane) * _TRACKS + min(track, _TRACKS - 1)


def read_trace(path: Path) -> list[Span]:
    """The spans of a trace that a :class:`Timeline` has written, or still writes, in the order in
    which they ended up there.

    Raises:
        ValueError: if the file is no such trace.
        OSError: if it cannot be read.
    """
    text = path.read_text().rpartition("\n")[0]  # the last line may be half written
    try:
        events = json.loads(text.rstrip().removesuffix(",") + "]")
        (epoch,) = {e["args"][_EPOCH] for e in events if e["name"] == "process_name"}
        return [_span(event, epoch) for event in events if event["ph"] == "X"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a trace that Lamina has written: {error!r}") from error


def _span(event: dict[str, Any], epoch: float) -> Span:
    lane, step, size = Lane(event["cat"]), event["args"]["step"], event["args"]["bytes"]
    name = event["name"]
    row = -1 if name == lane.value else int(name.removeprefix("row "))
    start = event["ts"] / 1e6 - epoch
    return Span(lane, step, row, start, start + event["dur"] / 1e6, size)
