"""CUDA graphs in transformers' continuous batching: kept where they can be, and right where a
replay calls no hook. There is no GPU here: a replay is a forward whose layers call nothing, and
streams are written down and not run.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from engine.batching import PATIENCE, Engine, forget, load_model
from engine.models import Checkpoints
from engine.workload import prompt
from lamina_kv.engines.transformers import attach, hooks, scheduler
from lamina_kv.engines.transformers.streams import ComputeStream

pytestmark = pytest.mark.engine

module = __import__(attach.__module__, fromlist=["attach"])
LAYERWISE: dict[str, object] = {
    "load": {"mode": "layerwise", "when": "always"},
    "host": {"capacity": "64MiB"},
}
PROMPT = prompt(91, 100)
FLASH = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"))
MASKED = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))


def batching(**options: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(page_size=16, num_blocks=200, max_batch_tokens=512, **options)


# -- which are kept ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "mode", "model", "kept", "first"),
    [
        (None, "layerwise", FLASH, (False, True), (False, True)),
        (None, "layerwise", MASKED, (False, False), (False, False)),
        (None, "layerwise", None, (False, False), (False, False)),
        (True, "layerwise", FLASH, True, (True, True)),
        (False, "layerwise", FLASH, False, (False, False)),
        (None, "parked", FLASH, None, (True, True)),
    ],
)
def test_graphs_are_kept_where_loads_need_no_hook(
    asked: Any, mode: str, model: Any, kept: Any, first: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``first``: forwards that come after the loads of their step."""
    monkeypatch.setattr(module, "get_accelerator_graph_name", lambda: "CUDAGraph")
    attached = attach(batching(use_cuda_graph=asked), {"load": {"mode": mode}}, model=model)
    assert attached.use_cuda_graph == kept
    assert SCHEDULER_MAPPING[attached.scheduler_type].args[2] == first
    assert not attached.use_async_batching


def test_what_is_off_is_said_once_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        attach(batching())
        assert not caplog.text
        monkeypatch.setattr(module, "get_accelerator_graph_name", lambda: "CUDAGraph")
        attach(batching())
    assert "asynchronous batching is off" in caplog.text
    assert "attach(..., model=model) keeps those of decoding" in caplog.text


# -- a replay ------------------------------------------------------------------------------------


@pytest.mark.parametrize("knows", [True, False])
def test_a_forward_that_calls_no_hook_comes_after_its_loads(
    checkpoints: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    knows: bool,
) -> None:
    """Unless nobody knows, and then the engine stops."""
    model = load_model(checkpoints.model("llama"))
    with Engine(model, batching()) as plain:
        (expected,) = plain.turn([PROMPT])
    monkeypatch.setattr(scheduler, "hook_layers", lambda *_: None)
    with Engine(model, batching(use_cuda_graph=knows), LAYERWISE) as engine:
        assert engine.turn([PROMPT]) == [expected]
        forget(engine)
        if knows:
            assert engine.turn([PROMPT]) == [expected]
            assert engine.figures()["hit_tokens host"] > 0
        else:
            engine.submit(PROMPT)
            output = engine.manager.output_router.output_queue.get(timeout=PATIENCE)
            assert "did not wait" in output.error
    caplog.clear()  # the error that was logged has the engine in it


# -- streams -------------------------------------------------------------------------------------


class Stream:
    """Writes down what it waits for."""

    def __init__(self) -> None:
        self.waits: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waits.append(other)

    def synchronize(self) -> None:
        self.waits.append("the host")


def test_the_two_streams_are_ordered_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    present, theirs = Stream(), Stream()
    current = present
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    stream = ComputeStream(torch.device("cuda", 0))
    stream.precede()  # before the first forward there is nothing to come after
    stream.follow()
    assert (present.waits, theirs.waits) == (["the host"], [])

    current = theirs
    stream.note()
    current = present
    stream.note()  # only the first forward says it
    stream.precede()
    stream.follow()
    assert (present.waits[1:], theirs.waits) == ([theirs], [present])


def test_nothing_is_said_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be a part of the graph."""
    said: list[object] = []
    lamina: Any = SimpleNamespace(
        moves_rows=True,
        wait_layer=said.append,
        layer_written=said.append,
        finish_loads=lambda: said.append("all"),
    )
    cache: Any = SimpleNamespace(update=lambda *_: (None, None), layer_to_allocator={0: None})
    capturing = False
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    hooks.hook_layers(cache, lamina, ComputeStream(torch.device("cuda", 0)))
    cache.update(None, None, 0, {})
    assert len(said) == 3
    capturing = True
    cache.update(None, None, 0, {})
    assert len(said) == 3
