"""Plots of a report. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lamina.bench.report import Report, duration
from lamina.bench.samples import Samples

_INK, _FAINT, _MEASURED, _FLOOR = "#1f2328", "#8c959f", "#2a6f97", "#c8553d"
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
