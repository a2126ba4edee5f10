"""Names of blocks that are the same for all engines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from struct import pack
from typing import Any

BlockName = bytes


def first_name(adapter: str) -> BlockName:
    """What stands in front of a prompt's first block.

    Args:
        adapter: the LoRA adapter's name; empty without one.
    """
    return hashlib.blake2b(adapter.encode(errors="replace"), digest_size=8).digest()


def next_name(parent: BlockName, tokens: Sequence[int], extra: Sequence[Any] = ()) -> BlockName:
    """The name of a block.

    Args:
        parent: that of the block in front.
        tokens: the block's.
        extra: what else makes it another one.
    """
    told = hashlib.blake2b(parent, digest_size=8)
    told.update(pack(f"<{len(tokens)}I", *tokens))
    for key in extra:
        told.update(repr(key).encode(errors="replace"))
    return told.digest()


def names(adapter: str, tokens: Sequence[int], block_tokens: int) -> Iterator[BlockName]:
    """Those of a prompt's whole blocks, in order."""
    name = first_name(adapter)
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        name = next_name(name, tokens[start : start + block_tokens])
        yield name
