"""The same promises on every engine that is served: two versions of vLLM, two model runners each.

The answers with Lamina are those of the same engine without it: from host memory and from disk,
after a restart, after a load that failed, with too little memory, after aborts. `make test` tries
the installed version with the runner that no other test has, `make compat` tries all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.driver import SMALL, Answer, Ask, Engine, EngineSpec, Fleet, Start, differences
from engine.models import Checkpoints
from engine.pair import PairSpec, shared_pair
from engine.runners import RUNNERS, Runner
from engine.stores import flip
from engine.test_crowds import CROWD as READERS
from engine.test_crowds import DOCUMENT, ask_at_once, load_of_one, loaded
from engine.test_hybrids import BLOCKS, compare, forget, hold, options_of, talks
from engine.workload import loadable, prompt

LATER = [pytest.mark.compat, pytest.mark.soak]
"""Not in `make test`, and not in CI, which has no newer version to lay over the installed one."""

pytestmark = pytest.mark.engine

V2 = RUNNERS[1]
ASKS = [Ask(prompt(700 + length, length), max_tokens=4) for length in (70, 128, 129, 200)]
"""Prompts with one to three whole chunks."""
CROWD = [Ask(prompt(750 + n, 90 + 20 * n), max_tokens=40) for n in range(4)]
TIGHT = {"num_gpu_blocks_override": 14, "max_model_len": 256}
"""Blocks for two of them when they end."""


def each(runner: Runner) -> Any:
    marks = [] if runner == V2 else LATER
    marks = [*marks, pytest.mark.xdist_group(str(runner))]
    if missing := runner.missing():
        marks = [*marks, pytest.mark.skip(reason=missing)]
    return pytest.param(runner, marks=marks, id=str(runner))


@pytest.fixture(params=[each(runner) for runner in RUNNERS])
def runner(request: pytest.FixtureRequest) -> Runner:
    return request.param


Plain = Callable[[Sequence[Ask]], list[Answer]]


@pytest.fixture
def plain(llama: Path, fleet: Fleet, runner: Runner) -> Plain:
    """What this engine answers without Lamina."""
    return lambda asks: fleet.answers(EngineSpec(llama, runner=runner), asks)


def what_runs(worker: Any) -> tuple[str, int]:
    """In a worker of vLLM: its version and which model runner it has."""
    import vllm
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    return vllm.__version__, 2 if isinstance(worker.model_runner, GPUModelRunner) else 1


def note_loads(worker: Any) -> None:
    """In a worker: note for each step with loads whether its layers are said to call hooks."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    executor = get_kv_transfer_group()._on_worker.executor
    start, worker.said = executor.start_loads, []

    def noted(*, layers_call: bool) -> None:
        if not executor._loads.is_empty:
            worker.said.append(layers_call)
        start(layers_call=layers_call)

    executor.start_loads = noted


def noted_loads(worker: Any) -> list[bool]:
    return list(worker.said)


def expect_whole(answers: Sequence[Answer]) -> None:
    assert [a.cached for a in answers] == [loadable(len(ask.tokens)) for ask in ASKS]


def expect_quiet(engine: Engine) -> None:
    metrics = engine.metrics()
    assert metrics.total("lamina_leased_blocks") == metrics.total("lamina_transfers") == 0


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["layerwise", pytest.param("parked", marks=LATER)])
def test_from_each_tier_over_restarts_and_recomputed_where_damaged(
    llama: Path, start: Start, plain: Plain, runner: Runner, tmp_path: Path, mode: str
) -> None:
    expected = plain(ASKS)
    store = tmp_path / "store"
    lamina = {
        "host": {"capacity": "8MiB"},
        "tiers": [{"kind": "disk", "path": str(store), "capacity": "4MiB"}],
        "load": {"mode": mode, "min_tokens": 1},
    }
    spec = EngineSpec(llama, lamina, runner=runner)

    engine = start(spec)
    assert engine.in_workers(what_runs) == [(runner.version, runner.model_runner)]
    assert not differences(engine.generate(ASKS), expected)
    engine.forget()
    engine.in_workers(note_loads)
    from_host = engine.generate(ASKS)
    assert not differences(from_host, expected)
    expect_whole(from_host)
    expect_quiet(engine)
    (said,) = engine.in_workers(noted_loads)
    assert (said == []) if mode == "parked" else (said and all(said))  # no graph on a CPU
    engine.close()

    engine = start(spec)
    from_disk = engine.generate(ASKS)
    assert not differences(from_disk, expected)
    expect_whole(from_disk)
    assert engine.metrics().total("lamina_hit_tokens_total", tier="disk") > 0
    engine.close()

    flip(store)
    engine = start(spec)
    recomputed = engine.generate(ASKS)
    assert not differences(recomputed, expected)
    metrics = engine.metrics()
    assert metrics.total("lamina_failures_total", kind="fetch_corrupt") > 0
    expect_quiet(engine)


