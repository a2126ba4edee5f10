"""``lamina-kv bench trace``: what is found of a trace is what its policies, and Lamina's planner,
have kept of it."""

from __future__ import annotations

import json
import random
import re
from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lamina_kv.bench import app
from lamina_kv.bench.engine import BenchError
from lamina_kv.bench.policies import (
    OPTIMUM,
    Arc,
    Belady,
    Event,
    Lru,
    Policy,
    S3Fifo,
    blocks_found,
    others,
)
from lamina_kv.bench.progress import Progress
from lamina_kv.bench.replay import Engine, Pace, Replay
from lamina_kv.bench.trace import LAMINA, TraceSettings, blocks_of, measure
from lamina_kv.bench.trace_file import ReplayedRequest, Trace, read_trace

ONE_BY_ONE = Pace(prefill=1000.0, decode=10.0, running=1)
DOCUMENT = list(range(100, 110))


def schedule(prompts: Sequence[Sequence[int]]) -> list[Event]:
    """One request after the other."""
    return [Event(lookup, ids) for ids in prompts for lookup in (True, False)]


def found(policy: Policy, prompts: Sequence[Sequence[int]]) -> int:
    return blocks_found(policy, schedule(prompts))


def lines(*requests: tuple[float, Sequence[int], Sequence[int]], **said: float) -> str:
    """A trace: when each request comes (ms), its blocks, and those of its answer; and what else is
    said of every request."""
    return "".join(
        json.dumps(
            {
                "timestamp": when,
                "input_length": 16 * len(ids),
                "output_length": 10,
                "hash_ids": list(ids),
                "output_hash_ids": list(answer),
                **said,
            }
        )
        + "\n"
        for when, ids, answer in requests
    )


def traced(*requests: tuple[float, Sequence[int], Sequence[int]]) -> Trace:
    """The same, as it is read."""
    made = tuple(
        ReplayedRequest(when, 16 * len(ids), 10, array("I", ids), array("I", answer))
        for when, ids, answer in requests
    )
    blocks = sum(len(request.blocks) for request in made)
    different = len(set(chain(*(request.blocks + request.answer for request in made))))
    return Trace(made, blocks, different, 16, 0)


def replayed(
    prompts: Sequence[Sequence[int]], near: int, pace: Pace = ONE_BY_ONE, **far: int
) -> Replay:
    """Prompts through the planner, all of which come at once."""
    return Engine(traced(*((0.0, ids, ()) for ids in prompts)), near, far, pace).run()


def conversations(seed: int, capacity: int) -> list[list[int]]:
    """Some prompts, of which some go on from others."""
    source, prompts = random.Random(seed), [[0]]
    for block in range(1, 60):
        start = source.choice(prompts)[: source.randrange(6)] if source.random() < 0.7 else []
        new = [100 * block + i for i in range(source.randint(1, capacity))]
        prompts.append([*start, *new])
    return [source.choice(prompts) for _ in range(80)]


# -- policies --------------------------------------------------------------------------------------


def test_a_prompt_that_is_one_block_too_long() -> None:
    """It loses its beginning, and all of it with that, or its end and no more."""
    prompts = [list(range(11))] * 3
    assert found(Lru(10, leaf_first=False), prompts) == 0
    assert found(Lru(10, leaf_first=True), prompts) == 20
    assert found(Belady(10, schedule(prompts)), prompts) == 20


@pytest.mark.parametrize("policy", [Arc(10), S3Fifo(10)], ids=["ARC", "S3-FIFO"])
def test_questions_do_not_push_out_what_was_used_twice(policy: Policy) -> None:
    questions = [[n] for n in range(50)]
    prompts = [DOCUMENT[:6], DOCUMENT[:6], *questions, DOCUMENT[:6]]
    assert found(Lru(10, leaf_first=True), prompts) == 6, "it needs more than recency"
    assert found(policy, prompts) == 12


