"""Lamina's figures on vLLM's own ``/metrics``, under ``lamina_``."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)

from lamina_kv.observe.metrics import METRICS, MetricKind, Readings
from lamina_kv.values import MIB

PREFIX = "lamina_"
_SEPARATOR = "\x1f"

_TOLD = {
    "prompt_tokens": "prompt tokens",
    "hit_tokens": "hit tokens",
    "load_bytes": "loaded (MiB)",
    "save_bytes": "saved (MiB)",
    "write_bytes": "written (MiB)",
    "fetch_bytes": "fetched (MiB)",
    "failures": "failures",
}
"""Counters that vLLM's periodic line has, and what it calls them, behind their labels."""

_EVICTED = "eviction_age_seconds" + _SEPARATOR


class LaminaStats(KVConnectorStats):
    """Readings in the shape that vLLM ships between its processes: nested plain dicts."""

    data: dict[str, Any]

    @classmethod
    def of(cls, readings: Readings) -> LaminaStats:
        """Pack readings."""
        packed: dict[str, Any] = {
            "counters": {_pack(series): value for series, value in readings.counters.items()},
            "observations": {_pack(s): list(v) for s, v in readings.observations.items()},
            "gauges": {_pack(series): value for series, value in readings.gauges.items()},
        }
        return cls(data=packed)

    def reset(self) -> None:
        """Forget everything."""
        self.data = {"counters": {}, "observations": {}, "gauges": {}}

    def is_empty(self) -> bool:
        """Whether there is nothing to publish."""
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> LaminaStats:
        """Take in what came later."""
        for series, value in other.data.get("counters", {}).items():
            mine = self.data.setdefault("counters", {})
            mine[series] = mine.get(series, 0) + value
        for series, values in other.data.get("observations", {}).items():
            self.data.setdefault("observations", {}).setdefault(series, []).extend(values)
        self.data.setdefault("gauges", {}).update(other.data.get("gauges", {}))
        return self

    def reduce(self) -> dict[str, int | float]:
        """The interval in a few figures, for vLLM's periodic log line."""
        figures: dict[str, int | float] = {}
        for packed, value in self.data.get("counters", {}).items():
            name, *labels = packed.split(_SEPARATOR)
            if not value or name not in _TOLD:
                continue
            words = " ".join((*labels, _TOLD[name]))
            figures[words] = round(value / MIB, 1) if words.endswith("(MiB)") else value
        observations = self.data.get("observations", {})
        if waits := observations.get("wait_seconds", []):
            figures["model waited (s)"] = round(sum(waits), 4)
        if evicted := sum(
            len(ages) for packed, ages in observations.items() if packed.startswith(_EVICTED)
        ):
            figures["chunks evicted"] = evicted
        return figures


class LaminaPromMetrics(KVConnectorPromMetrics):
    """Registers every metric of :data:`lamina_kv.observe.metrics.METRICS` and feeds it."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        kinds = {
            MetricKind.COUNTER: metric_types[Counter],
            MetricKind.GAUGE: metric_types[Gauge],
            MetricKind.HISTOGRAM: metric_types[Histogram],
        }
        self._metrics: dict[str, Any] = {}
        for metric in METRICS.values():
            options: dict[str, Any] = {"buckets": metric.buckets} if metric.buckets else {}
            if metric.kind is MetricKind.GAUGE:
                # Of several API servers each is told now and then, and one scrape asks all.
                options["multiprocess_mode"] = "mostrecent"
            self._metrics[metric.name] = kinds[metric.kind](
                name=PREFIX + metric.name,
                documentation=metric.help,
                labelnames=[*labelnames, *metric.labels],
                **options,
            )
            if not metric.labels:
                # Published from the start, so that what never happened reads as 0.
                for values in per_engine_labelvalues.values():
                    self._metrics[metric.name].labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Feed one engine's readings."""
        for packed, value in transfer_stats_data.get("counters", {}).items():
            self._series(packed, engine_idx).inc(value)
        for packed, values in transfer_stats_data.get("observations", {}).items():
            series = self._series(packed, engine_idx)
            for value in values:
                series.observe(value)
        for packed, value in transfer_stats_data.get("gauges", {}).items():
            self._series(packed, engine_idx).set(value)

    def _series(self, packed: str, engine_idx: int) -> Any:
        name, *labels = packed.split(_SEPARATOR)
        return self._metrics[name].labels(*self.per_engine_labelvalues[engine_idx], *labels)


def _pack(series: tuple[str, tuple[str, ...]]) -> str:
    name, labels = series
    return _SEPARATOR.join((name, *labels))
