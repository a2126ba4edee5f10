"""What one engine tells another about itself, and how the pages of the two fit together."""

from __future__ import annotations

from typing import Annotated

import msgspec

MAX_ENDS = 1024
"""Ranks of a prefill engine that a decode engine keeps; it names them in every plan."""

MAX_END = 64
"""Characters of what a rank signs notices with."""

End = Annotated[str, msgspec.Meta(max_length=MAX_END)]


class ShapeMismatchError(ValueError):
    """Pages of one engine cannot be written into the other; says why."""


class RowCard(msgspec.Struct, frozen=True, array_like=True):
    """One row of a rank's cache, as a peer must know it to write there.

    Attributes:
        address: of block 0 in the rank's memory.
        stride: bytes from one block to the next.
        page_bytes: bytes of one block.
        heads: stretches of equal size that a page consists of, one for each KV head of the rank; 1
            where a page cannot be cut.
        groups: cache groups that have pages here.
    """

    address: int
    stride: int
    page_bytes: int
    heads: int
    groups: tuple[int, ...]


class RankCard(msgspec.Struct, frozen=True, array_like=True):
    """One rank.

    Attributes:
        rank: the rank.
        wire: what its transport says of itself.
        num_blocks: blocks in its pool.
        rows: its cache, in order of use.
        end: what its transport signs notices with.
    """

    rank: int
    wire: bytes
    num_blocks: int
    rows: tuple[RowCard, ...]
    end: str = ""


class EngineCard(msgspec.Struct, frozen=True, array_like=True):
    """One engine.

    Attributes:
        incarnation: names this run of it.
        model: fingerprint of what decides the content of pages, parallel layout aside.
        replicated: whether every rank is known to hold the same bytes (MLA).
        groups: kind, tokens of a block and window of each cache group.
        ranks: in order.
    """

    incarnation: str
    model: bytes
    replicated: bool
    groups: tuple[tuple[str, int, int], ...]
    ranks: tuple[RankCard, ...]


class SenderCard(msgspec.Struct, frozen=True, array_like=True):
    """A prefill engine, as a decode engine must know it to tell its words from a stranger's.

    Attributes:
        incarnation: names this run of it.
        replicated: whether every rank is known to hold the same bytes.
        ends: how notices of each rank are signed.
    """

    incarnation: str
    replicated: bool
    ends: Annotated[tuple[End, ...], msgspec.Meta(max_length=MAX_ENDS)]

    @classmethod
    def of(cls, engine: EngineCard) -> SenderCard:
        """The same engine."""
        ends = tuple(rank.end for rank in engine.ranks)
        return cls(engine.incarnation, engine.replicated, ends)


def encode_card(card: EngineCard) -> bytes:
    """A card as bytes, for a plan."""
    return msgspec.msgpack.encode(card)


def decode_card(data: bytes) -> EngineCard:
    """The card that :func:`encode_card` was given."""
    return msgspec.msgpack.decode(data, type=EngineCard)


class Route(msgspec.Struct, frozen=True):
    """What a prefill rank sends to one decode rank: of every page, one stretch.

    A stretch is given in parts of a page: part ``local[0]`` of ``local[1]`` equal ones.

    Attributes:
        rank: the decode rank.
        local: the part of its own page that the prefill rank reads.
        remote: the part of the decode rank's page that it writes.
    """

    rank: int
    local: tuple[int, int]
    remote: tuple[int, int]


