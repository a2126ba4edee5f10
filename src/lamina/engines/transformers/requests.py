"""transformers' requests and blocks, as control sees them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.generation.continuous_batching.cache_allocators import CacheAllocator
from transformers.generation.continuous_batching.requests import RequestState

from lamina.engines.standalone import TextRequest


class TransformersRequest(TextRequest):
    """One request.

    A request that the library resets begins anew, with what it had generated as a part of its
    prompt: that is how it is seen here, too.

    Args:
        state: the library's request, read at the moment of each call.
        allocators: of the cache, in the order of its groups.
    """

    def __init__(self, state: RequestState, allocators: Sequence[CacheAllocator]) -> None:
        super().__init__(state.request_id)
        # Of one that is to be forked the library computes two tokens at least.
        self.recompute_tokens = 2 if state.num_children else 1
        self._state = state
        self._allocators = allocators

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
        table: Sequence[int] = self._allocators[group].block_table.get(self.request_id, ())
        return table


class LedgerPool:
    """Leases as reference counts in the library's own ledger of blocks.

    Args:
        allocator: of the one group that is served.
    """

    def __init__(self, allocator: CacheAllocator) -> None:
        self._allocator = allocator
        self.held = 0

    def hold(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block."""
        self.held += len(blocks)
        for block in blocks:
            self._allocator.ledger.acquire(block)

    def free(self, blocks: Sequence[int]) -> None:
        """Take one reference from each block; at none it goes back to the library, which keeps it
        for other requests if it knows its content."""
        self.held -= len(blocks)
        over = [block for block in reversed(blocks) if self._allocator.ledger.release(block)]
        self._allocator.pool.free_blocks(self._allocator.index, over)
