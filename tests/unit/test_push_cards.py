"""Two engines are matched only if every page of the one can be written into the other as it is, and
then every stretch of every page is written exactly once."""

from __future__ import annotations

import re
from itertools import product

import msgspec
import pytest

from lamina_kv.push.cards import (
    EngineCard,
    RankCard,
    RowCard,
    SenderCard,
    ShapeMismatchError,
    decode_card,
    encode_card,
    ends_of_senders,
    match,
    routes,
)

HEADS = 8
HEAD_BYTES = 32


def engine(ranks: int = 1, *, replicated: bool = False, cut: bool = True) -> EngineCard:
    """An engine of a model with :data:`HEADS` heads, ``cut`` by them or not."""
    heads = HEADS if replicated else HEADS // ranks
    rows = tuple(
        RowCard(1 << 20, 4096, heads * HEAD_BYTES, heads if cut else 1, (group,))
        for group in (0, 1)
    )
    return EngineCard(
        f"engine of {ranks}",
        b"fingerprint",
        replicated,
        (("full", 16, 0), ("window", 16, 64)),
        tuple(RankCard(rank, b"wire %d" % rank, 100, rows) for rank in range(ranks)),
    )


def with_row(card: EngineCard, **changes: object) -> EngineCard:
    """The engine with another last row on its last rank."""
    last = card.ranks[-1]
    rows = (*last.rows[:-1], msgspec.structs.replace(last.rows[-1], **changes))
    ranks = (*card.ranks[:-1], msgspec.structs.replace(last, rows=rows))
    return msgspec.structs.replace(card, ranks=ranks)


def sender(ranks: int, *, replicated: bool = False) -> SenderCard:
    return SenderCard("p", replicated, tuple(f"end {rank}" for rank in range(ranks)))


def test_a_card_survives_its_encoding() -> None:
    card = engine(4)
    assert decode_card(encode_card(card)) == card


@pytest.mark.parametrize(("mine", "theirs"), [*product((1, 2, 4, 8), repeat=2)])
def test_every_stretch_is_written_once_and_by_who_is_waited_for(mine: int, theirs: int) -> None:
    match(engine(mine), engine(theirs))
    written: dict[int, dict[int, int]] = {rank: {} for rank in range(theirs)}
    for rank in range(mine):
        for route in routes(rank, mine, theirs, replicated=False):
            here, there = HEADS // mine // route.local[1], HEADS // theirs // route.remote[1]
            assert here == there
            for head in range(here):
                source = rank * HEADS // mine + route.local[0] * here + head
                target = route.rank * HEADS // theirs + route.remote[0] * there + head
                assert source == target
                assert target not in written[route.rank]
                written[route.rank][target] = rank
    waited = ends_of_senders(sender(mine), theirs, replicated=False)
    assert len(waited) == theirs
    for rank, heads in written.items():
        assert sorted(heads) == list(range(rank * HEADS // theirs, (rank + 1) * HEADS // theirs))
        assert waited[rank] == tuple(f"end {sender}" for sender in sorted(set(heads.values())))


@pytest.mark.parametrize(("mine", "theirs"), [*product((1, 2, 3, 4), repeat=2)])
def test_what_every_rank_holds_whole_is_sent_by_one(mine: int, theirs: int) -> None:
    found = [
        (rank, route)
        for rank in range(mine)
        for route in routes(rank, mine, theirs, replicated=True)
    ]
    assert sorted(route.rank for _, route in found) == list(range(theirs))
    for one, other in [(True, False), (False, True)]:
        waited = ends_of_senders(sender(mine, replicated=one), theirs, replicated=other)
        for rank, route in found:
            assert (route.local, route.remote) == ((0, 1), (0, 1))
            assert waited[route.rank] == (f"end {rank}",)


@pytest.mark.parametrize(("mine", "theirs"), [(0, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("replicated", [False, True])
def test_whoever_does_not_fit_is_waited_for_by_nobody_in_particular(
    mine: int, theirs: int, replicated: bool
) -> None:
    assert len(ends_of_senders(sender(mine), theirs, replicated=replicated)) == theirs


def test_pages_that_are_not_cut_fit_an_engine_of_the_same_size() -> None:
    match(engine(2, cut=False), engine(2, cut=False))


DECODE = engine(2)


@pytest.mark.parametrize(
    ("decode", "words"),
    [
        (msgspec.structs.replace(DECODE, model=b"another"), "same model"),
        (msgspec.structs.replace(DECODE, replicated=True), "whole cache on every rank"),
        (
            msgspec.structs.replace(DECODE, groups=(("full", 32, 0), ("window", 16, 64))),
            "('full', 16, 0), ('window', 16, 64)) here, (('full', 32, 0)",
        ),
        (msgspec.structs.replace(DECODE, groups=(("full", 16, 0),)), "cache groups"),
        (msgspec.structs.replace(DECODE, ranks=(*DECODE.ranks, DECODE.ranks[0])), "sizes 2 and 3"),
        (
            msgspec.structs.replace(
                DECODE,
                ranks=(
                    DECODE.ranks[0],
                    msgspec.structs.replace(DECODE.ranks[1], rows=DECODE.ranks[1].rows[:1]),
                ),
            ),
            "2 rows here, 1 there",
        ),
        (with_row(DECODE, groups=(0, 1)), "row 1 has pages of groups (1,) here, of (0, 1) there"),
        (with_row(DECODE, heads=2), "row 1: pages of 4 and 2 stretches"),
        (with_row(DECODE, page_bytes=96), "row 1: pages of 128 bytes here, of 96 there"),
        (engine(1, cut=False), "pages of 4 and 1 stretches"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(decode: EngineCard, words: str) -> None:
    with pytest.raises(ShapeMismatchError, match=re.escape(words)):
        match(engine(2), decode)


def test_pages_that_are_not_cut_do_not_fit_an_engine_of_another_size() -> None:
    """Their bytes would: what one rank holds is as large as two ranks' together."""
    for mine, theirs in ((1, 2), (2, 1)):
        with pytest.raises(ShapeMismatchError, match="the same tensor parallel size"):
            match(engine(mine, cut=False), engine(theirs, cut=False))
