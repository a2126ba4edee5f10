"""vLLM's KV events as they come over ZMQ: msgpack, with fields by name.

Only what routing needs is decoded; new fields of a newer vLLM change nothing.
"""

from __future__ import annotations

from typing import Any

import msgspec

Hash = bytes | int
"""An engine's name for a block: bytes, or their last 64 bits."""

REMOTE = "REMOTE"
"""``locality`` of a store that other engines share."""


class BlockStored(msgspec.Struct, tag=True):
    """Blocks that are found from now on; see vLLM's class of that name.

    Attributes:
        block_hashes: names of the blocks, in the order of the prompt.
        parent_block_hash: the block in front of the first one; None at the beginning of a prompt.
        token_ids: of all of them.
        block_size: tokens of each.
        medium: ``GPU``, ``CPU``, ``STORAGE``.
        ownership: the tier's name.
        locality: ``LOCAL`` or ``REMOTE``.
        lora_name: the adapter's.
        extra_keys: for each block what else makes it another one.
        group_idx: the cache group.
        kv_cache_spec_kind: what kind of group that is.
    """

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    ownership: str | None = None
    locality: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    """Blocks that are not found there any more."""

    block_hashes: list[Hash]
    medium: str | None = None
    ownership: str | None = None
    locality: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """Nothing is found there any more."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, array_like=True):
    """What is published at once."""

    ts: float
    events: list[msgspec.Raw]


_BATCH = msgspec.msgpack.Decoder(Batch)
_EVENT = msgspec.msgpack.Decoder(Event)


def read_batch(payload: bytes) -> list[Event]:
    """The events of a batch that routing understands.

    Raises:
        msgspec.MsgspecError: if it is no batch.
    """
    events: list[Event] = []
    for raw in _BATCH.decode(payload).events:
        try:
            events.append(_EVENT.decode(raw))
        except msgspec.ValidationError:
            continue  # of a kind that is newer than this
    return events
