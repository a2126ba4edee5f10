"""What several API servers publish together: one scrape asks all of them, and finds one series."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SERVERS = """
import os, sys
from types import SimpleNamespace
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from lamina_kv.engines.vllm.metrics import LaminaPromMetrics, LaminaStats
from lamina_kv.observe.metrics import Meter

metrics = LaminaPromMetrics(
    SimpleNamespace(kv_transfer_config=SimpleNamespace()),
    {kind: kind for kind in (Counter, Gauge, Histogram)},
    ["engine"],
    {0: ["0"]},
)

def server(backlog):
    meter = Meter()
    meter.gauge("write_backlog", backlog)
    meter.gauge("tier_used_bytes", 100 * backlog, tier="host")
    meter.count("prompt_tokens", 10)
    metrics.observe(LaminaStats.of(meter.drain()).data)

for backlog in (7, 3):
    if not (child := os.fork()):
        server(backlog)
        os._exit(0)
    os.waitpid(child, 0)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
for metric in registry.collect():
    for sample in metric.samples:
        if sample.value and not sample.name.endswith("_created"):
            print(sample.name, *sorted(sample.labels), sample.value)
"""


def test_gauges_of_several_servers_are_one_series(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SERVERS]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said = [line for line in ran.stdout.splitlines() if line.startswith("lamina_")]
    assert sorted(said) == [
        "lamina_prompt_tokens_total engine 20.0",
        "lamina_tier_used_bytes engine tier 300.0",
        "lamina_write_backlog engine 3.0",
    ]
