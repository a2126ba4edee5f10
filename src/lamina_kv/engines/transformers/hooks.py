"""Calls before a layer reads its cache and after it has written it, which transformers makes none.

The one place where the library is changed: ``PagedAttentionCache.update`` is what every attention
implementation calls (``integrations/*_attention.py``, ``eager_paged.py``; in 5.24 the models) to
write a layer's keys and values and to read what it attends to. It is wrapped on the instance: the
library's code stays as it is, and the wrapper goes when the cache goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from lamina_kv.engines.standalone import Standalone
from lamina_kv.engines.transformers.layout import layer_name
from lamina_kv.engines.transformers.streams import ComputeStream


def hook_layers(cache: PagedAttentionCache, lamina: Standalone, stream: ComputeStream) -> None:
    """Have every layer of a forward that moves rows wait for its row, and say that it has written
    it.

    Args:
        cache: the library's cache.
        lamina: what is told.
        stream: is told of each forward.
    """
    update: Callable[..., tuple[torch.Tensor, torch.Tensor]] = cache.update
    last = max(cache.layer_to_allocator)

    @torch.compiler.disable  # as the function that it wraps is
    def hooked(
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stream.note()
        # While a graph is captured the same forward has just run, and has told everything. What was
        # said now would become a part of the graph.
        if not lamina.moves_rows or stream.captures:
            return update(key_states, value_states, layer_idx, kwargs)
        name = layer_name(layer_idx)
        lamina.wait_layer(name)
        if layer_idx == last:
            lamina.finish_loads()
        # With a block table it is the kernel behind this call that writes: then rows are saved when
        # the step is over.
        writes = kwargs.get("block_table") is None
        states = update(key_states, value_states, layer_idx, kwargs)
        if writes:
            lamina.layer_written(name)
        return states

    cache.update = hooked
