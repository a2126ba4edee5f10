"""What control knows of one request while the engine has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import Protocol

from lamina.control.catalog import Location
from lamina.control.decisions import DecisionRecord
from lamina.control.policy import HitPart
from lamina.geometry import Group, GroupKind
from lamina.keys import ChunkChain, prompt_digest
from lamina.plan import ChunkKey, LoadMode, TierName, TransferId


@dataclass(frozen=True)
class ChunkShape:
    """Tokens and groups of chunks, all that control needs of the geometry.

    Attributes:
        chunk_tokens: tokens of a chunk.
        groups: cache groups of the model.
        null_block: a block id that stands for none, where the engine's tables have gaps.
    """

    chunk_tokens: int
    groups: tuple[Group, ...]
    null_block: int = -1

    @classmethod
    def uniform(cls, block_tokens: int, chunk_tokens: int) -> ChunkShape:
        """That of a model whose layers all look at the whole prefix."""
        return cls(chunk_tokens, (Group(GroupKind.FULL, block_tokens),))

    @cached_property
    def full(self) -> tuple[int, ...]:
        """Groups of which all of a prefix is needed."""
        return self._of(GroupKind.FULL)

    @cached_property
    def sparse(self) -> tuple[int, ...]:
        """Groups of which only the end of a prefix is needed."""
        return self._of(GroupKind.WINDOW, GroupKind.STATE)

    @cached_property
    def recurrent(self) -> tuple[int, ...]:
        """Groups of which one state is needed."""
        return self._of(GroupKind.STATE)

    @cached_property
    def in_place(self) -> bool:
        """Whether there is anything that the next step overwrites."""
        return any(group.in_place for group in self.groups)

    @cached_property
    def paged(self) -> tuple[int, ...]:
        """Groups whose blocks are filled as tokens are computed; a window's are then given up."""
        kinds = self._of(GroupKind.FULL, GroupKind.WINDOW)
        return tuple(group for group in kinds if not self.groups[group].in_place)

    @cached_property
    def rings(self) -> tuple[int, ...]:
        """Windows in place."""
        kinds = self._of(GroupKind.WINDOW)
        return tuple(group for group in kinds if self.groups[group].in_place)

    @cached_property
    def resume_tokens(self) -> int:
        """A hit ends on a multiple of this. One that ends inside a chunk needs no more than whole
        blocks of it; a state, or a window, is only kept for ends of chunks."""
        blocks = math.lcm(*(group.block_tokens for group in self.groups))
        return self.chunk_tokens if self.sparse else blocks

    def pushed_blocks(self, floor: int, start: int, end: int) -> int:
        """Blocks that a push of the tokens ``start..end`` needs, of a request that has the first
        ``floor`` tokens itself."""
        return sum(
            1
            if group.kind is GroupKind.STATE
            else -(-end // group.block_tokens) - self.first_pushed(i, floor, start, end)
            for i, group in enumerate(self.groups)
        )

    def first_pushed(self, group: int, floor: int, start: int, end: int) -> int:
        """Index in the prompt of the first block that such a push needs of a group with pages.

        Of a window nothing is loaded where the rest is pushed; what the engine has of it must not
        be written to.
        """
        shape = self.groups[group]
        first = start if shape.kind is GroupKind.FULL else max(floor, shape.first_token(end))
        return first // shape.block_tokens

    def _of(self, *kinds: GroupKind) -> tuple[int, ...]:
        return tuple(i for i, group in enumerate(self.groups) if group.kind in kinds)


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


@dataclass(slots=True)
class Story:
    """What became of one request's hit, for the log and for people.

    All counts are tokens; times are seconds, negative where nothing is known. ``taken`` is what is
    loaded, by the tier that it comes from.
    """

    prompt: int = 0
    engine: int = 0
    host: int = 0
    disk: int = 0
    loaded: int = 0
    pushed: int = 0
    mode: LoadMode = LoadMode.LAYERWISE
    reason: str = "miss"
    predicted_load: float = -1.0
    predicted_compute: float = -1.0
    seconds: float = 0.0
    waited: float = 0.0
    failed: bool = False
    unpushed: str = ""
    push_failed: str = ""
    taken: dict[TierName, int] = field(default_factory=dict)

    def line(self, request_id: str) -> str:
        """One line that says what was hit, where, what was loaded, and why the rest was not."""
        brought = 0 if self.failed or self.push_failed else self.loaded + self.pushed
        recomputed = self.prompt - self.engine - brought
        text = (
            f"request {request_id}: prompt {self.prompt} tokens, hit engine {self.engine} "
            f"host {self.host} disk {self.disk}, "
        )
        if self.failed:
            text += f"load FAILED ({self.reason}), "
        elif self.loaded or not self.pushed:
            how = self.mode.value if self.loaded else self.reason
            text += f"loaded {self.loaded} ({how}), "
        if self.push_failed:
            text += f"push FAILED ({self.push_failed}), "
        elif self.pushed:
            text += f"pushed {self.pushed}, "
        elif self.unpushed:
            text += f"not pushed ({self.unpushed}), "
        text += f"recomputed {recomputed}"
        if self.predicted_load >= 0 and self.predicted_compute >= 0:
            text += (
                f", predicted: load {self.predicted_load * 1e3:.1f} ms, compute "
                f"{self.predicted_compute * 1e3:.1f} ms"
            )
        if self.loaded or self.pushed:
            text += f", load {self.seconds * 1e3:.1f} ms, model waited {self.waited * 1e3:.1f} ms"
        return text


@dataclass(frozen=True, slots=True)
class FoundChunk:
    """A chunk of a hit.

    Attributes:
        place: where it is.
        group: the cache group that it is of.
        start: the first token wanted of it.
        end: the one after the last.
    """

    place: Location
    group: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class FoundPrefix:
    """A hit, remembered while its request waits.

    Attributes:
        floor: tokens that the engine had when it was taken; -1 for none taken.
        losses: the catalog's losses then.
        arrivals: the catalog's arrivals then, and the tiers that could be read.
        end_chunk: the chunk after the last one of which every whole prefix is visible.
        tokens: tokens of the hit beyond ``floor``.
        parts: the hit by tiers, in prefix order; then, without tokens, tiers that have only windows
            or states of it.
    """

    floor: int = -1
    losses: int = -1
    arrivals: tuple[int, tuple[TierName, ...]] = (-1, ())
    end_chunk: int = 0
    tokens: int = 0
    parts: tuple[HitPart, ...] = ()

    @property
    def below_host(self) -> bool:
        """Whether some of it may since have come nearer."""
        return any(part.tier is not TierName.HOST for part in self.parts)


@dataclass(slots=True)
class Wait:
    """How a request waits for what another's load brings (:mod:`lamina.control.sharing`).

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


@dataclass(slots=True)
class RequestRecord:
    """One request of the engine.

    Attributes:
        view: the engine's request.
        chain: its chunk keys, extended as tokens become known.
        hit: the memoised hit.
        losses: how often the engine took its blocks away.
        admitted: whether the engine gave it blocks since.
        ended: whether the engine is done with it; kept until its load is terminal.
        offered: tokens beyond the engine's that the last lookup promised.
        load: its load that is not terminal.
        receive: its receive that is not terminal.
        push_over: why it is part of no push any more; empty while it may be.
        next_save: first chunk that was not yet considered for saving.
        promote: chunks loaded from disk that the host tier should hold, too.
        held_back: first chunk that found no room, so that it is counted once.
        turn: tokens of its prompt, and tokens that are computed when the latest step is over.
        barred: whether what it holds must not be saved, because it was computed by several weights
            or adapters, or from a token that was taken back; until it gets other blocks.
        distrust: why nothing is loaded for it any more; empty while it may be.
        decision: what was last decided about its hit.
        patience: seconds after which its load has taken too long.
        prefill: tokens that it had, and control's clock, when its prompt began to be computed; None
            while nothing is to be measured.
        fresh: whether nothing of it was computed since it got its blocks.
        may_hit: whether its last lookup was allowed to find anything.
        sources: of its first tokens, where they came from, and how far each source reaches.
        counted: whether its prompt has been counted.
        story: what became of its hit.
        wait: whether and how it waits for another's load.
    """

    view: RequestView
    chain: ChunkChain
    hit: FoundPrefix = field(default_factory=FoundPrefix)
    losses: int = 0
    admitted: bool = False
    ended: bool = False
    offered: int = 0
    load: TransferId | None = None
    receive: TransferId | None = None
    push_over: str = ""
    next_save: int = 0
    promote: set[ChunkKey] = field(default_factory=set)
    held_back: int = -1
    barred: bool = False
    turn: tuple[int, int] = (0, 0)
    distrust: str = ""
    decision: DecisionRecord | None = None
    patience: float = inf
    prefill: tuple[int, float] | None = None
    fresh: bool = False
    may_hit: bool = False
    sources: list[tuple[str, int]] = field(default_factory=list)
    counted: bool = False
    story: Story = field(default_factory=Story)
    wait: Wait = field(default_factory=Wait)

    def rename(self, chain: ChunkChain) -> None:
        """Its chunks are others from now on: weights, or an adapter, have changed. Only for a
        request without blocks."""
        self.chain = chain
        self.next_save = 0
        self.hit = FoundPrefix()
        self.wait = Wait()
        self.promote.clear()

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
        self.admitted = False
        self.load = None
        self.receive = None
        self.next_save = 0
        self.hit = FoundPrefix()
        self.held_back = -1
        self.barred = False
        self.turn = (0, 0)
        self.prefill = None
        self.wait = Wait()
        self.promote.clear()

    def computes(self, start: int, end: int) -> None:
        """A step computes the tokens from ``start`` to ``end``, for a model with recurrent states.

        A session's turn may take back a token that a step in flight had computed. Then the state
        has that token in it, and all that comes after is computed from it: nothing of it is saved.
        """
        prompt, computed = self.turn
        self.turn = self.view.num_prompt_tokens, end
        self.barred |= start < computed and prompt != self.turn[0]

    @property
    def moving(self) -> bool:
        """Whether something is on its way to its blocks."""
        return self.load is not None or self.receive is not None

    def known_keys(self) -> tuple[list[ChunkKey], ...]:
        """Per group, keys of all whole chunks whose tokens are known."""
        known = self.view.num_tokens
        self.chain.extend(self.view.tokens(), self.view.chunk_extra, end=known)
        return self.chain.groups
