"""vLLM's KV events for what tiers hold: blocks stored and removed (``docs/events.md``).

They name blocks as vLLM's own events do, by the request's block hashes at the block size of their
cache group. So a subscriber needs to know nothing of chunks. vLLM publishes them with its own, in
the same batch.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from vllm.distributed.kv_events import (
    MEDIUM_CPU,
    MEDIUM_STORAGE,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
)
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    to_event_extra_keys,
)
from vllm.v1.kv_offload.base import Locality
from vllm.v1.request import Request

from lamina_kv.control.reporting.residency import Change, Residency
from lamina_kv.control.requests import RequestView
from lamina_kv.engines.vllm.requests import VllmRequest
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.plan import NEAR, TierName
from lamina_kv.tiers.config import SharedConfig, TierConfig


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a chunk, as vLLM knows them: a label
    (:class:`~lamina_kv.control.reporting.residency.Label`).

    Attributes:
        group: their cache group.
        hashes: their hashes. Of recurrent states a chunk has one block, the last one.
        parent: the hash of the block in front of them; None at the beginning of a prompt.
        tokens: their token ids.
        block_tokens: tokens of each.
        extra_keys: for each what its hash depends on beside tokens; None if that is nothing.
        adapter: number and name of their LoRA adapter.
        session: session of the first request that had them.
    """

    group: int
    hashes: tuple[BlockHash, ...]
    parent: BlockHash | None
    tokens: array[int]
    block_tokens: int
    extra_keys: tuple[tuple[Any, ...] | None, ...] | None
    adapter: tuple[int, str] | None
    session: str | None

    @property
    def name(self) -> Hashable:
        """Their last hash names all of the prompt up to their end."""
        return self.group, self.hashes[-1]


@dataclass(frozen=True, slots=True)
class _Place:
    """How vLLM's events speak of a tier."""

    medium: str
    locality: str
    ownership: str | None


class KvEvents:
    """See the module.

    Args:
        tiers: the far tiers' configuration.
        chunk_tokens: tokens of a chunk.
        groups: the cache groups.
    """

    def __init__(
        self, tiers: Sequence[TierConfig], chunk_tokens: int, groups: Sequence[Group]
    ) -> None:
        self._chunk_tokens = chunk_tokens
        self._groups = groups
        self._hash_tokens = 0
        self._specs: Sequence[tuple[str, int | None]] = ()
        self._pool_was_reset = False
        # As vLLM's own offloading does, which names secondary tiers only.
        self._places = {NEAR: _Place(MEDIUM_CPU, Locality.LOCAL.value, None)}
        for tier in tiers:
            where = Locality.REMOTE if isinstance(tier, SharedConfig) else Locality.LOCAL
            self._places[TierName(tier.name)] = _Place(MEDIUM_STORAGE, where.value, tier.name)

    def bind(self, manager: KVCacheManager) -> None:
        """VLLM's cache manager exists now."""
        self._hash_tokens = manager.block_pool.hash_block_size
        self._specs = manager.kv_cache_event_metadata

    def pool_was_reset(self) -> None:
        """VLLM says that all blocks are cleared, and means its own. Whoever follows an engine's
        events may take that for all that was announced, so that the rest is announced again."""
        self._pool_was_reset = True

    def describe(self, view: RequestView, group: int, index: int) -> Blocks | None:
        """A request's chunk; see :data:`~lamina_kv.control.reporting.residency.Describe`."""
        assert isinstance(view, VllmRequest)
        request, shape = view.vllm, self._groups[group]
        size, step = shape.block_tokens, self._hash_tokens
        end = (index + 1) * self._chunk_tokens
        start = end - (size if shape.kind is GroupKind.STATE else self._chunk_tokens)
        hashes = request.block_hashes
        if size % step or len(hashes) * step < end:
            return None
        adapter = request.lora_request
        return Blocks(
            group,
            tuple(hashes[at // step - 1] for at in range(start + size, end + 1, size)),
            hashes[start // step - 1] if start else None,
            array("I", request._all_token_ids[start:end]),
            size,
            _extra_keys(request, range(start, end, size)),
            None if adapter is None else (adapter.adapter_id, adapter.name),
            request.session_id,
        )

    def take(self, residency: Residency) -> list[KVCacheEvent]:
        """Events since the last call, at most as many as
        :meth:`~lamina_kv.control.reporting.residency.Residency.take` gives changes."""
        if self._pool_was_reset:
            self._pool_was_reset = False
            residency.tell_again()
        return list(self._events(residency.take()))

    def _events(self, changes: Sequence[Change]) -> Iterator[KVCacheEvent]:
        for (tier, stored, group), alike in groupby(changes, _sort):
            place = self._places[tier]
            if stored:
                for change in alike:
                    yield self._stored(place, _blocks(change))
                continue
            yield BlockRemoved(
                block_hashes=[
                    maybe_convert_block_hash(each)
                    for change in alike
                    for each in _blocks(change).hashes
                ],
                medium=place.medium,
                group_idx=group,
                locality=place.locality,
                ownership=place.ownership,
            )

    def _stored(self, place: _Place, blocks: Blocks) -> BlockStored:
        kind, window = self._specs[blocks.group]
        number, name = blocks.adapter or (None, None)
        return BlockStored(
            block_hashes=[maybe_convert_block_hash(each) for each in blocks.hashes],
            parent_block_hash=None
            if blocks.parent is None
            else maybe_convert_block_hash(blocks.parent),
            token_ids=blocks.tokens.tolist(),
            block_size=blocks.block_tokens,
            lora_id=number,
            medium=place.medium,
            lora_name=name,
            extra_keys=to_event_extra_keys(blocks.extra_keys or [None] * len(blocks.hashes)),
            group_idx=blocks.group,
            kv_cache_spec_kind=kind,
            kv_cache_spec_sliding_window=window,
            locality=place.locality,
            ownership=place.ownership,
            session_id=blocks.session,
        )


def _sort(change: Change) -> tuple[TierName, bool, int]:
    return change.tier, change.stored, _blocks(change).group


def _blocks(change: Change) -> Blocks:
    assert isinstance(change.label, Blocks)
    return change.label


def _extra_keys(request: Request, starts: range) -> tuple[tuple[Any, ...] | None, ...] | None:
    """What blocks' hashes depend on beside tokens."""
    plain = not (request.lora_request or request.mm_features or request.cache_salt)
    if plain and request.prompt_embeds is None:
        return None
    size = starts.step
    return tuple(generate_block_hash_extra_keys(request, at, at + size, 0)[0] for at in starts)
