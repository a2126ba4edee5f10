"""How much of a prefill engine prompts take whose destination is not known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class Undelivered:
    """Blocks of prompts whose destination is not known: each block counts once, however many
    prompts begin with it, and what is still being computed counts as much as it will take."""

    def __init__(self) -> None:
        self._reserved: dict[str, int] = {}
        self._reserved_blocks = 0
        self._held: dict[str, tuple[int, ...]] = {}
        self._holders: Counter[int] = Counter()

    def reserve(self, push: str, blocks: int) -> None:
        """A prompt will be computed, and take so many blocks."""
        self.drop(push)
        self._reserved[push] = blocks
        self._reserved_blocks += blocks

    def hold(self, push: str, blocks: tuple[int, ...]) -> None:
        """A prompt has ended, and these blocks are held for it."""
        self.drop(push)
        self._held[push] = blocks
        self._holders.update(blocks)

    def drop(self, push: str) -> None:
        """A prompt has a destination, or will have none. Idempotent."""
        self._reserved_blocks -= self._reserved.pop(push, 0)
        for block in self._held.pop(push, ()):
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]

    def is_reserved(self, push: str) -> bool:
        """Whether there is room for a prompt when it ends."""
        return push in self._reserved

    def with_blocks(self, blocks: Iterable[int]) -> int:
        """How many blocks are held, if these are, too."""
        return len(self._holders) + sum(block not in self._holders for block in set(blocks))

    def with_prompt(self, push: str, blocks: int) -> int:
        """How many blocks will be held, if a prompt is computed that takes so many."""
        reserved = self._reserved_blocks - self._reserved.get(push, 0)
        return len(self._holders) + reserved + blocks

    @property
    def blocks(self) -> int:
        """How many are held now."""
        return len(self._holders)
