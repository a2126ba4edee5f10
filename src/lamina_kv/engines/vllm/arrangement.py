"""How a rank's kernels arrange bytes inside a page.

vLLM describes its cache down to pages. Inside a page each attention backend arranges keys and
values as suits it and the hardware, and vLLM picks the backend on the machine where it runs. The
CPU backend, for one, has several arrangements under one name: it packs bfloat16 for AMX, or for
bfloat16 on ARM if it was built for that. So two machines with equal configurations may not be able
to read each other's pages, and only a rank whose layers exist can tell.

What rounds differently but lies in the same place is not told apart, see ``docs/identity.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b, shake_128

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec

from lamina_kv.engines.vllm import layout


def arrangement(
    vllm_config: VllmConfig, cache: KVCacheConfig, views: Mapping[str, torch.Tensor]
) -> str:
    """What arranges the bytes of this rank's pages, as text: equal on two machines only if each can
    read the other's.

    Args:
        vllm_config: vLLM's; its layers exist and know their backends.
        cache: vLLM's cache, as this rank has it.
        views: per layer, vLLM's view of its cache; nothing is written to it.
    """
    layers = vllm_config.compilation_config.static_forward_context
    found: set[str] = set()
    probed: dict[tuple[object, ...], str] = {}
    for name, spec in layout.layer_specs(cache):
        layer, view = layers[name], views[name]
        parts = [layer.get_attn_backend().get_name()]
        impl = getattr(layer, "impl", None)
        if isinstance(impl, CPUAttentionBackendImpl):
            key = (layer.isa, impl.attn_type, view.dtype, *view.shape[2:])
            if key not in probed:
                probed[key] = _probe(layer, impl, view, vllm_config.model_config.dtype)
            parts.append(probed[key])
        elif isinstance(spec, MambaSpec) and current_platform.is_cpu():
            parts.append(_processor())
        found.add(" ".join(parts))
    return ", ".join(sorted(found))


def _probe(
    layer: torch.nn.Module, impl: CPUAttentionBackendImpl, view: torch.Tensor, dtype: torch.dtype
) -> str:
    """Where vLLM's kernel puts what: a digest of a block of one head, into which it has written
    known keys and values. They are small integers, which every type of cache holds exactly.

    Args:
        layer: of the model; tells its kernels and scales.
        impl: its backend.
        view: ``(blocks, heads, tokens of a kernel's block, key and value)``.
        dtype: of keys and values, where the cache quantises them.
    """
    _, _, tokens, content = view.shape
    if view.dtype in (torch.float32, torch.bfloat16, torch.float16):
        dtype = view.dtype
    count = tokens * content
    known = torch.frombuffer(bytearray(shake_128(b"lamina").digest(count)), dtype=torch.uint8) % 8
    key, value = known.to(dtype).view(tokens, 1, content).chunk(2, dim=2)
    block = torch.zeros((1, 1, tokens, content), dtype=view.dtype)
    slots = torch.arange(tokens)
    impl.do_kv_cache_update(layer, key.contiguous(), value.contiguous(), block, slots)
    written = block.view(torch.uint8).numpy().tobytes()
    return blake2b(written, digest_size=8).hexdigest()


def _processor() -> str:
    """What vLLM picks kernels for recurrent states by. States cannot be probed, so machines that
    differ in it do not share them."""
    features = {
        "avx512": torch.cpu._is_avx512_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "arm_bf16": torch.cpu.get_capabilities().get("bf16", False),
    }
    return "+".join(name for name, there in features.items() if there) or "plain"
