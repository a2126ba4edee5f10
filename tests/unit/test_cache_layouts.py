"""A layout of vLLM's cache is served if each page is one stretch of bytes, and else refused by the
name of the variable that chooses it. Which is which is asked of the addresses, not of names.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

layout = pytest.importorskip("lamina_kv.engines.vllm.layout")

from vllm.config import KVTransferConfig, ParallelConfig  # noqa: E402
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SparseCacheRole,
    UniformTypeKVCacheSpecs,
    compute_layout_strides,
)
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402

LAYERS, BLOCKS, TOKENS, CONTENT = 3, 5, 16, 32

LATENT: dict[str, Any] = {
    "max_tp_shards": 1,
    "cache_dtype_str": "fp8_ds_mla",
    "state_content_bytes": 656,
    "is_index_group_leader": True,
}
"""Of DeepSeek-V3.2's attention, as vLLM describes it."""


def spec(heads: int) -> Any:
    kind = MLAAttentionSpec if heads == 1 else FullAttentionSpec
    return kind(
        block_size=TOKENS, num_kv_heads=heads, head_size=CONTENT, dtype=torch.bfloat16
    )  # fmt: skip


def cache(name: str | None, heads: int) -> KVCacheConfig:
    names = [f"layer.{i}" for i in range(LAYERS)]
    size = LAYERS * BLOCKS * spec(heads).page_size_bytes
    return KVCacheConfig(
        num_blocks=BLOCKS,
        kv_cache_tensors=[KVCacheTensor(size=size, layers=names, layer_stride=0, block_stride=0)],
        kv_cache_groups=[KVCacheGroupSpec(names, spec(heads))],
        kv_cache_layout=name,
    )


def check(name: str | None, heads: int) -> None:
    config = SimpleNamespace(speculative_config=None, parallel_config=ParallelConfig())
    layout.check_supported(config, cache(name, heads))


def page_is_one_stretch(which: KVCacheLayout, heads: int) -> bool:
    """By the addresses of all of its bytes but the content's own."""
    strides = compute_layout_strides(spec(heads), BLOCKS, LAYERS, which)
    content = spec(heads).page_size_bytes // heads // TOKENS
    starts = {h * strides[2] + n * strides[3] for h in range(heads) for n in range(TOKENS)}
    return starts == {i * content for i in range(heads * TOKENS)}


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("which", list(KVCacheLayout), ids=lambda which: which.name)
def test_pages_that_are_cut_are_refused(which: KVCacheLayout, heads: int) -> None:
    if page_is_one_stretch(which, heads):
        check(which.name, heads)
        return
    with pytest.raises(layout.UnsupportedModel) as refusal:
        check(which.name, heads)
    message = str(refusal.value)
    assert message.startswith("VLLM_KV_CACHE_LAYOUT: ")
    assert which.name in message
    assert "LBHNC" in message


def test_some_are_refused_and_some_are_not() -> None:
    whole = {which.name for which in KVCacheLayout if page_is_one_stretch(which, 4)}
    assert whole == {"LBHNC", "LBNHC", "BLHNC", "BLNHC"}
    assert all(page_is_one_stretch(which, 1) for which in KVCacheLayout)


def test_a_cut_page_is_refused_before_anything_else() -> None:
    config = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=2))
    with pytest.raises(layout.UnsupportedModel, match="VLLM_KV_CACHE_LAYOUT"):
        layout.check_supported(config, cache("BHLNC", 4))


def test_a_version_that_names_no_layout_is_served() -> None:
    check(None, 4)


