"""Two ranks that hold the same cache keep one copy of it: one slab of host memory that both map and
one shard on disk that the first writes and reads, and what both had is there again from either.

Bytes are compared and not answers: MLA on a CPU does not compute the same twice.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from engine.driver import SMALL, Ask, Engine, EngineSpec, Start
from engine.models import Checkpoints, mla_block
from engine.stores import flip
from engine.workload import CHUNK, Tokens, prompt

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BLOCK = mla_block()
HOST_BYTES = 64 << 20
"""What :data:`~engine.driver.SMALL` gives the host tier."""

CHUNKS = 7
FIRST, SECOND = (prompt(seed, CHUNKS * CHUNK + 5) for seed in (31, 32))
CORES = sorted(os.sched_getaffinity(0))


def two_replicas(model: Path, store: Path, mode: str) -> EngineSpec:
    lamina = {
        **SMALL,
        "tiers": [{"kind": "disk", "path": str(store), "capacity": "64MiB"}],
        "load": {"mode": mode, "min_tokens": 1},
    }
    options = {"tensor_parallel_size": 2, "dtype": "bfloat16", "block_size": BLOCK}
    environment = {"VLLM_CPU_OMP_THREADS_BIND": f"{CORES[0]}|{CORES[-1]}"}
    return EngineSpec(model, lamina, options, environment=environment)


def run_and_look(engine: Engine, tokens: Tokens) -> tuple[list[tuple[str, str]], int]:
    """What each of the two ranks has in the blocks of the prompt's chunks, and how many tokens of
    it were there before."""
    (name,) = engine.submit([Ask(tokens, max_tokens=2)])
    while not engine.progress()[name]:
        engine.step()
    blocks = engine.pages(name)[: CHUNKS * CHUNK // BLOCK]
    (answer,) = engine.drain()
    return [(both[: len(both) // 2], both[len(both) // 2 :]) for both in blocks], answer.cached


def shared_memory(engine: Engine) -> dict[str, list[int]]:
    """By inode, the sizes of all mappings of memory that Lamina shares between processes."""
    assert engine.process.pid is not None
    found: dict[str, list[int]] = {}
    for process in psutil.Process(engine.process.pid).children(recursive=True):
        for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
            if "/memfd:lamina-" in line:
                addresses, _, _, _, inode = line.split()[:5]
                start, end = (int(address, 16) for address in addresses.split("-"))
                found.setdefault(inode, []).append(end - start)
    return found


def test_one_rank_keeps_what_both_hold(
    checkpoints: Checkpoints, start: Start, tmp_path: Path
) -> None:
    model, store = checkpoints.model("mla"), tmp_path / "store"
    engine = start(two_replicas(model, store, "layerwise"))
    (slab,) = shared_memory(engine).values()
    assert len(slab) == 2
    assert slab[0] == slab[1]
    assert 0.9 * HOST_BYTES < slab[0] <= HOST_BYTES

    saved, _ = run_and_look(engine, FIRST)
    assert all(one == other for one, other in saved)
    assert len(set(saved)) == len(saved)
    metrics = engine.metrics()
    kept = metrics.total("lamina_tier_used_bytes", tier="host")
    assert kept > 0
    assert metrics.total("lamina_save_bytes_total") == kept
    assert metrics.total("lamina_write_bytes_total") == kept
    assert 0.9 * HOST_BYTES < metrics.total("lamina_tier_capacity_bytes", tier="host") <= HOST_BYTES

    engine.forget()
    assert run_and_look(engine, FIRST) == (saved, CHUNKS * CHUNK)
    assert engine.metrics().total("lamina_load_bytes_total") == 2 * kept, "each rank loads it"
    run_and_look(engine, SECOND)
    engine.close()
    assert sorted(path.name for path in store.rglob("rank-*")) == [
        "rank-0.lock",
        "rank-0.slab",
    ]

    engine = start(two_replicas(model, store, "parked"))
    assert run_and_look(engine, FIRST) == (saved, CHUNKS * CHUNK)
    metrics = engine.metrics()
    assert metrics.total("lamina_hit_tokens_total", tier="disk") == CHUNKS * CHUNK
    assert metrics.total("lamina_failures_total") == 0
    assert metrics.total("lamina_leased_blocks") == 0

    flip(store)
    computed, _ = run_and_look(engine, SECOND)
    assert all(one == other for one, other in computed)
    assert engine.metrics().total("lamina_failures_total", kind="fetch_corrupt") >= 1
    engine.forget()
    assert run_and_look(engine, SECOND) == (computed, CHUNKS * CHUNK)
