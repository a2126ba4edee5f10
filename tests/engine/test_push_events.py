"""The proxy hears vLLM's own KV events, and sends a prompt to the engine that has it, whoever has
had it computed there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.driver import EngineSpec, Fleet
from engine.server import MODEL, Server
from engine.workload import BLOCK, prompt
from lamina_kv.bench.ports import free_port
from lamina_kv.push.proxy.routing.events.places import EventPlaces
from lamina_kv.push.proxy.routing.words import PolicyName
from push_proxy.proxies import proxied
from push_proxy.running import until

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NOWHERE = "http://127.0.0.1:9"
LENGTH = 20 * BLOCK + 5


def publishing(model: Path, port: int) -> EngineSpec:
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{port}",
    }
    return EngineSpec(model, None, {"kv_events_config": json.dumps(events)})


@pytest.mark.timeout(600)
def test_a_prompt_goes_to_the_engine_that_announces_it(llama: Path, fleet: Fleet) -> None:
    ports = [free_port() for _ in range(2)]
    servers = [Server(publishing(llama, p), fleet.next_log(), forked=True) for p in ports]
    first, second = servers
    first.start()
    with second, first:
        places = {s.url: f"127.0.0.1:{p}" for s, p in zip(servers, ports, strict=True)}
        with proxied(
            [NOWHERE],
            [server.url for server in servers],
            usable=2,
            policy=PolicyName.CACHE_AWARE,
            kv_events=EventPlaces(hosts=places),
        ) as proxy:
            tokens = prompt(31, LENGTH)
            # A subscriber that has just connected may miss what is said at once.
            for seed in range(1000):
                second.complete(prompt(5000 + seed, 2 * BLOCK))
                if proxy.metric("announced_blocks", engine=second.url):
                    break
            expected = second.complete(tokens)
            until(lambda: proxy.metric("announced_blocks", engine=second.url) >= LENGTH // BLOCK)
            before = first.metrics().total("vllm:request_success_total")
            for _ in range(3):
                body = {
                    "model": MODEL,
                    "prompt": list(tokens),
                    "max_tokens": 8,
                    "temperature": 0,
                    "ignore_eos": True,
                    "return_token_ids": True,
                }
                answer = proxy.post("/v1/completions", body)
                assert tuple(answer.json()["choices"][0]["token_ids"]) == expected
            assert first.metrics().total("vllm:request_success_total") == before
            assert proxy.metric("routes_total", chosen="prefix") == 3
            second.forget()
            second.complete(prompt(32, 2 * BLOCK))  # an idle engine does not tell that it has
            until(lambda: proxy.metric("announced_blocks", engine=second.url) <= 3)
