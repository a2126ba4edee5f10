"""``lamina-kv bench`` refuses what makes no sense before it starts anything, and says what
would."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lamina_kv.bench import app, plots
from lamina_kv.bench.engine import BenchError
from lamina_kv.bench.faulty_store import StoreFaults
from lamina_kv.bench.options import store_faults
from lamina_kv.bench.plain_read import PlainFile, drop_page_cache
from lamina_kv.bench.room import require_room
from lamina_kv.bench.settings import PromptSource
from lamina_kv.bench.shapes import SHAPES, Dtype, HybridShape, LlamaShape, Model
from peers.__main__ import app as peers

SHAPE = LlamaShape(16, 1024, 8, 128, 128, Dtype.BFLOAT16)


def refusal(*arguments: str) -> str:
    """What the command says, on one line; it must not have started anything."""
    command, rest = (peers, arguments[1:]) if arguments[0] == "peers" else (app, arguments)
    outcome = CliRunner().invoke(command, rest)
    assert outcome.exit_code == 2, outcome.output
    return re.sub(r"[\s│]+", " ", outcome.output)


@pytest.mark.parametrize("command", ["ttft", "overlap", "decode", "save", "peers"])
def test_every_command_refuses_a_shape_that_cannot_be(command: str) -> None:
    assert "--layers must be at least 1, got 0" in refusal(command, "--layers", "0")
    assert "--hidden must be at least 1, got -8" in refusal(command, "--hidden", "-8")
    assert "--kv-heads must be at least 1" in refusal(command, "--kv-heads", "0")
    assert "--head-dim must be a multiple of 32, got 33" in refusal(command, "--head-dim", "33")
    assert "--block-size must be a multiple of 32" in refusal(command, "--block-size", "48")
    assert "'int4' is not one of 'bfloat16'" in refusal(command, "--dtype", "int4")


@pytest.mark.parametrize("command", ["ttft", "overlap", "decode", "save", "peers"])
@pytest.mark.parametrize("repeat", ["0", "-1"])
def test_every_command_refuses_no_repetitions(command: str, repeat: str) -> None:
    assert f"--repeat must be at least 1, got {repeat}" in refusal(command, "--repeat", repeat)


@pytest.mark.parametrize("command", ["ttft", "overlap", "save"])
def test_a_prompt_that_cannot_be_hit_whole_is_refused_with_one_that_can(command: str) -> None:
    said = refusal(command, "--tokens", "1000")
    assert "--tokens must be a whole number of chunks of 128 tokens" in said
    assert "1024 would be" in said
    for nothing in ("0", "-5", "-128"):
        assert "128 would be" in refusal(command, "--tokens", nothing)


@pytest.mark.parametrize("command", ["ttft", "save"])
def test_a_store_cannot_be_made_faster_or_its_tail_shorter_than_its_median(command: str) -> None:
    for option in ("--store-latency-ms=-1", "--store-gb-per-second=0"):
        assert option.partition("=")[0] in refusal(command, option)
    said = refusal(command, "--store-latency-ms=5", "--store-tail-ms=2")
    assert "--store-tail-ms must be at least --store-latency-ms" in said
    assert "and that above 0" in refusal(command, "--store-tail-ms=2")


def test_a_store_is_made_as_slow_as_the_options_say() -> None:
    assert store_faults(0.0, 0.0, None) is None
    assert store_faults(2.0, 30.0, 0.5) == StoreFaults(latency=0.002, tail=0.03, bandwidth=5e8)


def test_small_blocks_make_chunks_of_several() -> None:
    said = refusal("ttft", "--block-size", "32", "--tokens", "32")
    assert "chunks of 64 tokens" in said


@pytest.mark.parametrize("tokens", ["0", "55", "120", "1000"])
def test_decode_refuses_answers_that_would_be_saved(tokens: str) -> None:
    assert "--tokens must be a multiple of 10 up to 119" in refusal("decode", "--tokens", tokens)


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--layers", "6", "--layers must be a multiple of 4 for a hybrid, got 6"),
        ("--dtype", "float32", "--dtype must be bfloat16 for a hybrid, got float32"),
        ("--block-size", "256", "--block-size must be at least 288 for this hybrid"),
        ("--tokens", "1280", "--tokens must be a whole number of chunks of 512 tokens"),
        ("--new-tokens", "1024", "--new-tokens must be one block, 512 tokens, for a hybrid"),
        ("--new-tokens", "511", "--new-tokens must be one block, 512 tokens, for a hybrid"),
        ("--hidden", "0", "--hidden must be at least 1, got 0"),
    ],
)
def test_overlap_refuses_a_hybrid_that_is_not_computed_in_one_step(
    option: str, value: str, complaint: str
) -> None:
    assert complaint in refusal("overlap", "--model", "hybrid", option, value)


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--new-tokens", "0", "--new-tokens must be at least 1"),
        ("--latency-ms", "-1", "--latency-ms must not be negative"),
        ("--latency-ms", "nan", "--latency-ms must not be negative"),
        ("--gb-per-second", "0", "--gb-per-second must be positive"),
        ("--gb-per-second", "-2", "--gb-per-second must be positive"),
    ],
)
def test_overlap_refuses_a_link_that_cannot_be(option: str, value: str, complaint: str) -> None:
    assert complaint in refusal("overlap", option, value)


@pytest.mark.parametrize("option", ["--json", "--plot", "--timeline"])
def test_output_that_could_not_be_written_is_refused_first(option: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    said = refusal("overlap", option, str(missing / "file.png"))
    assert "there is no directory" in said


def test_a_picture_of_an_unknown_kind_is_refused() -> None:
    assert "x.gif must end in .png or .svg" in refusal("ttft", "--plot", "x.gif")


def test_without_matplotlib_pictures_are_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'lamina-kv[bench]'" in refusal("ttft", "--plot", "x.png")


def test_a_prompt_that_does_not_fit_in_memory_is_refused_with_figures() -> None:
    outcome = CliRunner().invoke(app, ["ttft", "--tokens", str(1 << 24)])
    assert outcome.exit_code == 1
    assert "of memory" in outcome.output
    assert "fewer --tokens" in outcome.output


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"--directory .* is not a directory"):
        require_room(memory=0, disk=1, directory=tmp_path / "missing")


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="another --directory"):
        require_room(memory=0, disk=1 << 60, directory=tmp_path)


def test_importing_the_bench_imports_nothing_that_measures() -> None:
    code = (
        "import sys, lamina_kv.bench; "
        "print([name for name in ('torch', 'vllm', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_shape_knows_its_bytes() -> None:
    assert SHAPE.row_token_bytes == 2 * 8 * 128 * 2
    assert SHAPE.kv_bytes(8192) == 16 * 8192 * 4096
    assert LlamaShape(1, 64, 2, 32, 32, Dtype.FLOAT32).kv_bytes(1) == 2 * 2 * 32 * 4
    assert SHAPE.heads == 8
    assert LlamaShape(1, 2048, 2, 128, 32, Dtype.FLOAT16).heads == 16
    assert LlamaShape(1, 64, 4, 128, 32, Dtype.FLOAT16).heads == 4, "at least one group"


def test_a_hybrid_has_a_row_for_four_layers_and_a_state_for_three_of_them() -> None:
    shape = HybridShape(8, 128, 2, 64, 160, Dtype.BFLOAT16)
    page = 160 * 2 * 2 * 64 * 2
    assert shape.rows == 2
    assert shape.kv_bytes(320) == 2 * (2 + 3) * page
    assert shape.kv_bytes(320, prompts=2) == 2 * (2 + 6) * page


def test_sizes_that_are_not_chosen_are_the_models_own() -> None:
    for model, shape in SHAPES.items():
        assert shape.model is model
        assert shape.but(dtype=shape.dtype, layers=None) == shape
    changed = SHAPES[Model.HYBRID].but(dtype=Dtype.BFLOAT16, layers=8, hidden=None)
    assert (changed.layers, changed.hidden) == (8, SHAPES[Model.HYBRID].hidden)


def test_prompts_share_nothing_and_are_the_same_in_every_run() -> None:
    source, again = PromptSource(), PromptSource()
    first, second = source.prompt(64), source.prompt(64)
    assert first != second
    assert [again.prompt(64), again.prompt(64)] == [first, second]


def test_plain_reads_read_a_file_of_the_size(tmp_path: Path) -> None:
    plain = PlainFile(tmp_path, 3 * 1024 * 1024 + 5)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == 3 * 1024 * 1024 + 4096
    plain.read()
    plain.read()
    way, times = plain.fastest()
    assert way
    assert len(times) == 2
    assert all(seconds > 0 for seconds in times)


def test_the_page_cache_of_a_whole_directory_is_dropped(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "file").write_bytes(b"kept")
    drop_page_cache(tmp_path)
    assert (inner / "file").read_bytes() == b"kept"


def test_control_is_measured_without_an_engine(tmp_path: Path) -> None:
    sizes = ("--chunks", "40", "--tokens", "1024", "--requests", "3", "--repeat", "2")
    sizes += ("--waiting", "5", "--waiting-tokens", "512")
    file = tmp_path / "control.json"
    outcome = CliRunner().invoke(app, ["control", *sizes, "--json", str(file)])
    assert outcome.exit_code == 0, outcome.output
    measured = json.loads(file.read_text())
    assert len(measured["samples"]) == 15
    assert all(len(sample["values"]) == 2 for sample in measured["samples"])
    assert [target["unit"] for target in measured["targets"]] == ["s"] * 12 + ["B"]


def test_control_refuses_what_cannot_be() -> None:
    assert "--requests must be at least 1, got 0" in refusal("control", "--requests", "0")
    assert "--chunk-tokens must be a multiple of 16" in refusal("control", "--chunk-tokens", "50")
    assert "--chunks must be enough for one prompt" in refusal("control", "--chunks", "5")


def test_peers_refuses_what_could_not_be_compared() -> None:
    assert "--tokens must be a whole number of chunks of 256" in refusal("peers", "--tokens", "384")
    assert "--system must name Lamina" in refusal("peers", "--system", "LMCache")
    assert "--rates must be numbers with commas between" in refusal("peers", "--rates", "1;2")
    assert "--rates must be positive" in refusal("peers", "--rates", "1,0")
    assert "--shares must be between 0 and 1" in refusal("peers", "--shares", "80")
    assert "--requests must be at least 1, got 0" in refusal("peers", "--requests", "0")
