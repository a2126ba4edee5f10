"""Engines of one data-parallel server each have slots of their own in one store on disk, and one
store by key between them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.driver import SMALL, Ask, EngineSpec, Fleet, Start
from engine.server import CALL_SECONDS, Server
from engine.workload import CHUNK, prompt

pytestmark = [pytest.mark.engine, pytest.mark.soak]

PROMPTS = [prompt(500 + seed, 3 * CHUNK + 5) for seed in range(6)]
CORES = sorted(os.sched_getaffinity(0))


def test_two_engines_and_then_one(llama: Path, fleet: Fleet, start: Start, tmp_path: Path) -> None:
    store = tmp_path / "store"
    lamina = {**SMALL, "tiers": [{"kind": "disk", "path": str(store), "capacity": "32MiB"}]}
    spec = EngineSpec(llama, lamina, {"data_parallel_size": 2})
    asks = [Ask(tokens) for tokens in PROMPTS]
    expected = [answer.tokens for answer in fleet.answers(EngineSpec(llama), asks)]
    with Server(spec, tmp_path / "first.log") as server:
        for _ in range(3):  # so that both engines have seen every prompt
            assert [server.complete(tokens) for tokens in PROMPTS] == expected
        server.wait_until(
            lambda: server.metrics().total("lamina_transfers") == 0 and written(server) > 0,
            CALL_SECONDS,
        )
        assert server.stop() == 0
    assert sorted(path.name for path in store.glob("*/rank-*.slab")) == [
        "rank-0.slab",
        "rank-1.slab",
    ]
    with Server(spec, tmp_path / "second.log") as server:
        for _ in range(2):
            assert [server.complete(tokens) for tokens in PROMPTS] == expected
        metrics = server.metrics()
        for engine in ("0", "1"):
            assert metrics.total("lamina_hit_tokens_total", tier="disk", engine=engine) > 0
        assert metrics.total("lamina_failures_total") == 0
        assert server.stop() == 0
    single = start(EngineSpec(llama, lamina))
    assert [answer.tokens for answer in single.generate(asks)] == expected
    assert [path.name for path in store.glob("*/rank-*.slab")] == ["rank-0.slab"]


def test_two_engines_find_each_others_chunks_by_key(
    llama: Path, fleet: Fleet, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    tier = {"kind": "directory", "name": "shared", "path": str(store), "keep": "all"}
    lamina = {**SMALL, "tiers": [tier]}
    spec = EngineSpec(llama, lamina, {"data_parallel_size": 2})
    prompts = PROMPTS[:-1]  # engines take turns: with an odd number none is asked the same again
    asks = [Ask(tokens) for tokens in prompts]
    expected = [answer.tokens for answer in fleet.answers(EngineSpec(llama), asks)]
    with Server(spec, tmp_path / "server.log", forked=True) as server:
        for tokens, answer in zip(prompts, expected, strict=True):
            assert server.complete(tokens) == answer
            server.wait_until(lambda: server.metrics().total("lamina_transfers") == 0, CALL_SECONDS)
        before = server.metrics()
        for _ in range(2):
            assert [server.complete(tokens) for tokens in prompts] == expected
        after = server.metrics()
        read = [
            after.since(before, "lamina_hit_tokens_total", tier="shared", engine=engine)
            for engine in ("0", "1")
        ]
        # What an engine has not saved itself it has from the other one.
        assert sum(read) == len(prompts) * 3 * CHUNK
        assert after.total("lamina_failures_total") == 0
        assert server.stop() == 0
    files = [path.suffix for path in store.rglob("*.[0-9]*")]
    assert files == [".0"] * len(prompts) * 3


def written(server: Server) -> float:
    """Bytes on disk of the engine that has fewer."""
    metrics = server.metrics()
    return min(metrics.total("lamina_write_bytes_total", engine=e) for e in ("0", "1"))
