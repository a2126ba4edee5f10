"""What a person sees of Lamina on a real server: metrics, log lines, and that a hit outlives
the server.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from engine.driver import EngineSpec, Fleet
from engine.server import CALL_SECONDS, Server, ServerEnded
from engine.workload import CHUNK, loadable, prompt
from lamina_kv.observe.metrics import METRICS, MetricKind

pytestmark = pytest.mark.engine

TOKENS = prompt(91, 5 * CHUNK + 30)
HIT = loadable(len(TOKENS))
CHUNK_BYTES = CHUNK * 4 * 2 * 2 * 32 * 4
"""Tokens, layers, keys and values, heads, head size, float32."""


@pytest.mark.slow
def test_a_hit_from_each_tier(llama: Path, fleet: Fleet, tmp_path: Path) -> None:
    lamina = {
        "host": {"capacity": "16MiB"},
        "tiers": [{"kind": "disk", "path": str(tmp_path / "store"), "capacity": "16MiB"}],
        "observe": {"trace": str(tmp_path / "trace.jsonl")},
    }
    # By its name alone the connector is found through vLLM's plugins.
    by_name = {"kv_connector_module_path": None}
    spec = EngineSpec(llama, lamina, options={"shutdown_timeout": 30}, transfer=by_name)
    with Server(spec, fleet.next_log(), forked=True) as server:
        # What has not happened yet is 0, not absent: else no alert would see it happen first.
        server.wait_until(lambda: server.metrics().total("lamina_config_info") == 1, CALL_SECONDS)
        assert {
            sample.labels["kind"]
            for sample in server.metrics().samples
            if sample.name == "lamina_failures_total" and sample.labels["tier"] == "disk"
        } >= {"fetch_corrupt", "write_refused"}
        first = server.complete(TOKENS)
        server.wait_until(
            lambda: server.metrics().total("lamina_write_bytes_total") == 5 * CHUNK_BYTES,
            CALL_SECONDS,
        )
        server.forget()
        before = server.metrics()
        second = server.complete(TOKENS)
        server.wait_until(
            lambda: server.metrics().since(before, "lamina_load_seconds_count") == 1, CALL_SECONDS
        )
        after = server.metrics()
        host_log = server.log()
        server.stop()
        whole_log = server.log()
    assert first == second
    asked, again = map(json.loads, (tmp_path / "trace.jsonl").read_text().splitlines())
    assert asked["input_length"] == len(TOKENS)
    assert (len(asked["hash_ids"]), asked["chunk_bytes"]) == (5, CHUNK_BYTES)
    changed = ("timestamp", "prefill_seconds")
    assert again == asked | {name: again[name] for name in changed}
    assert again["prefill_seconds"] > 0
    assert again["timestamp"] > asked["timestamp"] > 0

    assert before.total("vllm:external_prefix_cache_queries_total") == len(TOKENS)
    assert before.total("vllm:external_prefix_cache_hits_total") == 0
    assert after.total("vllm:external_prefix_cache_hits_total") == HIT
    cached = "vllm:prompt_tokens_cached_by_source_total"
    assert after.total(cached, source="host") == HIT
    assert after.total(cached, source="disk") == 0
    assert after.total(cached, source="external_unspecified") == 0
    assert after.total("lamina_lookups_total") == 2
    assert after.total("lamina_lookup_tokens_total") == 2 * len(TOKENS)
    assert after.total("lamina_hit_tokens_total", tier="host") == HIT
    assert after.total("lamina_load_bytes_total") == HIT // CHUNK * CHUNK_BYTES
    assert after.total("lamina_save_bytes_total") == 5 * CHUNK_BYTES
    assert after.total("lamina_wait_seconds_count") == 1
    assert after.total("lamina_failures_total") == 0
    for tier in ("host", "disk"):
        capacity = after.total("lamina_tier_capacity_bytes", tier=tier)
        assert 0.9 * (16 << 20) < capacity <= 16 << 20, "whole objects"
        assert after.total("lamina_tier_used_bytes", tier=tier) == 5 * CHUNK_BYTES
    published = {sample.name for sample in after.samples}
    for metric in METRICS.values():
        if not metric.labels:
            suffix = {MetricKind.COUNTER: "_total", MetricKind.HISTOGRAM: "_bucket"}
            assert f"lamina_{metric.name}{suffix.get(metric.kind, '')}" in published

    assert re.search(
        r"INFO .*Lamina \S+ keeps KV cache in \S+ MiB of host memory \(\d+ chunks\), disk, \S+ MiB "
        r"\(\d+ chunks, 0 from earlier runs\); .* saves and loads",
        host_log,
    )
    assert re.search(
        rf"INFO .*Lamina ends: {2 * len(TOKENS):,} prompt tokens, {HIT:,} from host; "
        ".* 5 chunks stay in disk",
        whole_log,
    )
    line = re.search(r"INFO .*request \S+: prompt 350 tokens.*", host_log)
    assert line, "a loaded request is told of at INFO"
    assert re.search(
        rf"hit engine 0 host {HIT} disk 0, loaded {HIT} \(\w+\), recomputed {350 - HIT}, "
        r"load [\d.]+ ms, model waited [\d.]+ ms",
        line[0],
    )
    assert len(re.findall(r"request \S+: prompt", host_log)) == 1, "one line, not two; no miss"

    with Server(spec, fleet.next_log(), forked=True) as server:
        third = server.complete(TOKENS)
        metrics = server.metrics()
        assert metrics.total(cached, source="disk") == HIT
        assert metrics.total(cached, source="host") == 0
        assert metrics.total("vllm:external_prefix_cache_hits_total") == HIT
        assert metrics.total("lamina_hit_tokens_total", tier="disk") == HIT
        assert f"host 0 disk {HIT}, loaded {HIT}" in server.log()
        assert "5 from earlier runs" in server.log()
    assert third == first


@pytest.mark.slow
def test_a_mistake_stops_the_server_with_a_reason(llama: Path, fleet: Fleet) -> None:
    spec = EngineSpec(llama, {"hots": {"capacity": "1GiB"}})
    with pytest.raises(ServerEnded) as end, Server(spec, fleet.next_log(), forked=True):
        pass
    assert end.value.code != 0
    assert "hots: unknown key; did you mean host" in str(end.value)
