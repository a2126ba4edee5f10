"""Tokens, groups and blocks of chunks: all that control needs of the geometry."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from lamina_kv.geometry import Group, GroupKind
from lamina_kv.plan import ChunkKey, RankReport
from lamina_kv.tiers.reuse import Standing, Use


@dataclass(frozen=True)
class ChunkShape:
    """See the module.

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
    def deep(self) -> int:
        """Chunks of the chain for each chunk of tokens."""
        return max(1, len(self.full))

    @cached_property
    def sparse(self) -> tuple[int, ...]:
        """Groups of which only the end of a prefix is needed."""
        return self._of(GroupKind.WINDOW, GroupKind.STATE)

    def chain(self, groups: Sequence[Sequence[ChunkKey]], end: int) -> Sequence[ChunkKey]:
        """The first ``end`` chunks of the groups of which all of a prefix is needed, each chunk
        behind those without which it is of no use."""
        first, *others = [groups[group] for group in self.full] or [()]
        if not others:
            return first[:end]
        return [key for keys in zip(first[:end], *others, strict=False) for key in keys]

    def behind(
        self, groups: Sequence[Sequence[ChunkKey]], group: int, index: int
    ) -> ChunkKey | None:
        """The chunk of the chain that chunk ``index`` of a group stands behind. Windows and states
        of a chunk stand behind the chain's chunk before it: they may be saved first."""
        place = self.full.index(group) if group in self.full else 0
        if place:
            return groups[self.full[place - 1]][index]
        return groups[self.full[-1]][index - 1] if self.full and index else None

    def standing(
        self,
        groups: Sequence[Sequence[ChunkKey]],
        group: int,
        index: int,
        use: Use,
        last: bool,
    ) -> Standing:
        """Where chunk ``index`` of a group stands for a request.

        Args:
            groups: the request's keys by group.
            group: the group.
            index: the chunk's place in it.
            use: the request's use of its prefix.
            last: whether it is the last chunk of the request's prompt.
        """
        needed = not use.had or index >= use.had // self.deep
        return Standing(self.behind(groups, group, index), use, last, needed)

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
    def blocks_per_chunk(self) -> int:
        """Near pages of a chunk in one row, as the geometry has them: blocks of the group that has
        the most."""
        return self.chunk_tokens // min(group.block_tokens for group in self.groups)

    @cached_property
    def resume_tokens(self) -> int:
        """A hit ends on a multiple of this. One that ends inside a chunk needs no more than whole
        blocks of it; a state, or a window, is only kept for ends of chunks."""
        blocks = math.lcm(*(group.block_tokens for group in self.groups))
        return self.chunk_tokens if self.sparse else blocks

    def prefix_bytes(self, reports: Iterable[RankReport]) -> int:
        """Bytes, over all ranks, of what a chunk of a long prefix takes; the windows and states at
        its end are not counted.

        Args:
            reports: one from each rank.
        """
        kept = sum(report.chunk_bytes for report in reports if not report.follows)
        return kept * self.deep

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
