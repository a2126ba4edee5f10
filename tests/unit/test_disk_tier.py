"""Guards the disk tier's contract: what was written is read back, after a restart, too, and nothing
else ever is.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from disks import (
    NAMESPACE,
    OBJECT,
    SLOTS,
    held,
    key,
    open_disk,
    put,
    read,
    slab_of,
    sound,
    used,
)
from lamina_kv.keys import KEY_BYTES
from lamina_kv.tiers import KINDS
from lamina_kv.tiers.contract import Fate, Piece, StoreError, Tenant
from lamina_kv.tiers.disk import heads, shrinking
from lamina_kv.tiers.disk.aio import Operation
from lamina_kv.tiers.disk.config import DiskConfig
from lamina_kv.tiers.disk.data import Slab
from lamina_kv.tiers.disk.layout import GROUP
from lamina_kv.tiers.disk.room import Server
from lamina_kv.tiers.objects import aligned_memory


@pytest.mark.parametrize("direct", ["auto", False])
@pytest.mark.parametrize("size", [4096, OBJECT, 1 << 20])
def test_reads_back_what_was_written_in_any_order_and_after_a_restart(
    tmp_path: Path, direct: bool | str, size: int
) -> None:
    store = open_disk(tmp_path, size=size, direct=direct)
    assert store.slots == SLOTS
    chunks = {5: 50, 1: 10, 2: 20, 7: 70}
    put(store, {1: 10, 2: 20, 5: 50}, size)
    put(store, {7: 70}, size)
    assert all(sound(store, chunks, size).values())
    store.close()

    store = open_disk(tmp_path, size=size, direct=direct)
    assert held(store) == {slot: key(n) for slot, n in chunks.items()}
    assert all(sound(store, chunks, size).values())
    store.close()


def test_it_is_the_kind_disk(tmp_path: Path) -> None:
    config = DiskConfig(path=tmp_path, capacity=3 * OBJECT)  # type: ignore[call-arg]
    store = KINDS["disk"].open(config, Tenant(NAMESPACE, {}, 0, None, OBJECT, 0))
    assert store.slots == 3
    assert store.stored(keys=True) is not None, "control assigns its slots"
    store.close()


def test_a_batch_deeper_than_the_kernel_queue(tmp_path: Path) -> None:
    store = open_disk(tmp_path, 600, size=4096)
    chunks = {slot: 1000 + slot for slot in range(600)}
    put(store, chunks, 4096)
    assert all(sound(store, chunks, 4096).values())
    store.close()


def test_only_the_key_that_is_there_is_delivered(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    put(store, {0: 1, 1: 2})
    fates = read(store, {0: 1, 1: 3, 2: 4})
    assert fates == {0: Fate.DONE, 1: Fate.GONE, 2: Fate.GONE}
    store.close()


@pytest.mark.parametrize("place", range(KEY_BYTES))
def test_every_byte_of_a_key_counts(tmp_path: Path, place: int) -> None:
    store = open_disk(tmp_path)
    put(store, {0: 1})
    other = bytearray(key(1))
    other[place] ^= 1
    piece = Piece(type(key(1))(bytes(other)), 0, aligned_memory(OBJECT))
    assert store.read([piece], 1.0) == [Fate.GONE]
    store.close()


def test_what_a_slot_held_is_gone_once_it_is_written_again(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    put(store, {0: 1, 1: 2})
    put(store, {0: 3})
    assert sound(store, {0: 1, 1: 2}) == {0: False, 1: True}
    store.close()
    store = open_disk(tmp_path)
    assert held(store) == {0: key(3), 1: key(2)}
    assert sound(store, {0: 3, 1: 2}) == {0: True, 1: True}
    store.close()


def test_dropped_slots_stay_dropped(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    put(store, {0: 1, 1: 2})
    store.drop([0, 5])
    assert sound(store, {0: 1, 1: 2}) == {0: False, 1: True}
    store.close()
    store = open_disk(tmp_path)
    assert held(store) == {1: key(2)}
    store.close()


def test_the_later_slot_of_a_key_is_the_one_that_is_found_again(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    for slot, n in ((3, 1), (4, 2), (0, 1), (5, 1)):
        put(store, {slot: n})
    store.close()
    store = open_disk(tmp_path)
    assert held(store) == {4: key(2), 5: key(1)}
    assert sound(store, {4: 2, 5: 1}) == {4: True, 5: True}
    store.close()


def test_ranks_beyond_the_first_tell_marks_that_agree_with_its_keys(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    put(store, {1: 10, 6: 60})
    marks, whole = store.stored(keys=False), store.stored(keys=True)
    assert (marks.keys, marks.used) == (None, None)
    assert marks.slots.dtype == whole.slots.dtype == np.int32
    assert marks.slots.tolist() == whole.slots.tolist() == [1, 6]
    assert whole.keys is not None
    assert whole.keys.shape == (2, KEY_BYTES)
    for found in (marks, whole):
        first = [int.from_bytes(key[:4], "little") for key in whole.keys.tolist()]
        assert found.marks.tolist() == first == [10, 60]
    store.close()


def test_a_store_of_many_groups_is_found_again(tmp_path: Path) -> None:
    """The tables of a group are between objects."""
    slots = 3 * GROUP + 5
    store = open_disk(tmp_path, slots, size=4096)
    edges = [0, 511, 512, GROUP - 1, GROUP, GROUP + 127, GROUP + 128, 2 * GROUP, slots - 1]
    chunks = {slot: 7 + slot for slot in edges}
    put(store, chunks, 4096)
    store.close()
    store = open_disk(tmp_path, slots, size=4096)
    assert held(store) == {slot: key(n) for slot, n in chunks.items()}
    assert all(sound(store, chunks, 4096).values())
    store.close()


# -- when chunks were used last --------------------------------------------------------------------


def test_use_is_remembered_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1_000, 2_000))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    store = open_disk(tmp_path)
    put(store, {0: 1})
    put(store, {1: 2})
    store.touch([(key(1), 0), (key(7), 1)])
    store.close()
    store = open_disk(tmp_path)
    recent = used(store)
    assert recent[0] > recent[1]
    store.close()


def test_uses_are_written_now_and_then_and_not_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_disk(tmp_path)
    put(store, {0: 1})
    before = slab_of(tmp_path).read_bytes()
    store.touch([(key(1), 0)])
    assert slab_of(tmp_path).read_bytes() == before
    late = time.monotonic() + heads.RECENCY_SECONDS
    monkeypatch.setattr("time.monotonic", lambda: late)
    store.touch([(key(1), 0)])
    after = slab_of(tmp_path).read_bytes()
    assert after != before
    store.touch([(key(1), 0)])
    assert slab_of(tmp_path).read_bytes() == after
    store.close()


# -- many at once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flaw", ["size", "alignment", "contiguity"])
def test_memory_that_cannot_be_read_into_is_refused(tmp_path: Path, flaw: str) -> None:
    store = open_disk(tmp_path)
    put(store, {0: 1})
    memory = aligned_memory(2 * OBJECT)
    buffer = {
        "size": memory[: OBJECT - 4096],
        "alignment": memory[64 : 64 + OBJECT],
        "contiguity": memory[::2],
    }[flaw]
    with pytest.raises(ValueError, match="contiguous bytes that begin at a multiple of 4096"):
        store.read([Piece(key(1), 0, buffer)], 1.0)
    store.close()


def test_threads_read_while_one_writes(tmp_path: Path) -> None:
    store = open_disk(tmp_path, 32)
    fixed = {slot: 100 + slot for slot in range(16)}
    put(store, fixed)
    stop = threading.Event()

    def read() -> int:
        rounds = 0
        while not stop.is_set() or not rounds:
            assert all(sound(store, fixed).values())
            rounds += 1
        return rounds

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(4)]
        try:
            for turn in range(20):
                put(store, {slot: turn * 100 + slot for slot in range(16, 32)})
        finally:
            stop.set()
        assert all(reader.result() for reader in readers)
    store.close()


# -- the directory ---------------------------------------------------------------------------------


def test_only_the_owner_can_look_into_a_store(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = open_disk(tmp_path / "store")
        put(store, {0: 1})
        found = {p: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "store").rglob("*")}
        store.close()
    finally:
        os.umask(before)
    assert {mode for path, mode in found.items() if path.is_file()} == {0o600}
    assert {mode for path, mode in found.items() if path.is_dir()} == {0o700}


def test_the_disk_is_reserved_at_the_start(tmp_path: Path) -> None:
    store = open_disk(tmp_path, 4, size=1 << 20)
    slab = slab_of(tmp_path).stat()
    assert slab.st_blocks * 512 >= slab.st_size >= 4 << 20
    store.close()


def test_an_object_takes_no_more_than_it_is_rounded_up_to(tmp_path: Path) -> None:
    """Whatever its rows are: pages of 8,448 bytes, say, lose nothing each."""
    store = open_disk(tmp_path, GROUP)
    tables = 44 << 10
    assert slab_of(tmp_path).stat().st_size == GROUP * OBJECT + tables
    store.close()


def test_less_than_one_chunk_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"tiers\.second\.capacity: 12287 .* 12 KiB"):
        open_disk(tmp_path, capacity=OBJECT - 1, name="second")
    assert list(tmp_path.iterdir()) == []


def test_a_namespace_is_hexadecimal(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hexadecimal"):
        open_disk(tmp_path, namespace="../../etc")


def test_another_layout_starts_empty_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_disk(tmp_path)
    put(store, {0: 1})
    store.close()
    with caplog.at_level(logging.WARNING):
        store = open_disk(tmp_path, size=8192)
    assert held(store) == {}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "starts empty" in caplog.text
    put(store, {3: 1}, 8192)
    assert sound(store, {3: 1}, 8192) == {3: True}
    store.close()


@pytest.mark.parametrize("slots", [4, 6, GROUP + 1])
def test_another_capacity_keeps_what_fits(
    tmp_path: Path, slots: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_disk(tmp_path)
    chunks = {slot: 1 + slot for slot in range(SLOTS)}
    put(store, chunks)
    store.close()
    with caplog.at_level(logging.INFO):
        store = open_disk(tmp_path, slots)
    kept = {slot: n for slot, n in chunks.items() if slot < slots}
    said = f"has room for {slots} chunks now and had for {SLOTS}: {len(kept)} chunks are kept"
    assert said in caplog.text
    assert f"and {SLOTS - len(kept)} are given up" in caplog.text
    assert "WARNING" not in caplog.text
    caplog.clear()
    assert held(store) == {slot: key(n) for slot, n in kept.items()}
    assert all(sound(store, kept).values())
    put(store, {slots - 1: 99})
    assert sound(store, {slots - 1: 99}) == {slots - 1: True}
    assert slab_of(tmp_path).stat().st_size < slots * OBJECT + (100 << 10)
    store.close()
    store = open_disk(tmp_path)
    assert all(slot < min(slots, SLOTS) for slot in held(store))
    store.close()
    assert caplog.text == ""


@pytest.mark.parametrize("batch", [64 << 20, 1], ids=["at once", "one by one"])
def test_what_was_used_last_survives_a_smaller_capacity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Wherever it lies; and for how long each was unused is known as before."""
    monkeypatch.setattr(shrinking, "_BATCH_BYTES", batch)
    store = open_disk(tmp_path, 6, ranks=1)
    for slot in range(6):
        put(store, {slot: 1 + slot})
    store.touch([(key(2), 1)])
    before = used(store)
    store.close()
    store = open_disk(tmp_path, 3, ranks=1)
    kept = held(store)
    assert sorted(kept.values()) == sorted([key(2), key(5), key(6)])
    assert kept[1] == key(2), "what lies where it can stay is not moved"
    numbers = {key(n): n for n in (2, 5, 6)}
    assert all(sound(store, {slot: numbers[name] for slot, name in kept.items()}).values())
    after = used(store)
    assert [after[slot] for slot in kept] == [before[numbers[name] - 1] for name in kept.values()]
    store.close()
    assert slab_of(tmp_path).stat().st_size < 3 * OBJECT + (100 << 10)


