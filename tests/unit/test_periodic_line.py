"""What vLLM's periodic log line says of Lamina is for people."""

from __future__ import annotations

from lamina_kv.engines.vllm.metrics import LaminaStats
from lamina_kv.observe.metrics import Meter


def test_an_interval_in_a_few_figures() -> None:
    meter = Meter()
    meter.count("hit_tokens", 2560, tier="host")
    meter.count("hit_tokens", 0, tier="disk")
    meter.count("load_bytes", 117_964_800)
    meter.count("write_bytes", 1 << 19, tier="disk")
    meter.count("failures", 2, tier="disk", kind="fetch_late")
    meter.count("misses", 1, reason="never_seen")
    meter.observe("wait_seconds", 0.0005)
    meter.observe("wait_seconds", 0.0004)
    for tier in ("host", "host", "disk"):
        meter.observe("eviction_age_seconds", 3.0, tier=tier)
    assert LaminaStats.of(meter.drain()).reduce() == {
        "host hit tokens": 2560,
        "loaded (MiB)": 112.5,
        "disk written (MiB)": 0.5,
        "disk fetch_late failures": 2,
        "model waited (s)": 0.0009,
        "chunks evicted": 3,
    }
    assert LaminaStats.of(Meter().drain()).reduce() == {}
