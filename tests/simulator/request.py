"""One request of the simulated engine, as control sees it and as the engine runs it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np

from lamina_kv.control.requests import PushParameters
from lamina_kv.keys import ChunkChain, Epoch, pack
from lamina_kv.tiers.regard import USUAL
from simulator.content import Stamps, extend, root_hash
from simulator.options import BLOCK_TOKENS

VOCABULARY = 5
"""Few tokens, so that continuations of different requests meet."""


class Status(Enum):
    """Where a request is."""

    WAITING = "waiting"
    PARKED = "parked"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class RunState(Enum):
    """What becomes of steps of a run that are under way."""

    LIVE = "live"
    STALE = "stale"
    """Preempted: what was sampled still counts, nothing else."""
    DROPPED = "dropped"
    """Cut short by a reset: nothing of it counts."""


class Blocks:
    """Blocks that a request has been given.

    Attributes:
        ids: which, in token order; grows.
        held: whether they are still the request's.
        leased: those that a load still had to itself when they were the request's no more.
        cached: how many of them were put into the prefix cache.
    """

    __slots__ = ("cached", "held", "ids", "leased")

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.held = True
        self.leased: set[int] = set()
        self.cached = 0

    def may_be_written(self, block: int) -> bool:
        """Whether a load for their request may write to one of them."""
        return self.held or block in self.leased


class Run:
    """What a request computes in its blocks, until that is interrupted.

    Args:
        request: whose.
        position: tokens whose pages are there.
        blocks: where.

    Attributes:
        state: what becomes of its steps under way.
    """

    __slots__ = ("blocks", "position", "request", "state")

    def __init__(self, request: Request, position: int, blocks: Blocks) -> None:
        self.request = request
        self.position = position
        self.blocks = blocks
        self.state = RunState.LIVE


class Request:
    """A request; a :class:`~lamina_kv.control.requests.RequestView`.

    Args:
        request_id: its name.
        prompt: token ids.
        max_tokens: tokens to generate.
        salt: sets its content apart.
        recompute_tokens: tokens that must be computed even on a full hit.
        namespace: what chunk keys start from.
        chunk_tokens: tokens of a chunk.
        weights: which weights compute it.
        epoch: what Lamina calls them.
        ring: blocks of the ring that it overwrites again and again; 0 if it keeps all it computes.

    Attributes:
        computed: tokens that are computed once every step in flight has run and every draft in
            them was right.
        drafts: drafts to run with the next step.
        placeholders: tokens that steps in flight will sample, if every draft is right.
        in_flight: tokens in steps that have no output yet.
        last_step: the latest step with a forward that it was part of.
    """

    def __init__(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_tokens: int,
        salt: int,
        recompute_tokens: int,
        namespace: bytes,
        chunk_tokens: int,
        weights: int,
        epoch: Epoch,
        ring: int = 0,
    ) -> None:
        self._namespace = namespace
        self._ring = ring
        self.request_id = request_id
        self.push: PushParameters | None = None
        self.regard = USUAL
        self.num_prompt_tokens = len(prompt)
        self.recompute_tokens = recompute_tokens
        self.root_extra = pack((str(salt), ""))
        self.max_tokens = max_tokens
        self.salt = salt
        self.chain = ChunkChain(namespace, chunk_tokens, self.root_extra, epoch=epoch)
        self._tokens: list[int] = []
        self._hashes: Stamps = np.empty(len(prompt) + max_tokens, np.uint64)
        self._root = root_hash(weights, salt)
        self.append(prompt)
        self.status = Status.WAITING
        self.run: Run | None = None
        self.computed = 0
        self.drafts = 0
        self.placeholders = 0
        self.in_flight = 0
        self.stale = 0
        self.deliver_stale = True
        self.preemptions = 0
        self.last_step = 0

    @property
    def num_tokens(self) -> int:
        """Tokens whose ids are known."""
        return len(self._tokens)

    @property
    def hashes(self) -> Stamps:
        """The hash of every known prefix, shape ``(num_tokens,)``."""
        return self._hashes[: len(self._tokens)]

    @property
    def is_complete(self) -> bool:
        """Whether every token was generated."""
        return len(self._tokens) == len(self._hashes)

    @property
    def limit(self) -> int:
        """Tokens that it will have when it is complete."""
        return len(self._hashes)

    def tokens(self) -> Sequence[int]:
        """All known token ids."""
        return self._tokens

    def chunk_extra(self, start: int, end: int) -> bytes:
        """Nothing: no images here."""
        return b""

    def blocks(self, group: int = 0) -> Sequence[int]:
        """The blocks that the engine has given it, as if a ring were unrolled."""
        ids = self.run.blocks.ids if self.run is not None else []
        if not self._ring or len(ids) < self._ring:
            return ids
        return [ids[i % self._ring] for i in range(-(-self.num_tokens // BLOCK_TOKENS))]

    def state_blocks(self, group: int, end: int) -> Sequence[int]:
        """See :class:`~lamina_kv.control.requests.RequestView`."""
        raise AssertionError("the simulated model has no states")

    def append(self, tokens: Sequence[int]) -> list[int]:
        """Add known tokens; returns their hashes."""
        start = len(self._tokens)
        parent = int(self._hashes[start - 1]) if start else self._root
        added = extend(parent, tokens)
        self._tokens.extend(tokens)
        self._hashes[start : len(self._tokens)] = added
        self.chain.extend(self._tokens)
        return added

    def rehash(self, weights: int, epoch: Epoch) -> None:
        """The weights have changed, or may have: the same tokens have another content, and in any
        case other names."""
        self._root = root_hash(weights, self.salt)
        self._hashes = self._hashes.copy()  # a forward that still runs reads what was
        self._hashes[: len(self._tokens)] = extend(self._root, self._tokens)
        chunk = self.chain.chunk_tokens
        self.chain = ChunkChain(self._namespace, chunk, self.root_extra, epoch=epoch)
        self.chain.extend(self._tokens)

    @staticmethod
    def next_token(prefix: int) -> int:
        """What the model says after a prefix."""
        return prefix % VOCABULARY
