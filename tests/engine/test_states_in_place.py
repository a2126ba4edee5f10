"""Promise 1 for recurrent models without vLLM's prefix cache, which keep one state for a request
and overwrite it with every step: what Lamina saves of it is what it was at a boundary, and what
it brings back is what it saved.

The plain vLLM beside it computes every prompt from its beginning, in steps that end at the same
places, so that in float32 its answers are the same.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
)

from engine.driver import Answer, Ask, Engine, EngineSpec, Fleet, Start
from engine.driver import differences as differences_of
from engine.models import SHAPES, Checkpoints
from engine.stores import flip
from engine.workload import Tokens, prompt
from lamina_kv.engines.vllm import layout

pytestmark = pytest.mark.engine

CHUNKS = {
    "state-space": 64,
    "attention-and-state-space": 96,
    "short-convolution": 64,
    "linear-attention": 128,
}
"""Tokens of a chunk: a whole number of blocks for attention, in the last two more than one."""
HYBRID = "attention-and-state-space"
BOTH = pytest.mark.parametrize("model", ["state-space", HYBRID])
MODES = pytest.mark.parametrize("mode", ["layerwise", "parked"])
HOW = ("layerwise", "parked", "in-turn")
SLOW = {"slow_saves": 0.002}
"""Who reads a state while the next step runs reads another one."""
DISK = {"capacity": "32MiB"}


def spec_of(
    checkpoints: Checkpoints,
    model: str,
    lamina: dict[str, object] | None = None,
    faults: dict[str, float] | None = None,
    **options: object,
) -> EngineSpec:
    """An engine that computes prompts a chunk at a time, unless ``options`` say otherwise."""
    chunk = CHUNKS[model]
    if lamina is not None:
        lamina = {"host": {"capacity": "64MiB"}, "chunk_tokens": chunk, **lamina}
    steps = {
        "enable_prefix_caching": False,
        "max_num_batched_tokens": chunk,
        "max_num_seqs": 4,
    }
    options = {**SHAPES[model].options, **steps, **options}
    return EngineSpec(checkpoints.model(model), lamina, options, faults=faults or {})


def loading(mode: str) -> dict[str, object]:
    return {"load": {"mode": mode, "min_tokens": 1}}


# -- bytes ---------------------------------------------------------------------------------------


def watch_states(worker: Any) -> None:
    """Note the bytes of the states that each step of a single request starts from, as the layers
    find them: after Lamina's own hook, before anything of the layer runs."""
    runner = worker.model_runner
    groups = runner.kv_cache_config.kv_cache_groups
    first, runner.found = not hasattr(runner, "found"), []

    def spy(name: str, original: Callable[..., Any], layer: Any, *args: Any, **kw: Any) -> Any:
        if runner.found is not None:
            (group,) = (i for i, group in enumerate(groups) if name in group.layer_names)
            (request,) = runner.requests.values()
            (block,) = request.block_ids[group]
            digest = hashlib.blake2b(digest_size=8)
            for state in layer.kv_cache:
                digest.update(state[block].contiguous().view(torch.uint8).numpy())
            runner.found.append((request.num_computed_tokens, name, digest.hexdigest()))
        return original(layer, *args, **kw)

    for name, layer in runner.compilation_config.static_forward_context.items():
        if first and isinstance(layer, MambaBase):
            hooked = layer.conv_ssm_forward  # Lamina's, with what vLLM has as its argument
            inner = functools.partial(spy, name, *hooked.args)
            layer.conv_ssm_forward = functools.partial(hooked.func, inner)


def watched(worker: Any) -> list[tuple[int, str, str]]:
    found: list[tuple[int, str, str]] = worker.model_runner.found
    worker.model_runner.found = None
    return found


