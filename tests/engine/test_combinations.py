"""What users of vLLM switch on beside a connector changes no answer and loses no hit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from engine.driver import SMALL, Ask, EngineSpec, Fleet, Start, differences, loading_always
from engine.models import Checkpoints
from engine.workload import CHUNK, loadable, mixed_prompts, prompt

pytestmark = pytest.mark.engine

PROMPTS = mixed_prompts(61, count=24)
ASKS = [Ask(tokens) for tokens in PROMPTS]


def expect_same(
    fleet: Fleet,
    model: Path,
    options: Mapping[str, object],
    asks: list[Ask] = ASKS,
    lamina: Mapping[str, object] = SMALL,
) -> None:
    """Cold and from the host tier the answers are those of the same vLLM without Lamina."""
    expected = fleet.answers(EngineSpec(model, options=options), asks)
    engine = fleet.get(EngineSpec(model, lamina, options))
    assert not differences(engine.generate(asks), expected)
    engine.forget()
    before = engine.metrics()
    assert not differences(engine.generate(asks), expected)
    after = engine.metrics()
    assert after.since(before, "lamina_hit_tokens_total", tier="host") > 0
    assert after.total("lamina_failures_total") == 0
    assert after.total("lamina_leased_blocks") == after.total("lamina_transfers") == 0


@pytest.mark.parametrize("mode", ["layerwise", pytest.param("parked", marks=pytest.mark.slow)])
def test_without_vllms_own_prefix_cache(llama: Path, fleet: Fleet, mode: str) -> None:
    """Every hit is then Lamina's."""
    options = {"enable_prefix_caching": False}
    expect_same(fleet, llama, options, lamina={**SMALL, "load": {"mode": mode}})
    engine = fleet.get(EngineSpec(llama, {**SMALL, "load": {"mode": mode}}, options))
    ask = Ask(prompt(62, 4 * CHUNK + 9))
    engine.ask(ask)
    assert engine.ask(ask).cached == loadable(len(ask.tokens))


def test_priorities_with_too_little_memory(llama: Path, fleet: Fleet) -> None:
    """Requests are preempted for more urgent ones while their chunks are being saved."""
    asks = [Ask(prompt(70 + i, 150 + 40 * (i % 4)), max_tokens=60, priority=-i) for i in range(10)]
    options = {
        "scheduling_policy": "priority",
        "num_gpu_blocks_override": 40,
        "max_num_seqs": 6,
        "max_model_len": 1024,
    }
    expect_same(fleet, llama, options, asks)


@pytest.mark.parametrize("seed", [0, 1], ids=["accepted", "rejected"])
def test_a_draft_model(checkpoints: Checkpoints, llama: Path, fleet: Fleet, seed: int) -> None:
    """The model itself guesses right, another one wrong."""
    draft = str(checkpoints.model("llama", seed))
    drafts = {"speculative_config": {"model": draft, "num_speculative_tokens": 3}}
    asks = [replace(ask, max_tokens=24) for ask in ASKS[:12]]
    expected = fleet.answers(EngineSpec(llama), asks)
    engine = fleet.get(EngineSpec(llama, SMALL, drafts))
    assert not differences(engine.generate(asks), expected)
    engine.forget()
    again = engine.generate(asks)
    assert not differences(again, expected)
    assert sum(answer.cached for answer in again) > 0


@pytest.mark.parametrize("first", ["LaminaConnector", "ExampleConnector"])
def test_beside_another_connector(
    llama: Path, fleet: Fleet, start: Start, tmp_path: Path, first: str
) -> None:
    """vLLM's ``MultiConnector`` loads from the first that has a hit and saves to all."""
    connectors: list[dict[str, object]] = [
        {
            "kv_connector": "LaminaConnector",
            "kv_connector_module_path": "lamina_kv.engines.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": loading_always(SMALL),
        },
        {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "example")},
        },
    ]
    if first != "LaminaConnector":
        connectors.reverse()
    transfer = {
        "kv_connector": "MultiConnector",
        "kv_connector_module_path": None,
        "kv_connector_extra_config": {"connectors": connectors},
    }
    asks = ASKS[:8]
    expected = fleet.answers(EngineSpec(llama), asks)
    engine = start(EngineSpec(llama, {}, transfer=transfer))
    assert not differences(engine.generate(asks), expected)
    assert engine.reset(everywhere=False)
    again = engine.generate(asks)
    assert not differences(again, expected)
    assert all(
        a.cached >= len(p) // CHUNK * CHUNK - CHUNK for a, p in zip(again, PROMPTS, strict=False)
    )
    metrics = engine.metrics()
    assert metrics.total("lamina_lookups_total") == 2 * len(asks), "some have not ended for Lamina"
    if first == "LaminaConnector":
        assert metrics.total("lamina_hit_tokens_total", tier="host") > 0


@pytest.mark.parametrize(("role", "loads", "saves"), [("kv_producer", 0, 1), ("kv_consumer", 1, 0)])
def test_a_role_is_obeyed(
    llama: Path, start: Start, tmp_path: Path, role: str, loads: int, saves: int
) -> None:
    lamina = {
        **SMALL,
        "tiers": [{"kind": "disk", "path": str(tmp_path / "store"), "capacity": "32MiB"}],
    }
    ask, other = Ask(prompt(63, 3 * CHUNK + 1)), Ask(prompt(64, 3 * CHUNK + 1))
    engine = start(EngineSpec(llama, lamina))
    engine.ask(ask)
    engine.close()
    engine = start(EngineSpec(llama, lamina, transfer={"kv_role": role}))
    assert engine.ask(ask).cached == loads * 3 * CHUNK
    engine.ask(other)
    engine.close()
    engine = start(EngineSpec(llama, lamina))
    assert engine.ask(other).cached == saves * 3 * CHUNK


def test_an_end_with_transfers_in_flight(llama: Path, start: Start, tmp_path: Path) -> None:
    """What was under way is finished and found again; nothing is left behind."""
    lamina = {
        **SMALL,
        "tiers": [{"kind": "disk", "path": str(tmp_path / "store"), "capacity": "32MiB"}],
    }
    engine = start(EngineSpec(llama, lamina, faults={"slow_saves": 0.5}))
    ask = Ask(prompt(65, 6 * CHUNK + 1), max_tokens=1)
    engine.submit([ask])
    while not engine.metrics().total("lamina_transfers", direction="save"):
        engine.step()
    engine.close()
    assert engine.process.exitcode == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(engine.process.pid, 0)
    engine = start(EngineSpec(llama, lamina))
    assert not differences([engine.ask(ask)], [start(EngineSpec(llama)).ask(ask)])
