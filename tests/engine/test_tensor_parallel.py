"""Two ranks execute one plan on their own shards: equal answers, a hit only where both have it,
and found again by both after a restart.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.driver import SMALL, Ask, EngineSpec, Fleet, Start, differences
from engine.stores import flip, slab_of
from engine.workload import BLOCK, CHUNK, loadable, mixed_prompts

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPTS = mixed_prompts(101, count=20)
ASKS = [Ask(tokens) for tokens in PROMPTS]
CORES = sorted(os.sched_getaffinity(0))
TWO_RANKS = {"tensor_parallel_size": 2}
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": f"{CORES[0]}|{CORES[-1]}"}


def two_ranks(model: Path, store: Path | None, mode: str = "auto") -> EngineSpec:
    lamina: dict[str, object] | None = None
    if store is not None:
        lamina = {
            **SMALL,
            "tiers": [{"kind": "disk", "path": str(store), "capacity": "64MiB"}],
            "load": {"mode": mode, "min_tokens": 1},
        }
    return EngineSpec(model, lamina, TWO_RANKS, environment=TWO_CORES)


def test_two_ranks(llama: Path, start: Start, tmp_path: Path) -> None:
    store = tmp_path / "store"
    plain = start(two_ranks(llama, None))
    expected = plain.generate(ASKS)
    plain.close()

    engine = start(two_ranks(llama, store, "layerwise"))
    assert not differences(engine.generate(ASKS), expected)
    engine.forget()
    (name,) = engine.submit([Ask(PROMPTS[0], max_tokens=2)])
    while not engine.progress()[name]:
        engine.step()
    pages = engine.pages(name)
    engine.drain()
    engine.forget()
    again = engine.generate(ASKS)
    assert not differences(again, expected)
    assert all(a.cached >= loadable(len(p)) for a, p in zip(again, PROMPTS, strict=True))
    engine.close()
    assert sorted(path.name for path in store.glob("*/rank-*.slab")) == [
        "rank-0.slab",
        "rank-1.slab",
    ]

    engine = start(two_ranks(llama, store, "parked"))
    one_by_one = []
    for ask in ASKS:
        engine.forget()
        one_by_one.append(engine.ask(ask))
    assert not differences(one_by_one, expected)
    assert [answer.cached for answer in one_by_one] == [loadable(len(p)) for p in PROMPTS]
    engine.forget()
    (name,) = engine.submit([Ask(PROMPTS[0], max_tokens=2)])
    while not engine.progress()[name]:
        engine.step()
    loaded = loadable(len(PROMPTS[0]))
    assert engine.pages(name)[: loaded // BLOCK] == pages[: loaded // BLOCK]
    assert engine.drain()[0].cached == loaded > 0
    metrics = engine.metrics()
    assert metrics.total("lamina_hit_tokens_total", tier="disk") > 0
    assert metrics.total("lamina_failures_total") == 0
    assert metrics.total("lamina_leased_blocks") == 0


@pytest.mark.soak
def test_one_rank_has_lost_its_shard(llama: Path, start: Start, tmp_path: Path) -> None:
    """What one rank cannot deliver no rank delivers; what one rank finds damaged is recomputed
    by both."""
    store = tmp_path / "store"
    ask = max(ASKS, key=lambda ask: len(ask.tokens))
    engine = start(two_ranks(llama, store))
    expected = engine.ask(ask)
    engine.close()

    flip(store, [0], rank=1)
    engine = start(two_ranks(llama, store, "layerwise"))
    assert not differences([engine.ask(ask)], [expected])
    assert engine.metrics().total("lamina_failures_total", kind="fetch_corrupt") == 1
    engine.close()

    slab, _ = slab_of(store, rank=1)
    slab.unlink()
    engine = start(two_ranks(llama, store))
    answer = engine.ask(ask)
    assert answer.cached == 0
    assert not differences([answer], [expected])
    engine.forget()
    assert engine.ask(ask).cached == loadable(len(ask.tokens)) >= CHUNK


def test_one_rank_is_not_two(llama: Path, fleet: Fleet, start: Start, tmp_path: Path) -> None:
    store = tmp_path / "store"
    engine = start(two_ranks(llama, store))
    engine.ask(ASKS[0])
    engine.close()
    spec = two_ranks(llama, store)
    alone = start(EngineSpec(llama, spec.lamina))
    answer = alone.ask(ASKS[0])
    assert answer.cached == 0
    assert not differences([answer], fleet.answers(EngineSpec(llama), [ASKS[0]]))
