"""Plots of a report. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lamina.bench.report import Report, duration
from lamina.bench.samples import Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT, _MEASURED, _FLOOR = "#1f2328", "#8c959f", "#2a6f97", "#c8553d"
_CURVES = ("#2a6f97", "#c8553d", "#5b8c5a", "#8c959f")
_WIDTH_INCHES, _DPI = 8.0, 160
_SUFFIXES = (".png", ".svg")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot.

    Attributes:
        samples: a dot at their median, a line from the smallest to the largest, a mark at
            their floor.
        text: written beside them.
    """

    samples: Samples
    text: str


@dataclass(frozen=True, slots=True)
class Curve:
    """One way of doing something, by size.

    Attributes:
        name: the way.
        points: what was measured, by tokens.
    """

    name: str
    points: Mapping[int, Samples]


def require_drawable(path: Path) -> None:
    """Refuse to begin what could not be drawn in the end.

    Raises:
        ValueError: says what is wrong with the name, or what to install.
    """
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path} must end in {' or '.join(_SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("drawing needs matplotlib: pip install 'lamina-kv[bench]'")


def draw_ttft(report: Report, path: Path) -> None:
    """Time to first token by where the prompt was hit, on a logarithmic axis."""
    first = report.samples[0]
    lines = []
    for samples in report.samples:
        speedup = "" if samples is first else f", {first.median / samples.median:.3g}x"
        lines.append(Line(samples, duration(samples.median) + speedup))
    _draw(report.title, lines, "time", path, logarithmic=True)


def draw_overlap(report: Report, path: Path) -> None:
    """Steps as multiples of what they cannot go below."""
    lines = [
        Line(replace(target.figure, floor=1.0), f"{target.figure.median:.2f}x")
        for target in report.targets
    ]
    _draw(report.title, lines, report.compared.lower(), path, logarithmic=False)


def draw_push(curves: tuple[Sequence[Curve], Sequence[Curve]], path: Path) -> None:
    """Time to first token, and beside it the tail, by the prompt's length.

    Args:
        curves: of either; the same way is in the same place.
        path: where to.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, 3.8), layout="constrained")
    titles = "Time to first token", "Tail: prefill over, decode not begun"
    for axis, title, drawn in zip(figure.subplots(1, 2), titles, curves, strict=True):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        _draw_curves(axis, drawn, title, "tokens")
        axis.minorticks_off()
    figure.savefig(path, dpi=_DPI)


def draw_turns(curves: Sequence[Curve], path: Path) -> None:
    """Time to first token by the turn of a conversation.

    Args:
        curves: their points by turn.
        path: where to.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES * 0.75, 3.8), layout="constrained")
    axis = figure.subplots()
    _draw_curves(axis, curves, "Time to first token", "turn")
    axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=_DPI)


def _draw_curves(axis: Axes, curves: Sequence[Curve], title: str, what: str) -> None:
    for curve, colour in zip(curves, _CURVES, strict=False):
        points = list(curve.points.items())
        low, middle, high = zip(*((s.low, s.median, s.high) for _, s in points), strict=True)
        places = [place for place, _ in points]
        axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(places, middle, "o-", color=colour, markersize=5, label=curve.name)
    axis.set_xticks(places, [f"{place:,}" for place in places])
    axis.yaxis.set_major_formatter(lambda value, _: _round_duration(value))
    axis.set_xlabel(f"{what} (dot: median, shade: smallest to largest)", fontsize=9, color=_INK)
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=_INK)
    axis.tick_params(colors=_INK, labelsize=8.5)
    axis.grid(color="#e6e8eb", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False, fontsize=8.5)


def _draw(title: str, lines: Sequence[Line], unit: str, path: Path, *, logarithmic: bool) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, 1.1 + 0.42 * len(lines)), layout="constrained")
    axis = figure.subplots()
    for place, line in enumerate(reversed(lines)):
        samples = line.samples
        axis.plot([samples.low, samples.high], [place, place], color=_MEASURED, linewidth=2)
        axis.plot([samples.median], [place], "o", color=_MEASURED, markersize=7)
        if samples.floor is not None:
            axis.plot([samples.floor], [place], "|", color=_FLOOR, markersize=16, markeredgewidth=2)
        axis.annotate(
            line.text,
            (samples.high, place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_INK,
        )
    if logarithmic:
        axis.set_xscale("log")
        lowest = min(line.samples.low for line in lines)
        highest = max(line.samples.high for line in lines)
        axis.set_xlim(lowest / 1.5, highest * (highest / lowest) ** 0.15)
        axis.xaxis.set_major_formatter(lambda value, _: _round_duration(value))
    else:
        axis.set_xlim(0, 1.15 * max(line.samples.high for line in lines))
    axis.set_ylim(-0.6, len(lines) - 0.4)
    axis.set_yticks(
        range(len(lines)), [line.samples.name for line in reversed(lines)], fontsize=9.5
    )
    axis.tick_params(axis="y", length=0)
    axis.tick_params(colors=_INK)
    axis.set_xlabel(
        f"{unit} (dot: median, line: smallest to largest, red: floor)", fontsize=9, color=_INK
    )
    axis.grid(axis="x", color="#e6e8eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=_INK)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(_FAINT)
    figure.savefig(path, dpi=_DPI)


def _round_duration(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1e3:g} ms"
