"""What sets this engine's chunks apart from all others."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Sequence

import transformers
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from lamina_kv.config import Config
from lamina_kv.engines.identity import describe_checkpoint, describe_model
from lamina_kv.engines.ranks import Ranks
from lamina_kv.geometry import CacheGeometry, Group
from lamina_kv.keys import Namespace


def build_namespace(
    config: Config,
    cache: PagedAttentionCache,
    groups: Sequence[Group],
    geometry: CacheGeometry,
    ranks: Ranks,
) -> Namespace:
    """The namespace of an engine; with far tiers equal after a restart and on every machine.

    Args:
        config: Lamina's configuration.
        cache: the library's cache.
        groups: its cache groups.
        geometry: where its pages are.
        ranks: of the engine; they have one namespace.

    Raises:
        CheckpointError: if the weights cannot be told apart from others; says to set ``identity``.
        RanksError: if that is so on another rank, or it is configured in another way.
    """
    ranks.agree("with its configuration", config)
    model = cache.config
    return Namespace(
        model=describe_model(model.to_dict()),
        checkpoint=_checkpoint(config, cache, ranks),
        model_dtype=str(cache.dtype),
        cache_dtype=str(cache.dtype),
        quantization=str(getattr(model, "quantization_config", None) or ""),
        groups=tuple((group.kind.value, group.block_tokens, group.window) for group in groups),
        chunk_tokens=geometry.chunk_tokens,
        layout="pages of keys, then values",
        page_bytes=tuple(row.page_bytes for row in geometry.rows),
        tensor_parallel=ranks.count,
        pipeline_parallel=1,
        context_parallel=1,
        speculation="",
        engine="transformers",
        # Every device and every way to compute attention finds keys and values in the same places.
        engine_format=f"transformers {transformers.__version__} {sys.byteorder}",
    )


def _checkpoint(config: Config, cache: PagedAttentionCache, ranks: Ranks) -> str:
    if not config.tiers and config.identity == "auto":  # nothing outlives it or is shared
        return ranks.first("with a name", f"process {uuid.uuid4()}")
    path = str(cache.config._name_or_path)
    return ranks.together("with its checkpoint", lambda: describe_checkpoint(config, path))
