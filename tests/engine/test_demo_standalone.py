"""Guards `lamina-kv demo-standalone`: the answers that it compares are those of two engines of
which one has Lamina, and what it concludes is what it has seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from engine.batching import load_model
from engine.workload import prompt
from lamina_kv.cli import demo_standalone
from lamina_kv.cli.demo_standalone import SETTINGS, Answer, converse

pytestmark = pytest.mark.engine


def test_conversations_are_led_the_same_with_and_without(llama: Path) -> None:
    model = load_model(llama)
    openings = [prompt(seed, 150) for seed in range(3)]
    turns = [prompt(10 + turn, 12) for turn in range(3)]
    alone = converse(model, openings, turns, None)
    together = converse(model, openings, turns, SETTINGS)
    assert [len(turn) for turn in alone] == [3, 3, 3]
    assert alone[2][0].prompt == 150 + 3 * 12 + 2 * demo_standalone.MAX_TOKENS
    for before, after in zip(alone, together, strict=True):
        assert [a.tokens for a in before] == [a.tokens for a in after]
        assert all(a.first_token > 0 for a in (*before, *after))


def answers(*firsts: float, token: int = 1) -> list[list[Answer]]:
    """One conversation, by turn."""
    return [[Answer((token,), 100, first)] for first in firsts]


@pytest.mark.parametrize(
    ("together", "code", "said"),
    [
        (answers(1.0, 0.1), 0, "All 2 answers are the same"),
        (answers(1.0, 0.1, token=2), 1, "2 of 2 answers differ"),
    ],
)
def test_what_it_concludes(together: list[list[Answer]], code: int, said: str) -> None:
    console = Console(record=True, width=120)
    found = demo_standalone._report(console, answers(1.0, 2.0), together, str)
    text = console.export_text()
    assert found == code
    assert said in text
    assert "20.0x" in text


def test_it_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "deep" / "turns.png"
    demo_standalone._draw(answers(1.0, 2.0), answers(1.0, 0.1), picture)
    assert picture.stat().st_size > 1000
