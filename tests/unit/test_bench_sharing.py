"""``lamina-kv bench trace --engines``: what a fleet finds in its own host memory and in the store
that it shares, and what that costs."""

from __future__ import annotations

import json
import math
import random
import re
from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lamina_kv.bench import app
from lamina_kv.bench.fleet import (
    Fleet,
    FleetReplay,
    FleetShape,
    Keep,
    Routing,
    StoreShape,
    routes,
)
from lamina_kv.bench.replay import Engine, Pace
from lamina_kv.bench.trace_file import ReplayedRequest, Trace

TOKENS, BYTES = 16, 1000
PACE = Pace(prefill=1000.0, decode=10.0, running=8)
"""A block takes 16 ms to compute."""
UNLIMITED = StoreShape(capacity=1000, bandwidth=math.inf, latency=0.001)
TWO = FleetShape(2, 100, Routing.ROUND_ROBIN, Keep.ALL, UNLIMITED, PACE)
DOCUMENT = [1, 2, 3, 4, 5, 6]


def traced(*requests: tuple[float, Sequence[int]]) -> Trace:
    """Requests: when each comes, and its blocks. A block's number says all that is before it."""
    made = tuple(
        ReplayedRequest(when, TOKENS * len(ids), 10, array("I", ids), array("I"))
        for when, ids in requests
    )
    blocks = sum(len(request.blocks) for request in made)
    different = len(set(chain(*(request.blocks for request in made))))
    return Trace(made, blocks, different, TOKENS, BYTES)


def replayed(trace: Trace, shape: FleetShape = TWO) -> FleetReplay:
    return Fleet(trace, shape).run()


def figures(replay: FleetReplay) -> dict[str, int]:
    return {
        "near": replay.near,
        "store": replay.store,
        "written": replay.written,
        "read": replay.read,
    }


# -- who gets what ---------------------------------------------------------------------------------


def test_requests_go_round() -> None:
    trace = traced(*((n, [n]) for n in range(5)))
    assert routes(trace, 3, Routing.ROUND_ROBIN) == [0, 1, 2, 0, 1]


def test_a_session_goes_back_to_its_engine() -> None:
    """And what all requests begin with is no session."""
    prompts = [[0, 1], [0, 2], [0, 1, 11], [0, 3], [0, 2, 12], [0, 1, 11, 111], [0, 1, 21]]
    strangers = [[0, n] for n in range(100, 200)]
    trace = traced(*enumerate((*prompts, *strangers)))
    assert routes(trace, 3, Routing.SESSIONS)[:7] == [0, 1, 0, 2, 1, 0, 0]
    assert set(routes(trace, 3, Routing.SESSIONS)[7:]) == {0, 1, 2}


# -- what is found where ---------------------------------------------------------------------------


def test_another_engine_finds_in_the_store_what_the_first_has_written() -> None:
    """Two engines, three requests: the first computes, the second reads the store, the third is at
    home."""
    trace = traced((0, DOCUMENT), (10, DOCUMENT), (20, DOCUMENT))
    replay = replayed(trace)
    assert figures(replay) == {"near": 6, "store": 6, "written": 6, "read": 6}
    assert (replay.again, replay.gone, replay.evicted) == (0, 0, 0)
    assert len(replay.firsts) == 3


def test_without_a_store_every_engine_computes_for_itself() -> None:
    trace = traced((0, DOCUMENT), (10, DOCUMENT), (20, DOCUMENT))
    replay = replayed(trace, replace(TWO, keep=Keep.NOTHING))
    assert figures(replay) == {"near": 6, "store": 0, "written": 0, "read": 0}
    assert replay.waits == []


def test_what_is_used_once_is_not_shared() -> None:
    """It goes to the store when a second request has used it, as far as its engine sees: the same
    prompt in two engines is nothing that either would know of."""
    shape = replace(TWO, keep=Keep.SHARED)
    other = [100 + block for block in DOCUMENT]
    once_each = traced((0, DOCUMENT), (10, DOCUMENT))
    assert figures(replayed(once_each, shape)) == {"near": 0, "store": 0, "written": 0, "read": 0}
    twice = traced((0, DOCUMENT), (10, other), (20, DOCUMENT), (30, DOCUMENT))
    assert figures(replayed(twice, shape)) == {"near": 6, "store": 6, "written": 6, "read": 6}