@pytest.mark.soak
def test_too_little_memory_and_aborts(
    llama: Path, start: Start, plain: Plain, runner: Runner
) -> None:
    expected = plain(CROWD)
    engine = start(EngineSpec(llama, SMALL, TIGHT, runner=runner))
    free = engine.free_blocks()
    for _ in range(2):
        assert not differences(engine.generate(CROWD), expected)
    metrics = engine.metrics()
    assert metrics.total("vllm:num_preemptions_total") > 0
    assert metrics.total("lamina_hit_tokens_total", tier="host") > 0

    names = engine.submit(CROWD)
    for _ in range(4):
        engine.step()
    engine.abort(names[:2])
    left = engine.drain()
    assert not differences(sorted(left, key=lambda answer: int(answer.name[1:])), expected[2:])
    assert not differences(engine.generate(CROWD), expected)
    expect_quiet(engine)
    assert engine.free_blocks() == free


@pytest.mark.compat
@pytest.mark.soak
@pytest.mark.parametrize("mode", ["layerwise", "parked"])
def test_one_document_many_at_once(
    llama: Path, start: Start, plain: Plain, runner: Runner, mode: str
) -> None:
    expected = plain(READERS)
    engine = start(EngineSpec(llama, {**SMALL, "load": {"mode": mode}}, runner=runner))
    engine.ask(Ask(DOCUMENT, max_tokens=1))
    engine.forget()
    before = loaded(engine)
    answers, _ = ask_at_once(engine, READERS)
    assert not differences(answers, expected)
    assert loaded(engine) - before == load_of_one(engine)
    expect_quiet(engine)


@pytest.mark.compat
@pytest.mark.soak
@pytest.mark.parametrize("seed", [0, 1], ids=["accepted", "rejected"])
def test_a_draft_model(
    checkpoints: Checkpoints, llama: Path, fleet: Fleet, plain: Plain, runner: Runner, seed: int
) -> None:
    """Its layers run before vLLM asks for results, or after that."""
    asks = [replace(ask, max_tokens=12) for ask in ASKS]
    expected = plain(asks)
    draft = str(checkpoints.model("llama", seed))
    options = {"speculative_config": {"model": draft, "num_speculative_tokens": 3}}
    engine = fleet.get(EngineSpec(llama, SMALL, options, runner=runner))
    assert not differences(engine.generate(asks), expected)
    engine.forget()
    again = engine.generate(asks)
    assert not differences(again, expected)
    assert sum(answer.cached for answer in again) > 0
    expect_quiet(engine)


@pytest.mark.compat
@pytest.mark.soak
@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_pushes(llama: Path, fleet: Fleet, plain: Plain, runner: Runner, first: str) -> None:
    spec = PairSpec(llama, {"max_num_batched_tokens": 96}, runner=runner)
    pair = shared_pair(fleet, spec)
    expected = plain(ASKS)
    answers = pair.push(ASKS, first=first, apart=2)
    assert not differences(answers, expected)
    assert [answer.cached for answer in answers] == [len(ask.tokens) - 1 for ask in ASKS]
    pair.settle()
    assert pair.counts() == {"sent": len(ASKS), "received": len(ASKS)}


OTHERS = [
    "qwen3-moe",
    "sliding-window",
    "interleaved-windows",
    "alternating-windows",
    "short-convolution",
    "linear-attention",
]
"""Kinds of cache that vLLM's prefix cache keeps. Not MLA, whose answers are no reference on a CPU,
and not states without a prefix cache (:mod:`engine.test_states_in_place`)."""


@pytest.mark.compat
@pytest.mark.soak
@pytest.mark.parametrize("model", OTHERS)
def test_other_kinds_of_cache(
    checkpoints: Checkpoints, fleet: Fleet, runner: Runner, model: str
) -> None:
    conversations = talks(BLOCKS.get(model, 32), count=4)
    checkpoint, options = checkpoints.model(model), options_of(model)
    retained = {**options, "prefix_cache_retention_interval": None}
    plain = fleet.get(EngineSpec(checkpoint, options=retained, runner=runner))
    expected = hold(plain, conversations, lambda engine: engine)
    lamina = {
        "host": {"capacity": "64MiB"},
        "chunk_tokens": BLOCKS.get(model, 32),
        "load": {"min_tokens": 1},
    }
    engine = fleet.get(EngineSpec(checkpoint, lamina, options, runner=runner))
    compare(model, hold(engine, conversations, forget), expected)
    assert engine.metrics().total("lamina_hit_tokens_total", tier="host") > 0
    assert engine.metrics().total("lamina_failures_total") == 0
    expect_quiet(engine)
