"""Draws what happened when, row by row. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from lamina_kv.observe.timeline import Lane, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import ColorType as Colour


@dataclass(frozen=True, slots=True)
class Panel:
    """One request's first step.

    Attributes:
        title: what is special about it.
        spans: what happened in it.
        began: when the request came, on the clock of the spans.
        forward_ended: when the forward pass was over.
        ended: when the first token was there.
    """

    title: str
    spans: tuple[Span, ...]
    began: float
    forward_ended: float
    ended: float


@dataclass(frozen=True, slots=True)
class Bar:
    """Something to draw.

    Attributes:
        row: colours it; -1 for none.
        start: seconds.
        end: seconds.
    """

    row: int
    start: float
    end: float


def computing(panel: Panel) -> list[Bar]:
    """What the model computed with each row, layer by layer: from the moment a layer had its row to
    the moment the next one asked for its own, for the last layer to the end of the forward pass.
    """
    starts = sorted(
        (span.start, span.row)
        for span in panel.spans
        if span.lane is Lane.COMPUTE and span.row >= 0
    )
    waits = [span.start for span in panel.spans if span.lane is Lane.WAIT]
    bars = []
    for index, (start, row) in enumerate(starts):
        if index + 1 < len(starts):
            until, _ = starts[index + 1]
            end = min((wait for wait in waits if start < wait < until), default=until)
        else:
            end = max(start, panel.forward_ended)
        bars.append(Bar(row, start, end))
    return bars


def loading(panel: Panel) -> list[Bar]:
    """When each row was under way: from the moment the one before it had come, because one link
    carries one after the other."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for span in panel.spans:
        if span.lane is Lane.LOAD:
            first[span.row] = min(span.start, first.get(span.row, span.start))
            last[span.row] = max(span.end, last.get(span.row, span.end))
    bars = []
    arrived = panel.began
    for row, end in sorted(last.items(), key=lambda item: item[1]):
        bars.append(Bar(row, max(arrived, first[row]), end))
        arrived = end
    return bars


def turns(bars: Sequence[Bar]) -> list[Bar]:
    """One bar for all that follow each other and are of the same row."""
    runs = (list(run) for _, run in groupby(bars, lambda bar: bar.row))
    return [Bar(run[0].row, run[0].start, run[-1].end) for run in runs]


def plain(panel: Panel, lane: Lane) -> list[Bar]:
    """The spans of a lane as they are."""
    return [Bar(s.row, s.start, s.end) for s in panel.spans if s.lane is lane and s.row >= 0]


_LANES = ("load", "compute", "push", "save")
_HEIGHT = 0.74
_INK, _FAINT, _WAIT = "#1f2328", "#8c959f", "#dfe3e8"
_WIDTH_INCHES, _DPI = 9.0, 200
_LABELLED = 0.022
"""Fraction of the width from which a bar has room for its row's number."""
_HAIRLINE = 0.0012
"""Fraction of the width below which a bar would not be seen."""


def draw_timeline(panels: Sequence[Panel], path: Path, rows_are: str = "layers") -> None:
    """Draw steps under each other, on one axis of time.

    Args:
        panels: one for each step.
        path: where to; its suffix says what kind of picture.
        rows_are: what shares a row.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: for a suffix that matplotlib does not know.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, 0.7 + 1.35 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    lanes = [lane for lane in _LANES if lane != "push" or _pushes(panels)]
    rows = 1 + max((span.row for panel in panels for span in panel.spans), default=0)
    width = max(panel.ended - panel.began for panel in panels) * 1e3
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_xlim(0, width * 1.004)
        _draw_panel(axis, panel, rows, lanes)
    axes[-1].tick_params(axis="x", length=3, labelsize=9)
    axes[-1].set_xlabel(
        f"ms since the request. Numbers and colours: rows ({rows_are}). Grey: the model waits.",
        color=_INK,
        fontsize=9,
    )
    figure.savefig(path, dpi=_DPI)


def _pushes(panels: Sequence[Panel]) -> bool:
    return any(span.lane is Lane.PUSH for panel in panels for span in panel.spans)


def _draw_panel(axis: Axes, panel: Panel, rows: int, names: Sequence[str]) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"]([0.05 + 0.9 * row / max(1, rows - 1) for row in range(rows)])
    lanes = {name: len(names) - 1 - index for index, name in enumerate(names)}
    for bar in plain(panel, Lane.WAIT):
        _draw_bar(axis, panel, bar, lanes["compute"], _WAIT)
    for lane, bars in (
        ("load", loading(panel)),
        ("compute", computing(panel)),
        ("push", plain(panel, Lane.PUSH)),
        ("save", plain(panel, Lane.SAVE)),
    ):
        if not bars:
            continue
        for bar in bars:
            _draw_bar(axis, panel, bar, lanes[lane], colours[bar.row])
        for turn in turns(bars):
            _draw_label(axis, panel, turn, lanes[lane], colours[turn.row])
    ended = (panel.ended - panel.began) * 1e3
    axis.axvline(ended, color=_INK, linewidth=1.2)
    axis.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color=_INK, pad=4)
    axis.annotate(
        f"first token: {ended:,.0f} ms",
        (ended, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=_INK,
        fontsize=9.5,
    )
    axis.set_ylim(-0.5, len(names) - 0.5)
    axis.set_yticks(list(lanes.values()), list(lanes), fontsize=10)
    axis.tick_params(length=0, colors=_INK)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(_FAINT)


def _draw_bar(axis: Axes, panel: Panel, bar: Bar, lane: int, colour: Colour) -> None:
    full = axis.get_xlim()[1]
    start, width = (bar.start - panel.began) * 1e3, (bar.end - bar.start) * 1e3
    thin = width < 4 * _HAIRLINE * full
    axis.barh(
        lane,
        max(width, _HAIRLINE * full),
        _HEIGHT,
        start,
        align="center",
        color=[colour],
        edgecolor="white",
        linewidth=0 if thin else 0.5,
    )


def _draw_label(axis: Axes, panel: Panel, turn: Bar, lane: int, colour: Colour) -> None:
    if (turn.end - turn.start) * 1e3 < _LABELLED * axis.get_xlim()[1]:
        return
    axis.text(
        ((turn.start + turn.end) / 2 - panel.began) * 1e3,
        lane,
        str(turn.row),
        ha="center",
        va="center_baseline",
        fontsize=8,
        color=_readable_on(colour),
        # Over the lines between its layers.
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2},
    )


def _readable_on(colour: Colour) -> str:
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else _INK
