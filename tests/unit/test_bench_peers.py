"""``python bench/peers`` compares like with like: both sides speak one protocol, every system
gets the same room and the same requests, and the tables say what was measured."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from lamina_kv.bench.engine import BenchError
from lamina_kv.bench.report import Machine
from lamina_kv.bench.samples import Samples, Target, Unit
from lamina_kv.bench.shapes import Dtype, LlamaShape
from lamina_kv.config import load_config
from peers import protocol
from peers.arena import Contender
from peers.arrivals import Service, documents, percentile, schedule, service
from peers.plot import draw_peers
from peers.process import PeerProcess
from peers.protocol import Arrival, Response
from peers.results import Outcome, PeersReport, Row, best_peer, table
from peers.servers import SERVERS
from peers.settings import MixedSettings, PeersSettings, Scenario
from peers.sweep import FIXED, compared
from peers.systems import Environment, Shared, SharedKind, Store, System, wiring

SHAPE = LlamaShape(4, 256, 2, 64, 128, Dtype.BFLOAT16)
MIXED = MixedSettings(
    tokens=256,
    new_tokens=16,
    generated=4,
    documents=3,
    cached=2,
    memory=1.5,
    rates=(2.0,),
    shares=(0.5,),
    requests=200,
    first_within=1.0,
    token_within=0.1,
)


# -- the protocol ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question",
    [
        protocol.Start(
            system=System.LAMINA,
            shape=SHAPE,
            model="/model",
            cache_tokens=1024,
            step_tokens=512,
            store=Store(1 << 30, "/disk", 1 << 31, paced=True),
            lamina={"load": {"mode": "parked"}},
        ),
        protocol.Start(
            system=System.OFFLOADING,
            shape=SHAPE,
            model="/model",
            cache_tokens=1024,
            step_tokens=512,
            store=Store(1 << 30, shared=Shared(SharedKind.S3, "http://s3:1", "b", "me", "secret")),
        ),
        protocol.Serve([Arrival(0.25, [3, 4, 5], 2)]),
        protocol.Forget(),
        protocol.Copy(4096),
        protocol.Pace(1e9, 0.002),
        protocol.Stop(),
    ],
)
def test_a_question_is_one_line_and_arrives_as_it_was_asked(question: protocol.Question) -> None:
    text = protocol.line(question)
    assert text.endswith(b"\n")
    assert text.count(b"\n") == 1
    assert protocol.question(text) == question


@pytest.mark.parametrize(
    "answer",
    [
        protocol.Served([Response(0.5, 0.8, 256, [7, 8, 9, 7])]),
        protocol.Done(1.5),
        protocol.Failed("Traceback:\n  two lines"),
    ],
)
def test_an_answer_is_one_line_and_arrives_as_it_was_given(answer: protocol.Answer) -> None:
    text = protocol.line(answer)
    assert text.count(b"\n") == 1
    assert protocol.answer(text) == answer


def test_an_answer_is_no_question() -> None:
    with pytest.raises(msgspec.ValidationError):
        protocol.question(protocol.line(protocol.Done()))


def test_time_per_token_does_not_count_the_first() -> None:
    assert Response(1.0, 1.6, 0, [1, 2, 3, 4]).per_token == pytest.approx(0.2)
    assert Response(1.0, 1.0, 0, [1]).per_token == 0


# -- a system's process --------------------------------------------------------------------------

CHILD = """
import sys
import time
from peers import protocol
for text in sys.stdin.buffer:
    question = protocol.question(text)
    {body}
    sys.stdout.buffer.write(protocol.line(answer))
    sys.stdout.flush()
    if isinstance(question, protocol.Stop):
        break
