"""Routers that speak to vLLM's NixlConnector work with Lamina as they are: they ask a prefill
server first, and tell the decode server what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.deployment import decode_spec, prefill_spec
from engine.driver import Ask, EngineSpec, Fleet
from engine.server import Server, completion
from engine.workload import BLOCK, prompt
from lamina_kv.bench.settings import REMOTE_DECODE

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


def ask(server: Server, ask: Ask, **more: Any) -> dict[str, Any]:
    body = {**completion(ask), **more}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, trust_env=False, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def prefilled(server: Server, asked: Ask) -> dict[str, Any]:
    """What the prefill server wants the decode server to be told."""
    first = ask(server, asked, max_tokens=1, kv_transfer_params=REMOTE_DECODE)
    parameters = first["kv_transfer_params"]
    assert isinstance(parameters, dict)
    return parameters


def test_a_router_that_asks_the_prefill_server_first(llama: Path, fleet: Fleet) -> None:
    asks = [Ask(prompt(seed, 400), max_tokens=6) for seed in range(60, 64)]
    expected = [answer.tokens for answer in fleet.answers(EngineSpec(llama), asks)]
    options = {"enable_prompt_tokens_details": True}
    spec, other = prefill_spec(llama, options), decode_spec(llama, options, {"min_tokens": 0})
    with (
        Server(spec, fleet.next_log(), forked=True) as prefill,
        Server(other, fleet.next_log(), forked=True) as decode,
    ):
        for asked, right in zip(asks, expected, strict=True):
            told = prefilled(prefill, asked)
            assert spec.lamina is not None
            assert told["lamina_push"]["prefill"] == spec.lamina["push"]["listen"]
            assert told["do_remote_prefill"] is True
            answer = ask(decode, asked, kv_transfer_params=told)
            assert tuple(answer["choices"][0]["token_ids"]) == right
            details = answer["usage"]["prompt_tokens_details"]
            assert details["cached_tokens"] == 0, "what was pushed is not called cached"
        assert decode.metrics().total("lamina_pushes_total", outcome="received") == len(asks)
        half = asks[0].tokens[:200] + prompt(70, 200)
        told = prefilled(prefill, Ask(half))
        answer = ask(decode, Ask(half), kv_transfer_params=told)
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == 200 // BLOCK * BLOCK, "what the prefill server had is"
        prefill.wait_until_empty(30)
        decode.wait_until_empty(30)
