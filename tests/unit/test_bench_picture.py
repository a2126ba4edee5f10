"""The picture of a step shows what the spans say: who worked on which row, from when to when."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from lamina_kv.bench.picture import Bar, Panel, computing, draw_timeline, loading, plain, turns
from lamina_kv.observe.timeline import Lane, Span

ROWS = 3


def panel() -> Panel:
    """Three rows, two ahead: row 1's load is asked for while row 0's is still under way."""
    return Panel(
        title="a step",
        spans=(
            Span(Lane.LOAD, 7, 0, 1.0, 2.0, 8),
            Span(Lane.LOAD, 7, 1, 1.0, 3.0, 8),
            Span(Lane.WAIT, 7, 0, 1.1, 2.0),
            Span(Lane.COMPUTE, 7, 0, 2.0, 2.3),
            Span(Lane.LOAD, 7, 2, 2.0, 3.5, 4),
            Span(Lane.LOAD, 7, 2, 2.0, 4.0, 4),
            Span(Lane.SAVE, 7, 0, 2.4, 2.5, 8),
            Span(Lane.WAIT, 7, 1, 2.9, 3.0),
            Span(Lane.COMPUTE, 7, 1, 3.0, 3.3),
            Span(Lane.WAIT, 7, 2, 3.9, 4.0),
            Span(Lane.COMPUTE, 7, 2, 4.0, 4.3),
            Span(Lane.WRITE, 7, -1, 4.0, 4.4, 24),
        ),
        began=0.9,
        forward_ended=5.0,
        ended=5.2,
    )


def test_a_rows_turn_lasts_until_the_model_waits_for_the_next() -> None:
    assert computing(panel()) == [Bar(0, 2.0, 2.9), Bar(1, 3.0, 3.9), Bar(2, 4.0, 5.0)]


def shared() -> Panel:
    """Two rows, two layers each; the first layer of a row waits for it, and only the first."""
    return Panel(
        title="a hybrid's step",
        spans=(
            Span(Lane.WAIT, 7, 0, 1.0, 2.0),
            Span(Lane.COMPUTE, 7, 0, 2.0, 2.2),
            Span(Lane.COMPUTE, 7, 0, 2.5, 2.7),
            Span(Lane.WAIT, 7, 1, 3.0, 3.5),
            Span(Lane.COMPUTE, 7, 1, 3.5, 3.6),
            Span(Lane.COMPUTE, 7, 1, 4.0, 4.2),
        ),
        began=0.9,
        forward_ended=4.5,
        ended=4.6,
    )


def test_layers_that_share_a_row_have_a_bar_each_and_one_turn() -> None:
    bars = computing(shared())
    assert bars == [Bar(0, 2.0, 2.5), Bar(0, 2.5, 3.0), Bar(1, 3.5, 4.0), Bar(1, 4.0, 4.5)]
    assert turns(bars) == [Bar(0, 2.0, 3.0), Bar(1, 3.5, 4.5)]


def test_a_row_that_is_used_again_has_another_turn() -> None:
    bars = [Bar(0, 1.0, 2.0), Bar(1, 2.0, 3.0), Bar(0, 3.0, 4.0)]
    assert turns(bars) == bars
    assert turns([]) == []


def test_the_picture_says_what_shares_a_row(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    path = tmp_path / "timeline.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_timeline([shared()], path, "each shared by two layers")
    text = path.read_text()
    assert "rows (each shared by two layers)" in text
    assert text.count(">1</text>") == 1, "a row is named once, however many layers it has"


def test_without_waits_a_turn_lasts_until_the_next() -> None:
    spans = tuple(span for span in panel().spans if span.lane is not Lane.WAIT)
    bars = computing(Panel("", spans, 0.9, 5.0, 5.2))
    assert bars == [Bar(0, 2.0, 3.0), Bar(1, 3.0, 4.0), Bar(2, 4.0, 5.0)]


def test_rows_come_through_the_link_one_after_the_other() -> None:
    assert loading(panel()) == [Bar(0, 1.0, 2.0), Bar(1, 2.0, 3.0), Bar(2, 3.0, 4.0)]


def test_a_row_that_comes_late_is_drawn_when_it_came() -> None:
    spans = (Span(Lane.LOAD, 0, 0, 1.0, 4.0), Span(Lane.LOAD, 0, 1, 1.0, 3.0))
    assert loading(Panel("", spans, 0.5, 5.0, 5.0)) == [Bar(1, 1.0, 3.0), Bar(0, 3.0, 4.0)]


def test_a_lane_has_its_own_spans() -> None:
    assert plain(panel(), Lane.SAVE) == [Bar(0, 2.4, 2.5)]
    assert plain(panel(), Lane.WRITE) == [], "what has no row is in no lane of rows"


def test_the_picture_is_wide_enough_to_read_and_small_enough_to_publish(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "timeline.png"
    draw_timeline([panel(), panel()], path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width >= 1800
    assert 0.2 < height / width < 0.6
    assert len(content) < 150_000


def test_the_picture_names_lanes_rows_and_times(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    path = tmp_path / "timeline.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_timeline([panel()], path)
    text = path.read_text()
    for word in ("a step", "load", "compute", "save", "first token: 4,300 ms", "ms since"):
        assert word in text
    for row in range(ROWS):
        assert f">{row}</text>" in text


def test_a_step_without_spans_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "empty.png"
    draw_timeline([Panel("nothing", (), 1.0, 0.0, 2.0)], path)
    assert path.stat().st_size > 0
