"""Draws panels of the Grafana dashboard, without Grafana, from what a Prometheus answers to their
queries. What Grafana would draw looks otherwise; what the panels say is the same."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from math import isnan
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.dates import DateFormatter, date2num
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lamina_kv.quantities import size_of, time_of
from prometheus_server import Prometheus, Series

DASHBOARD = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "lamina.json"
_COLUMNS, _LINE_INCHES, _COLUMN_INCHES, _DPI = 24, 0.3, 0.55, 70
_RATE = "20s"
_INK, _FAINT = "#1f2328", "#8c959f"
_COLOURS = ("#2a6f97", "#c8553d", "#5b8c5a", "#8e6c8a", "#d9a441", "#8c959f", "#3d9a9a", "#b0605f")

Panel = Mapping[str, Any]


def draw(asked: Prometheus, path: Path, seconds: float, rows: Sequence[str]) -> None:
    """Draw panels as the dashboard lays them out.

    Args:
        asked: who answers their queries.
        path: a PNG file.
        seconds: of the past that is drawn.
        rows: titles of the dashboard's rows that are drawn.
    """
    parts = [part for title in rows for part in _row(title)]
    lines: dict[str, float] = {}  # where each row of panels begins, without rows that are left out
    y = 0.0
    for part in parts:
        own = part["gridPos"]
        key = f"{own['y']}"
        if key not in lines:
            lines[key] = y
            y += own["h"] if part["type"] != "row" else 1.5
    mpl.rcParams.update({"font.family": "sans-serif", "font.size": 8, "text.color": _INK})
    figure = plt.figure(figsize=(_COLUMNS * _COLUMN_INCHES, y * _LINE_INCHES), dpi=_DPI)
    end = time.time()
    for part in parts:
        own = part["gridPos"]
        top = 1 - lines[f"{own['y']}"] / y
        if part["type"] == "row":
            figure.text(0.008, top - 1 / y, part["title"], fontsize=11, weight="bold")
            continue
        left, width, height = own["x"] / _COLUMNS, own["w"] / _COLUMNS, own["h"] / y
        axes = figure.add_axes(
            (left + 0.2 * width, top - 0.72 * height, 0.76 * width, 0.56 * height)
        )
        axes.set_title(part["title"], fontsize=9, loc="left", x=-0.2, weight="bold", color=_INK)
        found = [(t, series) for t in part["targets"] for series in _ask(asked, t, end, seconds)]
        if part["type"] == "stat":
            _stat(axes, part, found)
        else:
            _lines(axes, part, found, end, seconds)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _row(title: str) -> list[Panel]:
    """A row's heading and panels."""
    board = json.loads(DASHBOARD.read_text())["panels"]
    found: list[Panel] = []
    for part in board:
        if part["type"] == "row" and found:
            return found
        if found or (part["type"] == "row" and part["title"] == title):
            found += [part, *part.get("panels", ())]
    if not found:
        raise ValueError(f"the dashboard has no row {title}")
    return found


def _ask(asked: Prometheus, target: Panel, end: float, seconds: float) -> list[Series]:
    query = target["expr"].replace("$__rate_interval", _RATE).replace("$__range", f"{seconds:.0f}s")
    query = re.sub(r"\$\w+", ".*", query)
    if target.get("instant"):
        return asked.now(query)
    return asked.over(query, end - seconds, end, 1.0)


def _name(target: Panel, series: Series) -> str:
    """What Grafana makes of a legend."""
    named = re.sub(
        r"\{\{\s*(\w+)\s*\}\}", lambda m: series.labels.get(m[1], ""), target["legendFormat"]
    )
    return named or ", ".join(f"{k}={v}" for k, v in series.labels.items())


def _words(unit: str, value: float) -> str:
    """A value with its unit, short."""
    match unit:
        case "percentunit":
            return f"{100 * value:.3g} %"
        case "s":
            return time_of(value) if value else "0 s"
        case "bytes":
            return size_of(int(value))
        case "Bps":
            return f"{size_of(int(value))}/s"
        case "ops" | "reqps":
            return f"{value:.3g}/s"
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _stat(axes: Axes, part: Panel, found: Sequence[tuple[Panel, Series]]) -> None:
    axes.set_axis_off()
    value = found[0][1].points[-1][1] if found else None
    unit = part["fieldConfig"]["defaults"]["unit"]
    text = "no data" if value is None else _words(unit, value)
    axes.text(0.4, 0.45, text, fontsize=20, ha="center", va="center", color=_COLOURS[0])


def _lines(
    axes: Axes,
    part: Panel,
    found: Sequence[tuple[Panel, Series]],
    end: float,
    seconds: float,
) -> None:
    defaults = part["fieldConfig"]["defaults"]
    times = [end - seconds + step for step in range(int(seconds) + 1)]
    names = [_name(target, series) for target, series in found]
    columns = [_at(series, times) for _, series in found]
    shown = [n for n, column in enumerate(columns) if not all(map(isnan, column))]
    moments = [float(date2num(datetime.fromtimestamp(each))) for each in times]
    stacked = "stacking" in defaults.get("custom", {})
    if stacked and shown:
        layers = [[0.0 if isnan(each) else each for each in columns[n]] for n in shown]
        colours = [_COLOURS[n % len(_COLOURS)] for n in range(len(shown))]
        axes.stackplot(moments, *layers, labels=[names[n] for n in shown], colors=colours)
    else:
        for number, n in enumerate(shown):
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(moments, columns[n], label=names[n], color=colour, linewidth=1.2)
    axes.set_xlim(moments[0], moments[-1])
    most = defaults.get("max")
    axes.set_ylim(0, 1.05 * most if most else None)
    if not shown:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color=_FAINT)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _words(defaults["unit"], v)))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S"))
    axes.tick_params(labelsize=7, colors=_FAINT, length=0)
    axes.grid(color="#eaeef2", linewidth=0.6)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    if 0 < len(shown) <= 8:
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.2, -0.12), ncols=4, fontsize=7, frameon=False,
            columnspacing=1, handlelength=1,
        )  # fmt: skip


def _at(series: Series, times: Sequence[float]) -> list[float]:
    """Values at moments; not a number where there is none."""
    known = {round(moment): value for moment, value in series.points}
    return [known.get(round(moment), float("nan")) for moment in times]
