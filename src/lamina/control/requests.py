"""What control knows of one request while the engine has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lamina.control.catalog import Location
from lamina.keys import ChunkChain
from lamina.plan import ChunkKey, LoadMode, TierName, TransferId


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """Tokens and blocks of a chunk, all that control needs of the geometry."""

    block_tokens: int
    chunk_tokens: int

    @property
    def blocks(self) -> int:
        """Blocks in one chunk."""
        return self.chunk_tokens // self.block_tokens


class RequestView(Protocol):
    """An engine's request, as control needs to see it. Read at the moment of the call."""

    @property
    def request_id(self) -> str:
        """The engine's name for it."""

    @property
    def num_tokens(self) -> int:
        """Tokens whose ids are known and final: the prompt and what was sampled so far."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""

    @property
    def recompute_tokens(self) -> int:
        """Tokens at the end that must be computed even on a full hit, at least 1."""

    @property
    def root_extra(self) -> bytes:
        """What sets the request's keys apart from the first chunk on: salt, adapter."""

    def tokens(self) -> Sequence[int]:
        """All known token ids."""

    def chunk_extra(self, start: int, end: int) -> bytes:
        """What sets the chunk of tokens ``start..end`` apart: its multimodal inputs."""

    def blocks(self) -> Sequence[int]:
        """The block ids that the engine has given the request, in token order."""


@dataclass(slots=True)
class Story:
    """What became of one request's hit, for the log and for people.

    All counts are tokens; times are seconds.
    """

    prompt: int = 0
    engine: int = 0
    host: int = 0
    disk: int = 0
    loaded: int = 0
    mode: LoadMode = LoadMode.LAYERWISE
    reason: str = "miss"
    seconds: float = 0.0
    waited: float = 0.0
    failed: bool = False

    def sources(self) -> dict[TierName, int]:
        """Tokens of the hit by the tier they are in."""
        found = {TierName.HOST: self.host, TierName.DISK: self.disk}
        return {tier: tokens for tier, tokens in found.items() if tokens}

    def line(self, request_id: str) -> str:
        """One line that says what was hit, where, what was loaded, and why the rest was not."""
        recomputed = self.prompt - self.engine - (0 if self.failed else self.loaded)
        text = (
            f"request {request_id}: prompt {self.prompt} tokens, hit engine {self.engine} "
            f"host {self.host} disk {self.disk}, "
        )
        if self.failed:
            text += f"load FAILED ({self.reason}), "
        elif self.loaded:
            text += f"loaded {self.loaded} ({self.mode.value}), "
        else:
            text += f"loaded 0 ({self.reason}), "
        text += f"recomputed {recomputed}"
        if self.loaded:
            text += f", load {self.seconds * 1e3:.1f} ms, model waited {self.waited * 1e3:.1f} ms"
        return text


@dataclass(frozen=True, slots=True)
class FoundPrefix:
    """A hit, remembered while its request waits.

    Attributes:
        floor: tokens that the engine had when it was taken; -1 for none taken.
        generation: the catalog's generation then.
        end_chunk: the chunk after the last visible one.
        tokens: tokens of the hit beyond ``floor``.
        places: where its chunks are, in prefix order.
    """

    floor: int = -1
    generation: int = -1
    end_chunk: int = 0
    tokens: int = 0
    places: tuple[Location, ...] = ()


@dataclass(slots=True)
class RequestRecord:
    """One request of the engine.

    Attributes:
        view: the engine's request.
        chain: its chunk keys, extended as tokens become known.
        hit: the memoised hit.
        admitted: whether the engine gave it blocks in this epoch.
        ended: whether the engine is done with it; kept until its load is terminal.
        load: its load that is not terminal.
        next_save: first chunk that was not yet considered for saving.
        promote: chunks loaded from disk that the host tier should hold, too.
        held_back: first chunk that found no room, so that it is counted once.
        barred: whether it may not be saved in this epoch, because what it holds was computed before
            a reset.
        distrust: why nothing is loaded for it any more; empty while it may be.
        story: what became of its hit.
    """

    view: RequestView
    chain: ChunkChain
    hit: FoundPrefix = field(default_factory=FoundPrefix)
    admitted: bool = False
    ended: bool = False
    load: TransferId | None = None
    next_save: int = 0
    promote: set[ChunkKey] = field(default_factory=set)
    held_back: int = -1
    barred: bool = False
    distrust: str = ""
    story: Story = field(default_factory=Story)

    def new_epoch(self) -> None:
        """The engine took the blocks away (preemption, failed load): everything is open again."""
        self.admitted = False
        self.load = None
        self.next_save = 0
        self.hit = FoundPrefix()
        self.held_back = -1
        self.barred = False
        self.promote.clear()

    def known_keys(self) -> list[ChunkKey]:
        """Keys of all whole chunks whose tokens are known."""
        if len(self.chain.keys) < self.view.num_tokens // self.chain.chunk_tokens:
            self.chain.extend(self.view.tokens(), self.view.chunk_extra)
        return self.chain.keys
