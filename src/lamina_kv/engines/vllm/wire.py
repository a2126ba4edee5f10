"""A vLLM rank as other engines see it, and its end of the wire to them."""

from __future__ import annotations

import torch

from lamina_kv.engines.vllm.layout import BoundCache
from lamina_kv.push.cards import RankCard, RowCard
from lamina_kv.push.transports.base import Region, Transport


def open_wire(bound: BoundCache) -> Transport:
    """A transport that reaches all of a rank's cache.

    Raises:
        ValueError: if the library for it is not installed.
    """
    try:
        from lamina_kv.push.transports.nixl import NixlTransport
    except ImportError as error:
        raise ValueError(
            f"push: needs NIXL, which is not installed ({error}); pip install 'lamina-kv[push]'"
        ) from error
    return NixlTransport([_region(tensor) for tensor in bound.allocations])


def rank_card(rank: int, bound: BoundCache, wire: Transport) -> RankCard:
    """What other engines must know of a rank.

    Args:
        rank: the rank.
        bound: its cache.
        wire: its end of the wire.
    """
    rows = tuple(
        RowCard(
            address=bound.allocations[row.allocation].data_ptr() + row.offset,
            stride=row.block_stride,
            page_bytes=row.page_bytes,
            heads=row.heads,
            groups=row.groups,
        )
        for row in bound.geometry.rows
    )
    return RankCard(rank, wire.describe(), bound.geometry.num_blocks, rows, wire.name)


def _region(tensor: torch.Tensor) -> Region:
    device = -1 if tensor.device.type == "cpu" else int(tensor.device.index or 0)
    return Region(tensor.data_ptr(), tensor.numel(), device)
