"""vLLM's description of its cache, as a :class:`~lamina_kv.geometry.CacheGeometry`.

Everything comes from ``KVCacheTensor`` (vLLM 0.32, ``vllm/v1/kv_cache_interface.py``): layer
``l``'s page of block ``b`` starts ``offset + l * layer_stride + b * block_stride`` bytes into the
backing allocation. Tensor shapes say nothing reliable and are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpecKind,
    MambaSpec,
    RSWASpec,
    UniformTypeKVCacheSpecs,
    compute_layer_kv_cache_shape_bytes,
    get_kv_cache_spec_kind,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from lamina_kv.geometry import (
    AUTO_STATE_TOKENS,
    CacheGeometry,
    Group,
    GroupKind,
    Row,
    chunk_tokens_for,
)

KINDS = {
    KVCacheSpecKind.FULL_ATTENTION: GroupKind.FULL,
    KVCacheSpecKind.MLA_ATTENTION: GroupKind.FULL,
    KVCacheSpecKind.SLIDING_WINDOW: GroupKind.WINDOW,
    KVCacheSpecKind.SLIDING_WINDOW_MLA: GroupKind.WINDOW,
    KVCacheSpecKind.MAMBA: GroupKind.STATE,
}
"""Kinds of cache that can be served."""

_CUT_BY_HEADS = (KVCacheSpecKind.FULL_ATTENTION, KVCacheSpecKind.SLIDING_WINDOW)
"""Kinds of cache whose pages are divided among tensor-parallel ranks by heads."""

NULL_BLOCK = 0
"""The block that stands for none in vLLM's tables (``vllm/v1/core/block_pool.py``)."""


class UnsupportedModel(ValueError):
    """The model's cache, or how it is spread, cannot be served without risking a wrong token."""


@dataclass(frozen=True)
class BoundCache:
    """A rank's cache: where pages are, and the memory they are in.

    Attributes:
        geometry: where pages are.
        allocations: one flat uint8 tensor for each backing allocation.
    """

    geometry: CacheGeometry
    allocations: tuple[torch.Tensor, ...]


def check_supported(vllm_config: VllmConfig, cache: KVCacheConfig) -> None:
    """Refuse what this version would serve wrongly.

    Raises:
        UnsupportedModel: says what is not supported and what to do.
    """
    _check_layout(cache)
    kinds = {get_kv_cache_spec_kind(group.kv_cache_spec) for group in cache.kv_cache_groups}
    if foreign := sorted(kind.value for kind in kinds if kind not in KINDS):
        raise UnsupportedModel(
            f"LaminaConnector does not serve models with {', '.join(foreign)}. Serve this model "
            "without --kv-transfer-config."
        )
    for group in cache.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, RSWASpec) or not (spec.prefix_cacheable and group.enable_kv_transfer):
            raise UnsupportedModel(
                f"LaminaConnector does not serve models with a {type(spec).__name__} that vLLM "
                "does not keep whole. Serve this model without --kv-transfer-config."
            )
    in_place = any(_in_place(group) for group in cache.kv_cache_groups)
    if in_place and vllm_config.speculative_config is not None:
        raise UnsupportedModel(
            "LaminaConnector does not serve a recurrent model with speculative decoding while "
            "vLLM's prefix cache is off: no step leaves a state that is sure to be whole. Serve "
            "with --enable-prefix-caching, without speculative decoding, or without "
            "--kv-transfer-config."
        )
    if in_place and vllm_config.cache_config.use_replayssm:
        raise UnsupportedModel(
            "LaminaConnector does not serve a recurrent model with use_replayssm while vLLM's "
            "prefix cache is off: a step leaves no whole state. Serve with "
            "--enable-prefix-caching, without use_replayssm, or without --kv-transfer-config."
        )
    parallel = vllm_config.parallel_config
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedModel(
                f"LaminaConnector does not support {name} > 1 yet; use tensor parallelism, or "
                "serve without --kv-transfer-config."
            )
    if parallel.distributed_executor_backend == "external_launcher" and parallel.world_size > 1:
        raise UnsupportedModel(
            "LaminaConnector does not support distributed_executor_backend external_launcher with "
            "several ranks: each has a scheduler, and hears of loads and saves at a time of its "
            'own. Use "mp" or "ray", or serve without --kv-transfer-config.'
        )


