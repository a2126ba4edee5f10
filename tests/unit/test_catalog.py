"""The catalog shows only complete chunks, never reuses a leased slot, evicts the rest by use."""

from __future__ import annotations

import pytest

from lamina.control.catalog import Catalog, TierCatalog
from lamina.plan import ChunkKey, StoredChunk, TierName


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(20, "big"))


def fill(tier: TierCatalog, *numbers: int) -> list[int]:
    slots = []
    for number in numbers:
        slot = tier.reserve(key(number))
        assert slot is not None
        tier.publish(key(number))
        slots.append(slot)
    return slots


def test_a_chunk_is_not_found_before_it_is_published() -> None:
    tier = TierCatalog(TierName.HOST, 2)
    slot = tier.reserve(key(1))
    assert tier.find(key(1)) is None
    assert tier.holds(key(1))
    tier.publish(key(1))
    assert tier.find(key(1)) == slot


def test_an_abandoned_slot_is_free_again() -> None:
    tier = TierCatalog(TierName.HOST, 1)
    slot = tier.reserve(key(1))
    tier.abandon(key(1))
    assert not tier.holds(key(1))
    assert tier.reserve(key(2)) == slot


def test_a_key_has_one_slot() -> None:
    tier = TierCatalog(TierName.HOST, 2)
    tier.reserve(key(1))
    with pytest.raises(ValueError, match="already holds"):
        tier.reserve(key(1))


def test_neighbouring_chunks_get_neighbouring_slots() -> None:
    tier = TierCatalog(TierName.DISK, 4)
    assert fill(tier, 1, 2, 3) == [0, 1, 2]


def test_the_least_recently_used_chunk_is_evicted() -> None:
    tier = TierCatalog(TierName.HOST, 3)
    fill(tier, 1, 2, 3)
    tier.touch(key(1))
    tier.reserve(key(4))
    assert [tier.find(key(n)) is not None for n in (1, 2, 3)] == [True, False, True]
    assert (tier.evictions, tier.losses) == (1, 1)


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    tier = TierCatalog(TierName.HOST, 3)
    fill(tier, 1, 2, 3)
    Catalog(tier, None).note_use([[key(1), key(2), key(3)]])
    tier.reserve(key(4))
    assert tier.find(key(3)) is None
    assert tier.find(key(1)) is not None


def test_a_leased_slot_is_not_evicted() -> None:
    tier = TierCatalog(TierName.HOST, 2)
    first, second = fill(tier, 1, 2)
    tier.lease(first)
    tier.lease(second)
    assert tier.reserve(key(3)) is None
    tier.release(first)
    assert tier.reserve(key(3)) == first


def test_a_filling_slot_is_not_evicted() -> None:
    tier = TierCatalog(TierName.HOST, 1)
    tier.reserve(key(1))
    assert tier.reserve(key(2)) is None


def test_a_dropped_chunk_keeps_its_slot_from_reuse_while_it_is_leased() -> None:
    tier = TierCatalog(TierName.HOST, 1)
    (slot,) = fill(tier, 1)
    tier.lease(slot)
    tier.lease(slot)
    assert tier.drop(key(1)) == slot
    assert tier.find(key(1)) is None
    assert tier.reserve(key(2)) is None
    tier.release(slot)
    assert tier.reserve(key(2)) is None
    tier.release(slot)
    assert tier.reserve(key(2)) == slot


def test_chunks_found_at_the_start_are_visible_and_evicted_by_age() -> None:
    tier = TierCatalog(TierName.DISK, 2)
    tier.adopt([StoredChunk(key(1), 0, last_used=20.0), StoredChunk(key(2), 1, last_used=10.0)])
    assert tier.used == 2
    assert tier.reserve(key(3)) == 1
    assert tier.find(key(1)) == 0


def test_a_slot_claimed_twice_at_the_start_is_given_to_one_chunk() -> None:
    tier = TierCatalog(TierName.DISK, 2)
    tier.adopt([StoredChunk(key(1), 0, last_used=1.0), StoredChunk(key(2), 0, last_used=2.0)])
    assert [tier.find(key(1)), tier.find(key(2))] == [0, None]


def test_the_host_is_preferred_and_the_prefix_may_span_tiers() -> None:
    host, disk = TierCatalog(TierName.HOST, 2), TierCatalog(TierName.DISK, 4)
    catalog = Catalog(host, disk)
    fill(host, 1)
    fill(disk, 1, 2, 4)
    keys = [key(n) for n in (1, 2, 3, 4)]
    assert catalog.prefix_end([keys], 0, len(keys)) == 2
    assert catalog.prefix_end([keys], 3, len(keys)) == 4
    places = [catalog.locate(k) for k in keys]
    assert [p.tier if p else None for p in places] == [
        TierName.HOST,
        TierName.DISK,
        None,
        TierName.DISK,
    ]


def test_clearing_forgets_every_visible_chunk_and_names_their_slots() -> None:
    tier = TierCatalog(TierName.DISK, 3)
    slots = fill(tier, 1, 2)
    tier.reserve(key(3))
    assert sorted(tier.clear()) == slots
    assert not tier.holds(key(1))
    assert tier.holds(key(3))
