"""A router that follows vLLM's KV events knows what every tier of Lamina holds."""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import vllm

from engine.driver import SMALL, Ask, CacheEvent, EngineSpec, Fleet, Start
from engine.models import SHAPES, Checkpoints
from engine.server import CALL_SECONDS, Held, Server
from engine.subscriber import Place, Subscriber
from engine.workload import BLOCK, CHUNK, loadable, mixed_prompts, prompt

pytestmark = pytest.mark.engine

CHUNK_BYTES = CHUNK * 4 * 2 * 2 * 32 * 4
"""Tokens, layers, keys and values, heads, head size, float32."""

HOST, DISK = Place("CPU", None, "LOCAL"), Place("STORAGE", "ssd", "LOCAL")


def chunks(server: Server, tier: str) -> int:
    """Chunks in a tier, as the server publishes it."""
    return int(server.metrics().total("lamina_tier_used_bytes", tier=tier)) // CHUNK_BYTES


def settle(server: Server, subscriber: Subscriber) -> None:
    """Until nothing is under way, and the subscriber has heard of what was."""
    server.wait_until(lambda: server.held() == Held(), CALL_SECONDS)

    def knows() -> bool:
        subscriber.follow()
        counted = [len(subscriber.held.get(place, ())) * BLOCK // CHUNK for place in (HOST, DISK)]
        return counted == [chunks(server, "host"), chunks(server, "ssd")]

    server.wait_until(knows, CALL_SECONDS)
    assert not subscriber.wrong


@pytest.mark.skipif(
    vllm.__version__.startswith("0.33") and find_spec("orjson") is None,
    reason="the HTTP server of vLLM 0.33 needs orjson, which comes with no build for CPUs",
)
def test_a_subscriber_over_zmq_predicts_every_hit(
    llama: Path, fleet: Fleet, tmp_path: Path
) -> None:
    """Host memory has room for 15 chunks, the disk for 22, and the prompts have 60."""
    tiers = [{"kind": "disk", "name": "ssd", "path": str(tmp_path / "s"), "capacity": "3MiB"}]
    lamina = {"host": {"capacity": "2MiB"}, "tiers": tiers}
    rng, prompts = random.Random(5), [prompt(500 + seed, 5 * CHUNK + 9) for seed in range(12)]
    with Subscriber() as subscriber:
        options = {"kv_events_config": subscriber.config}
        with Server(EngineSpec(llama, lamina, options), fleet.next_log(), forked=True) as server:
            for tokens in prompts:
                server.complete(tokens, 1)
            settle(server, subscriber)
            for event in ("BlockStored", "BlockRemoved"):
                assert {medium for name, medium in subscriber.seen if name == event} >= {
                    "CPU", "STORAGE"
                }  # fmt: skip
            predicted: list[int] = []
            for tokens in rng.choices(prompts, k=12):
                predicted.append(subscriber.holds(tokens, (HOST, DISK)))
                server.forget()
                before = server.metrics()
                server.complete(tokens, 1)
                settle(server, subscriber)
                found = server.metrics().since(before, "lamina_hit_tokens_total")
                assert found == min(predicted[-1], loadable(len(tokens)))
            assert len(set(predicted)) > 1, "hits of one length say little"
            assert subscriber.seen["AllBlocksCleared", None] >= 12


def stored(events: list[CacheEvent], mediums: set[str]) -> dict[object, list[CacheEvent]]:
    found: dict[object, list[CacheEvent]] = {}
    for event in events:
        if event.kind == "BlockStored" and event.medium in mediums:
            for block in event.blocks:
                found.setdefault((event.group, block), []).append(event)
    return found


@pytest.mark.parametrize("model", ["interleaved-windows", "short-convolution"])
def test_blocks_of_windows_and_states_have_vllms_names(
    checkpoints: Checkpoints, start: Start, model: str
) -> None:
    options = {
        **SHAPES[model].options,
        "enable_prefix_caching": True,
        "kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"},
    }
    engine = start(EngineSpec(checkpoints.model(model), SMALL, options))
    for tokens in mixed_prompts(77, count=8):
        engine.ask(Ask(tokens, max_tokens=40))
    engine.drain()
    engine.ask(Ask(prompt(78, 9), max_tokens=2))
    events = engine.events()
    own, tiers = stored(events, {"GPU"}), stored(events, {"CPU"})
    groups = {group for group, _ in own}
    assert len(groups) > 1
    assert {group for group, _ in tiers} == groups
    for group in groups:
        both = [block for block in tiers if block[0] == group and block in own]
        assert both, f"no block of group {group} has a name that vLLM knows"
        for block in both:
            mine, theirs = tiers[block][0], own[block][0]
            assert mine.block_tokens == theirs.block_tokens
            assert mine.extra[:1] + mine.extra[2:] == theirs.extra[:1] + theirs.extra[2:]


def test_resets_and_sleeps_take_back_what_is_not_found_any_more(llama: Path, start: Start) -> None:
    options = {"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}}
    engine = start(EngineSpec(llama, SMALL, options))

    kept: set[object] = set()

    def held() -> int:
        engine.drain()
        engine.ask(Ask(prompt(79, 9), max_tokens=2))  # a step, with which events go out
        for event in engine.events():
            if event.medium == "CPU":
                (kept.update if event.kind == "BlockStored" else kept.difference_update)(
                    event.blocks
                )
        return len(kept) * BLOCK

    ask = Ask(prompt(80, 3 * CHUNK + 1), max_tokens=1)
    engine.ask(ask)
    assert held() == 3 * CHUNK
    engine.forget()
    assert held() == 3 * CHUNK, "only vLLM's own cache was cleared"
    engine.forget_all()
    assert held() == 0
    engine.ask(ask)
    assert held() == 3 * CHUNK
    for level in (1, 2):
        engine.drain()
        engine.core("sleep", level, "keep")
        engine.core("wake_up")
        assert held() == (3 * CHUNK if level == 1 else 0), "at level 2 the weights are others"
