"""The models that a bench runs: their sizes, and what an engine builds them from."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self

from lamina_kv.geometry import chunk_tokens_for

VOCABULARY = 4096
"""Small, so that the last matrix is not what is measured."""


def require_positive(option: str, value: int) -> None:
    """Refuse a number below 1.

    Raises:
        ValueError: names the option.
    """
    if value < 1:
        raise ValueError(f"{option} must be at least 1, got {value}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


_CONVOLUTION = 4
"""Tokens that a gated delta net's convolution looks at."""


class Model(StrEnum):
    """Kinds of models."""

    LLAMA = "llama"
    HYBRID = "hybrid"


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
class ModelShape(ABC):
    """What models of every kind have.

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

    model: ClassVar[Model]
    layers_per_row: ClassVar[int]
    """All but one of them recurrent."""
    rows_are: ClassVar[str]
    """What shares a row, for the reader of a picture."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "kv_heads"):
            require_positive(_option(name), getattr(self, name))
        for name in ("head_dim", "block_size"):
            size = getattr(self, name)
            if size < 32 or size % 32:
                raise ValueError(f"{_option(name)} must be a multiple of 32, got {size}")

    def but(self, *, dtype: Dtype, **sizes: int | None) -> Self:
        """This shape with other sizes; those that are None stay.

        Raises:
            ValueError: if such a model cannot be.
        """
        chosen = {name: size for name, size in sizes.items() if size is not None}
        return replace(self, dtype=dtype, **chosen)

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Rows of the KV cache, all of the same size."""
        return self.layers // self.layers_per_row

    @property
    @abstractmethod
    def chunk_tokens(self) -> int:
        """Tokens in a chunk."""

    @property
    @abstractmethod
    def step_tokens(self) -> int:
        """Tokens that are computed in one step behind a hit, unless another number is chosen."""

    @abstractmethod
    def require_step(self, tokens: int) -> None:
        """Refuse a number of tokens that are not computed and saved in one step behind a hit.

        Raises:
            ValueError: names the option.
        """

    def kv_bytes(self, tokens: int, prompts: int = 1) -> int:
        """Bytes of KV cache that ``tokens`` tokens take, all rows.

        Args:
            tokens: of all prompts together.
            prompts: how many; each has a block for the state of every recurrent layer.
        """
        states = prompts * (self.layers_per_row - 1)
        return (tokens + states * self.block_size) * self.rows * self.row_token_bytes

    @property
    def weight_bytes(self) -> int:
        """About what the weights take."""
        mlp = 3 * self.hidden * self.intermediate
        weights = self.rows * self._row_weights() + self.layers * mlp
        return (weights + 2 * VOCABULARY * self.hidden) * self.dtype.size

    @property
    def row_token_bytes(self) -> int:
        """Bytes of KV cache that one token takes in one row."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.size

    @property
    def heads(self) -> int:
        """Query heads: as many as fill the width, in whole groups of KV heads."""
        return self.kv_heads * max(1, self.hidden // self.head_dim // self.kv_heads)

    @property
    def intermediate(self) -> int:
        """Width inside the MLP: 2.75 times the model's, in whole lines of 128."""
        return -(-self.hidden * 11 // 4 // 128) * 128

    # -- for others ----------------------------------------------------------------------------

    def options(self) -> dict[str, str | int | float]:
        """The shape as the options that choose it, for a report."""
        return {"model": self.model.value, **asdict(self), "dtype": self.dtype.value}

    def write_config(self, directory: Path) -> None:
        """Write the ``config.json`` that an engine builds the model from."""
        config = {
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
            **self._architecture(),
        }
        (directory / "config.json").write_text(json.dumps(config))

    @abstractmethod
    def _row_weights(self) -> int:
        """Weights of the layers of one row, without their MLPs."""

    @abstractmethod
    def _architecture(self) -> dict[str, Any]:
        """Fields of ``config.json`` that only models of this kind have."""


@dataclass(frozen=True, slots=True)
class LlamaShape(ModelShape):
    """A Llama-shaped model: each layer has a row."""

    model = Model.LLAMA
    layers_per_row = 1
    rows_are = "layers"

    @property
    def chunk_tokens(self) -> int:
        """As Lamina chooses it."""
        return chunk_tokens_for(self.block_size)

    @property
    def step_tokens(self) -> int:
        """Enough to keep the processor busy."""
        return 1024

    def require_step(self, tokens: int) -> None:
        """Any number."""
        require_positive("--new-tokens", tokens)

    def _row_weights(self) -> int:
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    def _architecture(self) -> dict[str, Any]:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@dataclass(frozen=True, slots=True)
class HybridShape(ModelShape):
    """A Qwen3-Next-shaped model, with hardly any experts: three gated delta nets, then one layer of
    full attention, and so on. The four share a row; in it a block holds either the keys and values
    of its tokens or one state of a gated delta net.
    """

    model = Model.HYBRID
    layers_per_row = 4
    rows_are = "four layers each: 3 gated delta nets, 1 full attention"

    def __post_init__(self) -> None:
        ModelShape.__post_init__(self)
        if self.layers % self.layers_per_row:
            raise ValueError(
                f"--layers must be a multiple of {self.layers_per_row} for a hybrid, "
                f"got {self.layers}"
            )
        if self.dtype is not Dtype.BFLOAT16:
            raise ValueError(
                f"--dtype must be {Dtype.BFLOAT16.value} for a hybrid, got {self.dtype.value}: "
                "vLLM's gated delta nets know no other on a CPU"
            )
        if self.block_size * self.row_token_bytes < self._state_bytes:
            # vLLM would take larger blocks without asking, and --tokens would not be whole ones.
            least = -(-self._state_bytes // (32 * self.row_token_bytes)) * 32
            raise ValueError(
                f"--block-size must be at least {least} for this hybrid, so that a block can hold "
                f"a recurrent state of {self._state_bytes} bytes, got {self.block_size}"
            )

    @property
    def chunk_tokens(self) -> int:
        """A block: a step may leave a state behind each."""
        return self.block_size

    @property
    def step_tokens(self) -> int:
        """One block, see :meth:`require_step`."""
        return self.block_size

    def require_step(self, tokens: int) -> None:
        """One block: vLLM ends a step at the last boundary of a block inside the prompt, because
        the state there can be kept; what is shorter than a block is not saved."""
        if tokens != self.block_size:
            raise ValueError(
                f"--new-tokens must be one block, {self.block_size} tokens, for a hybrid, got "
                f"{tokens}: vLLM computes more in several steps, and less is not saved"
            )

    def _row_weights(self) -> int:
        delta_net = 8 * self.hidden * self._delta_heads * self.head_dim
        attention = self.hidden * self.head_dim * (3 * self.heads + 2 * self.kv_heads)
        return (self.layers_per_row - 1) * delta_net + attention

    def _architecture(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "full_attention_interval": self.layers_per_row,
            "linear_num_key_heads": self._delta_heads,
            "linear_num_value_heads": 2 * self._delta_heads,
            "linear_key_head_dim": self.head_dim,
            "linear_value_head_dim": self.head_dim,
            "linear_conv_kernel_dim": _CONVOLUTION,
            # vLLM wants one layer with experts.
            "mlp_only_layers": list(range(self.layers - 1)),
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": self.intermediate,
            "shared_expert_intermediate_size": self.intermediate,
        }

    @property
    def _delta_heads(self) -> int:
        """Key heads of a gated delta net; it has twice as many value heads."""
        return max(1, self.hidden // self.head_dim)

    @property
    def _state_bytes(self) -> int:
        """Bytes of a gated delta net's state: a matrix for each value head, and the convolution's
        last inputs."""
        width = self._delta_heads * self.head_dim
        matrices = 2 * width * self.head_dim * Dtype.FLOAT32.size  # as vLLM keeps them on a CPU
        return matrices + (_CONVOLUTION - 1) * 4 * width * self.dtype.size


SHAPES: Mapping[Model, ModelShape] = {
    Model.LLAMA: LlamaShape(16, 1024, 8, 128, 128, Dtype.BFLOAT16),
    Model.HYBRID: HybridShape(48, 512, 4, 128, 512, Dtype.BFLOAT16),
}
"""What is run unless other sizes are chosen."""