def attention_pages(worker: Any, blocks: int) -> list[str]:
    """Digests of a single request's first pages for tokens, of all layers."""
    runner = worker.model_runner
    layers = runner.compilation_config.static_forward_context
    (request,) = runner.requests.values()
    digests = []
    for group, held in zip(runner.kv_cache_config.kv_cache_groups, request.block_ids, strict=True):
        for name in group.layer_names:
            if not isinstance(layers[name], MambaBase):
                cache = layers[name].kv_cache
                size = cache.shape[0] // runner.kv_cache_config.num_blocks
                for block in held[:blocks]:
                    page = cache[block * size : (block + 1) * size].contiguous()
                    digests.append(hashlib.blake2b(page.view(torch.uint8).numpy()).hexdigest())
    return digests


def run_and_watch(
    engine: Engine, tokens: Tokens, blocks: int
) -> tuple[dict[tuple[int, str], str], list[str], Answer]:
    """Digests of states by the tokens behind them and their layer, of attention's pages, and the
    answer."""
    engine.in_workers(watch_states)
    (name,) = engine.submit([Ask(tokens, max_tokens=4)])
    while engine.progress()[name] == 0:
        engine.step()
    (pages,) = engine.in_workers(attention_pages, blocks)
    (answer,) = engine.drain()
    (found,) = engine.in_workers(watched)
    return {(end, layer): digest for end, layer, digest in found}, pages, answer


