"""Where an engine keeps its KV cache: rows, pages and blocks, as plain numbers.

This room knows bytes and offsets and nothing else: no tensors, no engine, no tier. An engine
adapter derives a :class:`CacheGeometry` from its own description of the cache; every other
room reads it.

A *row* is the unit of pipelining: the pages that one forward pass reads or writes at one
position of the model. Page ``b`` of a row starts at ``offset + b * block_stride`` bytes into
the backing allocation ``allocation`` and is ``page_bytes`` long. Layer-outermost layouts,
block-outermost layouts and groups that alias the same bytes are all of this form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

DIRECT_IO_ALIGNMENT = 4096
"""Bytes. Extents on disk start at multiples of this, which suits every block device in use."""

OBJECT_HEADER_BYTES = 64
"""Bytes in front of row 0 of a chunk, near and in every far tier; see
:mod:`lamina_kv.tiers.objects`."""

AUTO_CHUNK_TOKENS = 64
"""``chunk_tokens: auto`` is the smallest multiple of the block size that is at least this."""

AUTO_STATE_TOKENS = 512
"""``chunk_tokens: auto`` of a model that has only states, which are as large however few tokens lie
between them."""


class GroupKind(StrEnum):
    """What a group's layers need of a prefix, to go on behind it."""

    FULL = "full"
    """All of it."""
    WINDOW = "window"
    """Its last tokens."""
    STATE = "state"
    """One recurrent state, that at exactly its end."""


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share their block ids; a block belongs to one group at a time.

    Attributes:
        kind: what of a prefix is needed.
        block_tokens: tokens in one block; for states, between one that is kept and the next.
        window: tokens that a layer looks at, the one it computes included; 0 unless it is one
            of a ``WINDOW`` group.
        in_place: whether a request's own steps overwrite what it has. A state is then in one block,
            which every step overwrites; a window is in a ring of as many tokens as it has, in which
            a token takes the place of the one that far before it.
    """

    kind: GroupKind
    block_tokens: int
    window: int = 0
    in_place: bool = False

    def first_token(self, end: int) -> int:
        """Of a prefix of ``end`` tokens, the first one that is needed."""
        if self.kind is GroupKind.WINDOW:
            return max(0, end - self.window + 1)
        return end if self.kind is GroupKind.STATE else 0

    def first_kept(self, computed: int) -> int:
        """Of a window in place, the first token that a request still has of ``computed`` ones."""
        return max(0, computed - self.window)

    def state_index(self, end: int) -> int:
        """Which of a request's blocks holds the state behind its first ``end`` tokens."""
        return 0 if self.in_place else end // self.block_tokens - 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a row the blocks of a group are, if the engine's groups cut the same memory into
    blocks of different sizes: block ``b`` is the row's page ``scale * b + shift``."""

    scale: int
    shift: int


@dataclass(frozen=True, slots=True)
class Row:
    """One raw cache position, shared by one layer of each group.

    Attributes:
        layers: names of the layers that use this row, in order of use in a forward pass.
        allocation: index of the backing allocation that holds the row.
        offset: bytes from the start of the allocation to page 0 of this row.
        block_stride: bytes from one page to the next.
        page_bytes: bytes of one block in this row that carry content.
        groups: the groups that its layers are of; blocks of others carry nothing here.
        heads: stretches of equal size that a page consists of, one for each KV head; 1 where a page
            is not cut by heads.
        places: one for each of ``groups``; none if every block is the page of its number.
    """

    layers: tuple[str, ...]
    allocation: int
    offset: int
    block_stride: int
    page_bytes: int
    groups: tuple[int, ...] = (0,)
    heads: int = 1
    places: tuple[Place, ...] = ()

    def __post_init__(self) -> None:
        if self.places and len(self.places) != len(self.groups):
            raise ValueError(
                f"row {self.layers} has {len(self.places)} places for {len(self.groups)} groups"
            )
        if self.page_bytes <= 0 or self.block_stride < self.page_bytes or self.offset < 0:
            raise ValueError(
                f"row {self.layers} does not describe pages: page_bytes={self.page_bytes}, "
                f"block_stride={self.block_stride}, offset={self.offset}"
            )


class Band(NamedTuple):
    """Rows of one form at equal distances: their pages are one regular array.

    Attributes:
        first: the first row.
        rows: how many.
        spacing: bytes from a row to the next in the engine's allocation.
        near_spacing: the same in a chunk's object.
    """

    first: int
    rows: int = 1
    spacing: int = 0
    near_spacing: int = 0


