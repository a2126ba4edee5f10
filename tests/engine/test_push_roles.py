"""Pushes work with every ``kv_role``, on both sides; the role is about tiers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.driver import SMALL, Ask, EngineSpec, Fleet, Start, differences
from engine.models import Checkpoints
from engine.pair import PairSpec, shared_pair
from engine.test_push import options_of
from engine.workload import CHUNK, prompt
from lamina_kv.bench.ports import free_port

pytestmark = pytest.mark.engine

OPTIONS: dict[str, Any] = {"max_num_batched_tokens": 192}
WITH_DEFAULT_POLICY = {"kv_load_failure_policy": "fail"}


def keeps_freed_blocks_back(core: Any) -> bool:
    """Whether vLLM gives no block away that a step in flight writes to."""
    return core.scheduler.defer_block_free


@pytest.mark.parametrize(
    ("prefill", "decode"), [("kv_producer", "kv_consumer"), ("kv_consumer", "kv_producer")]
)
def test_a_push_with_any_role(llama: Path, fleet: Fleet, prefill: str, decode: str) -> None:
    pair = shared_pair(fleet, PairSpec(llama, OPTIONS, roles=(prefill, decode)))
    asks = [Ask(prompt(800 + n, n)) for n in (3 * CHUNK, 700)]
    expected = fleet.get(EngineSpec(llama, options=OPTIONS)).generate(asks)
    before = pair.metrics()
    answers = pair.push(asks)
    assert not differences(answers, expected)
    assert [answer.cached for answer in answers] == [len(ask.tokens) - 1 for ask in asks]
    pair.settle()
    assert pair.counts() == {"sent": len(asks), "received": len(asks)}
    for engine, role in ((pair.prefill, prefill), (pair.decode, decode)):
        assert engine.in_core(keeps_freed_blocks_back)
        engine.forget()
        engine.generate(asks)
        saved, hit = (
            engine.metrics().since(before[engine], name) > 0
            for name in ("lamina_save_bytes_total", "lamina_load_bytes_total")
        )
        # A consumer that saves nothing finds nothing, either.
        assert (saved, hit) == (role == "kv_producer", False)
        assert f"kv_role: {role}: prompts are" in engine.log()


def test_what_may_not_do_as_it_seems_is_said_at_the_start(llama: Path, start: Start) -> None:
    push = {"listen": f"0.0.0.0:{free_port()}"}
    engine = start(EngineSpec(llama, {**SMALL, "push": push}, transfer=WITH_DEFAULT_POLICY))
    for words in (
        "kv_load_failure_policy: fail: a request whose push fails",
        "push.token: not set, and push.listen is 0.0.0.0",
    ):
        (line,) = (line for line in engine.log().splitlines() if words in line)
        assert "WARNING" in line


@pytest.mark.slow
def test_a_consumer_pushes_states(checkpoints: Checkpoints, fleet: Fleet) -> None:
    """What it saves of a recurrent model is what it sends: a state at a boundary."""
    model = checkpoints.model("short-convolution")
    options = options_of("short-convolution")
    pair = shared_pair(fleet, PairSpec(model, options, roles=("kv_consumer", "kv_producer")))
    asks = [Ask(prompt(810 + n, n)) for n in (200, 500)]
    expected = fleet.get(EngineSpec(model, options=options)).generate(asks)
    assert not differences(pair.push(asks), expected)
    pair.settle()
    assert pair.counts() == {"sent": len(asks), "received": len(asks)}
