"""What a bench runs: a model's shape, and how its engine is set up."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from lamina.geometry import chunk_tokens_for

VOCABULARY = 4096
"""Small, so that the last matrix is not what is measured."""

TokenIds = list[int]


class Dtype(StrEnum):
    """Number formats of weights and KV cache."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"

    @property
    def size(self) -> int:
        """Bytes of one number."""
        return 4 if self is Dtype.FLOAT32 else 2


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama-shaped model.

    Attributes:
        layers: number of layers.
        hidden: width.
        kv_heads: KV heads.
        head_dim: numbers in one head.
        block_size: tokens in one block of the engine.
        dtype: of weights and KV cache.

    Raises:
        ValueError: if such a model cannot be; the message names the option.
    """

    layers: int
    hidden: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: Dtype

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "kv_heads"):
            require_positive(_option(name), getattr(self, name))
        for name in ("head_dim", "block_size"):
            size = getattr(self, name)
            if size < 32 or size % 32:
                raise ValueError(f"{_option(name)} must be a multiple of 32, got {size}")

    @property
    def heads(self) -> int:
        """Query heads: as many as fill the width, in whole groups of KV heads."""
        return self.kv_heads * max(1, self.hidden // self.head_dim // self.kv_heads)

    @property
    def row_token_bytes(self) -> int:
        """Bytes of KV cache that one token takes in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.size

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of KV cache that ``tokens`` tokens take."""
        return tokens * self.layers * self.row_token_bytes

    @property
    def weight_bytes(self) -> int:
        """About what the weights take."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        per_layer = attention + 3 * self.hidden * self.intermediate
        return (self.layers * per_layer + 2 * VOCABULARY * self.hidden) * self.dtype.size

    @property
    def intermediate(self) -> int:
        """Width inside the MLP: 2.75 times the model's, in whole lines of 128."""
        return -(-self.hidden * 11 // 4 // 128) * 128

    def options(self) -> dict[str, str | int | float]:
        """The shape as the options that choose it, for a report."""
        return asdict(self) | {"dtype": self.dtype.value}

    def write_config(self, directory: Path) -> None:
        """Write the ``config.json`` that an engine builds the model from."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 1 << 20,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "torch_dtype": self.dtype.value,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
        }
        (directory / "config.json").write_text(json.dumps(config))


class Connector(Enum):
    """A connector's class and the module it is in."""

    LAMINA = ("LaminaConnector", "lamina.engines.vllm")
    PACED = ("PacedConnector", "lamina.bench.paced")
    """Lamina with every tier behind a :class:`~lamina.bench.pacing.Link`."""
    IDLE = ("IdleConnector", "lamina.bench.idle")
    """One that does nothing."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine, in one process.

    Attributes:
        name: for messages.
        shape: the model.
        model: directory of its ``config.json``.
        tokens: tokens that its KV cache holds.
        step_tokens: tokens that one step computes at most.
        connector: which connector; None for an engine without.
        lamina: the connector's configuration.
    """

    name: str
    shape: ModelShape
    model: Path
    tokens: int
    step_tokens: int
    connector: Connector | None = None
    lamina: Mapping[str, Any] = field(default_factory=dict, hash=False)


class PromptSource:
    """Prompts that share nothing with each other. The same ones in every run.

    Args:
        seed: sets them apart from those of another source.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def prompt(self, tokens: int) -> TokenIds:
        """``tokens`` token ids, none of them special."""
        return self._random.choices(range(3, VOCABULARY), k=tokens)


def require_positive(option: str, value: int) -> None:
    """Refuse a number below 1.

    Raises:
        ValueError: names the option.
    """
    if value < 1:
        raise ValueError(f"{option} must be at least 1, got {value}")


def require_whole(option: str, tokens: int, block_size: int) -> None:
    """Refuse a number of tokens that is not a whole number of chunks.

    Raises:
        ValueError: names the option and the next number that would do.
    """
    chunk = chunk_tokens_for(block_size)
    if tokens < chunk or tokens % chunk:
        nearest = max(1, round(tokens / chunk)) * chunk
        raise ValueError(
            f"{option} must be a whole number of chunks of {chunk} tokens, so that all of them can "
            f"be hit; {tokens} is not, {nearest} would be"
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
