"""J: transformers' continuous batching, random weights: the answers with Lamina are those without.

Prompts are asked one by one, twice, of an engine whose own cache holds two of them; a new engine is
asked once more, and finds them on disk. In float32, where one rounding more does not choose another
token; times are of bfloat16, whose answers are not compared.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpu.lab import CudaLab
from gpu.plan import Bench
from gpu.report import Bound, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PATIENCE = 60.0
"""Seconds after which an answer that has not come is a hang."""


@dataclass(frozen=True)
class Shape:
    """A model and what is asked of it.

    Attributes:
        layers: of the model.
        heads: KV heads; it has twice as many query heads.
        head_size: of one.
        window: tokens that each layer looks at; 0 for all.
        prompts: how many.
        tokens: of a prompt.
        answer: tokens of an answer.
        page: tokens of a block.
    """

    layers: int = 16
    heads: int = 8
    head_size: int = 128
    window: int = 0
    prompts: int = 6
    tokens: int = 4096
    answer: int = 8
    page: int = 16

    @property
    def prompt_bytes(self) -> int:
        """Of a prompt's cache in float32."""
        return self.tokens * self.layers * 2 * self.heads * self.head_size * 4


LARGE = Shape()
SLIDING = Shape(layers=4, window=1024, prompts=3)

VOCABULARY = 32_000


@dataclass
class Asked:
    """What came of asking every prompt once.

    Attributes:
        answers: tokens.
        seconds: of all answers together.
    """

    answers: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0


def run(bench: Bench[CudaLab]) -> Generator[Row, None, None]:
    """See the module."""
    device = bench.lab.device
    yield from compare("full attention", LARGE, device, torch.float32)
    yield from compare("sliding window", SLIDING, device, torch.float32)
    yield from compare("full attention", LARGE, device, torch.bfloat16)


def compare(
    name: str, shape: Shape, device: torch.device, dtype: torch.dtype
) -> Generator[Row, None, None]:
    """Ask without Lamina and with it, and compare what can be.

    Args:
        name: of the shape.
        shape: the model and the prompts.
        device: where it runs.
        dtype: of weights and cache; answers are compared in float32 only.
    """
    name = f"{name}, {str(dtype).removeprefix('torch.')}"
    model, prompts = _model(shape, device, dtype), _prompts(shape)
    with _engine(model, shape, None) as engine:
        _ask(engine, prompts[:1], shape)  # kernels are compiled
        without = _ask(engine, prompts, shape)
    with tempfile.TemporaryDirectory(prefix="lamina-acceptance-") as folder:
        settings: dict[str, object] = {
            "identity": "random weights of the acceptance run",
            "host": {"capacity": 2 * shape.prompts * shape.prompt_bytes},
            "load": {"when": "always"},
            "tiers": [
                {
                    "kind": "disk",
                    "path": str(Path(folder) / "store"),
                    "capacity": 2 * shape.prompts * shape.prompt_bytes,
                }
            ],
        }
        with _engine(model, shape, settings) as engine:
            rounds = {"cold": _ask(engine, prompts, shape), "host": _ask(engine, prompts, shape)}
            found = {"host": _figures(engine)["hit_tokens host"]}
            _await_saves(engine)
        with _engine(model, shape, settings) as engine:
            rounds["disk"] = _ask(engine, prompts, shape)
            found["disk"] = _figures(engine)["hit_tokens disk"]
    for what, asked in rounds.items():
        if dtype == torch.float32:
            different = sum(a != b for a, b in zip(asked.answers, without.answers, strict=True))
            yield Row(f"{name}, {what}: other answers", different, "", Bound(0))
        yield Row(f"{name}, {what}: time, of that without", asked.seconds / without.seconds)
    for tier, tokens in found.items():
        yield Row(f"{name}: tokens from {tier}", tokens, "", Bound(1, at_least=True))


def _model(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

    width = 2 * shape.heads * shape.head_size
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": 2 * shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": 2 * shape.tokens,
    }
    if shape.window:
        config = MistralConfig(sliding_window=shape.window, **sizes)
    else:
        config = LlamaConfig(**sizes)
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()


def _prompts(shape: Shape) -> list[list[int]]:
    chosen = random.Random(0)
    return [
        [chosen.randrange(VOCABULARY) for _ in range(shape.tokens)] for _ in range(shape.prompts)
    ]


@contextmanager
def _engine(
    model: Any, shape: Shape, settings: Mapping[str, object] | None
) -> Generator[Any, None, None]:
    """A running manager; with Lamina if there are settings."""
    from transformers.generation.configuration_utils import (
        ContinuousBatchingConfig,
        GenerationConfig,
    )

    from lamina_kv.engines.transformers import attach

    batching = ContinuousBatchingConfig(
        page_size=shape.page,
        num_blocks=2 * (shape.tokens + shape.answer) // shape.page + 2,
        max_batch_tokens=min(512, shape.tokens),
        max_requests_per_batch=4,
        use_cuda_graph=False,
        use_async_batching=False,
    )
    if settings is not None:
        batching = attach(batching, settings, model=model)
    greedy = GenerationConfig(max_new_tokens=shape.answer, do_sample=False, eos_token_id=-1)
    manager = model.init_continuous_batching(
        generation_config=greedy, continuous_batching_config=batching
    )
    manager.start()
    try:
        yield manager
    finally:
        manager.stop()
        manager.destroy()


def _ask(manager: Any, prompts: list[list[int]], shape: Shape) -> Asked:
    """Ask all prompts, one behind the other."""
    asked = Asked()
    began = time.perf_counter()
    for prompt in prompts:
        manager.add_request(list(prompt), max_new_tokens=shape.answer)
        result = manager.get_result(timeout=PATIENCE)
        if result is None or result.error is not None:
            reason = "nothing" if result is None else result.error
            raise RuntimeError(f"a request of {len(prompt)} tokens came to an end with {reason}")
        asked.answers.append(list(result.generated_tokens))
    asked.seconds = time.perf_counter() - began
    return asked


def _figures(manager: Any) -> dict[str, float]:
    from lamina_kv.engines.transformers import attached_to

    lamina = attached_to(manager)
    if lamina is None:
        raise RuntimeError("Lamina is not attached to the engine that was started with it")
    return {"hit_tokens host": 0.0, "hit_tokens disk": 0.0} | lamina.figures()


def _await_saves(manager: Any) -> None:
    from lamina_kv.engines.transformers import attached_to

    lamina = attached_to(manager)
    end = time.monotonic() + PATIENCE
    while lamina is not None and lamina.hand_off.has_work and time.monotonic() < end:
        time.sleep(0.02)
