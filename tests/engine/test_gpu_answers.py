"""Promise: section J of the acceptance run compares answers, and knows what came from where.

On a CPU, with a model of two layers; on a GPU it has not run.
"""

from __future__ import annotations

import pytest
import torch

from gpu.report import Verdict
from gpu.sections import answers

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SHAPE = answers.Shape(layers=2, heads=1, head_size=16, window=64, prompts=4, tokens=256)


def test_answers_from_host_and_disk_are_those_without() -> None:
    compared = list(answers.compare("small", SHAPE, torch.device("cpu"), torch.float32))
    assert [row.verdict for row in compared if row.bound] == [Verdict.PASS] * 5


def test_another_answer_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers._ask
    rounds: list[answers.Asked] = []

    def ask(*arguments: object) -> answers.Asked:
        rounds.append(asked(*arguments))
        if len(rounds) == 4:  # a first prompt, all of them without, cold, from host memory
            rounds[-1].answers[2][0] += 1
        return rounds[-1]

    monkeypatch.setattr(answers, "_ask", ask)
    compared = answers.compare("small", SHAPE, torch.device("cpu"), torch.float32)
    failed = {row.figure: row.value for row in compared if row.verdict is Verdict.FAIL}
    assert failed == {"small, float32, host: other answers": 1}