def routes(rank: int, mine: int, theirs: int, *, replicated: bool) -> tuple[Route, ...]:
    """What one rank of a prefill engine sends to whom.

    Args:
        rank: the rank.
        mine: ranks of its engine.
        theirs: ranks of the decode engine; one number is a multiple of the other.
        replicated: whether every rank holds the same bytes.
    """
    if replicated:
        # Everybody has everything: the decode ranks are divided among the prefill ranks.
        return tuple(Route(other, (0, 1), (0, 1)) for other in range(rank, theirs, mine))
    if mine >= theirs:
        share = mine // theirs
        return (Route(rank // share, (0, 1), (rank % share, share)),)
    share = theirs // mine
    return tuple(Route(rank * share + part, (part, share), (0, 1)) for part in range(share))


def ends_of_senders(
    prefill: SenderCard, ranks: int, *, replicated: bool
) -> tuple[tuple[str, ...], ...]:
    """For each rank of a decode engine, how those sign their notices that send it something.

    Args:
        prefill: the prefill engine.
        ranks: how many the decode engine has.
        replicated: whether every rank of it is known to hold the same bytes.
    """
    ends: list[list[str]] = [[] for _ in range(ranks)]
    mine = len(prefill.ends)
    for rank, end in enumerate(prefill.ends):
        for route in routes(rank, mine, ranks, replicated=replicated or prefill.replicated):
            if route.rank < ranks:  # else nothing fits, and the prefill engine will say so
                ends[route.rank].append(end)
    return tuple(tuple(of_rank) for of_rank in ends)


def is_replicated(one: EngineCard, other: EngineCard) -> bool:
    """Whether every rank of two engines holds the same bytes; one with one rank does not know."""
    return one.replicated or other.replicated


def match(prefill: EngineCard, decode: EngineCard) -> None:
    """Whether pages of ``prefill`` can be written into ``decode`` as they are.

    Raises:
        ShapeMismatchError: if not; names the difference and what would be right.
    """
    if prefill.groups != decode.groups:
        raise ShapeMismatchError(
            f"cache groups (kind, block tokens, window) differ: {prefill.groups} here, "
            f"{decode.groups} there; use the same model and block size on both sides"
        )
    if not decode.ranks or min(rank.num_blocks for rank in decode.ranks) < 1:
        raise ShapeMismatchError("the decode engine says that it has no ranks, or no blocks")
    if prefill.model != decode.model:
        raise ShapeMismatchError(
            "the engines do not serve the same model, or cannot read each other's cache: weights, "
            "dtypes, quantisation, engine version, attention backend, kind of device (a CPU with "
            "AMX is another) or cache layout differ"
        )
    mine, theirs = len(prefill.ranks), len(decode.ranks)
    if prefill.replicated != decode.replicated and min(mine, theirs) > 1:
        raise ShapeMismatchError(
            "one engine keeps the whole cache on every rank, the other does not"
        )
    replicated = is_replicated(prefill, decode)
    if not replicated and mine % theirs and theirs % mine:
        raise ShapeMismatchError(
            f"tensor parallel sizes {mine} and {theirs}: one must be a multiple of the other"
        )
    for here in prefill.ranks:
        for route in routes(here.rank, mine, theirs, replicated=replicated):
            there = decode.ranks[route.rank]
            if len(here.rows) != len(there.rows):
                raise ShapeMismatchError(
                    f"{len(here.rows)} rows here, {len(there.rows)} there: the engines lay the "
                    "model's layers out differently"
                )
            for index, (source, target) in enumerate(zip(here.rows, there.rows, strict=True)):
                _match_row(index, source, target, route)


def _match_row(index: int, source: RowCard, target: RowCard, route: Route) -> None:
    if source.groups != target.groups:
        raise ShapeMismatchError(
            f"row {index} has pages of groups {source.groups} here, of {target.groups} there"
        )
    # A page that cannot be cut counts as one head, and so fits only a whole page.
    if source.heads * route.remote[1] != target.heads * route.local[1]:
        raise ShapeMismatchError(
            f"row {index}: pages of {source.heads} and {target.heads} stretches do not fit "
            "together; use the same tensor parallel size on both sides, or a cache layout in which "
            "each KV head of a page is one stretch (vLLM: VLLM_KV_CACHE_LAYOUT=LBHNC)"
        )
    if source.page_bytes * route.remote[1] != target.page_bytes * route.local[1]:
        raise ShapeMismatchError(
            f"row {index}: pages of {source.page_bytes} bytes here, of {target.page_bytes} there"
        )
