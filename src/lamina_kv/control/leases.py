"""Leases on engine blocks: a block that is being read, or loaded into, is not reused, however it is
freed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class BlockPool(Protocol):
    """What control needs of the engine's block pool: reference counts."""

    def hold(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block."""

    def free(self, blocks: Sequence[int]) -> None:
        """Take one reference from each block; at none the engine may reuse it."""


class BlockLease:
    """A hold on engine blocks. Released exactly once, however often :meth:`release` is called."""

    __slots__ = ("_book", "blocks")

    def __init__(self, book: LeaseBook, blocks: tuple[int, ...]) -> None:
        self._book: LeaseBook | None = book
        self.blocks = blocks

    def release(self) -> None:
        """Give the blocks back."""
        book, self._book = self._book, None
        if book is not None:
            book.give_back(self.blocks)


class LeaseBook:
    """Takes leases in a block pool and knows how many blocks are held.

    Args:
        pool: the engine's pool.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.leased_blocks = 0

    def take(self, blocks: tuple[int, ...]) -> BlockLease:
        """Hold ``blocks`` until the lease is released."""
        self._pool.hold(blocks)
        self.leased_blocks += len(blocks)
        return BlockLease(self, blocks)

    def give_back(self, blocks: tuple[int, ...]) -> None:
        """Used by :class:`BlockLease` alone."""
        self.leased_blocks -= len(blocks)
        self._pool.free(blocks)
