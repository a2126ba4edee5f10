"""What a processor must be told before vLLM's kernels run on it."""

from __future__ import annotations

import torch
from vllm.platforms import current_platform


def prepare() -> None:
    """Ask Linux for AMX tiles, if vLLM's kernels will use them.

    A process that has not asked is killed by its first tile instruction. vLLM leaves it to oneDNN,
    which asks when it first multiplies larger matrices, and a step of few tokens has none. Without
    a cache an engine begins with a prompt; with one its first step may load all of a prompt but a
    token, so that attention runs before oneDNN has asked.
    """
    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
