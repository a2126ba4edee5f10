"""Guards that a decision can be explained and made again from what was written down of it, and that
a notebook that cannot be written costs nothing but the notes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from driven_planner import Engine, View, prompt
from typer.testing import CliRunner

from lamina.cli.main import app
from lamina.control.cost import CostModel, Costs, decode_costs, encode_costs
from lamina.control.decisions import DecisionRecord, decode_decision, encode_decision
from lamina.engines.notebook import Notebook
from lamina.plan import TierName


def decided(*, seconds: float = 1.0, name: str = "b") -> DecisionRecord:
    """A decision about a hit of 64 tokens in the host tier, where a load takes so long."""
    made: list[DecisionRecord] = []
    costs = CostModel()
    costs.loaded(TierName.HOST, 2000, seconds)
    costs.computed(0, 64, 0.1)
    engine = Engine(costs=costs.costs, on_decision=made.append)
    engine.save(View("a", prompt(70)))
    hit = engine.planner.lookup(View(name, prompt(70), first_block=40), 0)
    engine.planner.admitted(name, hit.tokens)
    assert made[-1].request_id == name
    return made[-1]


def test_what_was_written_down_is_what_was_decided() -> None:
    record = decided()
    again = decode_decision(encode_decision(record))
    assert again == record
    assert again.replay() == record.decision


def test_an_explanation_has_what_the_decision_rested_on() -> None:
    text = decided().explain()
    for part in ("request b", "64 tokens", "in host", "1000.0 ms", "slower_than_computing"):
        assert part in text
    assert "loaded 64 tokens, layerwise (hit)" in decided(seconds=0.001).explain()


def test_a_decision_that_would_be_another_now_is_seen() -> None:
    record = decided()
    other = replace(record, decision=replace(record.decision, tokens=7))
    assert other.replay() != other.decision


@pytest.mark.parametrize("line", [b"", b"{}", b"[1, 2]", b"\xff", b'{"request_id": 3}'])
def test_what_is_no_decision_is_an_error(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a decision"):
        decode_decision(line)
    with pytest.raises(ValueError, match="not costs"):
        decode_costs(b"[3]" + line)


class TestNotebook:
    def test_costs_are_kept_from_one_run_to_the_next(self, tmp_path: Path) -> None:
        file, costs = tmp_path / "costs.json", decided().costs
        assert Notebook(None, file).read_costs() is None
        Notebook(None, file).close(costs)
        assert Notebook(None, file).read_costs() == costs
        assert decode_costs(encode_costs(costs)) == costs

    def test_damaged_costs_are_not_used(self, tmp_path: Path) -> None:
        file = tmp_path / "costs.json"
        file.write_bytes(b"{")
        assert Notebook(None, file).read_costs() is None

    def test_a_directory_that_is_not_there_costs_the_notes_only(self, tmp_path: Path) -> None:
        notebook = Notebook(tmp_path / "none" / "d", tmp_path / "none" / "c")
        notebook.note(decided())
        notebook.close(Costs())

    def test_every_decision_is_a_line(self, tmp_path: Path) -> None:
        file = tmp_path / "decisions"
        notebook = Notebook(file, None)
        for name in ("one", "two"):
            notebook.note(decided(name=name))
        notebook.close(Costs())
        names = [decode_decision(line).request_id for line in file.read_bytes().splitlines()]
        assert names == ["one", "two"]


class TestExplain:
    def explain(self, *arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["explain", *arguments])
        return result.exit_code, result.output

    def test_one_request_or_all(self, tmp_path: Path) -> None:
        file = tmp_path / "decisions"
        lines = [encode_decision(decided(name=name)) for name in ("one", "two")]
        file.write_bytes(b"\n".join(lines))
        code, text = self.explain(str(file))
        assert code == 0
        assert "request one" in text
        assert "request two" in text
        assert "request two" not in self.explain(str(file), "one")[1]

    def test_mistakes_are_named(self, tmp_path: Path) -> None:
        file = tmp_path / "decisions"
        assert self.explain(str(file))[0] == 1
        file.write_bytes(encode_decision(decided()) + b"\nx")
        code, text = self.explain(str(file))
        assert code == 1
        assert "line 2" in text
        file.write_bytes(encode_decision(decided()))
        assert "no decision about other" in self.explain(str(file), "other")[1]