def test_a_longer_prompt_writes_what_is_new_of_it() -> None:
    trace = traced((0, DOCUMENT), (10, [*DOCUMENT, 7, 8]), (20, [*DOCUMENT, 7, 8]))
    assert figures(replayed(trace)) == {"near": 6, "store": 8, "written": 8, "read": 8}


def test_what_host_memory_has_given_up_is_read_back() -> None:
    shape = replace(TWO, engines=1, near=12)
    other = [100 + block for block in range(12)]
    replay = replayed(traced((0, DOCUMENT), (10, other), (20, DOCUMENT)), shape)
    assert figures(replay) == {"near": 0, "store": 6, "written": 18, "read": 6}


def test_what_is_still_being_written_is_not_found() -> None:
    """A block takes a second to the store. The second request comes in the midst of it, and
    computes the rest itself."""
    slow = replace(TWO, store=replace(UNLIMITED, bandwidth=BYTES))
    replay = replayed(traced((0, DOCUMENT), (3.5, DOCUMENT)), slow)
    assert replay.store < 6
    assert replay.written > 6, "two engines have written the same blocks"
    assert replay.again == replay.written - 6


def test_a_full_store_loses_what_was_used_longest_ago() -> None:
    shape = replace(TWO, store=replace(UNLIMITED, capacity=len(DOCUMENT)))
    other = [100 + block for block in DOCUMENT]
    replay = replayed(traced((0, DOCUMENT), (10, other), (200, DOCUMENT), (400, other)), shape)
    assert replay.evicted > 0
    assert replay.store == 0
    assert replay.near == 12, "each engine has its own"
    again = replayed(traced((0, DOCUMENT), (10, other), (200, other), (400, DOCUMENT)), shape)
    assert again.store == 6, "of the younger prompt"


# -- what it costs ---------------------------------------------------------------------------------


def test_a_request_waits_for_its_blocks_to_come() -> None:
    """Six blocks of 10 ms each, which is less than to compute them, and no less than that."""
    shape = replace(TWO, store=StoreShape(1000, 100 * BYTES, 0.001))
    replay = replayed(traced((0, DOCUMENT), (10, DOCUMENT)), shape)
    assert replay.store == 6
    (wait,) = [wait for wait in replay.waits if wait > 0.05]
    assert 0.06 <= wait <= 0.12
    computed, loaded = replay.firsts
    assert computed >= 6 * 0.016
    assert loaded == pytest.approx(wait + 0.001, abs=0.001), "one token is left to compute"


def test_what_an_engine_computes_meanwhile_is_no_wait() -> None:
    """Six blocks come in 60 ms. Beside them another prompt is computed, which takes 1.6 s."""
    shape = replace(TWO, store=StoreShape(1000, 100 * BYTES, 0.001))
    long = list(range(1000, 1100))
    trace = traced((0, DOCUMENT), (5, [900]), (10, [901]), (10, DOCUMENT), (10, [902]), (10, long))
    replay = replayed(trace, shape)
    assert replay.store == 6
    assert max(replay.waits) < 0.03
    assert max(replay.firsts) > 1.6


def test_engines_wait_for_each_other_at_the_store() -> None:
    """Five that need the same at the same time are served one after the other."""
    shape = replace(TWO, engines=6, store=StoreShape(1000, 100 * BYTES, 0.001))
    alone = replayed(traced((0, DOCUMENT), (10, DOCUMENT)), shape)
    crowd = replayed(traced((0, DOCUMENT), *[(10, DOCUMENT)] * 5), shape)
    assert max(crowd.waits) > 2 * max(alone.waits)