"""
START = protocol.Start(
    system=System.RECOMPUTE,
    shape=SHAPE,
    model="/model",
    cache_tokens=1024,
    step_tokens=512,
    store=Store(0),
)


def child(tmp_path: Path, body: str) -> PeerProcess:
    command = (sys.executable, "-c", CHILD.format(body=body))
    variables: Mapping[str, str] = {"PYTHONPATH": ":".join(sys.path)}
    return PeerProcess("a peer", command, variables, START, tmp_path)


def test_a_process_answers_while_it_is_awake(tmp_path: Path) -> None:
    body = "answer = protocol.Done(getattr(question, 'size', 0))"
    with child(tmp_path, body) as process:
        process.ready()
        process.pause()
        for size in (3, 5):
            with process.awake():
                assert process.call(protocol.Copy(size), protocol.Done).seconds == size


def test_a_process_that_is_not_asked_is_stopped(tmp_path: Path) -> None:
    with child(tmp_path, "answer = protocol.Done()") as process:
        process.ready()
        with process.awake():
            pass
        stat = Path(f"/proc/{process._process.pid}/stat")
        give_up = time.monotonic() + 60
        while (state := stat.read_text().rpartition(")")[2].split()[0]) != "T":
            assert time.monotonic() < give_up, f"its state is {state}"


def test_what_fails_in_a_process_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    body = (
        "print('about to fail', file=sys.stderr, flush=True); "
        "answer = protocol.Failed('no such thing')"
    )
    with (
        pytest.raises(BenchError, match=r"a peer failed\nno such thing(.|\n)*about to fail"),
        child(tmp_path, body) as process,
    ):
        process.ready()


def test_a_process_that_ends_is_told_with_its_exit_code(tmp_path: Path) -> None:
    with (
        pytest.raises(BenchError, match="a peer ended unexpectedly, exit code 3"),
        child(tmp_path, "sys.exit(3)") as process,
    ):
        process.ready()


def test_a_process_that_gives_no_answer_in_time_can_be_ended(tmp_path: Path) -> None:
    body = "isinstance(question, protocol.Copy) and time.sleep(600); answer = protocol.Done()"
    with child(tmp_path, body) as process:
        with pytest.raises(BenchError, match="a peer gave no answer for 0 s"):
            process.call(protocol.Copy(1), protocol.Done, 0.2)
        process.end()


# -- systems --------------------------------------------------------------------------------------


def test_every_system_gets_the_same_room() -> None:
    store = Store(1 << 30, "/disk", 1 << 31)
    offloading = wiring(System.OFFLOADING, store, {})
    lamina = wiring(System.LAMINA, store, {})
    lmcache = wiring(System.LMCACHE, store, {})
    simple = wiring(System.SIMPLE, store, {})
    assert offloading.extra["cpu_bytes_to_use"] == 1 << 30
    assert offloading.extra["secondary_tiers"] == [{"type": "fs", "root_dir": "/disk"}]
    assert lamina.extra["host"]["capacity"] == 1 << 30
    assert lamina.extra["tiers"] == [{"kind": "disk", "path": "/disk", "capacity": 1 << 31}]
    assert lmcache.environment["LMCACHE_MAX_LOCAL_CPU_SIZE"] == "1.0"
    assert lmcache.environment["LMCACHE_MAX_LOCAL_DISK_SIZE"] == "2.0"
    assert simple.extra["disk_capacity_bytes"] == 1 << 31
    assert wiring(System.RECOMPUTE, store, {}).connector is None


SHARED = (
    Shared(SharedKind.VALKEY, "valkey://127.0.0.1:7"),
    Shared(SharedKind.DIRECTORY, "/shared"),
    Shared(SharedKind.S3, "http://127.0.0.1:8", "bench", "me", "secret"),
)


@pytest.mark.parametrize("shared", SHARED, ids=lambda shared: shared.kind)
def test_a_system_that_shares_a_store_is_given_it(shared: Shared) -> None:
    playing = [system for system in System if system.shares(shared.kind)]
    assert len(playing) == 2, "Lamina and a peer"
    for system in playing:
        wired = wiring(system, Store(1 << 30, shared=shared), {})
        said = json.dumps({**wired.extra, **wired.environment})
        assert shared.where.removeprefix("http://") in said
        assert shared.secret in said


def test_lamina_keeps_all_of_it_in_a_shared_store_as_peers_do() -> None:
    for shared in SHARED:
        extra = wiring(System.LAMINA, Store(1 << 30, shared=shared), {}).extra
        (tier,) = load_config({"host": extra["host"], "tiers": extra["tiers"]}, {}).tiers
        assert tier.keep == "all"


@pytest.mark.parametrize("kind", [SharedKind.DIRECTORY, SharedKind.VALKEY])
def test_a_server_is_gone_with_its_data(kind: SharedKind, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    with SERVERS[kind](folder) as server:
        assert server.place("one").kind is kind
        assert server.can_stop is (kind is SharedKind.VALKEY)
        server.stop()
    assert not folder.exists()


def test_only_lmcache_is_installed_beside_vllm() -> None:
    assert [each for each in Environment if each.requirements] == [Environment.LMCACHE]
    assert {each.environment for each in System} == set(Environment)


def test_lamina_is_measured_with_what_it_decides_unless_something_is_fixed() -> None:
    assert "load" not in wiring(System.LAMINA, Store(1), {}).extra
    fixed = {"load": {"mode": "parked"}}
    assert wiring(System.LAMINA, Store(1), fixed).extra["load"] == {"mode": "parked"}


def test_a_bench_without_lamina_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must name Lamina"):
        settings(tmp_path, systems=(System.RECOMPUTE, System.LMCACHE))


def test_a_link_slower_than_computing_needs_computing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs --system recompute"):
        settings(tmp_path, systems=(System.LAMINA,), scenarios=(Scenario.SLOWER,))


def test_a_prompt_that_lmcache_could_not_hit_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tokens must be a whole number of chunks of 256"):
        settings(tmp_path, tokens=384)


def settings(
    tmp_path: Path,
    *,
    tokens: int = 512,
    systems: tuple[System, ...] = tuple(System),
    scenarios: tuple[Scenario, ...] = (Scenario.HOST,),
) -> PeersSettings:
    return PeersSettings(
        shape=SHAPE,
        tokens=tokens,
        new_tokens=64,
        step_tokens=256,
        generated=4,
        repeat=3,
        directory=tmp_path,
        environments=tmp_path,
        systems=systems,
        scenarios=scenarios,
        mixed=MIXED,
    )


# -- requests that come at random -----------------------------------------------------------------


def test_a_schedule_is_the_same_for_the_same_seed_only() -> None:
    assert schedule(MIXED, 2.0, 0.5, seed=7) == schedule(MIXED, 2.0, 0.5, seed=7)
    assert schedule(MIXED, 2.0, 0.5, seed=7) != schedule(MIXED, 2.0, 0.5, seed=8)


@pytest.mark.parametrize("rate", [0.5, 8.0])
def test_arrivals_are_a_poisson_process(rate: float) -> None:
    """Gaps have the mean and the spread of an exponential distribution."""
    times = [arrival.at for arrival in schedule(MIXED, rate, 0.0, seed=1)]
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / rate, rel=0.2)
    assert spread == pytest.approx(mean, rel=0.25)
    assert min(gaps) > 0


@pytest.mark.parametrize(("share", "hits"), [(0.0, 0), (0.5, 100), (0.8, 160), (1.0, 200)])
def test_the_share_of_hits_is_met_exactly(share: float, hits: int) -> None:
    known = documents(MIXED)
    prompts = [arrival.prompt for arrival in schedule(MIXED, 2.0, share, seed=3)]
    assert sum(prompt[: MIXED.tokens] in known for prompt in prompts) == hits
    assert {len(prompt) for prompt in prompts} == {MIXED.tokens + MIXED.new_tokens}
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts), "no question comes twice"


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 50) == 50
    assert percentile(values, 99) == 99
    assert percentile([3.0, 1.0, 2.0], 99) == 3
    assert percentile([3.0, 1.0, 2.0], 50) == 2
    assert percentile([4.0], 1) == 4
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)


def test_goodput_counts_requests_that_were_in_time_in_both_ways() -> None:
    arrivals = [Arrival(at, [1] * 10, 3) for at in (0.0, 1.0, 2.0, 6.0)]
    responses = [
        Response(0.5, 0.6, 5, [1, 2, 3]),
        Response(1.5, 1.6, 5, [1, 2, 3]),  # its first token is late
        Response(0.5, 1.5, 5, [1, 2, 3]),  # its others are
        Response(1.0, 1.2, 0, [1, 2, 3]),  # just in time
    ]
    one = service("Lamina", MIXED, 1.0, 0.5, arrivals, responses)
    assert (one.requests, one.good) == (4, 2)
    assert one.seconds == pytest.approx(7.2)
    assert one.goodput == pytest.approx(2 / 7.2)
    assert (one.first_median, one.first_p99) == (0.5, 1.5)
    assert one.token_p99 == pytest.approx(0.5)
    assert one.cached == pytest.approx(15 / 40)


# -- results --------------------------------------------------------------------------------------

ROWS = (
    Row(Samples("recompute", (10.0, 11.0, 9.0)), is_peer=False),
    Row(Samples("LMCache", (0.2, 0.3, 0.25)), is_peer=True, cached=(512, 512, 512)),
    Row(Samples("OffloadingConnector", (0.2, 0.1, 0.1)), is_peer=True),
    Row(Samples("Lamina", (0.08, 0.09, 0.1)), is_peer=False, per_token=0.03),
)


def test_the_best_peer_is_neither_lamina_nor_recomputing() -> None:
    best = best_peer(ROWS)
    assert best is not None
    assert best.samples.name == "OffloadingConnector"
    most = best_peer(ROWS, more_is_better=True)
    assert most is not None
    assert most.samples.name == "LMCache"
    assert best_peer(ROWS[:1]) is None


def outcome() -> Outcome:
    return Outcome(
        Scenario.HOST,
        "Hit in host memory",
        ROWS,
        (Samples("copy + step", (0.06,)),),
        (
            Target(Samples("Lamina ÷ best peer", (0.9,)), Unit.RATIO, 0.9),
            Target(Samples("Lamina ÷ floor", (1.5,)), Unit.RATIO, 1.25),
        ),
        ("A note.",),
    )


def test_a_table_holds_medians_against_the_best_peer_and_the_floor() -> None:
    lines = outcome().as_markdown().splitlines()
    (lamina,) = (line for line in lines if line.startswith("| Lamina |"))
    assert [cell.strip() for cell in lamina.strip("|").split("|")] == [
        "Lamina",
        "90.0 ms",
        "80.0 ms to 100 ms",
        "0.90x",
        "1.50x",
        "30.0 ms",
        "",
    ]
    assert "| Lamina ÷ best peer | 0.90x | ≤ 0.90x | met |" in lines
    assert "| Lamina ÷ floor | 1.50x | ≤ 1.25x | **missed** |" in lines
    assert lines[-1] == "A note."


def test_every_line_of_a_table_has_as_many_cells() -> None:
    text = table(("a", "b"), [("x", "1"), ("y", "2")])
    assert text.splitlines() == ["| a | b |", "| --- | ---: |", "| x | 1 |", "| y | 2 |"]


def test_the_report_has_every_number() -> None:
    machine = Machine("a processor", 2, 8 << 30, 0.1, {"python": "3.11"})
    one = Service("Lamina", 2.0, 0.8, 10, 9, 5.0, 0.5, 1.5, 0.03, 0.05, 0.7)
    mixed = Outcome(Scenario.MIXED, "Mixed load", services=(one,))
    report = PeersReport(machine, {"tokens": 8192}, (outcome(), mixed))
    document = json.loads(report.as_json())
    first, second = document["outcomes"]
    assert first["rows"][3]["samples"]["values"] == [0.08, 0.09, 0.1]
    assert second["services"][0]["first_p99"] == 1.5
    assert document["settings"]["tokens"] == 8192
    assert (
        "| Lamina | 80% | 2 | 1.80/s | 9/10 | 500 ms | 1.50 s | 30.0 ms | 50.0 ms | 70% |"
        in report.as_markdown().splitlines()
    )


def test_a_picture_has_a_panel_for_every_scenario(tmp_path: Path) -> None:
    services = tuple(
        Service(label, rate, 0.8, 10, 9, 5.0 / rate, 0.5, 1.5, 0.03, 0.05, 0.7)
        for label in ("LMCache", "Lamina")
        for rate in (1.0, 2.0)
    )
    outcomes = (outcome(), Outcome(Scenario.MIXED, "Mixed load", services=services))
    machine = Machine("a processor", 2, 8 << 30, 0.1, {"python": "3.11"})
    target = tmp_path / "peers.svg"
    draw_peers(PeersReport(machine, {}, outcomes), target)
    drawn = target.read_text()
    for text in ("Hit in host memory", "90.0 ms", "Goodput, 80% hits", "LMCache"):
        assert f"<!-- {text} -->" in drawn


def test_the_sweep_holds_auto_against_each_fixed_setting_beside_which_it_ran() -> None:
    def pair(auto: float, fixed: float, contender: Contender) -> tuple[Contender, Outcome]:
        rows = (
            Row(Samples("auto", (auto,)), is_peer=False),
            Row(Samples(contender.label, (fixed,)), is_peer=False),
        )
        return contender, Outcome(Scenario.HOST, "Hit in host memory", rows)

    one, other = FIXED[:2]
    swept = compared(Scenario.HOST, [pair(1.0, 2.0, one), pair(1.1, 1.0, other)])
    assert [(target.figure.name, target.met) for target in swept.targets] == [
        (f"auto ÷ {one.label}", True),
        (f"auto ÷ {other.label}", False),
    ]
    assert [row.samples.name for row in swept.rows] == [
        f"auto, beside {one.label}",
        one.label,
        f"auto, beside {other.label}",
        other.label,
    ]


def test_the_sweep_fixes_every_window_and_mode_and_loads_always() -> None:
    fixed = [contender.lamina["load"] for contender in FIXED]
    assert all(load["when"] == "always" for load in fixed)
    assert [load["load_ahead"] for load in fixed if load.get("mode") == "layerwise"] == [
        *(1, 2, 4, 8),
        "auto",
    ]
    assert any(load.get("mode") == "parked" for load in fixed)
