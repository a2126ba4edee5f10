"""Plots of a report. Needs matplotlib."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from lamina_kv.bench.report import Report, duration
from lamina_kv.bench.samples import Samples
from lamina_kv.quantities import time_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT, _MEASURED, _FLOOR = "#1f2328", "#8c959f", "#2a6f97", "#c8553d"
_CURVES = ("#2a6f97", "#c8553d", "#5b8c5a", "#8c959f")
_POLICIES = ("#2a6f97", "#8c959f", "#5b8c5a", "#8e6c8a", "#c8553d")
_BARS = ("#8c959f", "#c8553d", "#2a6f97")
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


def draw_hit_rates(
    rates: Mapping[str, Sequence[float]],
    sizes: Sequence[float],
    unit: str,
    saved: Mapping[str, Sequence[float]],
    path: Path,
) -> None:
    """Hit rate against capacity, on a logarithmic axis, and the prefill that each tier saves.

    Args:
        rates: of each policy at each capacity; the first one is drawn in front, the last one, which
            nothing can exceed, as a dashed line.
        sizes: the capacities.
        unit: what they are counted in.
        saved: seconds of prefill that each tier saves at each capacity.
        path: where to.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES * 1.3, 3.8), layout="constrained")
    axis, beside = figure.subplots(1, 2)
    first, *_, last = rates
    for (name, values), colour in zip(rates.items(), cycle(_POLICIES)):
        axis.plot(
            sizes,
            [100 * value for value in values],
            "--" if name == last else "o-",
            color=_INK if name == last else colour,
            linewidth=2.4 if name == first else 1.2,
            markersize=5 if name == first else 3.5,
            label=name,
            zorder=3 if name == first else 2,
        )
    axis.set_xscale("log")
    ticks = [f"{size:,.3g}" if size < 1000 else f"{size:,.0f}" for size in sizes]
    axis.set_xticks(sizes, ticks)
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axis.set_xlabel(f"capacity, {unit}", fontsize=9, color=_INK)
    axis.set_title("Blocks found again", loc="left", fontsize=10.5, fontweight="bold", color=_INK)
    _plain(axis)
    _draw_saved_prefill(beside, saved, ticks, unit)
    figure.savefig(path, dpi=_DPI)


def _draw_saved_prefill(
    axis: Axes, saved: Mapping[str, Sequence[float]], ticks: Sequence[str], unit: str
) -> None:
    """Stacked bars, one for each capacity."""
    below = [0.0] * len(ticks)
    for (tier, seconds), colour in zip(saved.items(), cycle(_POLICIES)):
        axis.bar(range(len(ticks)), seconds, 0.6, bottom=below, color=colour, label=tier)
        below = [sum(pair) for pair in zip(below, seconds, strict=True)]
    for place, total in enumerate(below):
        axis.annotate(
            time_of(total), (place, total), ha="center", va="bottom", fontsize=9, color=_INK
        )
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set_ylim(0, 1.15 * max(*below, 1e-9))
    axis.yaxis.set_major_formatter(lambda value, _: time_of(value) if value else "0")
    axis.set_xlabel(f"capacity, {unit}", fontsize=9, color=_INK)
    axis.set_title("Prefill saved", loc="left", fontsize=10.5, fontweight="bold", color=_INK)
    _plain(axis)


Bars = Mapping[str, Mapping[str, tuple[float, float]]]
"""Groups of bars by name, and of each bar by name its two parts, percent."""


def draw_sharing(
    found: Mapping[str, Bars], saved: Mapping[str, Sequence[tuple[float, float]]], path: Path
) -> None:
    """What is found with one store for many engines, and what that saves.

    Args:
        found: panels by title: what came from host memory, and from the store.
        saved: curves by name: bandwidth in GB/s, and percent of all prefill that is saved. One
            point of infinite bandwidth is a level. Either may be empty.
        path: where to.
    """
    from matplotlib.figure import Figure

    panels = len(found) + bool(saved)
    figure = Figure(figsize=(1.0 + 3.7 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    groups = [group for bars in found.values() for group in bars.values()]
    most = max((sum(bar) for group in groups for bar in group.values()), default=0.0)
    for axis, (title, bars) in zip(axes, found.items(), strict=False):
        _draw_bars(axis, bars, title)
        axis.set_ylim(0, 1.25 * most)
    if saved:
        _draw_saved(axes[-1], saved)
    figure.savefig(path, dpi=_DPI)


def _draw_saved(axis: Axes, saved: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for (name, curve), colour in zip(saved.items(), cycle(_POLICIES)):
        places, values = zip(*curve, strict=True)
        if math.isfinite(places[0]):
            axis.plot(places, values, "o-", color=colour, markersize=4, label=name)
        else:
            axis.axhline(values[0], linestyle="--", color=_INK, linewidth=1.2, label=name)
    every = {place for curve in saved.values() for place, _ in curve if math.isfinite(place)}
    axis.set_xscale("log")
    axis.set_xticks(sorted(every), [f"{place:g}" for place in sorted(every)])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("bandwidth of the store, GB/s", fontsize=9, color=_INK)
    _percent(axis, "Prefill saved, less all waits")


def _draw_bars(axis: Axes, bars: Bars, title: str) -> None:
    names = list(dict.fromkeys(name for group in bars.values() for name in group))
    width = 0.8 / len(names)
    for number, (name, colour) in enumerate(zip(names, cycle(_BARS), strict=False)):
        places = [group + width * (number - (len(names) - 1) / 2) for group in range(len(bars))]
        near, store = zip(*(group[name] for group in bars.values()), strict=True)
        axis.bar(places, near, width * 0.92, color=colour, label=name)
        axis.bar(places, store, width * 0.92, bottom=near, color=colour, alpha=0.5, hatch="///")
    axis.set_xticks(range(len(bars)), list(bars))
    axis.set_xlabel("host memory of each engine (hatched: store)", fontsize=9, color=_INK)
    _percent(axis, title)


def _percent(axis: Axes, title: str) -> None:
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=_INK)
    _plain(axis)


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
    _plain(axis)


def _plain(axis: Axes) -> None:
    """What all pictures of curves have."""
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
