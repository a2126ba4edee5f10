"""Where vLLM's CPU kernels put keys and values is told from their bytes: by instruction set and by
block, not by how many heads or blocks there are, and not by a model's weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MambaSpec

from lamina_kv.engines.vllm.arrangement import arrangement

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM is not for CPUs here")


class Layer:
    """As much of a layer as the kernel looks at."""

    _k_scale_float = _v_scale_float = 1.0

    def __init__(self, isa: str, cache_dtype: str) -> None:
        self.isa = isa
        impl = object.__new__(CPUAttentionBackendImpl)
        impl.kv_cache_dtype = cache_dtype
        impl.attn_type = AttentionType.DECODER
        self.impl = impl

    def get_attn_backend(self) -> type[CPUAttentionBackend]:
        return CPUAttentionBackend


def told(
    *isas: str,
    tokens: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 2,
    blocks: int = 3,
    cache_dtype: str = "auto",
) -> str:
    """The arrangement of a model whose layers have these instruction sets."""
    names = [f"layer.{index}" for index in range(len(isas))]
    stored = torch.uint8 if cache_dtype != "auto" else dtype
    view = torch.zeros((blocks, heads, tokens, 2 * 64), dtype=stored)
    spec = FullAttentionSpec(block_size=tokens, num_kv_heads=heads, head_size=64, dtype=stored)
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=names)
    layers = {name: Layer(isa, cache_dtype) for name, isa in zip(names, isas, strict=True)}
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers),
        model_config=SimpleNamespace(dtype=dtype),
    )
    said = arrangement(
        cast(VllmConfig, config),
        cast(KVCacheConfig, SimpleNamespace(kv_cache_groups=[group])),
        dict.fromkeys(names, view),
    )
    assert not view.count_nonzero(), "nothing is written to the engine's cache"
    return said


def test_the_same_everywhere_but_for_what_arranges_bytes() -> None:
    usual = told("vec")
    assert usual.startswith("CPU_ATTN ")
    assert told("vec", heads=8, blocks=700) == usual
    assert told("vec", "vec", "vec") == usual
    different: list[dict[str, Any]] = [{"tokens": 64}, {"dtype": torch.float32}]
    found = {told("vec", **each) for each in different}
    assert len({usual, *found}) == 3


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this processor has no AMX")
@pytest.mark.parametrize("cache_dtype", ["auto", "fp8_e4m3"])
def test_amx_arranges_under_the_same_name_in_another_way(cache_dtype: str) -> None:
    amx, plain = (told(isa, cache_dtype=cache_dtype) for isa in ("amx", "vec"))
    assert amx.split()[0] == plain.split()[0] == "CPU_ATTN"
    assert amx != plain
    assert told("vec", "amx", cache_dtype=cache_dtype).split(", ") == sorted((amx, plain))


def test_recurrent_states_are_told_apart_by_what_the_processor_can_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = SimpleNamespace(get_name=lambda: "GDN_ATTN")
    layer = SimpleNamespace(get_attn_backend=lambda: backend)
    spec = MambaSpec(shapes=((4, 4),), dtypes=(torch.float32,), block_size=32)
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["a"])
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"a": layer})
    )

    def states() -> str:
        return arrangement(
            cast(VllmConfig, config),
            cast(KVCacheConfig, SimpleNamespace(kv_cache_groups=[group])),
            {"a": torch.zeros(1)},
        )

    found = []
    for amx in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        found.append(states())
    assert found[0] != found[1]
    assert all(each.startswith("GDN_ATTN ") for each in found)