def test_ranks_that_share_chunks_move_none(tmp_path: Path) -> None:
    """Each knows of last uses by its own clock, and all need a chunk in the same slot."""
    store = open_disk(tmp_path, 6, ranks=2)
    for slot in range(6):
        put(store, {slot: 1 + slot})
    store.close()
    store = open_disk(tmp_path, 3, ranks=2)
    assert held(store) == {slot: key(1 + slot) for slot in range(3)}
    store.close()


def test_what_moves_takes_empty_slots_before_old_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a start that waits no longer has given up nothing for what it moved."""
    monkeypatch.setattr(shrinking, "_BATCH_BYTES", 1)
    store = open_disk(tmp_path, 6, ranks=1)
    for slot in (0, 2, 3, 4):  # 1 is empty, 0 the oldest
        put(store, {slot: 1 + slot})
    store.close()
    moved = 0

    def once() -> float:
        nonlocal moved
        moved += 1
        return 0.0 if moved <= 2 else 1e9

    monkeypatch.setattr(shrinking, "time", SimpleNamespace(monotonic=once))
    store = open_disk(tmp_path, 3, ranks=1)
    assert held(store) == {0: key(1), 1: key(5), 2: key(3)}
    store.close()


def test_a_start_waits_for_a_smaller_capacity_no_longer_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrinking, "MOST_SECONDS", -1.0)
    store = open_disk(tmp_path, ranks=1)
    for slot in range(SLOTS):
        put(store, {slot: 1 + slot})
    store.close()
    store = open_disk(tmp_path, 3, ranks=1)
    assert held(store) == {slot: key(1 + slot) for slot in range(3)}
    assert all(sound(store, {slot: 1 + slot for slot in range(3)}).values())
    store.close()


@pytest.mark.parametrize("after", range(1, 8))
def test_a_process_that_is_killed_while_it_makes_its_part_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Whatever it has written by then, all chunks are read right or are not there, and those that
    were used last are there."""
    store = open_disk(tmp_path, ranks=1)
    for slot in range(SLOTS):
        put(store, {slot: 1 + slot})
    store.close()
    calls = 0
    move = Slab.move

    def dies(self: Slab, operation: Operation, *given: Any) -> Any:
        nonlocal calls
        calls += operation is Operation.WRITE
        if calls == after:
            raise KeyboardInterrupt
        return move(self, operation, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Slab, "move", dies)
        patch.setattr(shrinking, "_BATCH_BYTES", 2 * OBJECT)
        with suppress(KeyboardInterrupt):
            open_disk(tmp_path, 3, ranks=1).close()
    store = open_disk(tmp_path, 3, ranks=1)
    kept = {slot: int.from_bytes(name[:8], "little") for slot, name in held(store).items()}
    assert sorted(kept.values()) == [6, 7, 8]
    assert all(sound(store, kept).values())
    store.close()


