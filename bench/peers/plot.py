"""Plots of the comparison. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lamina_kv.bench.report import duration
from peers.arrivals import Service
from peers.results import Outcome, PeersReport, Row
from peers.settings import Scenario
from peers.systems import System

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT, _FLOOR = "#1f2328", "#8c959f", "#c8553d"
_COLOURS = {
    System.RECOMPUTE.value: "#8c959f",
    System.OFFLOADING.value: "#b08f5a",
    System.SIMPLE.value: "#a7764f",
    System.LMCACHE.value: "#5b8c5a",
    System.LAMINA.value: "#2a6f97",
}
_TITLES = {
    Scenario.HOST: "Hit in host memory",
    Scenario.DISK: "Hit on disk",
    Scenario.SUFFIX: "Hit in host memory, long suffix",
    Scenario.SLOW: "Hit behind a slow link, long suffix",
    Scenario.SLOWER: "Hit behind a link slower than computing",
    Scenario.MISS: "Nothing to hit: tokens a second",
}
_MARGIN = 1.3
_WIDTH_INCHES, _PANEL_INCHES, _DPI = 9.0, 2.3, 160


def draw_peers(report: PeersReport, path: Path) -> None:
    """A panel for each scenario: a bar for each system, and under a mixed load a curve."""
    from matplotlib.figure import Figure

    panels = [outcome for outcome in report.outcomes if outcome.rows]
    loads = [
        (share, [one for one in outcome.services if one.share == share])
        for outcome in report.outcomes
        for share in sorted({one.share for one in outcome.services})
    ]
    count = len(panels) + len(loads)
    figure = Figure(figsize=(_WIDTH_INCHES, _PANEL_INCHES * -(-count // 2)), layout="constrained")
    axes = [figure.add_subplot(-(-count // 2), 2, index + 1) for index in range(count)]
    for axis, outcome in zip(axes, panels, strict=False):
        _draw_bars(axis, outcome)
    for axis, (share, services) in zip(axes[len(panels) :], loads, strict=True):
        _draw_curves(axis, share, services)
    figure.savefig(path, dpi=_DPI)


def _draw_bars(axis: Axes, outcome: Outcome) -> None:
    """Medians, with a line from the smallest to the largest, and the floor. Where all others take a
    fraction of recomputing, its bar leads out of the panel."""
    others = [row.samples.high for row in outcome.rows if row.samples.name != System.RECOMPUTE]
    limit = _MARGIN * max(others)
    for place, row in enumerate(reversed(outcome.rows)):
        one = row.samples
        axis.barh(place, one.median, height=0.68, color=_colour(row))
        inside = one.high < limit
        if inside:
            axis.plot([one.low, one.high], [place, place], color=_INK, linewidth=1)
        axis.annotate(
            f"{one.median:.0f}/s" if outcome.more_is_better else duration(one.median),
            (min(one.high, limit), place),
            xytext=(4 if inside else -4, 0),
            textcoords="offset points",
            ha="left" if inside else "right",
            va="center",
            fontsize=7.5,
            color=_INK if inside else "white",
        )
    if outcome.floors:
        axis.axvline(outcome.floors[0].median, color=_FLOOR, linewidth=1.2, linestyle=(0, (4, 2)))
    axis.set_yticks(range(len(outcome.rows)), [row.samples.name for row in outcome.rows[::-1]])
    axis.set_xlim(0, limit)
    axis.locator_params(axis="x", nbins=5)
    if not outcome.more_is_better:
        axis.xaxis.set_major_formatter(lambda value, _: duration(value) if value else "0")
    _dress(axis, _TITLES[outcome.scenario])


def _draw_curves(axis: Axes, share: float, services: Sequence[Service]) -> None:
    """Goodput by the rate that came."""
    labels = list(dict.fromkeys(one.label for one in services))
    for label in labels:
        points = sorted((one.rate, one.goodput) for one in services if one.label == label)
        rates, goodputs = zip(*points, strict=True)
        axis.plot(
            rates, goodputs, "o-", markersize=4, color=_COLOURS.get(label, _FAINT), label=label
        )
    axis.set_ylim(bottom=0)
    axis.set_xlabel("requests a second", fontsize=8, color=_INK)
    axis.legend(frameon=False, fontsize=7)
    _dress(axis, f"Goodput, {share:.0%} hits")


def _colour(row: Row) -> str:
    return _COLOURS.get(row.samples.name, _COLOURS[System.LAMINA.value])


def _dress(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold", color=_INK)
    axis.tick_params(colors=_INK, labelsize=7.5)
    axis.grid(axis="x", color="#e6e8eb", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
