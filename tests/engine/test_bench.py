"""The benches run from beginning to end, and every hit they time is where they say it is.

A bench stops with an error when a hit is in another place than the one it measures, so that it
ends well is what is tested; the times are not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lamina_kv.bench.progress import Progress
from lamina_kv.bench.settings import PromptSource
from lamina_kv.bench.shapes import Dtype, LlamaShape
from peers import protocol
from peers.environments import Environments
from peers.process import PeerProcess
from peers.protocol import Arrival
from peers.systems import Environment, Store, System

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TINY = ["--layers", "2", "--hidden", "128", "--kv-heads", "2", "--head-dim", "64"]


def run(tmp_path: Path, command: str, *options: str) -> dict[str, object]:
    """The report of one bench of a tiny model."""
    target = tmp_path / "report.json"
    code = "from lamina_kv.bench import app; app()"
    arguments = [command, *TINY, *options, "--repeat", "2", "--json", str(target)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, object] = json.loads(target.read_text())
    assert all(len(sample["values"]) >= 2 for sample in report["samples"])  # type: ignore[attr-defined]
    return report


def test_ttft_finds_the_prompt_in_every_place(tmp_path: Path) -> None:
    plot, store = tmp_path / "plot.png", tmp_path / "store"
    store.mkdir()
    report = run(
        tmp_path, "ttft", "--tokens", "256", "--plot", str(plot), "--directory", str(store)
    )
    assert len(report["targets"]) == 2  # type: ignore[arg-type]
    assert plot.exists()
    assert list(store.iterdir()) == [], "what it wrote is removed"


@pytest.mark.soak
def test_overlap_measures_every_window_and_draws_the_step(tmp_path: Path) -> None:
    picture = tmp_path / "timeline.png"
    report = run(
        tmp_path, "overlap", "--tokens", "256", "--new-tokens", "128", "--timeline", str(picture)
    )
    names = [target["name"] for target in report["targets"]]  # type: ignore[attr-defined]
    assert names == [f"load_ahead {window}" for window in ("1", "2", "4", "auto")] + ["in bulk"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.soak
def test_overlap_of_a_hybrid_loads_every_row_once(tmp_path: Path) -> None:
    """The bench stops if other bytes come through the link than the rows of the hit, once."""
    picture = tmp_path / "timeline.png"
    hybrid = ["--model", "hybrid", "--layers", "8", "--block-size", "160", "--tokens", "320"]
    report = run(tmp_path, "overlap", *hybrid, "--timeline", str(picture))
    assert len(report["targets"]) == 5  # type: ignore[arg-type]
    settings: dict[str, object] = report["settings"]  # type: ignore[assignment]
    assert (settings["model"], settings["new_tokens"]) == ("hybrid", 160)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.soak
@pytest.mark.parametrize(("command", "tokens"), [("decode", "20"), ("save", "256")])
def test_overheads_are_measured_for_host_and_disk(
    tmp_path: Path, command: str, tokens: str
) -> None:
    report = run(tmp_path, command, "--tokens", tokens, "--directory", str(tmp_path))
    names = [target["name"] for target in report["targets"]]  # type: ignore[attr-defined]
    others = ["a connector that does nothing"] if command == "decode" else []
    assert names == ["host tier", "host and disk tier", *others]


@pytest.mark.soak
def test_peers_measures_lamina_beside_recomputing(tmp_path: Path) -> None:
    """The bench stops if a prompt that was saved is not found again; that no weights are as small
    as vLLM's dummies makes equal answers mean something."""
    target, plot = tmp_path / "report.json", tmp_path / "plot.png"
    systems = ["--system", "recompute", "--system", "Lamina"]
    scenarios = [f"--scenario={name}" for name in ("host", "suffix", "disk", "miss", "mixed")]
    sizes = ["--tokens", "512", "--new-tokens", "128", "--step-tokens", "256", "--repeat", "2"]
    mixed = ["--mixed-tokens", "256", "--requests", "6", "--rates", "8", "--shares", "0,0.5"]
    bench = Path(__file__).parents[2] / "bench" / "peers"
    done = subprocess.run(
        [
            *(sys.executable, str(bench), *TINY, *systems, *scenarios, *sizes, *mixed),
            *("--directory", str(tmp_path), "--json", str(target), "--plot", str(plot)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = {each["scenario"]: each for each in json.loads(target.read_text())["outcomes"]}
    assert set(outcomes) == {"host", "suffix", "disk", "miss", "mixed"}
    for hit in ("host", "suffix", "disk"):
        rows = {row["samples"]["name"]: row for row in outcomes[hit]["rows"]}
        assert set(rows["Lamina"]["cached"]) <= {0, 512}
        assert set(rows["recompute"]["cached"]) == {0}
        assert "All systems generated the same tokens." in outcomes[hit]["notes"]
    services = outcomes["mixed"]["services"]
    assert [(one["label"], one["share"]) for one in services] == [
        ("recompute", 0.0),
        ("Lamina", 0.0),
        ("recompute", 0.5),
        ("Lamina", 0.5),
    ]
    assert "| Lamina |" in done.stdout
    assert plot.exists()


@pytest.mark.slow
def test_answers_that_peers_compares_depend_on_every_part_of_the_prompt(tmp_path: Path) -> None:
    shape = LlamaShape(4, 256, 2, 64, 128, Dtype.BFLOAT16)
    shape.write_config(tmp_path)
    start = protocol.Start(
        system=System.RECOMPUTE,
        shape=shape,
        model=str(tmp_path),
        cache_tokens=1024,
        step_tokens=512,
        store=Store(0),
    )
    command, variables = Environments(tmp_path, Progress(Console(stderr=True))).command(
        Environment.OWN
    )
    prompt = [*PromptSource().prompt(512), 1]
    other = PromptSource(seed=1).prompt(512)
    with PeerProcess("recompute", command, variables, start, tmp_path) as process:

        def answer(prompt: list[int]) -> list[int]:
            process.call(protocol.Forget(), protocol.Done)
            asked = protocol.Serve([Arrival(0.0, prompt, 8)])
            (response,) = process.call(asked, protocol.Served).responses
            assert response.cached == 0
            return response.tokens

        expected = answer(prompt)
        assert answer(prompt) == expected
        for first, last in ((0, 1), (128, 256), (384, 512)):
            changed = [*prompt[:first], *other[first:last], *prompt[last:]]
            assert answer(changed) != expected
