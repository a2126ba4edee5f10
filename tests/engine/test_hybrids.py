"""Promise 1 for models that mix kinds of cache: what Lamina brings back for a sliding window, a
short convolution or a recurrent state is what vLLM itself goes on from.

Conversations of several turns are held with a vLLM that keeps its own prefix cache, and with one
whose cache is emptied and overwritten after every turn, so that Lamina has to bring it back.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.driver import Answer, Ask, Engine, EngineSpec, Fleet, Start, differences
from engine.models import SHAPES, Checkpoints
from engine.stores import flip
from engine.workload import Tokens, prompt

pytestmark = [pytest.mark.engine, pytest.mark.scaled]

TALKS, TURNS = int(os.environ.get("LAMINA_SOAK_CONVERSATIONS", "12")), 3
"""A dozen conversations have three that begin alike, and lengths of every kind."""
BLOCKS = {"linear-attention": 256}
"""Tokens of a block where it is not 32."""
HYBRIDS = [
    "sliding-window",
    "interleaved-windows",
    "alternating-windows",
    "short-convolution",
    "linear-attention",
]
STATES = ["short-convolution", "linear-attention"]
HOST = {"capacity": "256MiB"}

QUICK = {
    ("sliding-window", "layerwise"),
    ("interleaved-windows", "parked"),
    ("short-convolution", "layerwise"),
}
"""Models, and how they load, that are tried whenever something has changed."""


def _marks(model: str, mode: str) -> tuple[pytest.MarkDecorator, ...]:
    if mode == "auto" or (model, mode) == ("alternating-windows", "parked"):
        return (pytest.mark.soak,)
    return () if (model, mode) in QUICK else (pytest.mark.slow,)


@dataclass(frozen=True)
class Talk:
    """A conversation: what is said first, and what is added to each answer."""

    first: Tokens
    more: tuple[Tokens, ...]


def talks(block: int, count: int = TALKS) -> list[Talk]:
    """Some begin alike, some end on a boundary, some are shorter than a block."""
    rng = random.Random(5)
    shared = prompt(900, 2 * block + 40)
    lengths = (rng.randrange(5, 3 * block), rng.randrange(1, 4) * block, block + 1)
    found = []
    for number in range(count):
        length = rng.choice((*lengths, rng.randrange(5, 6 * block)))
        start = shared[: rng.randrange(1, len(shared))] if number % 4 == 0 else ()
        more = tuple(
            prompt(2000 + 10 * number + i, rng.randrange(1, 2 * block)) for i in range(TURNS)
        )
        found.append(Talk(start + prompt(1000 + number, length), more[: TURNS - 1]))
    return found


def options_of(model: str) -> dict[str, Any]:
    block = BLOCKS.get(model, 32)
    return {"block_size": block, "max_model_len": min(64 * block, 4096), **SHAPES[model].options}


def hold(
    engine: Engine, conversations: Sequence[Talk], after_turn: Callable[[Engine], Engine]
) -> list[Answer]:
    """Every answer, turn by turn and one by one."""
    answers: list[Answer] = []
    texts = [talk.first for talk in conversations]
    for turn in range(TURNS):
        for i, talk in enumerate(conversations):
            answer = engine.ask(Ask(texts[i]))
            answers.append(answer)
            if turn < TURNS - 1:
                texts[i] += answer.tokens + talk.more[turn]
        engine = after_turn(engine)
    return answers


def forget(engine: Engine) -> Engine:
    engine.forget()
    return engine


@pytest.fixture(scope="module")
def reference(
    checkpoints: Checkpoints, fleet: Fleet
) -> Callable[[str], tuple[list[Talk], list[Answer]]]:
    """Conversations and what vLLM answers from its own prefix cache, by model."""
    known: dict[str, tuple[list[Talk], list[Answer]]] = {}

    def get(model: str) -> tuple[list[Talk], list[Answer]]:
        if model not in known:
            conversations = talks(BLOCKS.get(model, 32))
            # By default vLLM keeps fewer boundaries than Lamina, and where it resumes decides how
            # its arithmetic rounds.
            options = {**options_of(model), "prefix_cache_retention_interval": None}
            plain = fleet.get(EngineSpec(checkpoints.model(model), options=options))
            known[model] = conversations, hold(plain, conversations, lambda engine: engine)
        return known[model]

    return get


def compare(model: str, answers: Sequence[Answer], expected: Sequence[Answer]) -> None:
    cached = [(ours.cached, theirs.cached) for ours, theirs in zip(answers, expected, strict=True)]
    if model in STATES:
        assert all(ours == theirs for ours, theirs in cached), cached
    else:  # vLLM has little room for windows, and gives some up
        assert all(ours >= theirs for ours, theirs in cached), cached
    assert not differences(answers, expected)


@pytest.mark.parametrize(
    ("model", "mode"),
    [
        pytest.param(model, mode, marks=_marks(model, mode))
        for model in HYBRIDS
        for mode in ("layerwise", "parked", "auto")
    ],
)
def test_from_host_memory(
    checkpoints: Checkpoints, fleet: Fleet, reference: Any, model: str, mode: str
) -> None:
    conversations, expected = reference(model)
    lamina = {
        "host": HOST,
        "chunk_tokens": BLOCKS.get(model, 32),
        "load": {"mode": mode, "min_tokens": 1},
    }
    engine = fleet.get(EngineSpec(checkpoints.model(model), lamina, options_of(model)))
    compare(model, hold(engine, conversations, forget), expected)
    metrics = engine.metrics()
    assert metrics.total("lamina_hit_tokens_total", tier="host") > 0
    assert metrics.total("lamina_failures_total") == 0
    assert metrics.total("lamina_leased_blocks") == metrics.total("lamina_transfers") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        "short-convolution",
        "interleaved-windows",
        "linear-attention",
        # Their windows are those of the second one.
        pytest.param("sliding-window", marks=pytest.mark.soak),
        pytest.param("alternating-windows", marks=pytest.mark.soak),
    ],
)
def test_from_disk_after_restarts(
    checkpoints: Checkpoints, start: Start, reference: Any, tmp_path: Path, model: str
) -> None:
    conversations, expected = reference(model)
    lamina = {
        "host": HOST,
        "tiers": [{"kind": "disk", "path": str(tmp_path / "store"), "capacity": "256MiB"}],
        "chunk_tokens": BLOCKS.get(model, 32),
        "load": {"min_tokens": 1},
    }
    spec = EngineSpec(checkpoints.model(model), lamina, options_of(model))

    def restart(engine: Engine) -> Engine:
        metrics = engine.metrics()
        assert metrics.total("lamina_failures_total") == 0
        engine.close()
        return start(spec)

    compare(model, hold(start(spec), conversations, restart), expected)


@pytest.mark.parametrize(
    "model", ["short-convolution", pytest.param("interleaved-windows", marks=pytest.mark.slow)]
)
def test_planned_when_the_last_step_has_ended(
    checkpoints: Checkpoints, fleet: Fleet, reference: Any, model: str
) -> None:
    """A step ahead the last token of a boundary that is passed while decoding is not known yet,
    and here it is."""
    conversations, expected = reference(model)
    lamina = {"host": HOST, "chunk_tokens": 32, "load": {"min_tokens": 1}}
    checkpoint, options = checkpoints.model(model), options_of(model)
    engine = fleet.get(EngineSpec(checkpoint, lamina, options, asynchronous=False))
    compare(model, hold(engine, conversations, forget), expected)
    assert engine.metrics().total("lamina_leased_blocks") == 0


def test_a_load_that_is_late_is_waited_for(checkpoints: Checkpoints, fleet: Fleet) -> None:
    """VLLM could not take it back, and memory does not fail."""
    model = "interleaved-windows"
    options, ask = options_of(model), Ask(prompt(870, 300))
    expected = fleet.get(EngineSpec(checkpoints.model(model), options=options)).ask(ask)
    lamina = {"host": HOST, "load": {"mode": "layerwise", "deadline": 0.1}}
    slow = {"slow_loads": 0.3}
    engine = fleet.get(EngineSpec(checkpoints.model(model), lamina, options, faults=slow))
    for _ in range(20):  # on a busy machine a save, too, is late
        again = engine.ask(ask)
        assert not differences([again], [expected])
        if again.cached:
            break
        engine.forget()
    assert again.cached > 0


@pytest.mark.slow
def test_states_of_another_type_do_not_mix(
    checkpoints: Checkpoints, start: Start, tmp_path: Path
) -> None:
    """Their pages have the same size."""
    model = "short-convolution"
    disk = {"kind": "disk", "path": str(tmp_path / "store"), "capacity": "32MiB"}
    ask = Ask(prompt(880, 200))
    for kind, cached in (("bfloat16", 0), ("bfloat16", 192), ("float16", 0)):
        options = {**options_of(model), "mamba_cache_dtype": kind}
        lamina = {"host": {"capacity": "64MiB"}, "tiers": [disk]}
        engine = start(EngineSpec(checkpoints.model(model), lamina, options))
        assert engine.ask(ask).cached == cached
        engine.close()


CHUNKED = {"max_num_batched_tokens": 96, "max_num_seqs": 8}


@pytest.mark.parametrize("model", ["interleaved-windows", "short-convolution"])
def test_many_at_once_in_small_pieces(checkpoints: Checkpoints, fleet: Fleet, model: str) -> None:
    """Prefills end off boundaries, and running requests share prefixes."""
    options = {**options_of(model), **CHUNKED}
    asks = [Ask(talk.first) for talk in talks(32)] * 2
    plain = {**options, "prefix_cache_retention_interval": None}
    expected = fleet.answers(EngineSpec(checkpoints.model(model), options=plain), asks)
    lamina = {"host": HOST, "chunk_tokens": 32, "load": {"min_tokens": 1}}
    engine = fleet.get(EngineSpec(checkpoints.model(model), lamina, options))
    for _ in range(3):
        answers = engine.generate(asks)
        assert [a.samples for a in answers] == [e.samples for e in expected]
        engine.forget()
    assert engine.metrics().total("lamina_hit_tokens_total", tier="host") > 0
    assert engine.metrics().total("lamina_failures_total") == 0


@pytest.mark.parametrize(
    "model", ["short-convolution", pytest.param("interleaved-windows", marks=pytest.mark.slow)]
)
def test_preempted_and_aborted(checkpoints: Checkpoints, fleet: Fleet, model: str) -> None:
    """With too little memory for all of them, and saves on their way."""
    room = {"num_gpu_blocks_override": 110, "max_num_seqs": 6, "max_model_len": 512}
    options = {**options_of(model), **room}
    asks = [Ask(prompt(700 + i, 150 + 30 * i), max_tokens=70) for i in range(8)]
    expected = fleet.answers(EngineSpec(checkpoints.model(model), options=options), asks)
    engine = fleet.get(EngineSpec(checkpoints.model(model), {"host": HOST}, options))
    free = engine.free_blocks()
    for _ in range(2):
        names = engine.submit(asks[:4])
        for _ in range(5):
            engine.step()
        engine.abort(names)
        engine.drain()
        answers = engine.generate(asks)
        assert [a.samples for a in answers] == [e.samples for e in expected]
        engine.forget()
    metrics = engine.metrics()
    assert metrics.total("lamina_leased_blocks") == metrics.total("lamina_transfers") == 0
    assert engine.free_blocks() == free


@pytest.mark.parametrize(
    ("model", "policy"),
    [
        ("short-convolution", "recompute"),
        *(
            pytest.param(model, policy, marks=pytest.mark.slow)
            for model, policy in (
                ("interleaved-windows", "recompute"),
                ("interleaved-windows", "fail"),
                ("sliding-window", "fail"),
                ("short-convolution", "fail"),
                ("sliding-window", "recompute"),
            )
        ),
    ],
)
def test_a_chunk_that_is_damaged(
    checkpoints: Checkpoints, fleet: Fleet, start: Start, tmp_path: Path, model: str, policy: str
) -> None:
    """A chunk of one group that is damaged on disk ends the hit, and no request."""
    store = tmp_path / "store"
    lamina = {
        "host": HOST,
        "tiers": [{"kind": "disk", "path": str(store), "capacity": "64MiB"}],
        "chunk_tokens": 32,
    }
    options = options_of(model)
    asks = [Ask(prompt(800 + i, 200 + i)) for i in range(3)]
    expected = fleet.answers(EngineSpec(checkpoints.model(model), options=options), asks)
    engine = start(EngineSpec(checkpoints.model(model), lamina, options))
    for ask in asks:
        engine.ask(ask)
    engine.close()
    flip(store, range(6))  # the first chunk of every group

    transfer = {"kv_load_failure_policy": policy}
    engine = start(EngineSpec(checkpoints.model(model), lamina, options, transfer=transfer))
    bad, *good = engine.generate(asks)
    assert engine.metrics().total("lamina_failures_total", kind="fetch_corrupt") >= 1
    assert not differences([bad, *good], expected)
    assert all(answer.cached > 0 for answer in good)
    engine.forget()
    assert not differences(engine.generate(asks), expected)
    assert engine.metrics().total("lamina_leased_blocks") == 0


@pytest.mark.parametrize("model", ["interleaved-windows", "short-convolution", "linear-attention"])
def test_nothing_is_saved_twice(checkpoints: Checkpoints, fleet: Fleet, model: str) -> None:
    """What is saved is what the geometry says: whole blocks of every group that has tokens in them,
    and one state at each boundary that the prefill stopped at."""
    block = BLOCKS.get(model, 32)
    lamina = {"host": HOST, "chunk_tokens": block}
    engine = fleet.get(EngineSpec(checkpoints.model(model), lamina, options_of(model)))
    before = engine.metrics()
    ask = Ask(prompt(850, 5 * block + 7), max_tokens=1)
    engine.ask(ask)
    engine.ask(ask)
    saved = engine.metrics().since(before, "lamina_save_bytes_total")
    page, rows, paged, recurrent = engine.in_workers(cache_shape)[0]
    assert saved == rows * page * (5 * paged + recurrent)


def cache_shape(worker: Any) -> tuple[int, int, int, int]:
    """Bytes of a page, rows, groups with blocks for tokens, groups with states."""
    config = worker.model_runner.kv_cache_config
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    recurrent = sum(type(spec).__name__ == "MambaSpec" for spec in specs)
    rows = len(config.kv_cache_groups[0].layer_names)
    return specs[0].page_size_bytes, rows, len(specs) - recurrent, recurrent


CORES = sorted(os.sched_getaffinity(0))
TWO_RANKS = {"tensor_parallel_size": 2}
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": f"{CORES[0]}|{CORES[-1]}"}


@pytest.mark.soak
@pytest.mark.parametrize("model", ["interleaved-windows", "linear-attention"])
def test_two_ranks(checkpoints: Checkpoints, start: Start, tmp_path: Path, model: str) -> None:
    conversations = talks(BLOCKS.get(model, 32), count=12)
    options = {**options_of(model), **TWO_RANKS}
    plain = {**options, "prefix_cache_retention_interval": None}
    checkpoint = checkpoints.model(model)
    engine = start(EngineSpec(checkpoint, None, plain, environment=TWO_CORES))
    expected = hold(engine, conversations, lambda engine: engine)
    engine.close()
    lamina = {
        "host": HOST,
        "tiers": [{"kind": "disk", "path": str(tmp_path / "store"), "capacity": "128MiB"}],
        "chunk_tokens": BLOCKS.get(model, 32),
        "load": {"min_tokens": 1},
    }
    spec = EngineSpec(checkpoint, lamina, options, environment=TWO_CORES)
    engine = start(spec)
    compare(model, hold(engine, conversations, forget), expected)
    engine.close()
    engine = start(spec)
    again = [engine.ask(Ask(talk.first)) for talk in conversations]
    assert not differences(again, expected[: len(conversations)])
    assert sum(answer.cached for answer in again) > 0
    assert engine.metrics().total("lamina_hit_tokens_total", tier="disk") > 0