@pytest.mark.parametrize("policy", [Arc(4), S3Fifo(4)], ids=["ARC", "S3-FIFO"])
def test_ghosts_bring_back_what_was_given_up_too_early(policy: Policy) -> None:
    """What comes back soon after it was given up stays, although as much is new as fits."""
    prompts = [[n] for n in (5, 5, 6, 6, 1, 10, 11, 12, 6, 5, 1, 14, 15, 16, 17, 1)]
    assert found(Lru(4, leaf_first=True), prompts) == 2
    assert found(policy, prompts) == 5


@pytest.mark.parametrize("seed", range(8))
def test_nothing_finds_more_than_belady(seed: int) -> None:
    capacity = 4 + seed
    events = schedule(conversations(seed, capacity))
    rates = {name: blocks_found(make(), events) for name, make in others(capacity, events).items()}
    assert max(rates.values()) == rates[OPTIMUM]
    assert min(rates.values()) < rates[OPTIMUM]


@pytest.mark.parametrize("seed", range(20))
def test_belady_is_the_best_that_can_be(seed: int) -> None:
    """Against all that could be kept, tried one by one."""
    source = random.Random(seed)
    pool = [[1], [1, 2], [1, 2, 3], [4], [4, 5], [6]]
    prompts = [source.choice(pool) for _ in range(9)]
    best = {frozenset[int](): 0}
    for ids in prompts:
        after: dict[frozenset[int], int] = {}
        for kept, hits in best.items():
            hit = next((n for n, block in enumerate(ids) if block not in kept), len(ids))
            there = sorted(kept | set(ids))
            for bits in range(1 << len(there)):
                left = frozenset(block for i, block in enumerate(there) if bits >> i & 1)
                if len(left) <= 3:
                    after[left] = max(after.get(left, 0), hits + hit)
        best = after
    assert found(Belady(3, schedule(prompts)), prompts) == max(best.values())


def test_what_is_not_there_yet_is_not_found() -> None:
    ids = [1, 2, 3]
    events = [Event(True, ids), Event(True, ids), Event(False, ids), Event(True, ids)]
    for make in others(10, events).values():
        assert blocks_found(make(), events) == 3


# -- files -----------------------------------------------------------------------------------------


