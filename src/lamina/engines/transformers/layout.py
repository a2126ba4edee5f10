"""transformers' paged cache, as a :class:`~lamina.geometry.CacheGeometry`.

The cache is one flat tensor. Block ``b`` of full attention begins ``b * bytes_per_block`` bytes
into it and has one page for each layer, keys and then values (transformers 5.19,
``cache_allocators/full_attention.py``).
"""

from __future__ import annotations

from torch import distributed
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import (
    FullAttentionCacheAllocator,
)

from lamina.geometry import CacheGeometry, Group, GroupKind, Row, chunk_tokens_for

NO_BLOCK = -1
"""Stands for a block that a request does not have."""


class UnsupportedModel(ValueError):
    """The model's cache cannot be served without risking a wrong token; the message says why."""


def check_supported(cache: PagedAttentionCache) -> None:
    """Refuse what this version would serve wrongly.

    Raises:
        UnsupportedModel: says what is not supported and what to do.
    """
    for name, allocator in cache.cache_allocators.items():
        if type(allocator) is not FullAttentionCacheAllocator:
            raise UnsupportedModel(
                f"Lamina does not serve {name} in transformers' continuous batching: run this "
                "model without attach()"
            )
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    if ranks > 1:
        raise UnsupportedModel(
            f"Lamina does not serve transformers' continuous batching on several ranks, and there "
            f"are {ranks}: run it in one process, or without attach()"
        )


def layer_name(layer: int) -> str:
    """A layer's name in the geometry."""
    return f"layers.{layer}"


def groups(cache: PagedAttentionCache) -> tuple[Group, ...]:
    """The cache groups, in the order of the cache's allocators."""
    return tuple(
        Group(GroupKind.FULL, allocator.tokens_per_page)
        for allocator in cache.cache_allocators.values()
    )


def geometry(cache: PagedAttentionCache, chunk_tokens: int | str) -> CacheGeometry:
    """Where pages are.

    Args:
        cache: the library's cache.
        chunk_tokens: as configured.

    Raises:
        ValueError: if ``chunk_tokens`` is not a whole number of pages.
    """
    (group,) = groups(cache)
    (allocator,) = cache.cache_allocators.values()
    page, block = allocator.bytes_per_page, allocator.bytes_per_block
    size = cache.cache_tensor.numel()
    return CacheGeometry(
        rows=tuple(
            Row((layer_name(layer),), 0, index * page, block, page)
            for index, layer in enumerate(allocator.layer_indices)
        ),
        num_blocks=size // block,
        block_tokens=group.block_tokens,
        chunk_tokens=(
            chunk_tokens if isinstance(chunk_tokens, int) else chunk_tokens_for(group.block_tokens)
        ),
        allocation_bytes=(size,),
    )