@pytest.mark.parametrize("older", [0, 1])
def test_capacity_bounds_the_path_and_the_least_recently_used_goes_first(
    tmp_path: Path, older: int, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"{n:032x}" for n in range(3)]
    kib = 1024

    def open_with(number: int, size: int, spare: int) -> None:
        open_disk(tmp_path, namespace=names[number], size=size, capacity=size + spare).close()

    open_with(0, 64 * kib, 0)
    open_with(1, 256 * kib, 200 * kib)
    assert len(list(tmp_path.rglob("*.slab"))) == 2
    os.utime(slab_of(tmp_path / names[older]), (1, 1))
    with caplog.at_level(logging.INFO):
        open_with(2, 1024 * kib, 330 * kib)
    left = {slab.parent.name for slab in tmp_path.rglob("*.slab")}
    assert left == {names[1 - older], names[2]}
    assert not (tmp_path / names[older]).exists()
    assert f"removed rank 0 of namespace {names[older]}" in caplog.text


def test_ranks_are_separate_and_rank_0_answers_for_those_nobody_uses(tmp_path: Path) -> None:
    old = "0" * 32
    for rank in (0, 1, 2):
        store = open_disk(tmp_path, namespace=old, rank=rank)
        put(store, {0: 1}, rank=rank)
        store.close()
    in_use = open_disk(tmp_path, namespace=old, rank=1)
    store = open_disk(tmp_path, rank=0)
    shards = {str(slab.relative_to(tmp_path)) for slab in tmp_path.rglob("*.slab")}
    assert shards == {f"{old}/rank-1.slab", f"{NAMESPACE}/rank-0.slab"}
    assert sound(in_use, {0: 1}, rank=1) == {0: True}
    store.close()
    in_use.close()