def _check_layout(cache: KVCacheConfig) -> None:
    """Refuse pages that are cut by heads, with other pages between the cuts."""
    if cache.kv_cache_layout is None or KVCacheLayout[cache.kv_cache_layout].is_block_compact:
        return
    # With one head there is nothing to cut.
    specs = [spec for group in cache.kv_cache_groups for spec in _specs(group).values()]
    if any(compute_layer_kv_cache_shape_bytes(spec, 1)[1] > 1 for spec in specs):
        whole = ", ".join(layout.name for layout in KVCacheLayout if layout.is_block_compact)
        raise UnsupportedModel(
            f"VLLM_KV_CACHE_LAYOUT: LaminaConnector does not serve {cache.kv_cache_layout}, in "
            f"which the heads of a block lie apart. Leave it out or use one of {whole}, or serve "
            "without --kv-transfer-config."
        )


def chunk_tokens(cache: KVCacheConfig, configured: int | str) -> int:
    """Tokens of a chunk.

    Args:
        cache: vLLM's cache.
        configured: ``chunk_tokens`` of the configuration.

    Raises:
        ValueError: if it is not a whole number of blocks.
    """
    lasting = [group for group in cache.kv_cache_groups if not _in_place(group)]
    block = math.lcm(*(int(group.kv_cache_spec.block_size) for group in lasting))
    aligned = any(_kind(group) is GroupKind.STATE for group in lasting)
    if isinstance(configured, str):
        if not lasting:
            return AUTO_STATE_TOKENS
        return block if aligned else chunk_tokens_for(block)
    if aligned and configured != block:
        raise ValueError(
            f"chunk_tokens: {configured} would keep few states: a prefill leaves one at the last "
            f'boundary of a block of {block} tokens, so use {block} or "auto"'
        )
    if configured % block:
        raise ValueError(
            f"chunk_tokens: {configured} is not a whole number of blocks; vLLM's block size here "
            f'is {block}, so use a multiple of it or "auto"'
        )
    return configured


def groups(cache: KVCacheConfig, configured_chunk: int | str) -> tuple[Group, ...]:
    """The cache groups, in vLLM's order.

    Args:
        cache: vLLM's cache.
        configured_chunk: ``chunk_tokens`` of the configuration: how far apart states are kept of
            which vLLM itself keeps none.

    Raises:
        ValueError: as :func:`chunk_tokens` says.
    """
    chunk = chunk_tokens(cache, configured_chunk)
    found = []
    for group in cache.kv_cache_groups:
        kind, window, in_place = _kind(group), 0, _in_place(group)
        if kind is GroupKind.WINDOW:
            first = next(iter(_specs(group).values()))
            window = int(first.sliding_window + first.extra_retained_tokens)
        block = chunk if in_place else int(group.kv_cache_spec.block_size)
        found.append(Group(kind, block, window, in_place))
    return tuple(found)


def is_non_causal(cache: KVCacheConfig) -> bool:
    """Whether a layer looks at tokens that come later, so that a page of it belongs to the whole
    prompt and not to the part before its end."""
    return any(
        getattr(spec, "non_causal", False)
        for group in cache.kv_cache_groups
        for spec in _specs(group).values()
    )


def recurrent_layers(cache: KVCacheConfig) -> tuple[str, ...]:
    """Layers whose cache is a recurrent state."""
    return tuple(
        layer
        for group in cache.kv_cache_groups
        if _kind(group) is GroupKind.STATE
        for layer in group.layer_names
    )


def bind(
    cache: KVCacheConfig,
    views: Mapping[str, torch.Tensor],
    forward_order: Sequence[str],
    configured_chunk: int | str,
) -> BoundCache:
    """The geometry of a rank's cache and the memory behind it.

    Args:
        cache: vLLM's cache.
        views: per layer, vLLM's view of it; only its address and storage are used.
        forward_order: layer names in the order in which a forward pass uses them.
        configured_chunk: ``chunk_tokens`` of the configuration.

    Raises:
        UnsupportedModel: if a layer is not where ``KVCacheTensor`` says.
    """
    allocations: dict[int, tuple[int, torch.Tensor]] = {}
    places: dict[tuple[int, int], tuple[list[str], int, int]] = {}
    group_of = {
        layer: index
        for index, group in enumerate(cache.kv_cache_groups)
        for layer in group.layer_names
    }
    page_bytes = {
        layer: size for group in cache.kv_cache_groups for layer, size in _page_bytes(group).items()
    }
    for tensor in cache.kv_cache_tensors:
        for position, layer in enumerate(tensor.layers):
            if layer not in views:
                raise UnsupportedModel(
                    f"vLLM registered no cache for layer {layer!r}. Serve this model without "
                    "--kv-transfer-config."
                )
            offset = tensor.offset + position * tensor.layer_stride
            view = views[layer]
            base = view.data_ptr() - offset
            if base not in allocations:
                allocations[base] = (len(allocations), _flat(view, base, tensor.size, layer))
            key = (allocations[base][0], offset)
            layers, stride, size = places.setdefault(
                key, ([], tensor.block_stride, page_bytes[layer])
            )
            if (stride, size) != (tensor.block_stride, page_bytes[layer]):
                raise UnsupportedModel(
                    f"layers {layers[0]!r} and {layer!r} share memory but not a page size. Serve "
                    "this model without --kv-transfer-config."
                )
            layers.append(layer)
    rank = {layer: i for i, layer in enumerate(forward_order)}
    last = len(rank)
    rows = [
        Row(
            layers=tuple(sorted(layers, key=lambda name: rank.get(name, last))),
            allocation=allocation,
            offset=offset,
            block_stride=stride,
            page_bytes=size,
            groups=tuple(sorted({group_of[layer] for layer in layers})),
            heads=_heads(cache, layers),
        )
        for (allocation, offset), (layers, stride, size) in places.items()
    ]
    rows.sort(key=lambda row: rank.get(row.layers[0], last))
    tensors = tuple(tensor for _, tensor in allocations.values())
    geometry = CacheGeometry(
        rows=tuple(rows),
        num_blocks=cache.num_blocks,
        block_tokens=min(group.block_tokens for group in groups(cache, configured_chunk)),
        chunk_tokens=chunk_tokens(cache, configured_chunk),
        allocation_bytes=tuple(tensor.numel() for tensor in tensors),
    )
    return BoundCache(geometry, tensors)


