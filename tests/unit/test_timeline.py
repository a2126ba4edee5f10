"""A timeline keeps the newest spans, in memory or in a file that can be read at any time, and a
trace read back says what was recorded."""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

from lamina_kv.observe import timeline as module
from lamina_kv.observe.timeline import Lane, Span, Timeline, read_trace


def events_of(path: Path) -> list[dict[str, object]]:
    """As Perfetto reads a trace: its last bracket may be missing."""
    events: list[dict[str, object]] = json.loads(path.read_text().rstrip().removesuffix(",") + "]")
    return events


def written(path: Path, *spans: Span, most_bytes: int = 1 << 20) -> None:
    timeline = Timeline(path, most_bytes=most_bytes)
    for span in spans:
        timeline.add(span.lane, span.step, span.row, span.start, span.size, end=span.end)
    timeline.close()


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
    now = Timeline.now()
    spans = [
        Span(lane, step, step, now + step, now + step + 0.5, 10 * step)
        for step, lane in enumerate(Lane)
    ]
    spans.append(Span(Lane.WRITE, 9, -1, now + 20, now + 21))
    written(path, *spans)

    read = read_trace(path)
    assert len(read) == len(spans)
    for ours, theirs in zip(spans, read, strict=True):
        assert (theirs.lane, theirs.step, theirs.row) == (ours.lane, ours.step, ours.row)
        assert theirs.size == ours.size
        assert theirs.start == pytest.approx(ours.start, abs=2e-6)
        assert theirs.end == pytest.approx(ours.end, abs=2e-6)


def test_a_trace_names_its_process_and_its_lanes(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline = Timeline(path, rank=3)
    timeline.add(Lane.WAIT, 0, 0, Timeline.now())
    timeline.close()
    events = events_of(path)
    (span,) = [event for event in events if event["ph"] == "X"]
    named = {(e["name"], e["pid"], e["tid"]): e["args"] for e in events if e["ph"] == "M"}
    assert named["thread_name", 3, span["tid"]] == {"name": "wait"}
    process = named["process_name", 3, 0]
    assert isinstance(process, dict)
    assert process["name"] == "Lamina rank 3"


@pytest.mark.parametrize("at_once", [True, False])
def test_no_two_spans_of_a_track_overlap(tmp_path: Path, at_once: bool) -> None:
    """Several threads load. Chrome's format has no overlapping slices on one thread."""
    path, now = tmp_path / "trace.json", Timeline.now()
    ended = [(0, 9), (1, 4), (2, 3), (5, 8), (0.5, 10), (9, 10)]  # as they are told, by their ends
    spans = [Span(Lane.LOAD, 0, i, now + a, now + b) for i, (a, b) in enumerate(ended)]
    if at_once:
        written(path, *spans)
    else:
        file = module._TraceFile(path, 0, 1 << 20)
        with file:
            for span in spans:
                file.append([span])
    tracks = defaultdict(list)
    for event in events_of(path):
        if event["ph"] == "X":
            start, length = event["ts"], event["dur"]
            assert isinstance(start, float)
            assert isinstance(length, float)
            tracks[event["tid"]].append((start, start + length))
    assert sum(map(len, tracks.values())) == len(spans)
    for slices in tracks.values():
        ordered = sorted(slices)
        for (_, end), (start, _) in itertools.pairwise(ordered):
            assert start >= end - 1, "they overlap"


def test_a_file_can_be_read_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    path = tmp_path / "trace.json"
    timeline = Timeline(path)
    timeline.add(Lane.WAIT, 7, 0, Timeline.now())
    while not (spans := read_trace(path)):  # the test's time limit ends it
        os.sched_yield()
    assert [span.step for span in spans] == [7]
    with path.open("a") as file:
        file.write('{"name": "row 1", "cat": "lo')  # half of an event
    assert [span.step for span in read_trace(path)] == [7]
    timeline.close()


def test_a_full_file_is_kept_once_and_a_new_one_begun(tmp_path: Path) -> None:
    path, earlier, now = tmp_path / "t.json", tmp_path / "t-earlier.json", Timeline.now()
    spans = [Span(Lane.SAVE, i, 0, now + i, now + i + 0.5) for i in range(4000)]
    written(path, *spans, most_bytes=100_000)
    assert sorted(tmp_path.iterdir()) == [earlier, path]
    assert sum(file.stat().st_size for file in (path, earlier)) < 700_000
    last = [span.step for span in (*read_trace(earlier), *read_trace(path))]
    assert last == list(range(4000))[-len(last) :]
    names = {event["name"] for event in events_of(path) if event["ph"] == "M"}
    assert {"process_name"} <= names, "each file can be read alone"


def test_a_new_start_keeps_what_the_last_one_wrote(tmp_path: Path) -> None:
    path, now = tmp_path / "t.json", Timeline.now()
    written(path, Span(Lane.SAVE, 1, 0, now, now + 1))
    written(path, Span(Lane.SAVE, 2, 0, now, now + 1))
    assert [span.step for span in read_trace(path)] == [2]
    assert [span.step for span in read_trace(tmp_path / "t-earlier.json")] == [1]


@pytest.mark.parametrize("name", ["gone/t.json", "."])
def test_a_file_that_cannot_be_made_is_an_error_at_the_start(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"No such file|Is a directory"):
        Timeline(tmp_path / name)


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.add(Lane.WAIT, 0, 0, Timeline.now())
    timeline.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        "no json\n",
        "[]\n",
        "{}\n",
        '[{"ph": "X", "cat": "sleep"},\n',
        '[{"ph": "M", "name": "process_name", "args": {"epoch": 0}},\n{"ph": "X", "name": ""},\n',
    ],
)
def test_what_is_no_trace_of_ours_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json is not a trace"):
        read_trace(path)
