"""What kind of engine is simulated, and how Lamina is configured for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from random import Random
from typing import Literal

from lamina_kv.config import Config, load_config
from lamina_kv.control.shape import ChunkShape
from lamina_kv.geometry import CacheGeometry, Group, GroupKind, Row
from simulator.stores import simulated_kinds

BLOCK_TOKENS = 4
STAMP_BYTES = 8


class Sort(Enum):
    """What a far tier is; its word for the configuration."""

    SLOTS = "slots"
    """In memory, with slots."""
    KEYS = "keys"
    """In memory, by key; it evicts by itself, and others remove what is in it."""
    DISK = "disk"
    """The real one, with slots."""


@dataclass(frozen=True)
class Far:
    """A far tier.

    Attributes:
        name: its name.
        sort: what it is.
        room: chunks that fit.
        in_flight: ``max_inflight`` in chunks.
        batch: chunks that it is best given in one call.
        readers: threads that read.
        entry: what ``tiers`` holds for it, of any kind that there is; None for one of ``sort``.
        keep: ``keep``: what is written to it.
    """

    name: str
    sort: Sort
    room: int = 32
    in_flight: int = 8
    batch: int = 4
    readers: int = 1
    entry: Mapping[str, object] | None = field(default=None, hash=False)
    keep: str = "all"

    @property
    def slotted(self) -> bool:
        """Whether control assigns slots. What is in other stores others may remove."""
        return self.sort is not Sort.KEYS

    @classmethod
    def draw(cls, random: Random, number: int, sort: Sort) -> Far:
        """Any tier of that sort."""
        return cls(
            f"{sort.value}-{number}",
            sort,
            room=random.choice((4, 32, 100)),
            in_flight=random.choice((1, 3, 8)),
            batch=random.choice((1, 3, 32)),
            readers=random.choice((1, 2)),
            keep=random.choice(("all", "all", "shared", "shared", "nothing")),
        )


@dataclass(frozen=True)
class Options:
    """One engine. Sizes are small, so that everything runs out all the time.

    Attributes:
        ranks: tensor-parallel ranks.
        replicas: whether they hold the same cache, and the first keeps it for all.
        rows: rows of the cache.
        blocks: blocks in the engine's pool, with the one that is never used.
        chunk_blocks: blocks in a chunk.
        budget: tokens in one step at most.
        max_running: requests in one step at most.
        drafts: speculative tokens after each sampled one at most.
        device: whether the cache is on a device that runs behind the engine.
        asynchronous: whether a step is planned before the one ahead of it has run.
        prefix_caching: whether the engine has a prefix cache of its own.
        hand_off: whether its scheduler knows nothing of loads, and has a hand-off; not with drafts,
            and not asynchronous.
        boundary_blocks: blocks; such an engine can load from any multiple of it on.
        ring_blocks: blocks of a ring that holds a sliding window, which is all that a request has;
            0 if it has all of its tokens. Only with a hand-off, and not with a prefix cache.
        fails_requests: whether a failed load ends its request instead of being recomputed.
        host_slots: chunks in host memory.
        grows: whether that can be used bit by bit, on each rank at its own pace, and not always in
            the end.
        tiers: far tiers, the preferred one first.
        mode: ``load.mode``.
        load_ahead: ``load.load_ahead``.
        piece_chunks: chunks that one thread loads at a time.
        saves_by_rows: whether a row is saved as soon as it is written, however small it is.
        when: ``load.when``.
        min_tokens: ``load.min_tokens``.
        deadline: ``load.deadline``, seconds.
        staging: ``load.staging``, bytes.
        save_tokens: ``save.tokens``.
        saves_in_flight: ``save.max_inflight`` in chunks.
        breaker_failures: ``breaker.failures``.
        breaker_pause: ``breaker.pause``, seconds.
    """

    ranks: int = 1
    replicas: bool = False
    rows: int = 3
    blocks: int = 64
    chunk_blocks: int = 2
    budget: int = 64
    max_running: int = 6
    drafts: int = 0
    device: bool = False
    asynchronous: bool = False
    prefix_caching: bool = True
    hand_off: bool = False
    boundary_blocks: int = 1
    ring_blocks: int = 0
    fails_requests: bool = False
    host_slots: int = 64
    grows: bool = False
    tiers: tuple[Far, ...] = ()
    mode: Literal["auto", "layerwise", "parked"] = "auto"
    load_ahead: int | Literal["auto"] = "auto"
    piece_chunks: int = 100
    saves_by_rows: bool = False
    when: str = "always"
    min_tokens: int = 0
    deadline: float = 0.05
    staging: int = 1 << 20
    save_tokens: Literal["all", "prompt"] = "all"
    saves_in_flight: int = 64
    breaker_failures: int = 1000
    breaker_pause: float = 0.05

    @classmethod
    def draw(cls, random: Random, disk: bool = False) -> Options:
        """Any engine; with a disk among its tiers if ``disk``."""
        sorts = random.choices((Sort.SLOTS, Sort.KEYS), k=random.choice((0, 1, 1, 2, 3)))
        if disk:
            sorts.insert(random.randint(0, len(sorts)), Sort.DISK)
        return cls(
            ranks=random.choice((1, 2)),
            rows=random.randint(2, 4),
            blocks=random.choice((28, 40, 64)),
            chunk_blocks=random.randint(1, 3),
            budget=random.choice((12, 40, 100)),
            max_running=random.choice((2, 6)),
            drafts=random.choice((0, 0, 3)),
            asynchronous=random.random() < 0.5,
            prefix_caching=random.random() < 0.5,
            fails_requests=random.random() < 0.2,
            host_slots=random.choice((3, 6, 12, 12, 40, 100)),
            tiers=tuple(Far.draw(random, n, sort) for n, sort in enumerate(sorts)),
            mode=random.choice(("auto", "layerwise", "layerwise", "parked")),
            load_ahead=random.choice((1, 2, 9, "auto")),
            piece_chunks=random.choice((1, 2, 100)),
            when=random.choice(("always", "auto")),
            min_tokens=random.choice((0, 0, 8)),
            staging=random.choice((64, 1 << 20)),
            save_tokens=random.choice(("all", "all", "all", "prompt")),
            saves_in_flight=random.choice((1, 3, 64)),
            replicas=random.random() < 0.4,
            breaker_failures=random.choice((1, 3, 1000)),
            breaker_pause=random.choice((0.01, 0.1)),
            saves_by_rows=random.random() < 0.5,
        )

    def on_device(self) -> Options:
        """The same engine, with its cache on a device."""
        return replace(self, device=True)

    def with_hand_off(self, random: Random) -> Options:
        """The same engine, but that its scheduler knows nothing of loads."""
        return replace(
            self,
            hand_off=True,
            boundary_blocks=random.choice((1, 1, 2, 3)),
            drafts=0,
            asynchronous=False,
            fails_requests=False,
        )

    def with_ring(self, random: Random) -> Options:
        """The same engine with a hand-off, and a model whose layers look at a window."""
        return replace(
            self.with_hand_off(random),
            prefix_caching=False,
            boundary_blocks=1,
            ring_blocks=self.chunk_blocks * random.randint(1, 4),
        )

    def tier(self, name: str) -> Far:
        """The far tier of that name."""
        return next(tier for tier in self.tiers if tier.name == name)

    @property
    def window(self) -> int:
        """Tokens that a ring holds; 0 without one."""
        return self.ring_blocks * BLOCK_TOKENS

    @property
    def shape(self) -> ChunkShape:
        """What control knows of the cache."""
        if not self.ring_blocks:
            return ChunkShape.uniform(BLOCK_TOKENS, self.chunk_tokens)
        ring = Group(GroupKind.WINDOW, BLOCK_TOKENS, self.window, in_place=True)
        return ChunkShape(self.chunk_tokens, (ring,))

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return self.chunk_blocks * BLOCK_TOKENS

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk on one rank."""
        return self.rows * self.chunk_tokens * STAMP_BYTES

    @property
    def longest(self) -> int:
        """Tokens of the longest request that always fits in the pool."""
        return (self.blocks // 2 - 2) * BLOCK_TOKENS - 4

    def geometry(self) -> CacheGeometry:
        """The cache: blocks outermost, with a gap between them that nobody may touch."""
        page = BLOCK_TOKENS * STAMP_BYTES
        stride = self.rows * page + STAMP_BYTES
        return CacheGeometry(
            rows=tuple(
                Row((f"layer.{row}",), 0, row * page, stride, page) for row in range(self.rows)
            ),
            num_blocks=self.blocks,
            block_tokens=BLOCK_TOKENS,
            chunk_tokens=self.chunk_tokens,
            allocation_bytes=(self.blocks * stride,),
        )

    def config(self, store: Path | None) -> Config:
        """Lamina's configuration.

        Args:
            store: directory of the disk tier.
        """
        tiers: list[dict[str, object]] = []
        settings: dict[str, object] = {
            "load": {
                "mode": self.mode,
                "load_ahead": self.load_ahead,
                "when": self.when,
                "min_tokens": self.min_tokens,
                "deadline": self.deadline,
                "staging": self.staging,
            },
            "save": {
                "tokens": self.save_tokens,
                "max_inflight": self.saves_in_flight * self.chunk_bytes,
            },
            "host": {"capacity": self.host_slots * self.geometry().object_bytes},
            "tiers": tiers,
            "breaker": {"failures": self.breaker_failures, "pause": self.breaker_pause},
        }
        for tier in self.tiers:
            entry: dict[str, object] = {
                "keep": tier.keep,
                **(tier.entry or {"kind": tier.sort.value}),
                "name": tier.name,
                "max_inflight": tier.in_flight * self.chunk_bytes,
            }
            if tier.sort is Sort.DISK:
                entry |= {"path": str(store), "capacity": tier.room * self.geometry().object_bytes}
            tiers.append(entry)
        with simulated_kinds():
            return load_config(settings, {})
