"""The bytes that Lamina brings back are the bytes that were saved, whatever they mean.

The engine's own view of its cache is read while a request holds its blocks, before and after a
round through a tier, with the cache's memory overwritten in between. This is the proof for what
answers cannot prove: arithmetic that is not the same twice (MLA on a CPU), and types in which
rounding hides a wrong bit.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import processors
from engine.driver import SMALL, Answer, Ask, Engine, EngineSpec, Fleet, Start
from engine.models import Checkpoints, mla_block
from engine.workload import BLOCK, CHUNK, loadable, prompt

pytestmark = pytest.mark.engine

TOKENS = prompt(11, 9 * CHUNK + 5)
MLA = {"dtype": "bfloat16", "block_size": mla_block(), "enable_prefix_caching": False}


def run_and_look(engine: Engine, tokens: tuple[int, ...]) -> tuple[list[str], Answer]:
    """The digests of a request's blocks once its prompt is computed, and its answer."""
    (name,) = engine.submit([Ask(tokens, max_tokens=4)])
    while engine.progress()[name] == 0:
        engine.step()
    pages = engine.pages(name)
    (answer,) = engine.drain()
    return pages, answer


@pytest.mark.parametrize("mode", ["layerwise", "parked"])
@pytest.mark.parametrize(
    ("model", "options", "block"),
    [
        pytest.param("llama", {}, BLOCK, id="float32"),
        pytest.param("llama", {"dtype": "bfloat16"}, BLOCK, id="bfloat16"),
        pytest.param(
            "llama",
            {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
            BLOCK,
            marks=pytest.mark.skipif(bool(processors.no_fp8()), reason=processors.no_fp8()),
            id="fp8",
        ),
        pytest.param("llama", {"block_size": 128}, 128, id="large-blocks"),
        pytest.param("qwen3-moe", {}, BLOCK, id="experts"),
        pytest.param("mla", MLA, mla_block(), id="mla"),
    ],
)
def test_a_round_through_host_memory(
    checkpoints: Checkpoints,
    fleet: Fleet,
    model: str,
    options: dict[str, object],
    block: int,
    mode: str,
) -> None:
    lamina = {**SMALL, "load": {"mode": mode}}
    engine = fleet.get(EngineSpec(checkpoints.model(model), lamina, options))
    saved, first = run_and_look(engine, TOKENS)
    engine.forget()
    brought_back, second = run_and_look(engine, TOKENS)

    whole = len(TOKENS) // max(block, CHUNK) * max(block, CHUNK)
    assert first.cached == 0
    assert second.cached == whole
    assert brought_back[: whole // block] == saved[: whole // block]
    assert len(set(saved)) == len(saved)


def test_a_round_through_the_disk(llama: Path, start: Start, tmp_path: Path) -> None:
    lamina = {
        **SMALL,
        "tiers": [{"kind": "disk", "path": str(tmp_path / "store"), "capacity": "64MiB"}],
    }
    spec = EngineSpec(llama, lamina)
    engine = start(spec)
    saved, _ = run_and_look(engine, TOKENS)
    engine.close()
    engine = start(spec)
    brought_back, answer = run_and_look(engine, TOKENS)

    assert answer.cached == loadable(len(TOKENS))
    assert brought_back[: answer.cached // BLOCK] == saved[: answer.cached // BLOCK]
    assert engine.metrics().total("lamina_hit_tokens_total", tier="disk") == answer.cached


@pytest.mark.parametrize("mode", ["layerwise", "parked"])
def test_arithmetic_goes_on_as_from_vllms_own_cache(llama: Path, fleet: Fleet, mode: str) -> None:
    """In bfloat16 a resumed prefill differs from a whole one; from the same boundary, with the
    same bytes, it does not."""
    options = {"dtype": "bfloat16", "block_size": CHUNK}
    asks = [Ask(prompt(seed, length)) for seed, length in enumerate((65, 200, 448, 512, 700))]

    plain = fleet.get(EngineSpec(llama, options=options))
    plain.generate(asks)
    resumed = [plain.ask(ask) for ask in asks]

    engine = fleet.get(EngineSpec(llama, {**SMALL, "load": {"mode": mode}}, options))
    engine.generate(asks)
    for ask, expected in zip(asks, resumed, strict=True):
        engine.forget()
        answer = engine.ask(ask)
        assert answer.cached == expected.cached > 0
        assert answer.samples == expected.samples
        assert answer.logprobs == expected.logprobs
