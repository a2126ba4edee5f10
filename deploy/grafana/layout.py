"""What a dashboard is made of, and its JSON.

Grafana's own generators (grafana-foundation-sdk, grafanalib) would type every option of a panel.
These panels use few, so that the JSON is written here and nothing has to be installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTH = 24
"""Columns of Grafana's grid."""

ENGINE = 'model_name=~"$model", instance=~"$instance", engine=~"$engine"'
"""Selects what the dashboard's variables say, of an engine's series."""

PROXY = 'instance=~"$proxy"'
"""Likewise, of a proxy's."""

SOURCE = {"type": "prometheus", "uid": "$datasource"}


@dataclass(frozen=True)
class Query:
    """One line, or family of lines, of a panel.

    Attributes:
        expression: PromQL; ``ENGINE`` and ``PROXY`` in braces are replaced by their selectors.
        legend: Grafana's template for its name.
        instant: whether only the newest value matters.
    """

    expression: str
    legend: str
    instant: bool = False


@dataclass(frozen=True)
class Panel:
    """A panel.

    Attributes:
        title: what it shows.
        description: what to read from it.
        queries: what it draws.
        unit: Grafana's name of the unit.
        kind: Grafana's name of the panel.
        width: columns.
        stacked: whether lines are stacked.
        most: upper end of the axis; None for what is there.
    """

    title: str
    description: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    most: float | None = None


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: Sequence[Panel]
    collapsed: bool = False


def _expression(query: Query) -> str:
    return query.expression.replace("{ENGINE", "{" + ENGINE).replace("{PROXY", "{" + PROXY)


def dashboard(rows: Sequence[Row]) -> dict[str, object]:
    """A dashboard as Grafana reads it."""
    panels: list[dict[str, object]] = []
    y = 0
    for row in rows:
        heading = {
            "type": "row",
            "title": row.title,
            "collapsed": row.collapsed,
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
        }
        y += 1
        inside, y = _laid_out(row.panels, y)
        panels.append({**heading, "panels": inside if row.collapsed else []})
        panels += [] if row.collapsed else inside
    for number, panel in enumerate(_all(panels), 1):
        panel["id"] = number
    return {
        "uid": "lamina-kv",
        "title": "Lamina: KV cache",
        "description": "Lamina's tiers, loads and pushes. docs/operating.md says what to look at.",
        "tags": ["lamina", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [*_variables()]},
        "panels": panels,
    }


def _all(panels: Sequence[dict[str, object]]) -> Iterator[dict[str, object]]:
    for panel in panels:
        yield panel
        inside = panel.get("panels")
        if isinstance(inside, list):
            yield from inside


def _laid_out(panels: Sequence[Panel], y: int) -> tuple[list[dict[str, object]], int]:
    """Panels side by side from line ``y`` on, and the line below them."""
    height, x = 8, 0
    laid_out: list[dict[str, object]] = []
    for panel in panels:
        if x + panel.width > WIDTH:
            x, y = 0, y + height
        position = {"x": x, "y": y, "w": panel.width, "h": height}
        laid_out.append({**_panel(panel), "gridPos": position})
        x += panel.width
    return laid_out, y + height


def _panel(panel: Panel) -> dict[str, object]:
    custom = {"fillOpacity": 10, "showPoints": "never"}
    if panel.stacked:
        custom |= {"fillOpacity": 40, "stacking": {"mode": "normal"}}
    defaults: dict[str, object] = {"unit": panel.unit, "min": 0, "custom": custom}
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.kind != "timeseries":
        del defaults["custom"]
    shown: dict[str, object] = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [_target(query, chr(ord("A") + n)) for n, query in enumerate(panel.queries)],
    }
    if panel.kind == "stat":
        shown["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area"}
    if panel.kind == "table":
        hidden = {"Time": True, "Value": True, "__name__": True, "job": True}
        shown["transformations"] = [{"id": "organize", "options": {"excludeByName": hidden}}]
    return shown


def _target(query: Query, letter: str) -> dict[str, object]:
    target: dict[str, object] = {
        "refId": letter,
        "datasource": SOURCE,
        "expr": _expression(query),
        "legendFormat": query.legend,
    }
    if query.instant:
        target |= {"instant": True, "range": False, "format": "table" if not query.legend else ""}
    return target


def _variables() -> Iterator[dict[str, object]]:
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    series = "lamina_prompt_tokens_total"
    yield _variable("model", "Model", f"label_values({series}, model_name)")
    chosen = f'{series}{{model_name=~"$model"}}'
    yield _variable("instance", "Server", f"label_values({chosen}, instance)")
    yield _variable("engine", "Engine", f"label_values({chosen}, engine)")
    yield _variable("proxy", "Proxy", "label_values(lamina_proxy_outstanding, instance)")


def _variable(name: str, label: str, query: str) -> dict[str, object]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
