"""What happened when, row by row, within the steps of one rank.

A recorder keeps spans in memory and writes them as a Chrome trace (``chrome://tracing``,
Perfetto); the bench draws them. When no recorder is configured nothing is measured.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

log = logging.getLogger("lamina_kv.observe")


class Lane(StrEnum):
    """Who was busy."""

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
        path: where :meth:`write` puts them; None keeps them in memory only.
        limit: spans kept; the oldest go first.
    """

    def __init__(self, path: Path | None = None, limit: int = 200_000) -> None:
        self._path = path
        self._spans: deque[Span] = deque(maxlen=limit)

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
        """All spans kept, oldest first."""
        return list(self._spans)

    def write(self) -> None:
        """Write a Chrome trace to the path given, if one was. That it cannot be written is said."""
        if self._path is None:
            return
        lanes = {lane: index for index, lane in enumerate(Lane)}
        events = [
            {
                "name": f"row {span.row}" if span.row >= 0 else span.lane.value,
                "cat": span.lane.value,
                "ph": "X",
                "pid": 0,
                "tid": lanes[span.lane],
                "ts": span.start * 1e6,
                "dur": (span.end - span.start) * 1e6,
                "args": {"step": span.step, "bytes": span.size},
            }
            for span in self._spans
        ]
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": lane.value}}
            for lane, i in lanes.items()
        ]
        try:
            self._path.write_text(json.dumps({"traceEvents": names + events}))
        except OSError as error:
            log.warning("observe.timeline: the trace is lost: %s", error)


def read_trace(path: Path) -> list[Span]:
    """The spans of a trace that :meth:`Timeline.write` has written, in its order.

    Raises:
        ValueError: if the file is no such trace.
        OSError: if it cannot be read.
    """
    try:
        events = json.loads(path.read_text())["traceEvents"]
        return [_span(event) for event in events if event["ph"] == "X"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a trace that Lamina has written: {error!r}") from error


def _span(event: dict[str, Any]) -> Span:
    lane, step, size = Lane(event["cat"]), event["args"]["step"], event["args"]["bytes"]
    name = event["name"]
    row = -1 if name == lane.value else int(name.removeprefix("row "))
    start = event["ts"] / 1e6
    return Span(lane, step, row, start, start + event["dur"] / 1e6, size)