def ranks_on_disk(path: Path) -> set[int]:
    return {int(slab.stem.removeprefix("rank-")) for slab in path.rglob("*.slab")}


def age(path: Path, rank: int, seconds: float) -> None:
    """A rank's part of a store was last used that long ago."""
    then = time.time() - seconds
    for file in path.rglob(f"rank-{rank}.*"):
        os.utime(file, (then, then))


def test_ranks_that_are_gone_give_back_their_space(tmp_path: Path) -> None:
    """Eight engines of one server are four from now on; one of the others is still stopping."""
    for rank in range(8):
        store = open_disk(tmp_path, rank=rank, ranks=8)
        put(store, {0: 1}, rank=rank)
        store.close()
    still_there = open_disk(tmp_path, rank=7, ranks=8)
    stores = [open_disk(tmp_path, rank=rank, ranks=4) for rank in range(4)]
    assert ranks_on_disk(tmp_path) == {0, 1, 2, 3, 7}
    assert [sound(each, {0: 1}, rank=rank) for rank, each in enumerate(stores)] == [{0: True}] * 4
    assert sound(still_there, {0: 1}, rank=7) == {0: True}
    for store in (*stores, still_there):
        store.close()


def test_of_ranks_that_are_gone_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    def open_with(rank: int, size: int, spare: int, ranks: int | None = None) -> None:
        open_disk(tmp_path, size=size, capacity=size + spare, rank=rank, ranks=ranks).close()

    for rank in (1, 2, 3):
        open_with(rank, 64 << 10, 0)
    for rank in (1, 3):
        age(tmp_path, rank, 1000 * rank)
    open_with(0, 1 << 20, 300 << 10, ranks=1)
    assert ranks_on_disk(tmp_path) == {0, 1, 2}


