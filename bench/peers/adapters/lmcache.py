"""LMCache's in-process connector on a CPU, with its host memory or its local disk.

Replaces the part that LMCache calls a GPU connector, of which it has none for a CPU, by
:func:`~peers.adapters.batch_copy.batch_copy`. It favours LMCache: pages stay as the
engine has them, so that nothing is rearranged, and what belongs together is copied in one call.
LMCache's layerwise mode needs kernels of its own on a device and is not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite.binding import ffi
from lmcache.utils import EngineType
from lmcache.v1 import gpu_connector
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
from vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector import LMCacheConnectorV1

from peers.adapters.batch_copy import batch_copy


class PageConnector(GPUConnectorInterface):
    """Copies whole pages between the engine's cache and LMCache's memory.

    Args:
        metadata: LMCache's, of which the shape is used.
    """

    def __init__(self, metadata: Any) -> None:
        self._layers, _, _, heads, size = metadata.kv_shape
        self._parts = 1 if metadata.use_mla else 2
        self._width = heads * size
        self._caches: list[torch.Tensor] = []

    def initialize_kvcaches_ptr(self, **named: Any) -> None:
        """Note where the engine's cache is."""
        if (caches := named.get("kvcaches")) is not None:
            self._caches = list(caches.values()) if isinstance(caches, dict) else list(caches)

    def get_shape(self, num_tokens: int) -> torch.Size:
        """Of memory for so many tokens."""
        return torch.Size([self._parts, self._layers, num_tokens, self._width])

    def to_gpu(self, memory_obj: Any, start: int, end: int, **named: Any) -> None:
        """Load one chunk."""
        self.batched_to_gpu([memory_obj], [start], [end], **named)

    def from_gpu(self, memory_obj: Any, start: int, end: int, **named: Any) -> None:
        """Save one chunk."""
        self.batched_from_gpu([memory_obj], [start], [end], **named)

    def batched_to_gpu(
        self, memory_objs: Sequence[Any], starts: Sequence[int], ends: Sequence[int], **named: Any
    ) -> None:
        """Load chunks."""
        engine, memory, sizes = self._addresses(memory_objs, starts, ends, named)
        batch_copy(memory, engine, sizes, load=True)

    def batched_from_gpu(
        self, memory_objs: Sequence[Any], starts: Sequence[int], ends: Sequence[int], **named: Any
    ) -> None:
        """Save chunks."""
        engine, memory, sizes = self._addresses(memory_objs, starts, ends, named)
        batch_copy(engine, memory, sizes)

    def _addresses(
        self,
        memory_objs: Sequence[Any],
        starts: Sequence[int],
        ends: Sequence[int],
        named: dict[str, Any],
    ) -> tuple[Any, Any, Any]:
        """Where each page is in the engine and in LMCache's memory, and its size. Tokens that the
        engine has already have no slot, and their pages are left out."""
        self.initialize_kvcaches_ptr(**named)
        first = self._caches[0]
        block_size, page = first.shape[2], first[0].numel() * first.element_size()
        bases = np.array([cache.data_ptr() for cache in self._caches], np.uint64)
        slots = named["slot_mapping"].numpy()
        engine, memory = [], []
        for chunk, start, end in zip(memory_objs, starts, ends, strict=True):
            at_blocks = slots[start:end:block_size]
            wanted = np.flatnonzero(at_blocks >= 0)
            blocks = (at_blocks[wanted] // block_size).astype(np.uint64)
            rows = np.arange(self._layers)[:, None] * len(at_blocks)
            engine.append((bases[:, None] + blocks[None, :] * np.uint64(page)).ravel())
            offsets = (rows + wanted[None, :]).ravel().astype(np.uint64) * np.uint64(page)
            memory.append(np.uint64(chunk.tensor.data_ptr()) + offsets)
        pages = np.concatenate(engine)
        return pages, np.concatenate(memory), np.full(len(pages), page, np.uint64)


_create = gpu_connector.CreateGPUConnector


def _create_for_pages(config: Any, metadata: Any, engine: Any, *rest: Any, **named: Any) -> Any:
    if engine == EngineType.VLLM:
        return PageConnector(metadata)
    return _create(config, metadata, engine, *rest, **named)


gpu_connector.CreateGPUConnector = _create_for_pages


def _hide_library_from_vllm() -> None:
    """LMCache imports numba, whose library answers to every name. vLLM, when it starts its worker,
    asks everything that is imported for its ``__dict__``, and stumbles over that answer."""
    of_library = ffi._lib_wrapper.__getattr__

    def without_magic(self: object, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return of_library(self, name)

    ffi._lib_wrapper.__getattr__ = without_magic


_hide_library_from_vllm()


class LMCacheOnCpu(LMCacheConnectorV1):
    """The connector as it is, in a process in which its GPU connector is replaced."""