def test_a_store_that_is_slower_than_computing_is_left_alone() -> None:
    """The first load tells that it is. Later ones are given up after 4 % of the time to compute, or
    10 ms, and a step."""
    shape = replace(TWO, store=StoreShape(1000, 5 * BYTES, 0.001))
    prompts = [[1000 * n + block for block in range(20)] for n in range(10)]
    requests = [(100.0 * n, prompts[n // 2]) for n in range(20)]
    replay = replayed(traced(*requests), shape)
    first, *later = sorted(replay.waits, reverse=True)
    assert replay.store == 20
    assert first > 20 / 5
    assert max(later) < 0.03


# -- beside one engine -----------------------------------------------------------------------------


@pytest.mark.parametrize("near", [30, 1000])
@pytest.mark.parametrize("seed", range(2))
def test_one_engine_without_a_store_finds_what_the_replay_of_one_finds(
    seed: int, near: int
) -> None:
    """Steps are others, and so what a full tier gives up may be."""
    source, prompts = random.Random(seed), [[0]]
    for block in range(1, 40):
        start = source.choice(prompts)[: source.randrange(6)] if source.random() < 0.7 else []
        prompts.append([*start, *(100 * block + i for i in range(source.randint(1, 8)))])
    requests = [(100.0 * n, source.choice(prompts)) for n in range(80)]
    trace = traced(*requests)
    fleet = replayed(trace, replace(TWO, engines=1, near=near, keep=Keep.NOTHING))
    found = Engine(trace, near, {}, PACE).run().blocks
    assert fleet.near == (found if near == 1000 else pytest.approx(found, rel=0.03))
    assert len(fleet.firsts) == len(requests)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Twelve requests about one document of ten blocks, each with a question of its own."""
    path = tmp_path / "trace.jsonl"
    lines = [
        {
            "timestamp": 100_000 * n,
            "input_length": 16 * 12,
            "output_length": 10,
            "hash_ids": [*range(10), 1000 + n, 2000 + n],
        }
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


FLEET = ["--engines", "4", "--block-size", "1MiB", "--prefill", "1000"]


def test_the_table_and_the_numbers_agree(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    options = ["--host", "100,100,50", "--store-gb-per-second", "inf,0.5,inf"]
    outputs = ["--keep", "nothing,all", "--json", str(out), "--plot", str(picture)]
    arguments = ["trace", str(file), *FLEET, *options, *outputs]
    outcome = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert outcome.exit_code == 0, outcome.output
    said = re.sub(r"\s+", " ", outcome.output)
    points = json.loads(out.read_text())["points"]
    shown = [(p["routing"], p["host_blocks"], p["keep"], p["gb_per_second"]) for p in points]
    large = [("nothing", None), ("all", None), ("all", 0.5)]
    assert shown == [
        (routing, host, keep, limit)
        for routing in ("round-robin", "sessions")
        for host, fleets in ((100, large), (50, large[:2]))
        for keep, limit in fleets
    ], "without a store there is nothing to limit"
    private, shared, limited, *_ = points
    assert private["found"] == {"host": 80 / 144, "store": 0.0}, "eight have been here before"
    assert shared["found"] == {"host": 80 / 144, "store": 30 / 144}
    assert shared["written_bytes"] == (10 + 2 * 12) << 20
    assert shared["read_bytes"] == 30 << 20
    assert limited["found"] == shared["found"]
    assert limited["wait_sum"] > shared["wait_sum"] > private["wait_sum"] == 0
    assert limited["saved"] < shared["saved"]
    assert "12 requests, 144 blocks of 16 tokens, 34 different ones; 4 engines" in said
    assert f"{100 * shared['found']['store']:.1f}" in said
    drawn = picture.read_text()
    assert all(text in drawn for text in ("no store", "keep: all", "Found, sessions"))
    assert "keep: all, round-robin, 0.098 GiB" in drawn, "by bandwidth"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--engines", "0"], "--engines must be at least 1, got 0"),
        (["--store-gb-per-second", "0"], "--store-gb-per-second must be above 0, or inf"),
        (["--store-gb-per-second", "nan"], "--store-gb-per-second must be above 0, or inf"),
        (["--store-gb-per-second", "fast"], "--store-gb-per-second must be numbers"),
        (["--store-latency-ms", "-1"], "--store-latency-ms must be at least 0, got -1"),
        (["--store-capacity", "0"], "a capacity must be blocks"),
        (
            ["--host", "1,2", "--store-gb-per-second", "1,2,3"],
            "--host and --store-gb-per-second must have one value each, or equally many, got 2 and",
        ),
        (["--keep", "some"], "--keep must be some of all, shared, nothing, got 'some'"),
        (["--routing", "x"], "--routing must be some of round-robin, sessions, got 'x'"),
        (["--far", "5"], "--far cannot be given with --engines"),
        (["--prefill", "0"], "--prefill must be a number of tokens a second"),
    ],
)
def test_what_makes_no_sense_is_refused_first(
    file: Path, arguments: list[str], complaint: str
) -> None:
    outcome = CliRunner().invoke(app, ["trace", str(file), *FLEET, *arguments])
    assert outcome.exit_code == 2, outcome.output
    assert complaint in re.sub(r"[\s│]+", " ", outcome.output)


def test_bytes_of_blocks_of_an_unknown_size_are_refused_with_what_to_do(file: Path) -> None:
    outcome = CliRunner().invoke(app, ["trace", str(file), "--engines", "2"])
    assert outcome.exit_code == 1
    assert "give --block-size" in outcome.output
