"""A real prefill server does not compute what its decode engine does without, and answers whoever
asked for it.
"""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from engine.driver import SMALL, EngineSpec, Fleet
from engine.server import CALL_SECONDS, Server
from engine.workload import CHUNK, prompt
from lamina_kv.bench.ports import free_port
from lamina_kv.push.cards import EngineCard, RankCard, RowCard
from lamina_kv.push.letters import Letter, News
from lamina_kv.push.link import Link
from lamina_kv.push.messages import NO_EPOCH, Attempt, Cancel, Claim, Failed

pytestmark = pytest.mark.engine

CARD = EngineCard("D", b"m", False, (), (RankCard(0, b"", 1, (RowCard(0, 1, 1, 1, ()),)),))


def ask(server: Server, push: str, **more: object) -> Any:
    body = {
        "model": "model",
        "prompt": [0] if more else list(prompt(17, 5 * CHUNK)),
        "max_tokens": 1,
        "kv_transfer_params": {"lamina_push": {"id": push, **more}},
    }
    request = urllib.request.Request(
        server.url + "/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=CALL_SECONDS) as answer:
        return json.load(answer)["choices"][0]


@pytest.mark.slow
def test_what_was_declined_is_aborted_and_answered(llama: Path, fleet: Fleet) -> None:
    address = f"127.0.0.1:{free_port()}"
    spec = EngineSpec(llama, {**SMALL, "push": {"listen": address}})
    with Server(spec, fleet.next_log(), forked=True) as server:
        link = Link(CARD, servers=(), token=None, silence=5.0)
        heard: list[News] = []

        def answered() -> bool:
            heard.extend(link.news())
            return any(isinstance(n, Letter) and isinstance(n.message, Failed) for n in heard)

        link.send(Letter(address, Cancel(Attempt("declined", NO_EPOCH))))
        link.send(Letter(address, Claim(("another",), 60.0)))  # refused: it is no engine
        server.wait_until(answered, CALL_SECONDS)
        before = server.metrics()
        assert ask(server, "declined")["finish_reason"] == "abort"
        computed = "vllm:iteration_tokens_total_sum"
        assert server.metrics().since(before, computed) == 0
        assert ask(server, "wanted")["finish_reason"] == "length"
        assert server.metrics().since(before, computed) > 0
        link.close()


@pytest.mark.slow
def test_what_a_router_withdraws_is_not_held(llama: Path, fleet: Fleet) -> None:
    spec = EngineSpec(llama, {**SMALL, "push": {"listen": f"127.0.0.1:{free_port()}"}})

    def held() -> float:
        return server.metrics().total("lamina_push_blocks", state="undelivered")

    with Server(spec, fleet.next_log(), forked=True) as server:
        assert ask(server, "unasked")["finish_reason"] == "length"
        server.wait_until(held, CALL_SECONDS)
        before = server.metrics()
        assert ask(server, "unasked", withdrawn=True)["finish_reason"] == "abort"
        assert server.metrics().since(before, "vllm:iteration_tokens_total_sum") == 0
        server.wait_until(lambda: not held(), CALL_SECONDS)
        server.wait_until_empty(CALL_SECONDS)
