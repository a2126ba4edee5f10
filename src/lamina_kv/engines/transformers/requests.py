"""transformers' requests and blocks, as control sees them."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence

from transformers.generation.continuous_batching.requests import RequestState

from lamina_kv.engines.standalone import TextRequest
from lamina_kv.engines.transformers.layout import Part


class TransformersRequest(TextRequest):
    """One request.

    A request that the library resets begins anew, with what it had generated as a part of its
    prompt: that is how it is seen here, too.

    Args:
        state: the library's request, read at the moment of each call.
        parts: the cache's groups.
    """

    def __init__(self, state: RequestState, parts: Sequence[Part]) -> None:
        super().__init__(state.request_id)
        # Of one that is to be forked the library computes two tokens at least.
        self.recompute_tokens = 2 if state.num_children else 1
        self._state = state
        self._parts = parts

    @property
    def num_tokens(self) -> int:
        """Tokens whose ids are known."""
        return len(self._state.initial_tokens) + len(self._state.generated_tokens)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._state.initial_tokens)

    def tokens(self) -> Sequence[int]:
        """All known token ids."""
        tokens: list[int] = self._state.initial_tokens + self._state.generated_tokens
        return tokens

    def blocks(self, group: int) -> Sequence[int]:
        """Block ids of one group, in token order."""
        return self._parts[group].blocks(self.request_id, self.num_tokens)


class LedgerPool:
    """Leases as reference counts in the library's own ledgers of blocks.

    Args:
        parts: the cache's groups.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._firsts = [part.first_block for part in parts]
        self.held = 0

    def _part_of(self, block: int) -> int:
        return bisect_right(self._firsts, block) - 1

    def hold(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block."""
        self.held += len(blocks)
        for block in blocks:
            part = self._parts[self._part_of(block)]
            part.allocator.ledger.acquire(block - part.first_block)

    def free(self, blocks: Sequence[int]) -> None:
        """Take one reference from each block; at none it goes back to the library, which keeps it
        for other requests if it knows its content."""
        self.held -= len(blocks)
        over: dict[int, list[int]] = defaultdict(list)
        for block in reversed(blocks):
            index = self._part_of(block)
            theirs = block - self._firsts[index]
            if self._parts[index].allocator.ledger.release(theirs):
                over[index].append(theirs)
        for index, freed in over.items():
            allocator = self._parts[index].allocator
            allocator.pool.free_blocks(allocator.index, freed)
