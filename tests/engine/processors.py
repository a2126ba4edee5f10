"""Older processors than this machine's, as vLLM sees them.

vLLM asks torch what the processor can do, and picks its kernels, and their arrangement of the
cache, by the answers. A fresh interpreter that is told less runs what an older machine would run,
bit by bit; only its speed is not that of an older machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

LACKS: Mapping[str, tuple[str, ...]] = {
    "Zen 4": ("amx_tile", "amx_fp16"),
    "Ice Lake": ("amx_tile", "amx_fp16", "avx512_bf16"),
    "Haswell": ("amx_tile", "amx_fp16", "avx512_bf16", "avx512"),
}
"""By a processor's name, what it cannot do."""


def pretend(processor: str) -> None:
    """Have this interpreter run on an older processor. vLLM must not have been imported."""
    if "avx512" in LACKS[processor]:
        os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    import torch

    for feature in LACKS[processor]:
        setattr(torch.cpu, f"_is_{feature}_supported", lambda: False)


def missing() -> str:
    """Why older processors cannot be told from this machine's; empty if they can."""
    import torch

    if torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported():
        return ""
    return "this machine's processor has no AMX: what older ones lack is lacking here, too"


def no_fp8() -> str:
    """Why vLLM cannot keep a cache of 8-bit numbers on this machine; empty if it can."""
    import torch

    if torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported():
        return ""
    return "this machine's processor has no AVX-512, without which vLLM keeps no fp8 cache on a CPU"