@MODES
@BOTH
def test_the_bytes_of_a_state(
    checkpoints: Checkpoints, fleet: Fleet, model: str, mode: str
) -> None:
    chunk, end = CHUNKS[model], 4 * CHUNKS[model]
    engine = fleet.get(spec_of(checkpoints, model, loading(mode), SLOW))
    tokens = prompt(31, end + 9)
    saved, pages, first = run_and_watch(engine, tokens, end // chunk)
    engine.forget()
    found, pages_again, second = run_and_watch(engine, tokens, end // chunk)

    layers = {layer for _, layer in saved}
    assert (first.cached, second.cached) == (0, end)
    assert {at for at, _ in found} == {at for at, _ in saved if at >= end}
    for layer in layers:
        assert found[end, layer] == saved[end, layer]
        assert len({digest for (_, of), digest in saved.items() if of == layer}) == 4 + 4
    assert pages_again == pages
    assert bool(pages) == (model == HYBRID)
    assert not differences_of([second], [first])
    engine.forget()
    longer = run_and_watch(engine, tokens[: 2 * chunk + 1] + prompt(32, 40), 2)[0]
    assert {at for at, _ in longer if at <= end} >= {2 * chunk}
    assert all(longer[2 * chunk, layer] == saved[2 * chunk, layer] for layer in layers)


# -- answers -------------------------------------------------------------------------------------


def saving(model: str) -> dict[str, object]:
    """In bfloat16 a state that was generated is rounded otherwise than one of a prompt, so only
    those of prompts are kept."""
    return {} if SHAPES[model].dtype == "float32" else {"save": {"tokens": "prompt"}}


def talk(engine: Engine, model: str, after_turn: Callable[[Engine], Engine]) -> list[Answer]:
    """Conversations of two turns, one request at a time. Some begin alike, some prompts and some
    answers end on a boundary, some are shorter than a chunk. An engine that finds anything finds
    the last boundary that it has ever passed."""
    rng, chunk = random.Random(3), CHUNKS[model]
    shared = prompt(40, 2 * chunk + 10)
    lengths = (5, 2 * chunk, 3 * chunk - 19, 2 * chunk + 1, rng.randrange(4 * chunk))
    texts = [prompt(50 + i, length) for i, length in enumerate(lengths)]
    texts += [shared + prompt(60 + i, rng.randrange(1, chunk)) for i in range(2)]
    known: set[Tokens] = set()
    answers, expected = [], []
    for _ in range(2):
        for i, text in enumerate(texts):
            ends = range((len(text) - 1) // chunk * chunk, 0, -chunk)
            expected.append(next((end for end in ends if text[:end] in known), 0))
            # The prompt that lacks 19 tokens to a boundary has an answer that ends on one.
            answers.append(engine.ask(Ask(text, max_tokens=20 if i == 2 else 50)))
            whole = text + answers[-1].tokens
            computed = len(text) if saving(model) else len(whole) - 1
            known |= {whole[:end] for end in range(chunk, computed + 1, chunk)}
            texts[i] = whole + prompt(rng.randrange(1000), rng.randrange(1, chunk))
        engine = after_turn(engine)
    found = [answer.cached for answer in answers]
    assert found in (expected, [0] * len(found))
    return answers


def forget(engine: Engine) -> Engine:
    engine.forget()
    return engine


@pytest.fixture(scope="module")
def reference(checkpoints: Checkpoints, fleet: Fleet) -> Callable[[str], Sequence[Answer]]:
    """What a plain vLLM answers."""

    @functools.cache
    def get(model: str) -> Sequence[Answer]:
        return talk(fleet.get(spec_of(checkpoints, model)), model, lambda engine: engine)

    return get


@pytest.mark.parametrize(
    ("model", "how"),
    [
        (HYBRID, "parked"),
        ("state-space", "in-turn"),
        ("short-convolution", "layerwise"),
        *(
            pytest.param(model, how, marks=pytest.mark.slow)
            for model, how in (
                (HYBRID, "layerwise"),
                ("state-space", "parked"),
            )
        ),
        *(
            pytest.param(model, how, marks=pytest.mark.soak)
            for model, how in (
                (HYBRID, "in-turn"),
                ("state-space", "layerwise"),
                ("linear-attention", "layerwise"),
            )
        ),
    ],
)
def test_from_host_memory(
    checkpoints: Checkpoints, fleet: Fleet, reference: Any, model: str, how: str
) -> None:
    """``in-turn``: with every step planned when the last one has ended."""
    expected = reference(model)
    lamina = loading("auto" if how == "in-turn" else how) | saving(model)
    spec = spec_of(checkpoints, model, lamina, SLOW)
    engine = fleet.get(replace(spec, asynchronous=how != "in-turn"))
    before = engine.metrics()
    answers = talk(engine, model, forget)
    assert not differences_of(answers, expected)
    metrics = engine.metrics()
    assert sum(answer.cached for answer in answers) > 0
    assert metrics.since(before, "lamina_failures_total") == 0
    assert metrics.since(before, "lamina_saves_dropped_total") == 0
    assert metrics.total("lamina_leased_blocks") == metrics.total("lamina_transfers") == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", [HYBRID, pytest.param("state-space", marks=pytest.mark.slow)])
def test_from_disk_after_restarts(
    checkpoints: Checkpoints, start: Start, reference: Any, tmp_path: Path, model: str
) -> None:
    expected = reference(model)
    disk = {"tiers": [{"kind": "disk", "path": str(tmp_path / "store"), **DISK}]}
    spec = spec_of(checkpoints, model, {**disk, **loading("auto")})

    def restart(engine: Engine) -> Engine:
        assert engine.metrics().total("lamina_failures_total") == 0
        engine.close()
        return start(spec)

    assert not differences_of(talk(start(spec), model, restart), expected)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["state-space", pytest.param(HYBRID, marks=pytest.mark.soak)])
def test_two_ranks(checkpoints: Checkpoints, start: Start, tmp_path: Path, model: str) -> None:
    disk = {"tiers": [{"kind": "disk", "path": str(tmp_path / "store"), **DISK}]}
    lamina = {**disk, **loading("auto")}
    cores = sorted(os.sched_getaffinity(0))
    environment = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    ours, plain = (
        replace(spec_of(checkpoints, model, with_, tensor_parallel_size=2), environment=environment)
        for with_ in (lamina, None)
    )
    engine = start(plain)
    expected = talk(engine, model, lambda engine: engine)
    engine.close()

    def restart(engine: Engine) -> Engine:
        engine.close()
        return start(ours)

    answers = talk(start(ours), model, restart)
    assert not differences_of(answers, expected)
    assert sum(answer.cached for answer in answers) > 0


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", [HYBRID, pytest.param("state-space", marks=pytest.mark.soak)])
def test_many_at_once_with_too_little_memory(
    checkpoints: Checkpoints, fleet: Fleet, model: str, asynchronous: bool
) -> None:
    """Steps end off boundaries, requests are preempted and aborted, and prefixes are shared."""
    chunk = CHUNKS[model]
    room = {
        "max_num_batched_tokens": chunk + 37,
        "num_gpu_blocks_override": 20 if model == HYBRID else 4,
        "max_model_len": 768,
    }
    shared = prompt(70, chunk + 20)
    asks = [Ask(shared + prompt(71 + i, 60 * i), max_tokens=2 * chunk) for i in range(6)]
    plain = fleet.get(spec_of(checkpoints, model, **room))
    expected = plain.generate(asks)
    more = [
        Ask(ask.tokens + answer.tokens + prompt(80 + i, 9))
        for i, (ask, answer) in enumerate(zip(asks, expected, strict=True))
    ]
    expected_more = plain.generate(more)
    spec = spec_of(checkpoints, model, loading("auto"), SLOW, **room)
    engine = fleet.get(replace(spec, asynchronous=asynchronous))
    free = engine.free_blocks()
    for _ in range(2):
        names = engine.submit(asks[:4])
        for _ in range(5):
            engine.step()
        engine.abort(names)
        engine.drain()
        assert [a.samples for a in engine.generate(asks)] == [e.samples for e in expected]
        engine.forget()
    answers = engine.generate(more)
    assert [a.samples for a in answers] == [e.samples for e in expected_more]
    assert sum(answer.cached for answer in answers) > 0
    metrics = engine.metrics()
    if model == HYBRID:
        assert metrics.total("vllm:num_preemptions_total") > 0
    assert metrics.total("lamina_leased_blocks") == metrics.total("lamina_transfers") == 0
    assert engine.free_blocks() == free


def test_chunks_that_are_damaged(checkpoints: Checkpoints, start: Start, tmp_path: Path) -> None:
    """The request is computed from its beginning, where no state counts."""
    store = tmp_path / "store"
    spec = spec_of(checkpoints, HYBRID, {"tiers": [{"kind": "disk", "path": str(store), **DISK}]})
    asks = [Ask(prompt(80 + i, 300 + i)) for i in range(2)]
    engine = start(spec)
    expected = [engine.ask(ask) for ask in asks]
    engine.close()
    flip(store)
    engine = start(spec)
    answers = engine.generate(asks)
    assert not differences_of(answers, expected)
    assert engine.metrics().total("lamina_failures_total", kind="fetch_corrupt") >= len(asks)


# -- sizes and refusals --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "configured", "chunk"),
    [
        (None, "auto", 512),
        (None, 100, 100),
        (16, "auto", 64),
        (96, "auto", 96),
        (96, 192, 192),
        (96, 64, None),
    ],
)
def test_how_far_apart_states_are_kept(
    block: int | None, configured: int | str, chunk: int | None
) -> None:
    state = MambaSpec(block_size=2048, shapes=((8,),), dtypes=(torch.float32,))
    groups = [KVCacheGroupSpec(["state"], state)]
    if block is not None:
        attention = FullAttentionSpec(
            block_size=block, num_kv_heads=1, head_size=8, dtype=torch.float32
        )
        groups.append(KVCacheGroupSpec(["attention"], attention))
    cache = KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=groups)
    if chunk is None:
        with pytest.raises(ValueError, match="not a whole number of blocks"):
            layout.groups(cache, configured)
    else:
        assert layout.chunk_tokens(cache, configured) == chunk
        assert layout.groups(cache, configured)[0].block_tokens == chunk


def test_prompts_computed_in_steps_that_end_elsewhere(
    checkpoints: Checkpoints, fleet: Fleet
) -> None:
    spec = spec_of(checkpoints, "state-space", {"chunk_tokens": "auto"}, max_num_batched_tokens=100)
    assert "Use --max-num-batched-tokens with a multiple" in fleet.get(spec).log()
