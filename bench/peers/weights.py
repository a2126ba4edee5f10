"""Random weights whose answers depend on the whole prompt, the same in every process.

vLLM's dummy weights are so small that any KV cache gives the same answer. These would notice one
that is wrong.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import ModelConfig

LOAD_FORMAT = "lamina_bench_random"

_SEED = 20_26
_GAIN = 2.0
"""Makes attention look at some tokens more than at others."""


@register_model_loader(LOAD_FORMAT)
class RandomWeights(BaseModelLoader):
    """Matrices with entries of the usual size, norms of one."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill the model in place."""
        generator = torch.Generator().manual_seed(_SEED)
        for tensor in model.state_dict().values():
            if tensor.dim() < 2:
                tensor.fill_(1)
            else:
                limit = _GAIN * math.sqrt(3 / tensor.shape[-1])
                tensor.uniform_(-limit, limit, generator=generator)
