"""The catalog finds a chunk in the best tier that has it, and tells every tier what is used."""

from __future__ import annotations

import pytest

from lamina_kv.control.catalog import AGED, Catalog, Far, open_catalog
from lamina_kv.plan import NEAR, ChunkKey, RankReport, TierName, TierReport
from lamina_kv.tiers.config import TierConfig
from lamina_kv.tiers.contract import Answer
from lamina_kv.tiers.hints import HintIndex
from lamina_kv.tiers.reuse import Standing, Use
from lamina_kv.tiers.slots import SlotIndex
from stores import stored_chunks

SLOTTED, SHARED = TierName("slotted"), TierName("shared")


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(20, "big"))


def fill(index: SlotIndex, *numbers: int) -> None:
    for number in numbers:
        assert isinstance(index.room(key(number)), int)
        index.filled(key(number))


class Tiers:
    """A catalog of near, a far tier with slots and one with hints; each far one can be shut."""

    def __init__(self, near: int = 3, far: int = 4) -> None:
        self.near = SlotIndex(near, stored=False)
        self.slotted = SlotIndex(far)
        self.shared = HintIndex(lambda: 0.0)
        self.shut: set[TierName] = set()
        tiers = [Far(SLOTTED, self.slotted, 1), Far(SHARED, self.shared, 1)]
        self.catalog = Catalog(self.near, tiers, lambda name: name not in self.shut)


def test_near_is_preferred_and_then_far_tiers_in_their_order() -> None:
    tiers = Tiers()
    fill(tiers.near, 1)
    fill(tiers.slotted, 1, 2)
    tiers.shared.told([key(1), key(2), key(3)], [True] * 3)
    located = [tiers.catalog.locate(key(number)) for number in (1, 2, 3, 4)]
    assert located == [NEAR, SLOTTED, SHARED, None]
    assert tiers.shared.asks() == (key(4),), "the only one for which it matters"


def test_a_chunk_is_unknown_while_nobody_has_it_and_somebody_may() -> None:
    tiers = Tiers()
    fill(tiers.near, 1)
    fill(tiers.slotted, 2)
    tiers.shared.told([key(3), key(4)], [True, False])
    unknown = [tiers.catalog.unknown(key(number)) for number in (1, 2, 3, 4, 5)]
    assert unknown == [False, False, False, False, True]
    tiers.shut.add(SHARED)
    assert not tiers.catalog.unknown(key(5))


def test_a_tier_out_of_use_has_nothing() -> None:
    tiers = Tiers()
    fill(tiers.slotted, 1)
    tiers.shut.add(SLOTTED)
    assert tiers.catalog.locate(key(1)) is None
    assert not tiers.catalog.keeps(key(1))
    assert tiers.catalog.out_of_use(key(1))
    assert not tiers.catalog.out_of_use(key(2))
    assert [tier.name for tier in tiers.catalog.readable_far()] == [SHARED]


def test_what_is_on_its_way_is_kept_and_not_found() -> None:
    tiers = Tiers()
    tiers.near.room(key(1))
    tiers.slotted.room(key(2))
    for number in 1, 2:
        assert tiers.catalog.keeps(key(number))
        assert tiers.catalog.locate(key(number)) is None
    assert not tiers.catalog.keeps(key(3))
    assert tiers.shared.asks() == (key(1), key(2)), "whether something is kept asks nobody"


def test_what_is_lost_or_learnt_anywhere_is_noticed() -> None:
    tiers = Tiers()
    fill(tiers.near, 1)
    fill(tiers.slotted, 2)
    seen = [(tiers.catalog.version, tiers.catalog.arrivals)]
    tiers.near.drop(key(1))
    seen.append((tiers.catalog.version, tiers.catalog.arrivals))
    tiers.slotted.lost(key(2), 0)
    seen.append((tiers.catalog.version, tiers.catalog.arrivals))
    tiers.shared.told([key(3)], [True])
    seen.append((tiers.catalog.version, tiers.catalog.arrivals))
    assert len(set(seen)) == len(seen)


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    tiers = Tiers(near=3, far=3)
    fill(tiers.near, 1, 2, 3)
    fill(tiers.slotted, 1, 2, 3)
    tiers.catalog.note_use([key(1), key(2), key(3)], Use())
    for index in tiers.near, tiers.slotted:
        index.room(key(4))
        assert index.visible.keys() == {key(1), key(2)}