@dataclass(frozen=True)
class CacheGeometry:
    """The whole cache of one rank.

    Attributes:
        rows: in the order in which a forward pass first uses them.
        num_blocks: pages of each row, numbered ``0 .. num_blocks - 1``: one for each block in the
            engine's pool, unless rows have places.
        block_tokens: tokens in one block, of the group that has the fewest in one.
        chunk_tokens: tokens in one chunk, a whole number of blocks.
        allocation_bytes: size of each backing allocation.
    """

    rows: tuple[Row, ...]
    num_blocks: int
    block_tokens: int
    chunk_tokens: int
    allocation_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a cache geometry needs at least one row")
        if self.chunk_tokens <= 0 or self.chunk_tokens % self.block_tokens:
            raise ValueError(
                f"chunk_tokens={self.chunk_tokens} is not a whole number of blocks of "
                f"{self.block_tokens} tokens"
            )
        for row in self.rows:
            end = row.offset + (self.num_blocks - 1) * row.block_stride + row.page_bytes
            if end > self.allocation_bytes[row.allocation]:
                raise ValueError(
                    f"row {row.layers} ends at byte {end}, beyond its allocation of "
                    f"{self.allocation_bytes[row.allocation]} bytes"
                )

    @cached_property
    def blocks_per_chunk(self) -> int:
        """Pages of a chunk in one row, of the group that has the most."""
        return self.chunk_tokens // self.block_tokens

    @cached_property
    def extent_bytes(self) -> tuple[int, ...]:
        """Per row, the bytes of one chunk in that row."""
        return tuple(row.page_bytes * self.blocks_per_chunk for row in self.rows)

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk, all rows."""
        return sum(self.extent_bytes)

    @cached_property
    def extent_offsets(self) -> tuple[int, ...]:
        """Per row, the byte of a chunk's object at which the row begins. Rows follow each other
        without gaps, behind the header."""
        ends = accumulate(self.extent_bytes, initial=OBJECT_HEADER_BYTES)
        return tuple(ends)[:-1]

    @cached_property
    def object_bytes(self) -> int:
        """Bytes of a chunk's object, header and padding included; what a near slot takes."""
        return align_up(OBJECT_HEADER_BYTES + self.chunk_bytes)

    @cached_property
    def row_of_layer(self) -> dict[str, int]:
        """Layer name to row index."""
        return {layer: index for index, row in enumerate(self.rows) for layer in row.layers}

    @cached_property
    def rows_alike(self) -> tuple[tuple[int, ...], ...]:
        """Rows whose blocks are cut alike: a chunk of any group has the same pages in all of them.
        Each row is in one entry."""
        alike: dict[object, list[int]] = {}
        for index, row in enumerate(self.rows):
            alike.setdefault((row.groups, row.places), []).append(index)
        return tuple(map(tuple, alike.values()))

    def bands(self, rows: Iterable[int]) -> list[Band]:
        """Cut distinct rows, none of which share bytes, into bands."""
        bands: list[Band] = []
        for row in sorted(rows, key=lambda row: (self._form(row), row)):
            if bands and (longer := self._extend(bands[-1], row)) is not None:
                bands[-1] = longer
            else:
                bands.append(Band(row))
        return bands

    def _form(self, row: int) -> tuple[int, int, int]:
        """What rows of a band have in common."""
        shape = self.rows[row]
        return shape.allocation, shape.block_stride, shape.page_bytes

    def _extend(self, band: Band, row: int) -> Band | None:
        """The band with one more row; None if that is of another form, or at another distance."""
        first, count, *spacings = band
        away = [
            self.rows[row].offset - self.rows[first].offset,
            self.extent_offsets[row] - self.extent_offsets[first],
        ]
        if count == 1:
            spacings = away
        if self._form(row) != self._form(first) or away != [count * each for each in spacings]:
            return None
        return Band(first, count + 1, *spacings)

    @cached_property
    def block_bytes(self) -> Counter[int]:
        """Per group, the bytes of one of its blocks, all rows; 0 if no row has any."""
        sizes: Counter[int] = Counter()
        for row in self.rows:
            for group in row.groups:
                sizes[group] += row.page_bytes
        return sizes


def chunk_tokens_for(block_tokens: int) -> int:
    """The chunk size that ``chunk_tokens: auto`` stands for, in tokens.

    Args:
        block_tokens: tokens in a block; of groups that differ in it, their least common multiple.
    """
    blocks = -(-AUTO_CHUNK_TOKENS // block_tokens)
    return blocks * block_tokens


def align_up(size: int, alignment: int = DIRECT_IO_ALIGNMENT) -> int:
    """``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment
