"""A timeline keeps the newest spans, and a trace read back says what was recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamina_kv.observe.timeline import Lane, Timeline, read_trace


def test_a_span_ends_when_it_is_recorded() -> None:
    timeline = Timeline()
    before = Timeline.now()
    timeline.add(Lane.LOAD, step=3, row=2, start=before, size=4096)
    after = Timeline.now()

    (span,) = timeline.spans()
    assert (span.lane, span.step, span.row, span.size) == (Lane.LOAD, 3, 2, 4096)
    assert span.start == before <= span.end <= after


def test_the_oldest_spans_go_first() -> None:
    timeline = Timeline(limit=3)
    for row in range(5):
        timeline.add(Lane.SAVE, 0, row, Timeline.now())
    assert [span.row for span in timeline.spans()] == [2, 3, 4]


def test_a_trace_read_back_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline = Timeline(path)
    for step, lane in enumerate(Lane):
        timeline.add(lane, step, step, Timeline.now(), size=step * 10)
    timeline.add(Lane.WRITE, 9, -1, Timeline.now())
    timeline.write()

    written, read = timeline.spans(), read_trace(path)
    assert len(read) == len(written) == len(Lane) + 1
    for ours, theirs in zip(written, read, strict=True):
        assert (theirs.lane, theirs.step, theirs.row) == (ours.lane, ours.step, ours.row)
        assert theirs.size == ours.size
        assert theirs.start == pytest.approx(ours.start, abs=1e-6)
        assert theirs.end == pytest.approx(ours.end, abs=1e-6)


def test_a_trace_names_its_lanes(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline = Timeline(path)
    timeline.add(Lane.WAIT, 0, 0, Timeline.now())
    timeline.write()
    events = json.loads(path.read_text())["traceEvents"]
    (span,) = [event for event in events if event["ph"] == "X"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names[span["tid"]] == "wait"


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.add(Lane.WAIT, 0, 0, Timeline.now())
    timeline.write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        "{}",
        '{"traceEvents": [{"ph": "X", "cat": "sleep"}]}',
        '{"traceEvents": [{"ph": "X", "cat": "load", "args": {}}]}',
    ],
)
def test_what_is_no_trace_of_ours_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json is not a trace"):
        read_trace(path)