def test_a_rank_whose_process_does_not_come_up_for_long_is_not_gone(tmp_path: Path) -> None:
    """Its number says that it belongs to the server."""
    for rank in range(2):
        store = open_disk(tmp_path, rank=rank, ranks=2)
        put(store, {0: 1}, rank=rank)
        store.close()
    for _ in range(2):  # rank 1 fails before it opens its part
        age(tmp_path, 1, 10_000)
        open_disk(tmp_path, rank=0, ranks=2).close()
    assert ranks_on_disk(tmp_path) == {0, 1}


def test_a_rank_that_was_not_there_the_time_before_is_gone(tmp_path: Path) -> None:
    """Where an engine cannot know how many there are."""
    for rank in range(3):
        open_disk(tmp_path, rank=rank).close()
    open_disk(tmp_path, rank=0).close()
    assert ranks_on_disk(tmp_path) == {0, 1, 2}, "others of the same server may still start"
    age(tmp_path, 1, 2000)
    age(tmp_path, 0, 1000)
    age(tmp_path, 2, 1000)
    open_disk(tmp_path, rank=0).close()
    assert ranks_on_disk(tmp_path) == {0, 2}


def test_the_first_start_of_a_rank_says_nothing_about_others(tmp_path: Path) -> None:
    open_disk(tmp_path, rank=1).close()
    age(tmp_path, 1, 100_000)
    open_disk(tmp_path, rank=0).close()
    assert ranks_on_disk(tmp_path) == {0, 1}


# -- would these tests see it? ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "guard"),
    [
        (False, test_ranks_that_are_gone_give_back_their_space),
        (True, test_a_rank_that_was_not_there_the_time_before_is_gone),
    ],
)
def test_that_ranks_are_never_or_always_taken_for_gone_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: bool, guard: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(Server, "has_left", lambda *_: gone)
    with pytest.raises(AssertionError):
        guard(tmp_path)
