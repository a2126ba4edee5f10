"""Which engines share a store: those to which bytes mean the same, whatever machine they run on,
and no others.

One engine saves what it is asked; then another one is asked the same. If it shares it loads all of
that, and else nothing. Either way it answers as it would without a store.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine import processors
from engine.driver import SMALL, Ask, EngineSpec, Fleet, Start, differences
from engine.models import Checkpoints
from engine.runners import RUNNERS, Runner
from engine.workload import loadable, prompt

pytestmark = pytest.mark.engine

ASKS = [Ask(prompt(1200 + length, length), max_tokens=6) for length in (70, 130, 200)]
"""Prompts with one to three whole chunks."""

BF16 = {"dtype": "bfloat16"}


@dataclass(frozen=True)
class Case:
    """Two engines.

    Attributes:
        shares: whether the second finds what the first has saved.
        options: arguments of ``vllm.LLM`` in which the second differs.
        lamina: fields of Lamina's configuration in which it differs.
        model: how its checkpoint differs: ``moved`` or ``other``.
        processors: on which they run; this machine's where it is empty.
        runners: which vLLM they are; the installed one where it is None.
        both: arguments of both.
    """

    shares: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    lamina: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    processors: tuple[str, str] = ("", "")
    runners: tuple[Runner | None, Runner | None] = (None, None)
    both: Mapping[str, Any] = field(default_factory=dict)

    def spec(self, model: Path, store: Path | None, *, second: bool) -> EngineSpec:
        """Either engine; without a store it is vLLM alone."""
        lamina = {
            **SMALL,
            "tiers": [{"kind": "directory", "path": str(store), "keep": "all"}],
            "load": {"min_tokens": 1},
            **(self.lamina if second else {}),
        }
        return EngineSpec(
            model,
            None if store is None else lamina,
            {**self.both, **(self.options if second else {})},
            processor=self.processors[second],
            runner=self.runners[second],
        )


def on(first: str, second: str, *, shares: bool, **both: Any) -> Case:
    return Case(shares, processors=(first, second), both=both)


SETTINGS = {
    "nothing": Case(True),
    "more of everything": Case(
        True,
        {"num_gpu_blocks_override": 900, "max_model_len": 4000, "max_num_batched_tokens": 4096},
    ),
    "seed": Case(True, {"seed": 7}),
    "folder": Case(True, model="moved"),
    "weights": Case(False, model="other"),
    "identity": Case(False, lamina={"identity": "mine"}),
    "dtype": Case(False, BF16),
    "block size": Case(False, {"block_size": 64}),
    "chunk size": Case(False, lamina={"chunk_tokens": 128}),
    "quantised cache": Case(False, {"kv_cache_dtype": "fp8"}, both=BF16),
}
"""By what is different."""

QUICK = ("nothing", "weights", "dtype")
"""Those that are tried whenever something has changed."""

PROCESSORS = {
    "float32 without AMX": on("", "Zen 4", shares=True),
    "float32 without AVX-512": on("", "Haswell", shares=True),
    "bfloat16 without AMX": on("", "Zen 4", shares=False, **BF16),
    "bfloat16 with AMX": on("Ice Lake", "", shares=False, **BF16),
    "bfloat16 without AVX-512": on("Ice Lake", "Haswell", shares=True, **BF16),
}
"""By what the second one computes with."""

V1, V2, NEWER, _ = RUNNERS
VERSIONS = {
    "model runner": Case(True, runners=(V1, V2)),
    "version": Case(False, runners=(V1, NEWER)),
}


def check(case: Case, checkpoints: Checkpoints, fleet: Fleet, start: Start, folder: Path) -> None:
    model, other, store = checkpoints.model("llama"), checkpoints.model("llama"), folder / "store"
    if case.model == "moved":
        other = shutil.copytree(model, folder / "moved")
    elif case.model:
        other = checkpoints.model("llama", 1)
    first = start(case.spec(model, store, second=False))
    first.generate(ASKS)
    first.close()
    expected = fleet.answers(case.spec(other, None, second=True), ASKS)
    second = start(case.spec(other, store, second=True))
    answers = second.generate(ASKS)
    there = [loadable(len(ask.tokens)) if case.shares else 0 for ask in ASKS]
    assert [answer.cached for answer in answers] == there
    if case.both == BF16:  # what is loaded rounds as the first one does
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    else:
        assert not differences(answers, expected)
    assert second.metrics().total("lamina_failures_total") == 0


@pytest.mark.parametrize(
    "different",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name)
        for name in SETTINGS
    ],
)
def test_settings(
    checkpoints: Checkpoints, fleet: Fleet, start: Start, tmp_path: Path, different: str
) -> None:
    if different == "quantised cache" and (missing := processors.no_fp8()):
        pytest.skip(missing)
    check(SETTINGS[different], checkpoints, fleet, start, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(bool(processors.missing()), reason=processors.missing())
@pytest.mark.parametrize(
    "second",
    [
        name if name == "bfloat16 without AMX" else pytest.param(name, marks=pytest.mark.soak)
        for name in PROCESSORS
    ],
)
def test_processors(
    checkpoints: Checkpoints, fleet: Fleet, start: Start, tmp_path: Path, second: str
) -> None:
    check(PROCESSORS[second], checkpoints, fleet, start, tmp_path)


@pytest.mark.compat
@pytest.mark.soak
@pytest.mark.parametrize("different", VERSIONS)
def test_versions(
    checkpoints: Checkpoints, fleet: Fleet, start: Start, tmp_path: Path, different: str
) -> None:
    case = VERSIONS[different]
    if missing := "; ".join(filter(None, (r.missing() for r in case.runners if r))):
        pytest.skip(missing)
    check(case, checkpoints, fleet, start, tmp_path)