def test_blocks_are_numbered_by_what_stands_before_them(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_text(lines((1500, [7, 8], [9]), (500, [8], []), (2500, [7, 8, 9], [])))
    trace = read_trace(file)
    first, second, third = trace.requests
    assert [request.seconds for request in trace.requests] == [0.0, 1.0, 2.0]
    assert list(first.blocks) != list(second.blocks[1:]), "the same block behind another one"
    assert second.blocks + second.answer == third.blocks
    assert (trace.blocks, trace.different) == (6, 4)
    assert (trace.block_tokens, trace.block_bytes) == (16, 0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no request has a block"),
        ("\n" + lines((0, [1], [])) + "{}", "line 3 is not a request of a trace"),
        ("nonsense", "line 1 is not a request of a trace"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}', "line 1"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "trace"
    file.write_text(text)
    settings = TraceSettings(file, ("1",), (), ONE_BY_ONE)
    with pytest.raises(BenchError, match=complaint), Progress(Console(quiet=True)) as progress:
        measure(settings, progress)


@pytest.mark.parametrize(
    ("size", "blocks"), [("3%", 30), ("0.05 %", 1), ("12", 12), ("1KiB", 10), ("10B", 1)]
)
def test_capacities(size: str, blocks: int) -> None:
    assert blocks_of(size, 1000, 100) == blocks


# -- through the planner ---------------------------------------------------------------------------


def test_with_room_for_all_everything_is_found_again() -> None:
    prompts = conversations(1, 8)
    events = schedule(prompts)
    replay = replayed(prompts, near=10_000)
    assert replay.blocks == blocks_found(Lru(10_000, leaf_first=True), events)
    assert replay.schedule == [Event(e.lookup, array("I", e.ids)) for e in events]


def test_a_tier_keeps_no_more_than_it_can() -> None:
    prompts = [[100 * n + i for i in range(5)] for n in range(10)] * 2
    assert replayed(prompts, near=50).blocks == 50
    assert replayed(prompts, near=10).blocks < 15


def test_a_far_tier_gives_back_what_host_memory_has_given_up() -> None:
    prompts = [[100 * n + i for i in range(5)] for n in range(10)] * 2
    replay = replayed(prompts, near=20, disk=50)
    assert replay.blocks == 50
    assert replay.found["disk"] > 0  # type: ignore[index]


def test_the_next_turn_finds_the_answer() -> None:
    """If the trace says what blocks it has completed."""
    trace = traced((0.0, [1, 2], [3, 4]), (10.0, [1, 2, 3, 4, 5], []))
    assert Engine(trace, 100, {}, ONE_BY_ONE).run().blocks == 4
    trace = traced((0.0, [1, 2], []), (10.0, [1, 2, 3, 4, 5], []))
    assert Engine(trace, 100, {}, ONE_BY_ONE).run().blocks == 2


def test_what_the_engine_has_itself_no_tier_is_asked_for() -> None:
    trace = traced(*((0.0, DOCUMENT, ()) for _ in range(3)))
    replay = Engine(trace, 100, {}, ONE_BY_ONE, own=10).run()
    assert (replay.had, replay.blocks) == (20, 0)
    replay = Engine(trace, 100, {}, ONE_BY_ONE, own=4).run()
    assert (replay.had, replay.blocks) == (8, 12)
    assert replay.schedule[2] == Event(True, array("I", DOCUMENT), 4)


@pytest.mark.parametrize("seed", range(3))
def test_a_tier_smaller_than_the_engines_cache_keeps_what_that_does_not(seed: int) -> None:
    """By the order of use it would keep what the engine has, too, and be asked for nothing."""
    source, prompts = random.Random(seed), []
    for n in range(400):
        start = 10 * source.randrange(8) if source.random() < 0.8 else 1000 + 10 * n
        prompts.append([*range(start, start + 8), 10_000 + n])
    trace = traced(*((0.0, ids, ()) for ids in prompts))
    replay = Engine(trace, 24, {}, ONE_BY_ONE, own=36).run()
    assert replay.had > trace.blocks / 5
    rates = {
        name: blocks_found(make(), replay.schedule)
        for name, make in others(24, replay.schedule).items()
    }
    assert max(rates, key=rates.__getitem__) == OPTIMUM
    assert rates["LRU leaf first"] < trace.blocks / 40
    assert replay.blocks > trace.blocks / 14
    assert rates[OPTIMUM] > replay.blocks


def test_requests_take_the_time_that_the_engine_needs() -> None:
    """Prompts of 160 tokens at 1000 a second, answers of 10 tokens at 10 a second."""
    prompts = [[100 * n + i for i in range(10)] for n in range(3)]
    assert replayed(prompts, 100).seconds == pytest.approx(3 * 1.16)
    many = Pace(1000.0, 10.0, running=3)
    assert replayed(prompts, 100, many).seconds == pytest.approx(3 * 0.16 + 1.0)
    two = Pace(1000.0, 10.0, running=2)
    assert replayed(prompts, 100, two).seconds == pytest.approx(2 * 1.16)
    again = [prompts[0], prompts[0]]
    assert replayed(again, 100, many).seconds == pytest.approx(0.16 + 1.0), "found, not computed"


def test_prefills_take_what_the_server_has_measured() -> None:
    """A request at a time, as far as that is known; else what is said of the engine."""
    ids = array("I", range(10))
    made = (
        ReplayedRequest(0.0, 160, 10, ids, array("I"), 8.0),
        ReplayedRequest(100.0, 160, 10, ids, array("I"), 4.0),
        ReplayedRequest(200.0, 160, 10, ids, array("I"), 0.0),
    )
    trace = Trace(made, 30, 10, 16, 0)
    assert trace.prefill_rate == pytest.approx(320 / 12)
    pace = Pace(1000.0, 10.0, 1, measured=True)
    assert pace.of(trace).prefill == trace.prefill_rate
    assert replace(pace, measured=False).of(trace).prefill == 1000.0
    saved = Engine(trace, 100, {}, pace.of(trace)).run().saved
    assert saved == {"host": pytest.approx(4.0 + 160 / trace.prefill_rate)}
    as_told = Engine(trace, 100, {}, replace(pace, measured=False)).run().saved
    assert as_told == {"host": pytest.approx(2 * 0.16)}


def test_each_tier_saves_what_it_has_found() -> None:
    prompts = [[100 * n + i for i in range(5)] for n in range(10)] * 2
    replay = replayed(prompts, near=20, disk=50)
    for tier, blocks in replay.found.items():
        assert replay.saved[tier] == pytest.approx(16 * blocks / 1000.0)


def test_no_more_can_be_found_than_was_seen_before() -> None:
    trace = traced((0.0, [1, 2], [3]), (1.0, [1, 2, 3, 4], []), (2.0, [5], []), (3.0, [5], []))
    assert trace.most_found == 4
    assert Engine(trace, 100, {}, ONE_BY_ONE).run().blocks == 4


def test_requests_that_run_at_once_are_looked_up_before_others_end() -> None:
    """The order in which other policies see them, too."""
    prompts = [[1], [2]]
    names = [event.lookup for event in replayed(prompts, 10, Pace(1000.0, 10.0, 2)).schedule]
    assert names == [True, False, True, False]
    trace = traced((0.0, [1], [3]), (0.0, [2], []))
    events = Engine(trace, 10, {}, Pace(1000.0, 10.0, 2)).run().schedule
    assert [list(event.ids) for event in events] == [[1], [1], [2], [2], [1, 3]]


def test_every_request_is_counted_once() -> None:
    prompts, counted = conversations(2, 8), []
    trace = traced(*((0.0, ids, ()) for ids in prompts))
    Engine(trace, 20, {"disk": 40}, Pace(1e5, 100.0, 16), counted.append).run()
    assert sum(counted) == trace.blocks
    assert len(counted) == len(prompts)


# -- the command -----------------------------------------------------------------------------------


def command(*arguments: str) -> str:
    outcome = CliRunner().invoke(app, ["trace", *arguments])
    assert outcome.exit_code == 0, outcome.output
    return re.sub(r"\s+", " ", outcome.output)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Ten requests about one document of ten blocks, each with a question of ten."""
    path = tmp_path / "trace.jsonl"
    prompts = [[*DOCUMENT, *range(1000 * n, 1000 * n + 10)] for n in range(1, 11)]
    path.write_text(lines(*((1000 * n, ids, []) for n, ids in enumerate(prompts))))
    return path


def test_the_table_and_the_numbers_agree(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    options = ["--host", "200,20", "--one-after-another"]
    said = command(str(file), *options, "--json", str(out), "--plot", str(picture))
    document = json.loads(out.read_text())
    small, large = document["points"]
    assert (small["blocks"], large["blocks"]) == (20, 200), "the smallest first"
    assert set(large["found"].values()) == {90 / 200}, "all find the document"
    assert small["found"][LAMINA] == pytest.approx(0.45, abs=0.2)
    assert small["found_by_tier"] == {"host": small["found"][LAMINA]}
    assert "45.00" in said
    assert "10 requests, 200 blocks of 16 tokens, 110 different ones" in said
    assert "one request after the other" in said
    assert document["worth"] in said
    assert document["answer"] in said
    assert document["trace"]["most_found"] == 90 / 200
    tokens = 16 * 200 * large["found"][LAMINA]
    assert large["saved_seconds_by_tier"] == {"host": pytest.approx(tokens / 50_000)}
    assert "200 blocks of host memory would find 45.0 % of all blocks again" in said
    assert "No tier can find more than 45.0 %" in said
    assert "at 50,000 tokens a second" in said
    assert document["worth"].startswith("Each 1,000 blocks more is worth ")
    assert all(name in picture.read_text() for name in (LAMINA, OPTIMUM, "S3-FIFO"))


def test_with_the_size_of_a_block_it_says_what_a_gibibyte_is_worth(file: Path) -> None:
    said = command(str(file), "--host", "5MiB,100%", "--block-size", "1MiB", "--running", "1")
    assert "Each GiB more is worth" in said
    assert "from 5 MiB to 110 MiB" in said


def test_a_trace_in_which_nothing_comes_twice_is_told(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(lines((0, range(10), []), (1000, range(10, 20), [])))
    said = command(str(path), "--host", "5,10")
    assert "Nothing in this trace comes twice" in said
    assert "points of hit rate" not in said


def test_several_tiers_say_what_each_has_found(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    said = command(str(file), "--host", "20", "--far", "30,200", "--far", "5", "--json", str(out))
    first, second = json.loads(out.read_text())["points"]
    assert first["tiers"] == {"host": 20, "far1": 30, "far2": 5}
    assert second["tiers"] == {"host": 20, "far1": 200, "far2": 5}
    assert sum(second["found_by_tier"].values()) == pytest.approx(second["found"][LAMINA])
    assert "by tier" in said
    assert "20 blocks of host memory and 200 blocks of far1 and 5 blocks of far2 would find" in said
    assert set(second["saved_seconds_by_tier"]) == {"host", "far1", "far2"}


def test_what_the_engine_finds_is_told_beside_what_tiers_find(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command(str(file), "--host", "200", "--json", str(out))
    (alone,) = json.loads(out.read_text())["points"]
    said = command(str(file), "--host", "200", "--engine", "30", "--json", str(out))
    (point,) = json.loads(out.read_text())["points"]
    assert alone["found_in_engine"] == 0 < point["found_in_engine"]
    both = point["found_in_engine"] + point["found"][LAMINA]
    assert both == pytest.approx(alone["found"][LAMINA]), "there is room for all"
    assert "The engine's own cache of 30 blocks finds" in said
    assert "Engine and tiers together cannot find more" in said
    assert "No tier can find more" in command(str(file), "--host", "200")


def test_what_the_server_has_measured_is_used_unless_somebody_knows_better(
    tmp_path: Path,
) -> None:
    path, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    path.write_text(lines((0, DOCUMENT, []), (1000, DOCUMENT, []), prefill_seconds=1.6))
    said = command(str(path), "--host", "100%", "--json", str(out))
    assert json.loads(out.read_text())["settings"]["prefill"] == pytest.approx(100.0)
    assert "save 1.6 s of prefill" in said
    assert "3.2 s of prefill, as the server has measured it" in said
    said = command(str(path), "--host", "100%", "--prefill", "160000", "--json", str(out))
    assert "save 1 ms of prefill" in said
    assert not json.loads(out.read_text())["trace"]["prefill_measured"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--host", "a"], 'a capacity must be blocks such as "5000"'),
        (["--host", "0"], "a capacity must be blocks"),
        (["--host", "1%,2%", "--far", "1,2,3"], "one capacity each, or equally many, got 2 and 3"),
        (["--engine", "some"], 'a capacity must be blocks such as "5000"'),
        (["--engine", "5", "--engines", "2"], "--engine cannot be given with --engines"),
        (["--prefill", "0"], "--prefill must be a number of tokens a second"),
        (["--decode", "nan"], "--decode must be a number of tokens a second"),
        (["--running", "0"], "--running must be at least 1"),
        (["--block-size", "1GB"], "--block-size must be a size"),
        (["--plot", "x.gif"], "x.gif must end in .png or .svg"),
    ],
)
def test_what_makes_no_sense_is_refused_first(
    file: Path, arguments: list[str], complaint: str
) -> None:
    outcome = CliRunner().invoke(app, ["trace", str(file), *arguments])
    assert outcome.exit_code == 2, outcome.output
    assert complaint in re.sub(r"[\s│]+", " ", outcome.output)


def test_bytes_of_blocks_of_an_unknown_size_are_refused_with_what_to_do(file: Path) -> None:
    outcome = CliRunner().invoke(app, ["trace", str(file), "--host", "1GiB"])
    assert outcome.exit_code == 1
    assert "give --block-size" in outcome.output
    outcome = CliRunner().invoke(app, ["trace", str(file.with_name("missing"))])
    assert outcome.exit_code == 1
    assert "No such file" in outcome.output


def test_a_bar_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina_kv.bench.progress._REDRAWN", -1.0)
    console = Console(force_terminal=True, width=100, record=True, quiet=False)
    with Progress(console) as progress:
        more = progress.bar("replaying", 10)
        more(5)
        assert progress._status is not None
        console.print(progress._status.status)
    shown = console.export_text()
    assert "replaying" in shown
    assert "50 %" in shown
