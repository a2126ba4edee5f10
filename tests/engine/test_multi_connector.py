"""Lamina beside vLLM's NixlConnector in a MultiConnector, in either order: prefill and decode by
NIXL, with Lamina's tiers on both sides."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.driver import (
    SMALL,
    Answer,
    Ask,
    Engine,
    EngineSpec,
    EngineStartError,
    Fleet,
    Start,
    differences,
    loading_always,
)
from engine.workload import CHUNK, loadable, prompt
from lamina_kv.bench.ports import free_port

pytest.importorskip("nixl")
pytestmark = pytest.mark.engine

PATIENCE = 120.0
"""Seconds after which something hangs."""

LAMINA: dict[str, Any] = {
    "kv_connector": "LaminaConnector",
    "kv_connector_module_path": "lamina_kv.engines.vllm",
    "kv_role": "kv_both",
    "kv_connector_extra_config": loading_always(SMALL),
}
NIXL: dict[str, Any] = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}

ASK = Ask(prompt(71, 3 * CHUNK + 5), max_tokens=4)


def beside(model: Path, *connectors: Mapping[str, Any]) -> EngineSpec:
    """An engine with a ``MultiConnector``."""
    return EngineSpec(
        model,
        {},
        transfer={
            "kv_connector": "MultiConnector",
            "kv_connector_module_path": None,
            "kv_connector_extra_config": {"connectors": connectors},
        },
        environment={"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), "UCX_TLS": "tcp,cma,self"},
    )


def test_prefill_and_decode_by_nixl(llama: Path, fleet: Fleet, start: Start) -> None:
    expected = fleet.get(EngineSpec(llama)).ask(ASK)
    prefill, decode = (start(beside(llama, *c)) for c in ((LAMINA, NIXL), (NIXL, LAMINA)))

    whole = loadable(len(ASK.tokens))

    given = _run(prefill, replace(ASK, max_tokens=1, transfer={"do_remote_decode": True}))
    answer = _run(decode, replace(ASK, transfer=given.transfer), other=prefill)
    assert not differences([answer], [expected])
    decode.drain()
    pulled = decode.metrics().total("lamina_hit_tokens_total", tier="other")
    assert pulled == len(ASK.tokens) - 1, "nothing was pulled"

    prefill.drain()
    prefill.forget()
    given = _run(prefill, replace(ASK, max_tokens=1, transfer={"do_remote_decode": True}))
    assert given.cached == whole, "the prefill engine has no use of its tiers"
    decode.forget()
    again = _run(decode, replace(ASK, transfer=given.transfer), other=prefill)
    assert not differences([again], [expected])

    decode.drain()
    decode.forget()
    alone = decode.ask(ASK)
    assert alone.cached == whole, "what was pulled is not kept"
    assert not differences([alone], [expected])


def test_lamina_twice_is_refused(llama: Path, start: Start) -> None:
    with pytest.raises(EngineStartError, match="LaminaConnector is named twice"):
        start(beside(llama, LAMINA, LAMINA))


def _run(engine: Engine, ask: Ask, other: Engine | None = None) -> Answer:
    """The answer to one request, while another engine goes on, too."""
    engine.submit([ask])
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        if other is not None:
            other.step()
        if answers := engine.step():
            return answers[0]
    pytest.fail("no answer")
