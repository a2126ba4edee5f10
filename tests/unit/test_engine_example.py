"""The example for authors of engines runs, loads what it says it loads, and answers rightly."""

from __future__ import annotations

import runpy
import threading
from pathlib import Path
from typing import Any

import pytest

from lamina.data.tiers.disk import DiskTier

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "tiny_engine.py"
QUESTIONS = [[(7 * i + j) % 1000 for j in range(100 + 20 * i)] for i in range(6)]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def test_it_says_what_it_shows(example: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    example["main"]()
    assert capsys.readouterr().out == (
        "1242 tokens computed, and 90 when asked again\nthe answers are the same\n"
    )


@pytest.mark.parametrize("mode", ["parked", "layerwise", "auto"])
def test_answers_are_the_same_however_they_are_loaded(example: dict[str, Any], mode: str) -> None:
    engine = example["TinyEngine"](
        {"load": {"mode": mode, "when": "always"}, "host": {"capacity": "1MiB"}}
    )
    first = engine.generate(QUESTIONS)
    computed = engine.computed
    assert engine.generate(QUESTIONS) == first
    assert engine.computed - computed < 0.2 * computed
    assert not +engine.pool.references
    engine.lamina.close()


def test_what_is_on_disk_is_found_by_the_next_engine(
    example: dict[str, Any], tmp_path: Path
) -> None:
    settings = {
        "load": {"when": "always"},
        "host": {"capacity": "1MiB"},
        "disk": {"path": str(tmp_path / "store"), "capacity": "16MiB"},
    }
    engine = example["TinyEngine"](settings)
    first, computed = engine.generate(QUESTIONS), engine.computed
    engine.lamina.close()
    engine = example["TinyEngine"](settings)
    assert engine.generate(QUESTIONS) == first
    assert engine.computed < 0.2 * computed
    engine.lamina.close()


def test_an_engine_that_a_thread_of_its_own_lets_go_of_gives_its_store_back(
    example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector ends an engine on whatever thread it runs."""
    store = str(tmp_path / "store")
    settings = {"host": {"capacity": "1MiB"}, "disk": {"path": store, "capacity": "16MiB"}}
    engine = example["TinyEngine"](settings)
    ended = threading.Event()

    def collect(*arguments: object) -> None:
        engine.lamina.close()
        ended.set()

    monkeypatch.setattr(DiskTier, "drop", collect)
    engine.lamina._executor._writer.drop([0])
    assert ended.wait(60), "it waits for itself"
    example["TinyEngine"](settings).lamina.close()