def test_a_prefix_of_many_runs_is_used_bit_by_bit() -> None:
    size = 2 * AGED
    tiers = Tiers(near=size)
    fill(tiers.near, *range(size))
    tiers.catalog.note_use([key(number) for number in range(size)], Use())
    assert tiers.near.uses(key(size - 1)) == 2
    assert tiers.near.uses(key(0)) == 1
    tiers.catalog.bring_up_to_date()
    assert tiers.near.uses(key(0)) == 2


def test_uses_that_wait_are_bounded_and_the_oldest_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lamina_kv.control.catalog.MOST_USES", 2)
    tiers = Tiers(near=8 * AGED)
    fill(tiers.near, *range(8 * AGED))
    chain = [key(number) for number in range(8 * AGED)]
    tiers.catalog.note_use(chain, Use())
    for number in range(2):
        tiers.catalog.note_use([key(number)], Use())
    for _ in range(16):
        tiers.catalog.bring_up_to_date()
    assert [tiers.near.uses(each) for each in (chain[2], chain[-1])] == [1, 2]


def test_a_use_is_counted_once_in_every_tier() -> None:
    tiers = Tiers()
    fill(tiers.near, 1, 2)
    fill(tiers.slotted, 1)
    for over in (False, True):
        tiers.catalog.note_use([key(1), key(2)], Use(2, 2), over=over)
    assert [tiers.near.uses(key(1)), tiers.slotted.uses(key(1))] == [2, 2]
    assert tiers.shared.uses(key(1)) == 0, "that is its store's affair"


def test_what_a_tier_knows_of_a_chunk_goes_with_it() -> None:
    tiers = Tiers()
    fill(tiers.near, 1)
    tiers.catalog.note_use([key(1)], Use(1, 2))
    assert isinstance(tiers.catalog.room(key(1), SLOTTED, Standing()), int)
    tiers.catalog.publish(key(1), SLOTTED)
    assert tiers.slotted.uses(key(1)) == 3


# -- opening -------------------------------------------------------------------------------


def report(
    rank: int, slots: int, *numbers: int, near: int = 2, follows: bool = False
) -> RankReport:
    stored = stored_chunks(dict(enumerate(map(key, numbers))), keys=rank == 0)
    return RankReport(rank, near, 1000, (TierReport(SLOTTED, slots, stored),), follows)


def opened(*reports: RankReport, max_inflight: int = 1) -> Catalog:
    tier = TierConfig(kind="slotted", max_inflight=max_inflight)
    return open_catalog(reports, [tier], lambda _: True, clock=lambda: 0.0)


def test_a_tier_is_as_large_as_that_of_the_rank_that_has_the_least() -> None:
    catalog = opened(report(0, 5, near=9), report(1, 4, near=8))
    assert catalog.near.capacity == 8
    assert catalog.far[SLOTTED].index.capacity == 4


def test_bounds_are_for_each_rank_that_keeps_chunks() -> None:
    leaders = report(0, 3, 1), report(2, 3, 1)
    catalog = opened(*leaders, report(1, 3, follows=True), max_inflight=100)
    assert catalog.far[SLOTTED].bound == 200
    assert catalog.locate(key(1)) == SLOTTED, "one that follows keeps nothing, and is not asked"


def test_a_tier_that_finds_chunks_by_key_gets_hints() -> None:
    reports = [RankReport(rank, 1, 1000, (TierReport(SLOTTED),)) for rank in range(2)]
    index = opened(*reports).far[SLOTTED].index
    assert index.find(key(1)) is Answer.UNKNOWN
    assert index.capacity == 0


@pytest.mark.parametrize(
    ("reports", "named"),
    [
        ([report(0, 1, near=0)], "host.capacity"),
        ([report(0, 1), report(1, 0)], "tiers.slotted"),
    ],
)
def test_a_tier_smaller_than_a_chunk_is_refused(reports: list[RankReport], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}: too small for one chunk, which takes 1000 B"):
        opened(*reports)


def test_without_far_tiers_there_is_near() -> None:
    catalog = open_catalog([RankReport(0, 2, 1000)], [], lambda _: True, clock=lambda: 0.0)
    fill(catalog.near, 1)
    assert (catalog.locate(key(1)), catalog.far) == (NEAR, {})
