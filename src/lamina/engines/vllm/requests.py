"""vLLM's requests and block pool, as control sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm.v1.core.block_pool import BlockPool as VllmPool
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys
from vllm.v1.request import Request

from lamina.control.requests import PushParameters
from lamina.engines.vllm.layout import NULL_BLOCK
from lamina.geometry import Group
from lamina.keys import pack
from lamina.push.link import split_address

PUSH_PARAMETER = "lamina_push"
"""The key of ``kv_transfer_params`` that is Lamina's."""


class VllmRequest:
    """One request.

    Args:
        request: vLLM's request, read at the moment of each call.
        tables: gives the request's block ids of every cache group.
        groups: the cache groups.
        adapter: identity of its LoRA adapter, empty without one.
        recompute_tokens: tokens that must be computed even on a full hit.
        push: the push that it is part of.
    """

    def __init__(
        self,
        request: Request,
        tables: Callable[[], Sequence[Sequence[int]]],
        groups: Sequence[Group],
        adapter: str,
        recompute_tokens: int,
        push: PushParameters | None,
    ) -> None:
        self._request = request
        self.request_id: str = request.request_id
        self.num_prompt_tokens: int = request.num_prompt_tokens
        self.recompute_tokens = recompute_tokens
        self.push = push
        self._tables = tables
        self._groups = groups
        self.root_extra = pack((request.cache_salt, adapter))

    @property
    def num_tokens(self) -> int:
        """Tokens whose ids are known."""
        return int(self._request.num_tokens)

    def tokens(self) -> Sequence[int]:
        """All known token ids."""
        tokens: list[int] = self._request._all_token_ids
        return tokens

    def blocks(self, group: int) -> Sequence[int]:
        """Block ids of one group, in token order."""
        return self._tables()[group]

    def state_blocks(self, group: int, end: int) -> Sequence[int]:
        """The block that keeps the state behind ``end`` for others, and, if the request runs in
        this step, the block that its forward reads and writes: vLLM has copied the one to the
        other before anything is loaded. In place they are one."""
        table = self._tables()[group][self._groups[group].state_index(end) :]
        return [block for block in table if block != NULL_BLOCK]

    def chunk_extra(self, start: int, end: int) -> bytes:
        """Hashes of the multimodal inputs and prompt embeddings that lie in the chunk."""
        request = self._request
        if not request.mm_features and request.prompt_embeds is None:
            return b""
        extra, _ = generate_block_hash_extra_keys(request, start, end, 0)
        return b"" if extra is None else pack(extra)


def push_parameters(request: Request) -> PushParameters | None:
    """What the router says of a request: ``{"lamina_push": {"id": …, "prefill": …}}`` in vLLM's
    ``kv_transfer_params``.

    Raises:
        ValueError: if it says something else under that name.
    """
    given = (request.kv_transfer_params or {}).get(PUSH_PARAMETER)
    if given is None:
        return None
    match given:
        case {"id": str(name), "prefill": str(address)} if name and len(given) == 2:
            split_address(address)
            return PushParameters(name, address)
        case {"id": str(name)} if name and len(given) == 1:
            return PushParameters(name, None)
    raise ValueError(
        f'must be {{"id": text}} or {{"id": text, "prefill": "HOST:PORT"}}, got {given!r}'
    )


class VllmBlockPool:
    """Leases as reference counts in vLLM's own block pool.

    Args:
        pool: vLLM's pool.
    """

    def __init__(self, pool: VllmPool) -> None:
        self._pool = pool

    def hold(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block."""
        self._pool.touch([self._pool.blocks[block] for block in blocks])

    def free(self, blocks: Sequence[int]) -> None:
        """Take one reference from each block, the last one first, as vLLM does: the end of a
        prefix is given up before its beginning."""
        self._pool.free_blocks([self._pool.blocks[block] for block in reversed(blocks)])
