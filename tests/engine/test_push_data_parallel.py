"""Pushes between servers that have two data-parallel ranks each, through the proxy: the decode
engine waits at the rank that prefills."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from engine.driver import SMALL, Ask, EngineSpec, Fleet
from engine.pair import QUICK
from engine.server import CALL_SECONDS, Server
from engine.workload import CHUNK, prompt
from lamina_kv.bench.ports import free_port
from push_proxy.proxies import Proxy, proxied

pytestmark = [pytest.mark.engine, pytest.mark.slow]

RANKS = ("0", "1")
PROMPTS = [prompt(830 + n, 4 * CHUNK + n) for n in range(8)]


def two_ports() -> int:
    """A free port before another."""
    while True:
        port = free_port()
        try:
            socket.create_server(("127.0.0.1", port + 1)).close()
        except OSError:
            continue
        return port


def complete(proxy: Proxy, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """The greedy answer to a prompt, through the proxy."""
    answer = proxy.post(
        "/v1/completions",
        {
            "model": "model",
            "prompt": list(tokens),
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    assert answer.status_code == 200, answer.text
    return tuple(answer.json()["choices"][0]["token_ids"])


def pushes(server: Server, rank: str, outcome: str) -> int:
    return int(server.metrics().total("lamina_pushes_total", engine=rank, outcome=outcome))


def test_two_ranks_on_each_side(llama: Path, fleet: Fleet, tmp_path: Path) -> None:
    expected = [
        answer.tokens for answer in fleet.answers(EngineSpec(llama), [Ask(p) for p in PROMPTS])
    ]
    listen = f"127.0.0.1:{two_ports()}"
    options = {"data_parallel_size": len(RANKS)}
    usual = {**QUICK, "quarantine": 120.0}
    sides: list[dict[str, Any]] = [{**usual, "listen": listen}, usual]
    with ExitStack() as stack:
        prefill, decode = (
            stack.enter_context(
                Server(
                    EngineSpec(llama, {**SMALL, "push": push}, options),
                    tmp_path / f"{n}.log",
                    forked=True,
                )
            )
            for n, push in enumerate(sides)
        )
        proxy = stack.enter_context(
            proxied([prefill.url], [decode.url], push=[listen], usable=2, health_interval=30.0)
        )
        assert [complete(proxy, tokens) for tokens in PROMPTS] == expected
        prefill.wait_until(
            lambda: sum(pushes(prefill, rank, "sent") for rank in RANKS) == len(PROMPTS),
            CALL_SECONDS,
        )
        # An idle rank of the proxy's is next, and vLLM's server takes its own in turn.
        assert [pushes(prefill, rank, "sent") for rank in RANKS] == [len(PROMPTS) // 2] * 2
        received = [pushes(decode, rank, "received") for rank in RANKS]
        assert sum(received) == len(PROMPTS)
        assert min(received) > 0
        assert sum(pushes(decode, rank, "given_up") for rank in RANKS) == 0