def describe(cache: KVCacheConfig) -> str:
    """How bytes are arranged inside pages, as far as vLLM's description says."""
    parts = {str(cache.kv_cache_layout)}
    for group in cache.kv_cache_groups:
        for spec in _specs(group).values():
            part = type(spec).__name__
            if isinstance(spec, MambaSpec):
                layout = envs.VLLM_SSM_CONV_STATE_LAYOUT
                part += f" {spec.mamba_type} {spec.shapes} {spec.dtypes} {layout}"
            parts.add(part)
    return "; ".join(sorted(parts))


def layer_specs(cache: KVCacheConfig) -> Iterator[tuple[str, Any]]:
    """Every layer with vLLM's specification of its cache."""
    for group in cache.kv_cache_groups:
        yield from _specs(group).items()


def page_sizes(cache: KVCacheConfig) -> tuple[int, ...]:
    """Bytes of one page of every layer, in vLLM's order of layers."""
    return tuple(size for group in cache.kv_cache_groups for size in _page_bytes(group).values())


def _kind(group: KVCacheGroupSpec) -> GroupKind:
    return KINDS[get_kv_cache_spec_kind(group.kv_cache_spec)]


def _in_place(group: KVCacheGroupSpec) -> bool:
    """Whether a request has one state, which each step overwrites: without its prefix cache vLLM
    keeps no other."""
    return any(
        isinstance(spec, MambaSpec) and spec.mamba_cache_mode == "none"
        for spec in _specs(group).values()
    )


def _page_bytes(group: KVCacheGroupSpec) -> dict[str, int]:
    return {layer: int(spec.page_size_bytes) for layer, spec in _specs(group).items()}


def _heads(cache: KVCacheConfig, layers: Sequence[str]) -> int:
    """Stretches of equal size, one for each KV head, that a page of these layers consists of."""
    heads = set()
    for group in cache.kv_cache_groups:
        for layer, spec in _specs(group).items():
            if layer in layers:
                padded = getattr(spec, "page_size_padded", None) is not None
                cut = get_kv_cache_spec_kind(spec) in _CUT_BY_HEADS and not padded
                heads.add(int(spec.num_kv_heads) if cut else 1)
    # Its dimensions from the outside in: layer, block, head, token (N), content.
    outermost = str(cache.kv_cache_layout).replace("L", "").startswith("BH")
    return heads.pop() if outermost and len(heads) == 1 else 1


def _specs(group: KVCacheGroupSpec) -> dict[str, Any]:
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return dict(spec.kv_cache_specs)
    return dict.fromkeys(group.layer_names, spec)


def _flat(view: torch.Tensor, base: int, size: int, layer: str) -> torch.Tensor:
    storage = view.untyped_storage()
    start = base - storage.data_ptr()
    if start < 0 or start + size > storage.nbytes():
        raise UnsupportedModel(
            f"layer {layer!r} is not where vLLM's KVCacheTensor says it is; this version of vLLM "
            "lays its cache out in a way that Lamina does not know. Serve this model without "
            "--kv-transfer-config."
        )
    flat = torch.empty(0, dtype=torch.uint8, device=view.device)
    flat.set_(storage, start, (size,), (1,))
    return flat
