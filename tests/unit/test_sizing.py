"""What docs/sizing.md says of its example is what the command says of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from documented import ROOT, blocks, commands
from lamina_kv.bench import app

PAGE, TRACE = "docs/sizing.md", "docs/examples/requests.jsonl"
CALLS = [words for words in commands(PAGE, "lamina-kv bench trace") if words[0] == TRACE]


def figures(text: str) -> dict[str, float]:
    """The hit rates in an answer, by the capacities that it names; and what no tier can exceed."""
    rates = re.findall(r"([^.%]*?[\d.]+ [MG]iB of [^%]*?) would find ([\d.]+) %", text)
    most = re.findall(r"(No tier can|together cannot) find more than ([\d.]+) %", text)
    return {what.strip(): float(rate) for what, rate in [*rates, *most]}


def test_the_example_is_what_its_script_prints() -> None:
    script = ROOT / "docs/examples/requests.py"
    printed = subprocess.run([sys.executable, script], check=True, capture_output=True)
    assert printed.stdout == (ROOT / TRACE).read_bytes()


def test_the_sizes_of_models_are_what_the_formula_says() -> None:
    page = (ROOT / PAGE).read_text()
    shape = r"^\| .*?: (\d+) layers, (?:(\d+) KV heads of (\d+)|MLA of (\d+) \+ (\d+)) \|"
    found = re.findall(shape + r" ([\d.]+) KiB \| ([\d,]+) \|$", page, re.MULTILINE)
    assert len(found) > 10
    for layers, heads, size, rank, rope, kib, tokens in found:
        row = 2 * int(heads) * int(size) if heads else int(rank) + int(rope)
        token = 2 * int(layers) * row
        assert float(kib) == pytest.approx(token / 1024, abs=0.05)
        assert int(tokens.replace(",", "")) == pytest.approx((100 << 30) / token, abs=500)


def test_there_is_a_call_with_one_tier_and_one_with_two_and_one_with_an_engines_cache() -> None:
    assert ["--far" in words for words in CALLS] == [False, False, True]
    assert ["--engine" in words for words in CALLS] == [False, True, False]


@pytest.mark.parametrize("number", range(3))
def test_the_page_says_what_the_command_says(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = CALLS[number]
    arguments = [str(ROOT / TRACE), *words[1:]]
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["trace", *arguments, "--json", "out.json"])
    assert done.exit_code == 0, done.output
    said = json.loads(Path("out.json").read_text())
    both = f"{said['answer']} {said['worth']}"
    found = figures(both)
    assert len(found) == 5
    shown = [figures(" ".join(text.split())) for text in blocks(PAGE, "text")]
    page = [each for each in shown if each][number]  # below each call is what it says
    # The policy of eviction changes now and then.
    assert page == {what: pytest.approx(rate, abs=3) for what, rate in found.items()}, both
    if "--plot" in arguments:
        assert Path(arguments[arguments.index("--plot") + 1]).stat().st_size > 1000
