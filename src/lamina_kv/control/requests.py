"""What control knows of one request while the engine has it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from lamina_kv.control.offers import Delivery, HitPart, Offer
from lamina_kv.keys import ChunkChain, prompt_digest
from lamina_kv.observe.traces import ServedRequest
from lamina_kv.plan import NEAR, ChunkKey, TierName, TransferId
from lamina_kv.tiers.regard import Regard
from lamina_kv.tiers.reuse import Standing, Use

if TYPE_CHECKING:
    from lamina_kv.control.shape import ChunkShape
    from lamina_kv.observe.spans import Span


@dataclass(frozen=True, slots=True)
class PushParameters:
    """What a router says of a request that two engines serve.

    Attributes:
        id: names the push; the same for both.
        prefill: where the prefill engine listens, if this one is to decode; None if it is to
            prefill.
    """

    id: str
    prefill: str | None


class RequestView(Protocol):
    """An engine's request, as control needs to see it. Read at the moment of the call."""

    @property
    def request_id(self) -> str:
        """The engine's name for it."""

    @property
    def num_tokens(self) -> int:
        """Tokens whose ids are known and final: the prompt and what was sampled so far. A token
        that the engine may still take back is none, nor one behind an input of which it is not
        known what it is; nothing is kept of those."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt. In a session, whose next turn is a longer prompt, it grows; what
        was computed for tokens that the turn took back then counts for nothing."""

    @property
    def recompute_tokens(self) -> int:
        """Tokens at the end that must be computed even on a full hit, at least 1."""

    @property
    def root_extra(self) -> bytes:
        """What sets the request's keys apart from the first chunk on: salt, adapter."""

    @property
    def push(self) -> PushParameters | None:
        """The push that it is part of, if it is."""

    @property
    def regard(self) -> Regard:
        """What it says of how long its chunks are worth keeping."""

    def tokens(self) -> Sequence[int]:
        """All known token ids."""

    def chunk_extra(self, start: int, end: int) -> bytes:
        """What sets the chunk of tokens ``start..end`` apart: its multimodal inputs."""

    def blocks(self, group: int) -> Sequence[int]:
        """The block ids of one group that the engine has given the request, in token order; where
        it has none any more, or none yet, the shape's ``null_block``. Those of a window in place
        come again and again, a ring's length apart."""

    def state_blocks(self, group: int, end: int) -> Sequence[int]:
        """The blocks that must hold the state behind the first ``end`` tokens for the request to
        go on there."""


class Follower(Protocol):
    """Whoever wants to know which chunks a request has, for as long as that lives."""

    def keys_known(self, view: RequestView, chain: ChunkChain) -> None:
        """Keys of the request were asked for: these are known, perhaps the same as before."""

    def over(self) -> None:
        """The request is over."""


@dataclass(frozen=True, slots=True)
class BoundaryState:
    """A recurrent state that a block holds when the step is over.

    Attributes:
        request_id: whose it is.
        group: the cache group.
        block: the block.
        end: tokens that it stands behind.
    """

    request_id: str
    group: int
    block: int
    end: int


@dataclass(frozen=True, slots=True)
class Hit:
    """What of a request is kept outside of the engine, remembered while the request waits.

    Attributes:
        floor: tokens that the engine had when the hit was found; -1 for none found.
        version: the catalog's version then. A hit of another version may not be there any more.
        arrivals: the catalog's arrivals then, and the tiers that were looked at.
        end_chunk: the first chunk that is missing of the groups that need all of a prefix.
        unknown: whether a tier has not said yet if it has what would make the hit longer.
        tokens: tokens of the hit beyond ``floor``.
        parts: the hit by tiers, in prefix order; then, without tokens, tiers that have only windows
            or states of it.
    """

    floor: int = -1
    version: int = -1
    arrivals: tuple[int, tuple[TierName, ...]] = (-1, ())
    end_chunk: int = 0
    unknown: bool = False
    tokens: int = 0
    parts: tuple[HitPart, ...] = ()

    @property
    def has_far(self) -> bool:
        """Whether some of it is only in far tiers, or was."""
        return any(part.tier != NEAR for part in self.parts)


