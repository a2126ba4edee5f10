"""Every figure that Lamina publishes, by name, and the meter that collects them.

The names here get the prefix ``lamina_`` where they are published. The meter is used from one
thread; the engine adapter drains it once a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class MetricKind(Enum):
    """How a metric behaves."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One published figure.

    Attributes:
        name: without the prefix; a counter gets ``_total`` from its exporter.
        kind: how it behaves.
        help: what it says.
        labels: names of its labels.
        buckets: upper bounds of a histogram, in its unit.
    """

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_AGES = (1, 10, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 86400, 3 * 86400, 7 * 86400)
_CONFIG = ("version", "tiers", "chunk_tokens", "load_when", "load_mode", "loads", "saves", "push")
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_C, _G, _H = MetricKind.COUNTER, MetricKind.GAUGE, MetricKind.HISTOGRAM

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("config_info", _G, "Always 1; the labels say how Lamina is set up", _CONFIG),
        Metric("prompt_tokens", _C, "Tokens of prompts that are complete or have ended"),
        Metric("hit_tokens", _C, "Of these, tokens that were brought, by where from", ("tier",)),
        Metric("saved_seconds", _C, "Prefill that hit_tokens saved, as predicted", ("tier",)),
        Metric("computed_tokens", _C, "Of these, tokens that were computed"),
        Metric("unfinished_tokens", _C, "Of these, tokens that were neither brought nor computed"),
        Metric("lookups", _C, "Prompts that were looked up; none that may not hit"),
        Metric("lookup_tokens", _C, "Tokens of prompts that were looked up"),
        Metric("misses", _C, "Prompts whose hit was not whole, by what was missing", ("reason",)),
        Metric("loads_skipped", _C, "Hits that were recomputed instead", ("reason",)),
        Metric("load_bytes", _C, "Bytes loaded into the engine"),
        Metric("save_bytes", _C, "Bytes saved from the engine to host memory"),
        Metric("write_bytes", _C, "Bytes written from host memory to a far tier", ("tier",)),
        Metric("fetch_bytes", _C, "Bytes read from a far tier for requests that wait", ("tier",)),
        Metric("load_seconds", _H, "Duration of loads", buckets=_SECONDS),
        Metric(
            "fetch_seconds", _H, "A chunk's share of the read of its batch, without the queue",
            ("tier",), _SECONDS,
        ),
        Metric("fetch_wait_seconds", _H, "Time a request waited for far tiers", buckets=_SECONDS),
        Metric("wait_seconds", _H, "Time the model waited for a load", buckets=_SECONDS),
        Metric("save_seconds", _H, "Duration of saves, order to loadable", buckets=_SECONDS),
        Metric(
            "write_seconds", _H, "A chunk's share of the write of its batch, without the queue",
            ("tier",), _SECONDS,
        ),
        Metric("push_bytes", _C, "Bytes pushed to decode engines"),
        Metric("push_seconds", _H, "Duration of pushes, order to drained", buckets=_SECONDS),
        Metric("push_wait_seconds", _H, "Announcement of a prompt to delivery", buckets=_SECONDS),
        Metric("pushes", _C, "Prompts pushed, by what became of them", ("outcome",)),
        Metric("pushes_skipped", _C, "Pushes that were not announced", ("reason",)),
        Metric("pushes_given_up", _C, "Announced and not received", ("reason",)),
        Metric("push_blocks", _G, "Engine blocks that pushes hold", ("state",)),
        Metric("push_links", _G, "Engines that are connected, by their part in pushes", ("side",)),
        Metric("push_peer_in_use", _G, "0 while a prefill engine fails and is not used", ("peer",)),
        Metric("push_backlog_bytes", _G, "Bytes not at a decode engine yet, all ranks", ("peer",)),
        Metric("saves_held_back", _C, "Chunks whose save had to wait", ("reason",)),
        Metric("saves_dropped", _C, "Chunks not saved because their request ended first"),
        Metric("writes_skipped", _C, "Chunks not written to a far tier", ("tier", "reason")),
        Metric("asked", _C, "Chunks that a store was asked for, by its answer", ("tier", "answer")),
        Metric("failures", _C, "Transfers that failed; of pushes, tier is push", ("tier", "kind")),
        Metric("eviction_age_seconds", _H, "Chunks evicted, by idle time", ("tier",), _AGES),
        Metric("tier_capacity_bytes", _G, "Size of a tier, all ranks", ("tier",)),
        Metric("tier_used_bytes", _G, "Use of a tier, all ranks", ("tier",)),
        Metric("tier_pinned_bytes", _G, "Of it, what requests have pinned", ("tier",)),
        Metric("tier_in_use", _G, "0 while it fails and is not used", ("tier", "direction")),
        Metric("bytes_in_flight", _G, "Bytes of unfinished transfers", ("direction",)),
        Metric("waiting_requests", _G, "Requests without blocks, by what for", ("cause",)),
        Metric("transfers", _G, "Unfinished transfers", ("direction",)),
        Metric("write_backlog", _G, "Chunks waiting to be written to far tiers"),
        Metric("queue_depth", _G, "Pieces of work that no thread has taken up"),
        Metric("leased_blocks", _G, "Engine blocks held for saves and pushes"),
    )
}  # fmt: skip

Series = tuple[str, tuple[str, ...]]
"""A metric's name and the values of its labels."""


@dataclass(frozen=True, slots=True)
class Readings:
    """What was measured since the meter was last drained.

    Attributes:
        counters: increments.
        observations: values of histograms.
        gauges: last values.
    """

    counters: dict[Series, float]
    observations: dict[Series, list[float]]
    gauges: dict[Series, float]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to publish."""
        return not (self.counters or self.observations or self.gauges)


class Meter:
    """Collects figures until they are drained."""

    def __init__(self) -> None:
        self._counters: dict[Series, float] = {}
        self._observations: dict[Series, list[float]] = {}
        self._gauges: dict[Series, float] = {}
        self._published_gauges: dict[Series, float] = {}

    def count(self, name: str, amount: float, **labels: str) -> None:
        """Add to a counter."""
        series = _series(name, MetricKind.COUNTER, labels)
        self._counters[series] = self._counters.get(series, 0) + amount

    def begin(self, name: str, **labels: str) -> None:
        """Publish a series of a counter or histogram before anything has happened: of one that
        appears with its first event Prometheus does not see that event."""
        metric = METRICS[name]
        series = _series(name, metric.kind, labels)
        if metric.kind is MetricKind.COUNTER:
            self._counters.setdefault(series, 0)
        else:
            self._observations.setdefault(series, [])

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        series = _series(name, MetricKind.HISTOGRAM, labels)
        self._observations.setdefault(series, []).append(value)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge; a value that was published already is not published again."""
        series = _series(name, MetricKind.GAUGE, labels)
        if self._published_gauges.get(series) != value:
            self._gauges[series] = self._published_gauges[series] = value

    def drain(self) -> Readings:
        """Everything since the last call."""
        readings = Readings(self._counters, self._observations, self._gauges)
        self._counters, self._observations, self._gauges = {}, {}, {}
        return readings


def _series(name: str, kind: MetricKind, labels: dict[str, str]) -> Series:
    metric = METRICS[name]
    assert metric.kind is kind, name
    return name, tuple(labels[label] for label in metric.labels)
