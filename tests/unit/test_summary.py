"""The line when an engine begins to be served, and the one when it ends."""

from __future__ import annotations

import numpy as np
from driven_planner import CHUNK, Engine, View, prompt

from lamina_kv import __version__
from lamina_kv.config import load_config
from lamina_kv.control.reporting.summary import closing, opening
from lamina_kv.keys import KEY_BYTES
from lamina_kv.plan import RankReport, StoredChunks, TierName, TierReport

CHUNK_BYTES = 1 << 20


def stored(count: int) -> StoredChunks:
    return StoredChunks(
        np.arange(count, dtype=np.int32),
        np.zeros(count, np.uint32),
        np.zeros((count, KEY_BYTES), np.uint8),
        np.zeros(count),
    )


def test_host_memory_alone_is_said_with_its_size() -> None:
    said = opening(
        load_config({}, {}), 64, [RankReport(0, 512, CHUNK_BYTES)], loads=True, saves=True
    )
    assert said == (
        f"Lamina {__version__} keeps KV cache in 512 MiB of host memory (512 chunks); "
        "chunks of 64 tokens, 1 MiB; saves and loads; load.when auto, load.mode auto"
    )


def test_everything_that_is_configured_is_said() -> None:
    config = load_config(
        {
            "tiers": [
                {"kind": "disk", "name": "nvme", "path": "/store", "capacity": "1GiB"},
                {"kind": "valkey", "url": "valkey://:SECRET@store:6379"},
            ],
            "observe": {"trace": "/log/requests.jsonl"},
        },
        {},
    )
    tiers = (
        TierReport(TierName("nvme"), 1000, stored(20)),
        TierReport(TierName("valkey")),
    )
    reports = [RankReport(rank, 8, CHUNK_BYTES, tiers) for rank in range(2)]
    reports.append(RankReport(2, 8, CHUNK_BYTES, follows=True))
    said = opening(config, 64, reports, loads=False, saves=True, pushes="listens at 10.0.0.1:9300")
    for words in (
        "16 MiB of host memory on 2 ranks (8 chunks)",
        "nvme (disk), 1.95 GiB (1,000 chunks, 20 from earlier runs)",
        "valkey, which finds chunks by key",
        "LOADS NOTHING (kv_role)",
        "pushes: listens at 10.0.0.1:9300",
        "observe.trace /log/requests.jsonl",
    ):
        assert words in said
    assert "SECRET" not in said


def test_the_end_says_what_it_was_worth_and_what_is_left() -> None:
    sources = {"engine": 300, "host": 2000, "disk": 0, "computed": 700}
    assert closing(sources, 130.0, stored={"disk": 20}, lost=3) == (
        "Lamina ends: 3,000 prompt tokens, 300 from engine, 2,000 from host; "
        "2 min of prefill saved, as predicted; 20 chunks stay in disk; 3 chunks were not written "
        "any more: give the server more time to stop (--shutdown-timeout)"
    )
    assert closing({}, 0.0, stored={}, lost=0) == "Lamina ends: 0 prompt tokens, none found"


def test_a_planner_knows_what_it_was_worth() -> None:
    engine = Engine({"load": {"when": "always"}}, far_slots=100)
    tokens = prompt(4 * CHUNK)
    engine.save(View("first", tokens))
    engine.write_all()
    offer = engine.lookup(View("again", tokens))
    engine.planner.admitted("again", offer.tokens)
    engine.planner.plan_step([("again", offer.tokens, len(tokens))], forward=True)
    engine.planner.finished("again", len(tokens), [()])
    said = engine.planner.closing()
    assert f"{2 * len(tokens)} prompt tokens, {3 * CHUNK + CHUNK // 2} from host" in said
    assert "4 chunks stay in disk" in said
    assert "not written" not in said
