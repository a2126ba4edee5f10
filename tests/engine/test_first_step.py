"""The first step of an engine may be a small one, as it never is without a cache: whatever vLLM's
kernels need has been done before."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import processors
from engine.driver import SMALL, Ask, EngineSpec, Start
from engine.workload import prompt

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(bool(processors.missing()), reason=processors.missing()),
]


def test_one_token_with_amx(llama: Path, start: Start) -> None:
    """Linux kills a process that uses tiles without having asked for them. vLLM alone is killed
    by this prompt, too."""
    engine = start(EngineSpec(llama, SMALL, {"dtype": "bfloat16"}))
    assert len(engine.ask(Ask(prompt(1, 1), max_tokens=2)).tokens) == 2