@dataclass(slots=True)
class Wait:
    """How a request waits for what another's load brings (:mod:`lamina_kv.control.sharing`).

    Attributes:
        load: the load that it waits for; None if for none.
        floor: tokens that the engine had of it when it began to wait.
        since: control's clock then.
        seconds: how long it has waited for loads before.
        promised: whether the last of those went well, so that the engine has more of it now.
        in_vain: whether that was not so: nothing is shared with it.
    """

    load: TransferId | None = None
    floor: int = 0
    since: float = 0.0
    seconds: float = 0.0
    promised: bool = False
    in_vain: bool = False


@dataclass(frozen=True, slots=True)
class Prefill:
    """A request whose tokens are being computed (:mod:`lamina_kv.control.prefills`).

    Attributes:
        start: tokens that it had.
        end: tokens that were known then. When one more is known, these are computed: those of the
            prompt, or after a preemption all.
        began: control's clock.
        steps: steps that were planned before.
        tokens: tokens of these steps.
    """

    start: int
    end: int
    began: float
    steps: int
    tokens: int


@dataclass(slots=True)
class RequestRecord:
    """One request of the engine.

    Attributes:
        view: the engine's request.
        chain: its chunk keys, extended as tokens become known.
        came: when the engine first spoke of it, by the planner's clock.
        hit: the memoised hit.
        losses: how often the engine took its blocks away.
        admitted: whether the engine gave it blocks since.
        begun: whether steps compute into blocks of its since it had none. A hand-off may let it
            compute to a boundary before it is admitted.
        ended: whether the engine is done with it; kept until its load is terminal.
        offer: what the last lookup promised; what was taken of it once the request has blocks.
        delivery: what became of that.
        load: its load that is not terminal.
        receive: its receive that is not terminal.
        push_over: why it is part of no push any more; empty while it may be.
        next_save: first chunk that was not yet considered for saving.
        considered: first chunk that never was; what is near behind it, others have saved.
        held_back: first chunk that found no room, so that it is counted once.
        held_end: chunks that were complete when that one was not worth a slot; -1 if it was.
        quiet_before: a step that ends before so many of its tokens completes nothing that has to be
            saved, and no prefill. It is passed over.
        turn: tokens of its prompt, and tokens that are computed when the latest step is over.
        barred: whether what it holds must not be saved, because it was computed by several weights
            or adapters, or from a token that was taken back; until it gets other blocks.
        no_loads: why nothing is loaded for it any more; empty while something may be.
        brought: the offer for which chunks came near: it waits for no far tier any more. None
            before.
        prefill: what is measured of its computing; None while nothing is.
        fresh: whether nothing of it was computed since it got its blocks.
        may_hit: whether its last lookup was allowed to find anything.
        sources: of its first tokens, where they came from, and how far each source reaches.
        counted: whether its prompt has been counted.
        wait: whether and how it waits for another's load.
        use: its use of its prefix, once that was noted.
        follower: who is told which chunks it has; None if nobody wants to know.
        miss: why its hit was not longer; empty if it was as long as it could be.
        span: from when the engine first spoke of it, or took its blocks away, to when it has
            blocks; None if nobody traces, or if it has them.
    """

    view: RequestView
    chain: ChunkChain
    came: float = 0.0
    hit: Hit = field(default_factory=Hit)
    losses: int = 0
    admitted: bool = False
    begun: bool = False
    ended: bool = False
    offer: Offer = field(default_factory=Offer)
    delivery: Delivery = field(default_factory=Delivery)
    load: TransferId | None = None
    receive: TransferId | None = None
    push_over: str = ""
    next_save: int = 0
    considered: int = 0
    held_back: int = -1
    held_end: int = -1
    quiet_before: int = 0
    barred: bool = False
    turn: tuple[int, int] = (0, 0)
    no_loads: str = ""
    brought: Offer | None = None
    prefill: Prefill | None = None
    fresh: bool = False
    may_hit: bool = False
    sources: list[tuple[str, int]] = field(default_factory=list)
    counted: bool = False
    wait: Wait = field(default_factory=Wait)
    use: Use | None = None
    follower: Follower | None = None
    miss: str = ""
    span: Span | None = None

    def rename(self, chain: ChunkChain) -> None:
        """Its chunks are others from now on: weights, or an adapter, have changed. Only for a
        request without blocks."""
        self.chain = chain
        self.next_save = self.considered = self.quiet_before = 0
        self.hit = Hit()
        self.wait = Wait()
        self.brought = None
        self.use = None

    def prompt_digest(self) -> bytes:
        """Names its prompt and the weights that compute it, for the other engine of a push."""
        prompt = self.view.num_prompt_tokens
        return prompt_digest(
            self.view.tokens()[:prompt],
            self.view.root_extra,
            self.view.chunk_extra(0, prompt),
            self.chain.epoch,
        )

    def lose_blocks(self) -> None:
        """The engine took the blocks away (preemption, failed load): everything is open again."""
        self.losses += 1
        self.admitted = self.begun = False
        self.load = None
        self.receive = None
        self.save_anew()
        self.hit = Hit()
        self.brought = None
        self.held_back = self.held_end = -1
        self.barred = False
        self.turn = (0, 0)
        self.prefill = None
        self.wait = Wait()

    def skip_saved(self, end: int) -> None:
        """Its first ``end`` chunks are near: they need not be considered for saving, unless the
        load that brings them fails."""
        if self.considered >= end:
            self.next_save = max(self.next_save, end)

    def save_anew(self) -> None:
        """Consider all of it for saving once more."""
        self.considered = max(self.considered, self.next_save)
        self.next_save = self.quiet_before = 0
        self.held_end = -1

    def rest(self, chunk_tokens: int, *, saves: bool) -> None:
        """All of it was looked at for this step, and its prompt is counted: find out when it has to
        be looked at again.

        Args:
            chunk_tokens: tokens of a chunk.
            saves: whether chunks are saved.
        """
        quiet = (max(self.next_save, self.held_end) + 1) * chunk_tokens if saves else sys.maxsize
        if self.prefill is not None and self.prefill.end < quiet:
            quiet = self.prefill.end + 1
        self.quiet_before = quiet

    def computes(self, start: int, end: int) -> None:
        """A step computes the tokens from ``start`` to ``end``, for a model with recurrent states.

        A session's turn may take back a token that a step in flight had computed. Then the state
        has that token in it, and all that comes after is computed from it: nothing of it is saved.
        """
        prompt, computed = self.turn
        self.turn = self.view.num_prompt_tokens, end
        self.barred |= start < computed and prompt != self.turn[0]

    def standing(self, shape: ChunkShape, group: int, index: int) -> Standing:
        """Where chunk ``index`` of one of its groups stands."""
        last = index + 1 == self.view.num_prompt_tokens // shape.chunk_tokens
        return shape.standing(self.chain.groups, group, index, self.known_use, last)

    @property
    def known_use(self) -> Use:
        """Its use of its prefix, as far as that is known."""
        return self.use or Use(regard=self.view.regard)

    @property
    def may_save(self) -> bool:
        """Whether chunks of it may be saved."""
        return self.view.regard.keep and not self.barred

    def served(self, prefill_seconds: float) -> ServedRequest:
        """What a trace has of it when it ends.

        Args:
            prefill_seconds: what computing its prompt is predicted to take; 0 if nobody knows.
        """
        keys, tokens = tuple(self.known_keys()[0]), self.view.num_tokens
        prompt = self.view.num_prompt_tokens
        return ServedRequest(self.came, prompt, tokens, keys, prefill_seconds)

    @property
    def moving(self) -> bool:
        """Whether something is on its way to its blocks."""
        return self.load is not None or self.receive is not None

    def known_keys(self) -> tuple[list[ChunkKey], ...]:
        """Per group, keys of all whole chunks whose tokens are known."""
        known = self.view.num_tokens
        self.chain.extend(self.view.tokens(), self.view.chunk_extra, end=known)
        if self.follower is not None:
            self.follower.keys_known(self.view, self.chain)
        return self.chain.groups
