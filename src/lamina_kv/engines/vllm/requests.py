"""vLLM's requests and block pool, as control sees them."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import islice
from typing import Any

from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.block_pool import BlockPool as VllmPool
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys
from vllm.v1.request import Request, RequestStatus

from lamina_kv.control.requests import PushParameters
from lamina_kv.engines.vllm.layout import NULL_BLOCK
from lamina_kv.geometry import Group
from lamina_kv.keys import Packable, pack
from lamina_kv.push.addresses import normalise
from lamina_kv.push.messages import MAX_ID
from lamina_kv.tiers.regard import Regard

PUSH_PARAMETER = "lamina_push"
"""The key of ``kv_transfer_params`` that is Lamina's."""

_ASKED_FIRST = "do_remote_decode"
"""By which routers that speak to vLLM's NixlConnector ask a prefill engine, before the decode
engine, to say what the latter is to be told."""

_PREFILLED = "do_remote_prefill"
"""What they expect in the answer. vLLM reports the prefill engine's cached tokens by it."""


_NAMELESS = re.compile(r"renderer\d+-mm-\d+-.*|[0-9a-f]{32,}", re.DOTALL)
"""Where vLLM names inputs by a counter: such names, as they are or hashed together with the
settings of their processor (``vllm/renderers/base.py``, ``_process_mm_uuids``)."""


class VllmRequest:
    """One request.

    Args:
        request: vLLM's request, read at the moment of each call.
        tables: gives the request's block ids of every cache group.
        groups: the cache groups.
        adapter: identity of its LoRA adapter, empty without one.
        counted: whether vLLM names multimodal inputs by a counter, where their user has not.
        recompute_tokens: tokens that must be computed even on a full hit.
        push: the push that it is part of.
        regard: what it says of how long its chunks are worth keeping.
    """

    def __init__(
        self,
        request: Request,
        tables: Callable[[], Sequence[Sequence[int]]],
        groups: Sequence[Group],
        adapter: str,
        counted: bool,
        recompute_tokens: int,
        push: PushParameters | None,
        regard: Regard,
    ) -> None:
        self._request = request
        self.request_id: str = request.request_id
        self._counted = counted
        self.recompute_tokens = recompute_tokens
        self.push = push
        self.regard = regard
        self._tables = tables
        self._groups = groups
        self.root_extra = pack((request.cache_salt, adapter))

    @property
    def vllm(self) -> Request:
        """The request itself."""
        return self._request

    @property
    def num_tokens(self) -> int:
        """Tokens whose ids are known and final. Where a session waits for its next turn they are
        not: the turn takes back what was sampled and not computed."""
        request = self._request
        known = int(request.num_tokens)
        if request.status == RequestStatus.WAITING_FOR_STREAMING_REQ:
            known = min(known, int(request.num_computed_tokens))
        if self._counted:
            for feature in request.mm_features or ():
                if _NAMELESS.fullmatch(_name(feature)):
                    return min(known, int(feature.mm_position.offset))
        return known

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, that of its latest turn in a session."""
        return int(self._request.num_prompt_tokens)

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
        """Hashes of the multimodal inputs and prompt embeddings that lie in the chunk. Nothing
        that is only a name: vLLM's own key of a block has the adapter's."""
        request = self._request
        extra: list[Packable] = []
        for feature in request.mm_features or ():
            offset, length = feature.mm_position.offset, feature.mm_position.length
            if offset < end and start < offset + length:
                extra.append(("mm", _name(feature), offset - start))
        if request.prompt_embeds is not None:
            keys, _ = generate_block_hash_extra_keys(request, start, end, 0)
            extra += [key for key in keys or () if key[0] == "prompt_embeds"]
        return pack(tuple(extra)) if extra else b""


def _name(feature: MultiModalFeatureSpec) -> str:
    """The name of an input's content; its identifier may begin with an adapter's name."""
    return str(feature.mm_hash or feature.identifier)


def push_parameters(request: Request) -> PushParameters | None:
    """What the router says of a request: ``{"lamina_push": {"id": …, "prefill": …}}`` in vLLM's
    ``kv_transfer_params``. One that asks the prefill engine first has it name the push.

    Raises:
        ValueError: if it says something else under that name, or the parameters are no object.
    """
    match request.kv_transfer_params:
        case None:
            return None
        case dict() as parameters:
            given = parameters.get(PUSH_PARAMETER)
        case other:
            raise ValueError(f"kv_transfer_params must be an object, got {shown(other)}")
    match given:
        case None if is_asked_first(request):
            return PushParameters(_own_name(request), None)
        case None:
            return None
        case {"id": str(name), "prefill": str(address)} if _is_id(name) and len(given) == 2:
            return PushParameters(name, normalise(address))
        case {"id": str(name)} if _is_id(name) and len(given) == 1:
            return PushParameters(name, None)
        case _ if withdrawn_push(request) is not None:
            return None
    raise ValueError(
        f'must be {{"id": text}} or {{"id": text, "prefill": "HOST:PORT"}}, with an id of 1 to '
        f"{MAX_ID} printable ASCII characters, got {shown(given)}"
    )


def withdrawn_push(request: Request) -> str | None:
    """The push of which a router tells its prefill engine that no decode engine will ask for it:
    ``{"lamina_push": {"id": …, "withdrawn": true}}`` in the parameters of a request that says
    nothing else. None of every other request."""
    match request.kv_transfer_params:
        case {"lamina_push": {"id": str(name), "withdrawn": True} as given}:
            return name if _is_id(name) and len(given) == 2 else None
    return None


def is_asked_first(request: Request) -> bool:
    """Whether a router wants to be told by a prefill engine what to tell the decode engine."""
    parameters = request.kv_transfer_params
    return (
        isinstance(parameters, dict)
        and parameters.get(_ASKED_FIRST) is True
        and PUSH_PARAMETER not in parameters
    )


def handed_on(request: Request, address: str) -> dict[str, Any] | None:
    """What such a router is told when the prefill engine has computed the prompt; None if it has
    not.

    Args:
        request: has ended.
        address: where decode engines reach this engine.
    """
    if request.status not in {RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED}:
        return None
    push = {"id": _own_name(request), "prefill": address}
    return {_PREFILLED: True, _ASKED_FIRST: False, PUSH_PARAMETER: push}


def _own_name(request: Request) -> str:
    """A push's name that no other request has: vLLM ends a request's with a random part."""
    name = request.request_id
    return name if _is_id(name) else sha256(name.encode()).hexdigest()


def shown(given: object) -> str:
    """The beginning of what a router or client says. No more of it is looked at, because its length
    is their choice, and the scheduler's thread waits."""
    if isinstance(given, dict):  # which ``reprlib`` would sort
        given = dict(islice(given.items(), 4))
    short = reprlib.Repr()
    short.maxlevel = 1
    return short.repr(given)


def _is_id(name: str) -> bool:
    return 0 < len(name) <= MAX_ID and name.isascii() and name.isprintable()


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
