"""Recurrent layers announce the use of their state: each once per forward, in the order of the
forward, before anything of the state is read and after all of it is written.

The hooks are installed into real engines without a connector, eager and compiled.
"""

from __future__ import annotations

from typing import Any

import pytest
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.gdn.olmo_gdn_linear_attn import (
    OlmoHybridGatedDeltaNetAttention,
)
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.linear.bailing_linear_attn import BailingMoELinearAttention
from vllm.model_executor.layers.mamba.linear.minimax_linear_attn import MiniMaxText01LinearAttention
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.short_conv import ShortConv

from engine.driver import Answer, Ask, Engine, EngineSpec, Fleet, differences
from engine.models import SHAPES, Checkpoints
from engine.workload import prompt
from lamina_kv.engines.vllm.hooks import hook_recurrent_layers

pytestmark = pytest.mark.engine

RECURRENT: dict[str, list[str]] = {
    "linear-attention": [f"model.layers.{layer}.linear_attn" for layer in (0, 1, 2, 4, 5, 6)],
    "short-convolution": [f"model.layers.{layer}.short_conv" for layer in (0, 1, 3, 4)],
    "state-space": [f"backbone.layers.{layer}.mixer" for layer in range(4)],
}
"""Per model, its recurrent layers in the order of the forward."""

IN_TURNS = {"max_num_batched_tokens": 160, "max_num_seqs": 4}
"""Prompts are computed in parts, beside requests that generate."""


def recurrent_layers(runner: Any) -> dict[str, Any]:
    layers = runner.compilation_config.static_forward_context
    return {name: layer for name, layer in layers.items() if isinstance(layer, MambaBase)}


def record(worker: Any) -> tuple[str, ...]:
    """Note every call; returns the layers that could not be hooked."""
    runner = worker.model_runner
    layers = recurrent_layers(runner)
    runner.calls = []
    return hook_recurrent_layers(
        layers,
        list(layers),
        before=lambda name: runner.calls.append(f"before {name}"),
        after=lambda name: runner.calls.append(f"after {name}"),
        active=lambda: True,
    )


def recorded(worker: Any) -> list[str]:
    return list(worker.model_runner.calls)


def warm_up(worker: Any) -> None:
    worker.model_runner._dummy_run(16)


def hide(worker: Any) -> None:
    """Keep states out of the cache except between the two calls: nothing but the layer's own work
    may need them there."""
    runner = worker.model_runner
    layers = recurrent_layers(runner)
    groups = runner.kv_cache_config.kv_cache_groups
    hidden: dict[tuple[str, int], list[Any]] = {}

    def blocks(name: str) -> list[int]:
        (group,) = (i for i, group in enumerate(groups) if name in group.layer_names)
        (request,) = runner.requests.values()
        return [block for block in request.block_ids[group] if block]

    def show(name: str) -> None:
        for block in blocks(name):
            for state, kept in zip(
                layers[name].kv_cache, hidden.get((name, block), ()), strict=False
            ):
                state[block] = kept

    def take_away(name: str) -> None:
        for block in blocks(name):
            states = [state[block] for state in layers[name].kv_cache]
            hidden[name, block] = [state.clone() for state in states]
            for state in states:
                state.fill_(3)

    hook_recurrent_layers(layers, list(layers), show, take_away, active=lambda: True)


def spoil(worker: Any) -> None:
    """Change states as soon as they are written, and never put them back."""
    runner = worker.model_runner
    layers = recurrent_layers(runner)

    def overwrite(name: str) -> None:
        for state in layers[name].kv_cache:
            state.mul_(2)

    hook_recurrent_layers(layers, list(layers), lambda name: None, overwrite, lambda: True)


def unhook(worker: Any) -> None:
    layers = recurrent_layers(worker.model_runner)
    hook_recurrent_layers(layers, list(layers), lambda name: None, lambda name: None, lambda: False)


@pytest.fixture(
    scope="module",
    params=[
        *((model, True) for model in RECURRENT),
        # A compiled model of one kind shows that calls survive compilation.
        *(
            pytest.param(
                (model, False),
                marks=pytest.mark.slow if model == "short-convolution" else pytest.mark.soak,
            )
            for model in RECURRENT
        ),
    ],
    ids=lambda case: f"{case[0]}-{'eager' if case[1] else 'compiled'}",
)
def spec(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> EngineSpec:
    model, eager = request.param
    options = {**SHAPES[model].options, **IN_TURNS, "enforce_eager": eager}
    # A forward for each step that was asked for, so that they can be counted.
    return EngineSpec(checkpoints.model(model), options=options, asynchronous=False)


@pytest.fixture
def engine(spec: EngineSpec, fleet: Fleet) -> Engine:
    return fleet.get(spec)


def run(engine: Engine, asks: list[Ask]) -> tuple[list[Answer], int]:
    """Answers, and how many forwards they took."""
    names, answers, steps = engine.submit(asks), {}, 0
    while len(answers) < len(asks):
        answers |= {answer.name: answer for answer in engine.step()}
        steps += 1
    return [answers[name] for name in names], steps


def test_each_layer_once_in_each_forward(engine: Engine) -> None:
    (layers,) = (RECURRENT[name] for name in RECURRENT if engine.spec.model.name.startswith(name))
    # The second one comes to its prompt's end while the first one generates.
    asks = [Ask(prompt(1, 90), max_tokens=12), Ask(prompt(2, 400)), Ask(prompt(3, 5))]
    expected, _ = run(engine, asks)
    engine.forget()

    assert engine.in_workers(record) == [()]
    answers, forwards = run(engine, asks)
    engine.in_workers(warm_up)
    (calls,) = engine.in_workers(recorded)
    engine.in_workers(unhook)

    assert not differences(answers, expected)
    assert forwards >= 12
    once = [f"{call} {layer}" for layer in layers for call in ("before", "after")]
    assert calls == once * forwards


def test_states_are_used_between_the_calls(engine: Engine) -> None:
    ask = Ask(prompt(4, 20))  # within a block, so that vLLM copies no state between steps
    expected = engine.ask(ask)
    answers = []
    for hooks in (hide, spoil):
        engine.forget()
        engine.in_workers(hooks)
        answers.append(engine.ask(ask))
    engine.in_workers(unhook)
    assert not differences(answers[:1], [expected])
    assert differences(answers[1:], [expected])


@pytest.mark.parametrize(
    "kind",
    [
        BailingMoELinearAttention,
        MambaMixer,
        MambaMixer2,
        MiniMaxText01LinearAttention,
        OlmoHybridGatedDeltaNetAttention,
        QwenGatedDeltaNetAttention,
        ShortConv,
    ],
)
def test_vllm_has_what_is_hooked(kind: type) -> None:
    layers = {"layer": kind.__new__(kind)}
    nothing = lambda name: None  # noqa: E731
    assert hook_recurrent_layers(layers, ["layer"], nothing, nothing, lambda: True) == ()
