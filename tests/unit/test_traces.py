"""A running engine writes down which requests it had: lengths and numbers, and nothing of what
they were about."""

from __future__ import annotations

import json
import os
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
from driven_planner import CHUNK, CHUNK_BYTES, Engine, View, keys_of, prompt

from lamina_kv.control.shape import ChunkShape
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.observe import traces
from lamina_kv.observe.traces import (
    ServedRequest,
    TraceRecorder,
    open_recorder,
    read_requests,
)
from lamina_kv.plan import RankReport

KEYS = keys_of(prompt(5 * CHUNK))
REQUEST = ServedRequest(12.5, 3 * CHUNK + 1, 5 * CHUNK + 2, KEYS, 0.25)


def recorded(path: Path, *requests: ServedRequest, most: int = 1 << 20) -> list[dict[str, Any]]:
    recorder = TraceRecorder(path, CHUNK, CHUNK_BYTES, began=10.0, most_bytes=most)
    for request in requests:
        recorder.ended(request)
    recorder.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_lengths_and_numbers(tmp_path: Path) -> None:
    (line,) = recorded(tmp_path / "trace", REQUEST)
    ids, answer = line.pop("hash_ids"), line.pop("output_hash_ids")
    assert line == {
        "timestamp": 2500,
        "input_length": 3 * CHUNK + 1,
        "output_length": 2 * CHUNK + 1,
        "chunk_tokens": CHUNK,
        "chunk_bytes": CHUNK_BYTES,
        "prefill_seconds": 0.25,
    }
    assert (len(ids), len(answer)) == (3, 2)
    assert len({*ids, *answer}) == 5
    assert all(0 <= number < 1 << 53 for number in (*ids, *answer))


def test_equal_chunks_have_equal_numbers_in_one_file_only(tmp_path: Path) -> None:
    first, second = recorded(tmp_path / "one", REQUEST, REQUEST)
    assert first == second
    (other,) = recorded(tmp_path / "two", REQUEST)
    assert not {*first["hash_ids"]} & {*other["hash_ids"]}


def test_a_file_is_begun_anew_and_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "trace"
    recorded(path, REQUEST)
    size = path.stat().st_size
    assert len(recorded(path, *[REQUEST] * 5, most=2 * size + size // 2)) == 2
    assert caplog.text.count("is as large as it may be") == 1


def test_who_ends_while_the_writer_is_behind_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Control never waits."""
    monkeypatch.setattr(traces, "MOST_WAITING", 2)
    goes_on, taken = threading.Event(), threading.Event()

    def held(request: ServedRequest) -> int:
        taken.set()
        assert goes_on.wait(10)
        return request.prompt

    recorder = TraceRecorder(tmp_path / "trace", CHUNK, CHUNK_BYTES, 0.0)
    wait = TraceRecorder._traced
    monkeypatch.setattr(recorder, "_traced", lambda r: held(r) and wait(recorder, r))
    recorder.ended(REQUEST)
    assert taken.wait(10)
    for _ in range(4):
        recorder.ended(REQUEST)
    goes_on.set()
    recorder.close()
    recorder.close()
    assert len((tmp_path / "trace").read_text().splitlines()) == 3
    assert caplog.text.count("some are left out") == 1


def test_a_disk_that_is_full_ends_it_and_what_was_written_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "trace"
    recorded(path, REQUEST)
    size, limits = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2, limits[1]))
    try:
        recorder = TraceRecorder(path, CHUNK, CHUNK_BYTES, 0.0)
        for _ in range(3):
            recorder.ended(REQUEST)
        recorder.close()
        recorder.ended(REQUEST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("observe.trace: no more is written down: OSError") == 1
    assert path.stat().st_size == size + size // 2
    with path.open("rb") as file:
        assert len([*read_requests(file)]) == 1
    assert "line 2, the last one, is cut off" in caplog.text


def test_an_error_of_any_kind_is_said_and_ends_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TraceRecorder, "_number", lambda recorder, key: 1 // 0)
    assert not recorded(tmp_path / "trace", REQUEST, REQUEST)
    assert caplog.text.count("no more is written down: ZeroDivisionError") == 1


def test_an_answer_is_never_shorter_than_nothing(tmp_path: Path) -> None:
    (line,) = recorded(tmp_path / "trace", ServedRequest(12.5, 3 * CHUNK, CHUNK, KEYS[:1]))
    assert line["output_length"] == 0


def test_a_pipe_stops_no_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert open_recorder(tmp_path / "pipe", CHUNK, 1, 0.0) is None
    assert open_recorder(Path(os.devnull), CHUNK, 1, 0.0) is None
    assert "it must be a regular file" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        '"output_length": ' + 400 * "9",
        '"output_length": -1',
        '"input_length": -1',
        '"chunk_tokens": -1',
        '"chunk_bytes": -1',
        '"timestamp": 1e300',
    ],
)
def test_numbers_out_of_range_are_refused(wrong: str) -> None:
    right = '"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [1], '
    with pytest.raises(ValueError, match="line 1 is not a request"):
        [*read_requests([f"{{{right}{wrong}}}\n".encode()])]


def test_a_file_that_cannot_be_opened_stops_no_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_recorder(tmp_path / "missing" / "trace", CHUNK, 1, 0.0) is None
    assert "observe.trace: no request is written down" in caplog.text
    assert open_recorder(None, CHUNK, 1, 0.0) is None


def test_each_engine_of_a_server_has_a_file_of_its_own(tmp_path: Path) -> None:
    for engine in range(2):
        recorder = open_recorder(tmp_path / "trace.jsonl", CHUNK, 1, 0.0, engine)
        assert recorder is not None
        recorder.close()
    assert {path.name for path in tmp_path.iterdir()} == {"trace.jsonl", "trace-engine1.jsonl"}


# -- what the planner says -------------------------------------------------------------------------


def test_the_planner_says_what_a_request_was_when_it_has_ended() -> None:
    ended: list[ServedRequest] = []
    engine = Engine(on_end=ended.append)
    engine.now = 3.0
    view = View("a", prompt(4 * CHUNK), num_prompt_tokens=2 * CHUNK + 5)
    engine.planner.arrived(view)
    engine.now = 4.0
    engine.save(view)
    tokens = 4 * CHUNK
    assert ended == [ServedRequest(3.0, 2 * CHUNK + 5, tokens, tuple(keys_of(prompt(tokens))))]


def test_a_request_that_never_had_blocks_is_none() -> None:
    ended: list[ServedRequest] = []
    engine = Engine(on_end=ended.append)
    view = View("a", prompt(4 * CHUNK))
    engine.lookup(view)
    engine.planner.finished("a", 0, [()])
    engine.planner.finished("unknown", 0, [()])
    assert not ended


def test_bytes_of_a_chunk_are_those_of_the_groups_that_keep_a_whole_prefix() -> None:
    full, window = Group(GroupKind.FULL, 16), Group(GroupKind.WINDOW, 16, window=64)
    reports = [RankReport(0, 10, 100), RankReport(1, 10, 100, follows=True)]
    assert ChunkShape(32, (full, window)).prefix_bytes(reports) == 100
    assert ChunkShape(32, (full, full)).prefix_bytes(reports) == 200
    assert ChunkShape(32, (window,)).prefix_bytes([RankReport(0, 10, 100)] * 2) == 200


def test_what_was_recorded_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    recorded(path, REQUEST)
    with path.open("rb") as file:
        (request,) = read_requests(file)
    assert (request.input_length, request.chunk_bytes) == (3 * CHUNK + 1, CHUNK_BYTES)
    assert len(request.output_hash_ids) == 2
