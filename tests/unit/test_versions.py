"""Guards the table of versions: it has what ran, and says no more than that."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import versions
from documented import ROOT
from versions import Run

PAGE = ROOT / "docs/compatibility.md"


def test_the_page_has_what_is_recorded() -> None:
    assert versions.load()
    assert versions.table(versions.load()) in PAGE.read_text(), (
        "docs/compatibility.md is out of step; `python tests/versions.py` prints its table"
    )


def test_nothing_that_failed_is_called_supported() -> None:
    assert not [run for run in versions.load() if run.failed]


def test_the_page_names_what_is_supported() -> None:
    """Of vLLM and transformers, what the code accepts; and no other."""
    from lamina_kv.engines.vllm.version import SUPPORTED

    rows = re.findall(
        r"^\| (vLLM|transformers)(?: \(continuous batching\))? \| (.*?) \|",
        PAGE.read_text(),
        re.MULTILINE,
    )
    # Read and not imported: it would bring torch and the library.
    attach = (ROOT / "src/lamina_kv/engines/transformers/attach.py").read_text()
    ends = re.findall(r"\((\d+), (\d+)\)", attach.partition("OLDEST, NEWEST = ")[2].split("\n")[0])
    assert dict(rows) == {
        "vLLM": " and ".join(f"{version}.x" for version in SUPPORTED),
        "transformers": " to ".join(".".join(end) for end in ends),
    }


@pytest.mark.parametrize(
    ("node_id", "engine"),
    [
        ("tests/engine/test_compat.py::test_outputs[0.33-V2]", "vLLM 0.33, V2"),
        ("tests/engine/test_compat.py::test_models[0.32-V2-mistral]", "vLLM 0.32, V2"),
        ("tests/engine/test_compat.py::test_models[mistral-0.33-V1]", "vLLM 0.33, V1"),
        ("tests/engine/test_reset.py::test_a_reset", "vLLM 0.32"),
        ("tests/fault/test_engine_disk.py::test_a_disk", "vLLM 0.32"),
        ("tests/engine/test_transformers_graphs.py::test_a_graph", "transformers 5.19.0"),
        ("tests/unit/test_keys.py::test_a_key", "no engine"),
    ],
)
def test_on_what_a_test_runs(node_id: str, engine: str) -> None:
    assert versions.place_of(node_id, "0.32", "5.19.0")[0] == engine


def test_a_test_that_fails_anywhere_has_failed() -> None:
    outcomes = {"tests/unit/a.py::b": "passed", "tests/unit/a.py::c": "failed"}
    (run,) = versions.runs_of(outcomes, "0.32", "5.19.0")
    assert (run.engine, run.passed, run.failed, run.skipped) == ("no engine", 1, 1, 0)


def test_what_was_only_skipped_did_not_run() -> None:
    assert not versions.runs_of({"tests/unit/a.py::b": "skipped"}, "0.32", "5.19.0")


def test_a_later_run_takes_the_place_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "RECORD", tmp_path / "versions.json")
    first, other, later = (
        Run("vLLM 0.32, V1", "some", python, passed, 0, 0, "2026-11-30", commit)
        for python, passed, commit in (("3.11.7", 1, "a"), ("3.12.1", 2, "a"), ("3.11.7", 3, "b"))
    )
    versions.save([first, other])
    versions.save([later])
    assert versions.load() == [later, other]
