"""A load does not begin while the engine's own stream may still copy blocks that it goes into."""

from __future__ import annotations

import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lamina_kv.data.executor import Executor
from lamina_kv.engines.standalone import Standalone
from lamina_kv.plan import StepPlan

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "tiny_engine.py"


@pytest.mark.parametrize("mode", ["parked", "layerwise"])
def test_loads_begin_when_the_engines_copies_are_over(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    make, begin = Standalone.__init__, Executor.begin_step

    def settling(lamina: Standalone, *args: Any, **options: Any) -> None:
        make(lamina, *args, **options, settle=lambda: said.append("settled"))

    def noted(executor: Executor, plan: StepPlan) -> None:
        said.append("loads" if plan.loads else "nothing to load")
        begin(executor, plan)

    monkeypatch.setattr(Standalone, "__init__", settling)
    monkeypatch.setattr(Executor, "begin_step", noted)
    engine = runpy.run_path(str(EXAMPLE))["TinyEngine"](
        {"load": {"mode": mode, "when": "always"}, "host": {"capacity": "1MiB"}}
    )
    for _ in range(2):
        engine.generate([list(range(100))])
    engine.lamina.close()
    assert "loads" in said
    assert "nothing to load" in said
    before = [earlier for earlier, now in pairwise(said) if now == "loads"]
    assert set(before) == {"settled"}
    assert said.count("settled") == said.count("loads"), "a step without loads waits for nobody"
