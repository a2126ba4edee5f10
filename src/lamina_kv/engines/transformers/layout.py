"""transformers' paged cache, as a :class:`~lamina_kv.geometry.CacheGeometry`.

The cache is one flat tensor, which the library's allocators, one for full attention and one for
sliding windows, cut into blocks. Block ``b`` of one begins ``b * bytes_per_block`` bytes into it
and has one page for each of the allocator's layers, keys and then values; pages of both are of one
size (transformers 5.19, ``cache_allocators/full_attention.py``). A sliding window is a ring in a
request's blocks: token ``p`` lies in place ``p % sliding_window`` (``sliding_attention.py``).

An allocator with more layers than the other is several groups, or a chunk of the other's would
leave most of its slot empty: a row has one layer of each group, and layers that run about the same
time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import distributed
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import (
    CacheAllocator,
    FullAttentionCacheAllocator,
    SlidingAttentionCacheAllocator,
)

from lamina_kv.geometry import CacheGeometry, Group, GroupKind, Place, Row, chunk_tokens_for

NO_BLOCK = -1
"""Stands for a block that a request does not have."""

LEAST_PAGE = 4
"""Tokens; the library takes no smaller ``page_size`` (``initialization.py``)."""


class UnsupportedModel(ValueError):
    """The model's cache cannot be served without risking a wrong token; the message says why."""


def check_supported(cache: PagedAttentionCache, shared_by: Sequence[int] | None) -> None:
    """Refuse what this version would serve wrongly.

    Args:
        cache: the library's cache.
        shared_by: see :class:`~lamina_kv.engines.transformers.scheduler.WithLamina`.

    Raises:
        UnsupportedModel: says what is not supported and what to do.
    """
    for name, allocator in cache.cache_allocators.items():
        if type(allocator) not in (FullAttentionCacheAllocator, SlidingAttentionCacheAllocator):
            raise UnsupportedModel(
                f"Lamina does not serve {name} in transformers' continuous batching: run this "
                "model without attach()"
            )
        window, page = _window(allocator), allocator.tokens_per_page
        if window % page:
            fitting = [size for size in range(page, LEAST_PAGE - 1, -1) if window % size == 0]
            do = f"set it to {fitting[0]}" if fitting else "run this model without attach()"
            raise UnsupportedModel(
                f"a sliding window of {window} tokens is not a whole number of pages, so that "
                f"pages would hold tokens of both its ends: page_size is {page}, {do}"
            )
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    if processes > 1 and shared_by is None:
        raise UnsupportedModel(
            f"{processes} processes run, and nothing says which of them share this model: call "
            "attach(..., model=model) in each"
        )


def layer_name(layer: int) -> str:
    """A layer's name in the geometry."""
    return f"layers.{layer}"


@dataclass(frozen=True)
class Part:
    """Layers of one allocator that are a cache group.

    Attributes:
        allocator: whose they are.
        pages: which pages of its blocks are theirs, in order of rows.
        first_block: Lamina's name for their part of the allocator's block 0; the others follow.
        window: tokens of the ring that a request has; 0 if it has all of its tokens.
    """

    allocator: CacheAllocator
    pages: tuple[int, ...]
    first_block: int
    window: int

    def blocks(self, request_id: str, tokens: int) -> Sequence[int]:
        """Lamina's names for the blocks of a request that has ``tokens``, in token order."""
        table: Sequence[int] = self.allocator.block_table.get(request_id, ())
        if self.window:
            page = self.allocator.tokens_per_page
            ring = self.window // page
            # Before it is full, nothing is beyond what the request was given.
            count = -(-tokens // page) if len(table) == ring else len(table)
            table = [table[index % ring] for index in range(count)]
        if not self.first_block:
            return table
        return [self.first_block + block for block in table]


def parts(cache: PagedAttentionCache) -> tuple[Part, ...]:
    """What is one cache group each."""
    allocators = list(cache.cache_allocators.values())
    rows = min(allocator.pages_per_block for allocator in allocators)
    found: list[Part] = []
    first = 0
    for allocator in allocators:
        count = -(-allocator.pages_per_block // rows)
        for part in range(count):
            pages = tuple(range(part, allocator.pages_per_block, count))
            found.append(Part(allocator, pages, first, _window(allocator)))
            first += cache.cache_tensor.numel() // allocator.bytes_per_block
    return tuple(found)


def groups(parts: Sequence[Part]) -> tuple[Group, ...]:
    """The cache groups, in the order of the parts that they are."""
    return tuple(
        Group(GroupKind.WINDOW, part.allocator.tokens_per_page, part.window, in_place=True)
        if part.window
        else Group(GroupKind.FULL, part.allocator.tokens_per_page)
        for part in parts
    )


def chunk_tokens(parts: Sequence[Part], configured: int | str) -> int:
    """Tokens of a chunk.

    Args:
        parts: the groups of the cache.
        configured: as configured.

    Raises:
        ValueError: if ``configured`` is not a whole number of pages, or does not divide a window:
            chunks would be cut by where a window begins.
    """
    page = max(part.allocator.tokens_per_page for part in parts)
    window = max(part.window for part in parts)
    smallest = chunk_tokens_for(page)
    if isinstance(configured, str):
        if not window:
            return smallest
        fitting = (size for size in range(smallest, window, page) if window % size == 0)
        return next(fitting, window)
    if configured % page or window % configured:
        of = f" that divides the sliding window of {window} tokens" if window else ""
        raise ValueError(
            f"chunk_tokens: {configured} does not fit this model; use a whole number of pages of "
            f'{page} tokens{of}, or "auto"'
        )
    return configured


def geometry(
    cache: PagedAttentionCache, parts: Sequence[Part], configured: int | str
) -> CacheGeometry:
    """Where pages are.

    Args:
        cache: the library's cache.
        parts: the groups of the cache.
        configured: ``chunk_tokens`` as configured.

    Raises:
        ValueError: as :func:`chunk_tokens` says.
    """
    first = parts[0].allocator
    page, size = first.bytes_per_page, cache.cache_tensor.numel()
    if len(parts) == 1:  # its blocks are all that there is: neighbours are copied as one
        stride = first.bytes_per_block
        rows = tuple(
            Row((layer_name(layer),), 0, index * page, stride, page)
            for index, layer in enumerate(first.layer_indices)
        )
    else:
        stride = page
        rows = tuple(_row(parts, index, page) for index in range(max(len(p.pages) for p in parts)))
    return CacheGeometry(
        rows=rows,
        num_blocks=size // stride,
        block_tokens=first.tokens_per_page,
        chunk_tokens=chunk_tokens(parts, configured),
        allocation_bytes=(size,),
    )


def _row(parts: Sequence[Part], index: int, page: int) -> Row:
    """Row ``index``, whose pages are all pages of the cache."""
    layers, having, places = [], [], []
    for group, part in enumerate(parts):
        if index < len(part.pages):
            which, scale = part.pages[index], part.allocator.pages_per_block
            layers.append(part.allocator.layer_indices[which])
            having.append(group)
            places.append(Place(scale, which - scale * part.first_block))
    names = tuple(layer_name(layer) for layer in sorted(layers))
    return Row(names, 0, 0, page, page, tuple(having), places=tuple(places))


def _window(allocator: CacheAllocator) -> int:
    """Tokens of a window; 0 for full attention."""
    if isinstance(allocator, SlidingAttentionCacheAllocator):
        return int(allocator.sliding_window)
    return 0
