"""An index of slots shows only complete chunks, never reuses a leased slot, evicts the rest by use,
and takes over only what every rank has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_kv.keys import KEY_BYTES, key_array
from lamina_kv.plan import ChunkKey, StoredChunks, marks_of
from lamina_kv.tiers.contract import Answer, NoRoom
from lamina_kv.tiers.reuse import Standing, Use, Worth
from lamina_kv.tiers.slots import SlotIndex


def key(number: int) -> ChunkKey:
    """Keys of which the first four bytes differ, as those of real ones do."""
    return ChunkKey(number.to_bytes(4, "big") + bytes(16))


def fill(index: SlotIndex, *numbers: int) -> list[int]:
    slots = []
    for number in numbers:
        slot = index.room(key(number))
        assert isinstance(slot, int)
        index.filled(key(number))
        slots.append(slot)
    return slots


def use(index: SlotIndex, *prefix: int) -> None:
    for _ in index.use_prefix([key(number) for number in prefix], Use()):
        pass


def stored(*chunks: tuple[int, int], used: Sequence[float] | None = None) -> StoredChunks:
    """What a rank's tier holds: pairs of slot and number of the key; with keys if ``used`` says
    when each was last used."""
    slots = np.array([slot for slot, _ in chunks], np.int32)
    keys = key_array([key(number) for _, number in chunks])
    if used is None:
        return StoredChunks(slots, marks_of(keys))
    return StoredChunks(slots, marks_of(keys), keys, np.array(used, np.float64))


def shown(index: SlotIndex) -> dict[int, int]:
    """Visible chunks by number, with their slots."""
    return {int.from_bytes(name[:4], "big"): slot for name, slot in index.visible.items()}


def victims(index: SlotIndex, count: int) -> list[int]:
    """Chunks that make room for ``count`` others, in their order."""
    gone = []
    for number in range(count):
        before = shown(index)
        assert isinstance(index.room(key(1_000_000 + number)), int)
        gone += [each for each in before if each not in shown(index)]
    return gone


# -- slots ---------------------------------------------------------------------------------


def test_a_use_of_which_a_chunk_comes_later_is_one() -> None:
    index, prefix, whole = SlotIndex(2, stored=False), [key(1), key(2)], Use(1, 2)
    assert not list(index.expect(prefix))
    assert not list(index.use_prefix(prefix, whole))
    assert isinstance(index.room(key(1), Standing(use=whole)), int)
    index.filled(key(1))
    assert index.uses(key(1)) == 1
    assert len(list(index.use_prefix(prefix, whole, over=True))) == 2
    assert isinstance(index.room(key(2), Standing(key(1), whole)), int)
    index.filled(key(2))
    assert index.uses(key(2)) == 2, "it was missed by a request that is over"


def test_a_use_counts_and_its_store_hears_of_it_when_the_request_begins() -> None:
    index, prefix = SlotIndex(3), [key(1), key(2)]
    for each in (*prefix, key(3)):
        index.room(each)
        index.filled(each)
    for _ in range(2):
        assert len(list(index.expect(prefix))) == 2
        assert (index.uses(key(1)), index.touches()) == (1, ())
    assert list(index.use_prefix(prefix, Use(2, 2)))
    assert index.uses(key(1)) == 2
    assert [name for name, _ in index.touches()] == [key(2), key(1)]


def test_a_chunk_of_a_request_that_is_yet_to_begin_is_young() -> None:
    index = SlotIndex(2)
    for number in (1, 2):
        index.room(key(number))
        index.filled(key(number))
    assert list(index.expect([key(1)]))
    assert victims(index, 1) == [2]


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize(("had", "needed"), [(0, 3), (1, 2), (3, 0)])
def test_what_a_tier_learns_is_the_age_of_what_the_engine_lacked(
    monkeypatch: pytest.MonkeyPatch, expected: bool, had: int, needed: int
) -> None:
    learnt = []
    monkeypatch.setattr(Worth, "used", lambda _, kind, age, chunks: learnt.append((age, chunks)))
    index, prefix = SlotIndex(100), [key(1), key(2), key(3)]
    behind = None
    for each in prefix:
        index.room(each, Standing(behind))
        index.filled(each)
        behind = each
    for number in range(10, 30):
        index.room(key(number))
    if expected:
        assert list(index.expect(prefix))
    assert list(index.use_prefix(prefix, Use(3, 4, had=had)))
    assert learnt == ([(20, needed)] if needed else [])


def test_what_the_engine_had_is_no_loss_when_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt = []
    monkeypatch.setattr(Worth, "used", lambda _, kind, age, chunks: learnt.append(age))
    index = SlotIndex(1)
    for number, needed in ((1, True), (2, True), (1, False), (2, True)):
        index.room(key(number), Standing(needed=needed))
        index.filled(key(number))
    assert learnt == [2], "of the second only"


def test_a_chunk_is_not_found_before_it_is_filled() -> None:
    index = SlotIndex(2)
    slot = index.room(key(1))
    assert (index.find(key(1)), index.slot(key(1))) == (Answer.ABSENT, None)
    assert index.holds(key(1))
    assert index.fills(key(1))
    index.filled(key(1))
    assert (index.find(key(1)), index.slot(key(1))) == (Answer.HERE, slot)
    assert not index.fills(key(1))
    assert (index.arrivals, index.version) == (1, 0)


def test_an_abandoned_slot_is_free_again() -> None:
    index = SlotIndex(1)
    slot = index.room(key(1))
    index.abandoned(key(1))
    assert not index.holds(key(1))
    assert index.used == 0
    assert index.room(key(2)) == slot


def test_a_key_has_one_slot() -> None:
    index = SlotIndex(2)
    index.room(key(1))
    with pytest.raises(ValueError, match="already holds"):
        index.room(key(1))


def test_neighbouring_chunks_get_neighbouring_slots() -> None:
    assert fill(SlotIndex(4), 1, 2, 3) == [0, 1, 2]


def test_the_least_recently_used_chunk_is_evicted() -> None:
    index = SlotIndex(3)
    fill(index, 1, 2, 3)
    use(index, 1)
    index.room(key(4))
    assert shown(index).keys() == {1, 3}
    assert index.version == 1


def test_no_chunk_makes_room_for_the_one_behind_it() -> None:
    index = SlotIndex(1)
    fill(index, 1)
    assert index.room(key(2), Standing(behind=key(1))) is NoRoom.WORTH_LESS
    assert isinstance(index.room(key(3)), int)


def test_a_chunk_behind_one_that_is_still_filling_keeps_it() -> None:
    index = SlotIndex(3)
    fill(index, 9)
    index.room(key(1))
    index.room(key(2), Standing(behind=key(1)))
    index.filled(key(1))
    assert victims(index, 1) == [9]
    assert index.room(key(4)) is NoRoom.IN_USE, "it may be of the prompt that is being saved"
    index.filled(key(2))
    assert isinstance(index.room(key(4)), int)
    assert index.find(key(1)) is Answer.HERE


def test_what_was_adopted_is_known_as_a_prefix_once_it_is_used() -> None:
    index = SlotIndex(4)
    index.adopt([stored((0, 3), (1, 1), (2, 2), (3, 9), used=[1.0, 2.0, 3.0, 4.0])])
    use(index, 1, 2, 3)
    use(index, 9)
    assert victims(index, 4) == [3, 2, 1, 9]
    assert not len(index._runs) - 4


def test_a_chunk_keeps_its_count_from_another_tier() -> None:
    index = SlotIndex(4)
    index.room(key(1), uses=2)
    index.filled(key(1))
    assert (index.uses(key(1)), index.uses(key(2))) == (3, 0)


def test_a_leased_slot_is_not_evicted() -> None:
    index = SlotIndex(2)
    first, second = fill(index, 1, 2)
    assert index.hold(key(1)) == first
    index.lease(second)
    assert not index.has_room
    assert index.room(key(3)) is NoRoom.IN_USE
    index.release(first)
    assert index.room(key(3)) == first
    assert index.leased == 1, "the second one still is"


def test_what_stands_behind_nothing_any_more_may_go() -> None:
    index = SlotIndex(2)
    fill(index, 1)
    index.room(key(2), Standing(behind=key(1)))
    assert index.room(key(3)) is NoRoom.IN_USE
    assert not index.has_room, "and it is not sought again in vain"
    index.disowned(key(2))
    assert index.room(key(3)) == 0


def test_a_filling_slot_is_not_evicted() -> None:
    index = SlotIndex(1)
    index.room(key(1))
    assert not index.has_room
    assert index.room(key(2)) is NoRoom.IN_USE


@pytest.mark.parametrize("before", [[], [1], [0, 0, 3]])
@pytest.mark.parametrize("slots", [[], [2], [0, 1, 2, 3], [3, 1, 1], [5, 0, 4]])
def test_slots_that_are_leased_together_are_leased_as_one_by_one(
    before: list[int], slots: list[int]
) -> None:
    """Slots 0 to 3 have chunks, 4 is being filled, 5 is free."""
    together, singly = SlotIndex(6), SlotIndex(6)
    for index in (together, singly):
        fill(index, *range(4))
        index.room(key(4))
        for slot in before:
            index.lease(slot)
    together.lease_all(slots)
    for slot in slots:
        singly.lease(slot)
    assert (together._leases, together._pinned) == (singly._leases, singly._pinned)
    for slot in (*before, *slots):
        together.release(slot)
    assert (together.leased, together._pinned) == (0, 0)


def test_a_dropped_chunk_keeps_its_slot_from_reuse_while_it_is_leased() -> None:
    index = SlotIndex(1)
    (slot,) = fill(index, 1)
    index.lease(slot)
    index.lease(slot)
    assert index.drop(key(1)) == slot
    assert index.find(key(1)) is Answer.ABSENT
    assert index.room(key(2)) is NoRoom.IN_USE
    index.release(slot)
    assert index.room(key(2)) is NoRoom.IN_USE
    index.release(slot)
    assert index.room(key(2)) == slot


def test_an_abandoned_slot_that_is_leased_is_reused_when_it_is_released() -> None:
    """A poisoned save still writes to its slot."""
    index = SlotIndex(1)
    slot = index.room(key(1))
    assert slot is not None
    index.lease(slot)
    index.abandoned(key(1))
    assert index.room(key(2)) is NoRoom.IN_USE
    assert not index.has_room
    index.release(slot)
    assert index.room(key(2)) == slot


def test_a_lease_on_what_was_dropped_takes_no_room_from_others() -> None:
    index = SlotIndex(2)
    _, other = fill(index, 1, 2)
    index.hold(key(1))
    index.drop(key(1))
    assert index.has_room
    assert index.room(key(3)) == other


def test_a_chunk_that_was_leased_while_it_was_filled_is_not_evicted() -> None:
    index = SlotIndex(1)
    slot = index.room(key(1))
    assert slot is not None
    index.lease(slot)
    index.filled(key(1))
    assert not index.has_room


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("rfadlut"), st.integers(0, 5)), max_size=60))
def test_room_is_promised_only_where_there_is_some(history: list[tuple[str, int]]) -> None:
    """Whatever happens to slots, none is in two uses, and there is room where it should be."""
    index = SlotIndex(3)
    leases: list[int] = []
    for what, number in history:
        name = key(number)
        if what == "r" and not index.holds(name):
            free, visible = index.used < index.capacity, set(index.visible.values())
            has_room = free or not visible <= set(leases)
            assert index.has_room == has_room
            slot = index.room(name)
            assert isinstance(slot, int) == has_room
            assert slot not in leases
            assert not (free and slot in visible)
        elif what == "f" and index.fills(name):
            index.filled(name)
        elif what == "a" and index.fills(name):
            index.abandoned(name)
        elif what == "d":
            index.drop(name)
        elif what == "l" and index.slot(name) is not None:
            leases.append(index.hold(name))
        elif what == "u" and leases:
            index.release(leases.pop(number % len(leases)))
        elif what == "t":
            use(index, number)
        assert len(set(index.visible.values())) == len(index.visible)
        assert index.leased == len(set(leases))
        assert index.used <= index.capacity
    for slot in leases:
        index.release(slot)
    for number in range(6):
        if index.fills(key(number)):
            index.abandoned(key(number))
        index.drop(key(number))
    assert index.used == 0


# -- what a store has to forget ------------------------------------------------------------


def test_a_store_forgets_what_cannot_be_delivered_and_what_was_half_written() -> None:
    index = SlotIndex(4)
    fill(index, 1, 2, 3)
    index.lost(key(2), 1)
    index.room(key(4))  # takes the slot of what was lost
    assert index.find(key(2)) is Answer.ABSENT
    index.room(key(5))
    index.abandoned(key(5))
    assert (index.pending, index.drops()) == (True, (3,))
    assert (index.pending, index.drops()) == (False, ())


def test_a_loss_of_what_is_elsewhere_by_now_changes_nothing() -> None:
    index = SlotIndex(2)
    fill(index, 1)
    index.lost(key(1), 1)
    assert index.find(key(1)) is Answer.HERE
    assert index.drops() == ()


def test_a_slot_that_is_written_again_need_not_be_forgotten() -> None:
    """It could be forgotten after it was written."""
    index = SlotIndex(1)
    fill(index, 1)
    index.lost(key(1), 0)
    assert index.room(key(2)) == 0
    assert index.drops() == ()


def test_near_has_no_store_that_could_forget() -> None:
    index = SlotIndex(2, stored=False)
    fill(index, 1)
    index.lost(key(1), 0)
    index.room(key(2))
    index.abandoned(key(2))
    assert not index.pending


# -- what every rank has -------------------------------------------------------------------


def test_chunks_found_at_the_start_are_visible_and_evicted_by_age() -> None:
    index = SlotIndex(3)
    index.adopt([stored((0, 1), (1, 2), (2, 3), used=[20.0, 10.0, 30.0])])
    assert index.used == 3
    assert shown(index) == {1: 0, 2: 1, 3: 2}
    assert victims(index, 3) == [2, 1, 3]


def test_what_is_adopted_ages_like_what_is_saved() -> None:
    index = SlotIndex(4)
    index.adopt([stored((0, 1), (2, 2), used=[1.0, 2.0])])
    fill(index, 3, 4)
    use(index, 1)
    assert victims(index, 4) == [2, 3, 4, 1]


def test_a_tier_that_holds_nothing_adopts_nothing() -> None:
    index = SlotIndex(3)
    index.adopt([stored(used=[]), stored()])
    assert fill(index, 1, 2, 3) == [0, 1, 2]
    assert victims(index, 1) == [1]


def test_free_slots_are_those_that_were_not_adopted() -> None:
    index = SlotIndex(5)
    index.adopt([stored((1, 1), (3, 2), used=[1.0, 2.0])])
    assert fill(index, 3, 4, 5) == [0, 2, 4]


def test_a_chunk_is_adopted_where_every_rank_has_it() -> None:
    """Another chunk in the slot, nothing in it, and something that the first rank has not: all are
    forgotten, on all ranks."""
    index = SlotIndex(6)
    index.adopt(
        [
            stored((0, 1), (1, 2), (2, 3), (3, 4), used=[1.0, 2.0, 3.0, 4.0]),
            stored((0, 1), (1, 9), (3, 4), (4, 5)),
            stored((0, 1), (1, 2), (2, 3), (3, 4)),
        ]
    )
    assert shown(index) == {1: 0, 4: 3}
    assert index.drops() == (1, 2, 4)
    assert fill(index, 6, 7, 8, 9) == [1, 2, 4, 5]


def test_ranks_that_agree_on_nothing_start_empty() -> None:
    index = SlotIndex(2)
    index.adopt([stored((0, 1), (1, 2), used=[1.0, 2.0]), stored((0, 2), (1, 1))])
    assert (shown(index), index.used) == ({}, 0)
    assert index.drops() == (0, 1)


def test_slots_that_not_every_rank_has_are_left_alone() -> None:
    """A rank's store may be larger than the smallest one."""
    index = SlotIndex(2)
    index.adopt([stored((0, 1), (2, 3), used=[1.0, 2.0]), stored((0, 1), (2, 3), (5, 6))])
    assert (shown(index), index.drops()) == ({1: 0}, ())


def test_a_chunk_in_two_slots_stays_in_the_one_used_longest_ago() -> None:
    index = SlotIndex(4)
    index.adopt([stored((0, 1), (1, 1), (2, 2), used=[4.0, 3.0, 5.0])])
    assert shown(index) == {1: 1, 2: 2}
    assert index.drops() == (0,)
    assert fill(index, 3, 4) == [0, 3]
    assert victims(index, 4) == [1, 2, 3, 4]


def test_many_chunks_are_adopted_as_few_are() -> None:
    size = 100_000
    keys = np.random.default_rng(1).integers(0, 256, (size, KEY_BYTES), np.uint8)
    slots, used = np.arange(size, dtype=np.int32), np.arange(size, dtype=np.float64)
    other = marks_of(keys)
    other[777] += 1
    index = SlotIndex(size)
    index.adopt([StoredChunks(slots, marks_of(keys), keys, used), StoredChunks(slots, other)])
    missing = [n for n in range(size) if index.slot(ChunkKey(keys[n].tobytes())) != n]
    assert missing == [777]
    assert index.drops() == (777,)
