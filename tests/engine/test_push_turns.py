"""What a decode engine computes comes back: through a store that both pools share, the prefill
engine has the answers of former turns, and computes only what is new."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.deployment import ANSWERED, Deployment, complete
from engine.driver import Ask, EngineSpec, Fleet
from engine.server import Server
from engine.workload import BLOCK, CHUNK, prompt
from lamina_kv.bench.ports import free_port

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FIRST, ANSWER, NEW = 500, 200, 150
"""Tokens of the first prompt, of every answer, and of what a client says next."""
PATIENCE = 60.0


def written(server: Server) -> bool:
    """Whether nothing is on its way to the store."""
    metrics = server.metrics()
    return not metrics.total("lamina_transfers") and not metrics.total("lamina_write_backlog")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("role", ["kv_both", "kv_consumer"])
def test_a_turn_computes_what_is_new(llama: Path, fleet: Fleet, tmp_path: Path, role: str) -> None:
    """A decode engine that saves nothing (``kv_consumer``) leaves its answers to be computed."""
    store = {"kind": "directory", "path": str(tmp_path / "shared"), "keep": "all"}
    lamina: dict[str, Any] = {"host": {"capacity": "64MiB"}, "tiers": [store]}
    listen = {"listen": f"127.0.0.1:{free_port()}"}
    prefill = Server(EngineSpec(llama, {**lamina, "push": listen}), fleet.next_log(), forked=True)
    spec = EngineSpec(llama, {**lamina, "push": {}}, transfer={"kv_role": role})
    decode = Server(spec, fleet.next_log(), forked=True)
    alone = fleet.get(EngineSpec(llama))
    talk = prompt(2020, FIRST)
    with Deployment([prefill], [decode], fleet.next_log()) as deployment:
        ask = partial(complete, deployment.proxy.url, PATIENCE)
        for turn in range(3):
            expected = alone.ask(Ask(talk, max_tokens=ANSWER)).tokens
            before = prefill.metrics()
            outcome = ask(Ask(talk, max_tokens=ANSWER))
            assert (outcome.kind, outcome.tokens) == (ANSWERED, expected)
            # The decode engine has all of the former turn, and needs a push of what is new only.
            prefill.wait_until_empty(PATIENCE)
            name = "vllm:request_prefill_kv_computed_tokens_sum"
            computed = prefill.metrics().since(before, name)
            if turn and role == "kv_both":
                assert 0 < computed <= NEW + CHUNK
            elif turn:
                assert computed >= ANSWER + NEW - BLOCK
            decode.wait_until(partial(written, decode), PATIENCE)
            prefill.wait_until(partial(written, prefill), PATIENCE)
            talk += outcome.tokens + prompt(2021 + turn, NEW)
