"""The example for authors of engines runs, loads what it says it loads, and answers rightly."""

from __future__ import annotations

import json
import runpy
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from typer.testing import CliRunner

from lamina_kv.bench import app as bench
from lamina_kv.plan import StepPlan, TierName, TierOrders
from lamina_kv.tiers import KINDS, Kind
from lamina_kv.tiers.config import TierConfig
from lamina_kv.tiers.contract import Tenant
from lamina_kv.tiers.disk.store import DiskStore
from lamina_kv.values import choice, integer
from stores import MemoryStore, Shelf

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
        "tiers": [{"kind": "disk", "path": str(tmp_path / "store"), "capacity": "16MiB"}],
    }
    engine = example["TinyEngine"](settings)
    first, computed = engine.generate(QUESTIONS), engine.computed
    engine.lamina.close()
    engine = example["TinyEngine"](settings)
    assert engine.generate(QUESTIONS) == first
    assert engine.computed < 0.2 * computed
    engine.lamina.close()


def test_its_requests_are_a_trace_of_what_more_memory_would_be_worth(
    example: dict[str, Any], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    engine = example["TinyEngine"]({"host": {"capacity": "1MiB"}, "observe": {"trace": str(trace)}})
    for _ in range(2):
        engine.generate(QUESTIONS)
    engine.lamina.close()
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    first, second = (
        sorted(len(line["hash_ids"]) for line in part) for part in (lines[:6], lines[6:])
    )
    assert first == second
    assert len({number for line in lines for number in line["hash_ids"]}) == sum(first)
    said = CliRunner().invoke(bench, ["trace", str(trace), "--host", "10%,100%"])
    assert said.exit_code == 0, said.output
    assert "Each GiB more is worth" in said.output


def test_an_engine_that_a_thread_of_its_own_lets_go_of_gives_its_store_back(
    example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector ends an engine on whatever thread it runs."""
    store = str(tmp_path / "store")
    settings = {
        "host": {"capacity": "1MiB"},
        "tiers": [{"kind": "disk", "path": store, "capacity": "16MiB"}],
    }
    engine = example["TinyEngine"](settings)
    ended = threading.Event()

    def collect(*arguments: object) -> None:
        engine.lamina.close()
        ended.set()

    monkeypatch.setattr(DiskStore, "drop", collect)
    engine.lamina._executor.begin_step(StepPlan(0, tiers=(TierOrders(TierName("disk"), (0,)),)))
    assert ended.wait(60), "it waits for itself"
    example["TinyEngine"](settings).lamina.close()


class ShelfConfig(TierConfig):
    """A tier in this process's memory."""

    kind: Annotated[Literal["shelf"], choice("shelf")] = "shelf"
    slots: Annotated[int, integer(0)] = 0


SHELF = Shelf()


def open_shelf(config: ShelfConfig, tenant: Tenant) -> MemoryStore:
    """See :data:`lamina_kv.tiers.KINDS`."""
    return MemoryStore(SHELF, slots=config.slots)


@pytest.mark.parametrize("slots", [0, 200])
def test_a_store_that_nobody_knows_is_a_tier(
    example: dict[str, Any], monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """Registered, it needs nothing else, whether control assigns its slots or it finds chunks by
    key."""
    monkeypatch.setitem(KINDS, "shelf", Kind(ShelfConfig, f"{__name__}:open_shelf"))
    SHELF.held.clear()
    settings = {
        "load": {"when": "always"},
        "host": {"capacity": "1MiB"},
        "tiers": [{"kind": "shelf", "slots": slots}],
    }
    engine = example["TinyEngine"](settings)
    first, computed = engine.generate(QUESTIONS), engine.computed
    engine.lamina.close()
    engine = example["TinyEngine"](settings)
    assert engine.generate(QUESTIONS) == first
    assert engine.computed < 0.2 * computed
    assert engine.lamina.figures()["hit_tokens shelf"] > 0
    engine.lamina.close()