@pytest.mark.parametrize("several", [False, True])
def test_a_window_that_vllm_computes_anew_is_refused(several: bool) -> None:
    """vLLM would cut what is loaded or pushed to whole blocks, and take less than was offered."""
    replayed: Any = SlidingWindowMLASpec(
        block_size=TOKENS,
        num_kv_heads=1,
        head_size=CONTENT,
        dtype=torch.bfloat16,
        sliding_window=2 * TOKENS,
        bounded_replay=True,
    )
    assert replayed.prefix_replay_tokens
    if several:
        replayed = UniformTypeKVCacheSpecs(
            block_size=TOKENS, kv_cache_specs={f"layer.{i}": replayed for i in range(LAYERS)}
        )
    config: Any = SimpleNamespace(speculative_config=None, parallel_config=ParallelConfig())
    described = cache(None, 1)
    described.kv_cache_groups.append(KVCacheGroupSpec(["replayed"], replayed))
    with pytest.raises(layout.UnsupportedModel, match="does not keep whole"):
        layout.check_supported(config, described)


def test_a_cache_of_sparse_attention_and_its_indexers_has_a_row_for_each() -> None:
    """DeepSeek-V3.2's, arranged by vLLM: two page sizes in one group. Its layers call no connector,
    which ``test_hooks.py`` and ``tests/engine/test_v2_step.py`` see to."""
    names = [f"model.layers.{i}.self_attn.{part}" for i in range(LAYERS) for part in ("k", "mla")]
    sizes = {"k": (132, {"cache_role": SparseCacheRole.INDEXER}), "mla": (576, LATENT)}
    specs = {
        name: MLAAttentionSpec(
            block_size=64,
            num_kv_heads=1,
            head_size=sizes[name.rpartition(".")[2]][0],
            dtype=torch.uint8,
            **sizes[name.rpartition(".")[2]][1],
        )
        for name in names
    }
    assert UniformTypeKVCacheSpecs.is_uniform_type(specs)
    whole = UniformTypeKVCacheSpecs(block_size=64, kv_cache_specs=specs)
    arranged = SimpleNamespace(
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: KVCacheLayout.BLHNC,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
    )
    described = get_kv_cache_config_from_groups(
        arranged, [KVCacheGroupSpec(names, whole)], 10 << 20
    )
    config = SimpleNamespace(speculative_config=None, parallel_config=ParallelConfig())
    layout.check_supported(config, described)
    memory = torch.zeros(described.kv_cache_tensors[0].size, dtype=torch.uint8)
    views = {
        name: memory[tensor.offset + index * tensor.layer_stride :]
        for tensor in described.kv_cache_tensors
        for index, name in enumerate(tensor.layers)
    }
    geometry = layout.bind(described, views, names, "auto").geometry
    assert [row.layers for row in geometry.rows] == [(name,) for name in names]
    assert [row.page_bytes for row in geometry.rows] == LAYERS * [64 * 132, 64 * 656]
    taken = np.zeros(len(memory), np.int8)
    for row in geometry.rows:
        for block in range(geometry.num_blocks):
            taken[row.offset + block * row.block_stride :][: row.page_bytes] += 1
    assert taken.max() == 1, "two rows have bytes in common"
    assert layout.recurrent_layers(described) == ()


# -- cut by heads, for pushes to engines of another tensor parallel size -------------------------


@pytest.mark.parametrize(
    ("sections", "mla", "chosen", "stretches"),
    [
        ({}, False, "LBNHC", 1),
        ({"push": {}}, False, "LBHNC", 4),
        ({"push": {}}, True, "LBNHC", 1),  # every rank has all of an MLA cache
    ],
)
def test_an_engine_that_pushes_has_pages_that_can_be_cut(
    sections: dict[str, object],
    mla: bool,
    chosen: str,
    stretches: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where attention backends take any layout, as on a GPU."""
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
    monkeypatch.delenv("LAMINA_CONFIG", raising=False)
    config = SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_layout=None),
        model_config=SimpleNamespace(use_mla=mla),
        kv_transfer_config=KVTransferConfig(
            kv_connector="LaminaConnector",
            kv_connector_module_path="lamina_kv.engines.vllm",
            kv_role="kv_both",
            kv_connector_extra_config=sections,
        ),
    )
    backends = ["LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC", "LHBNC"]
    found = resolve_kv_cache_layout(config, [backends])
    assert found.name == chosen
    heads = 1 if mla else 4
    assert layout._heads(cache(found.name, heads), ["layer.0"]) == stretches
