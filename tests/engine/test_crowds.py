"""Several requests about one document at once: it is moved in once and loaded into the engine once,
and what vLLM says of its own prefix cache is true."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.driver import (
    SMALL,
    Answer,
    Ask,
    CacheEvent,
    Engine,
    EngineSpec,
    Fleet,
    Start,
    differences,
)
from engine.models import Checkpoints
from engine.workload import BLOCK, CHUNK, prompt

pytestmark = pytest.mark.engine

DOCUMENT = prompt(71, 16 * CHUNK)
CROWD = [Ask(DOCUMENT + prompt(80 + number, 10 + number), max_tokens=4) for number in range(8)]
PARKED = {"load": {"mode": "parked"}}
EVENTS: dict[str, Any] = {
    "kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"},
}


def ask_at_once(engine: Engine, asks: Sequence[Ask], seed: int = 90) -> tuple[list[Answer], int]:
    """Let some requests come while another one runs, of that seed; their answers, and the most
    blocks that all of them had at a time."""
    free = least = engine.free_blocks()
    engine.submit([Ask(prompt(seed, 20), max_tokens=40)])
    engine.step()
    names = engine.submit(asks)
    answers: dict[str, Answer] = {}
    while len(answers) <= len(asks):
        answers.update((answer.name, answer) for answer in engine.step())
        least = min(least, engine.free_blocks())
    engine.drain()
    return [answers[name] for name in names], free - least


def loaded(engine: Engine) -> float:
    """Bytes that were loaded into the engine so far."""
    return engine.metrics().total("lamina_load_bytes_total")


def load_of_one(engine: Engine) -> float:
    """Bytes of a load of the document."""
    engine.forget()
    before = loaded(engine)
    engine.ask(CROWD[0])
    return loaded(engine) - before


BLOCKS = -(-len(DOCUMENT) // BLOCK) + 5 * (len(CROWD) + 1)
"""What the document needs once, and each question behind it."""


def test_from_host_memory(llama: Path, fleet: Fleet, start: Start) -> None:
    expected = fleet.get(EngineSpec(llama)).generate(CROWD)
    engine = start(EngineSpec(llama, {**SMALL, **PARKED}))
    engine.ask(Ask(DOCUMENT, max_tokens=1))
    engine.forget()
    before = loaded(engine)
    answers, blocks = ask_at_once(engine, CROWD)
    assert not differences(answers, expected)
    assert loaded(engine) - before == load_of_one(engine)
    assert blocks <= BLOCKS


def test_from_disk(llama: Path, fleet: Fleet, start: Start, tmp_path: Path) -> None:
    expected = fleet.get(EngineSpec(llama)).generate(CROWD)
    spec = EngineSpec(
        llama,
        {
            **SMALL,
            "tiers": [{"kind": "disk", "path": str(tmp_path / "store"), "capacity": "64MiB"}],
        },
    )
    engine = start(spec)
    engine.ask(Ask(DOCUMENT, max_tokens=1))
    engine.close()
    engine = start(spec)
    answers, blocks = ask_at_once(engine, CROWD)
    assert not differences(answers, expected)
    fetched = engine.metrics().total("lamina_fetch_bytes_total")
    assert loaded(engine) == load_of_one(engine) == fetched
    assert blocks <= BLOCKS


@pytest.mark.parametrize("name", ["interleaved-windows", "short-convolution"])
def test_models_with_windows_and_states(checkpoints: Checkpoints, start: Start, name: str) -> None:
    options = {"enable_prefix_caching": True, "kv_cache_dtype": "auto"}
    engine = start(EngineSpec(checkpoints.model(name), {**SMALL, **PARKED}, options))
    engine.ask(Ask(DOCUMENT, max_tokens=1))
    engine.forget()
    before = loaded(engine)
    ask_at_once(engine, CROWD)
    assert loaded(engine) - before == load_of_one(engine)


def replay(events: Sequence[CacheEvent]) -> list[str]:
    """What a router that follows the events must find wrong; nothing if they are true."""
    held: set[object] = set()
    wrong = []
    for event in events:
        if event.kind == "AllBlocksCleared":
            held.clear()
        elif event.kind == "BlockStored":
            if event.parent is not None and event.parent not in held:
                wrong.append("stored without its parent")
            wrong += ["stored twice" for block in event.blocks if block in held]
            held.update(event.blocks)
        else:
            wrong += ["removed and never stored" for block in event.blocks if block not in held]
            held.difference_update(event.blocks)
    return wrong


def test_a_router_that_follows_the_engines_events_knows_its_cache(
    llama: Path, start: Start
) -> None:
    options = {
        "num_gpu_blocks_override": 64,
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,
        **EVENTS,
    }
    engine = start(EngineSpec(llama, {**SMALL, **PARKED}, options))
    documents = [prompt(100 + number, 12 * CHUNK) for number in range(3)]
    for document in documents:
        engine.ask(Ask(document, max_tokens=1))
    assert engine.reset(everywhere=False)
    engine.events()
    for seed, document in enumerate(documents * 2, 200):
        asks = [Ask(document + prompt(120 + number, 5), max_tokens=3) for number in range(4)]
        ask_at_once(engine, asks, seed)
    events = [event for event in engine.events() if event.medium in (None, "GPU")]
    assert {event.kind for event in events} >= {"BlockStored", "BlockRemoved"}
    assert not replay(events)
