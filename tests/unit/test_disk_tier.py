"""Guards the disk tier's contract: what was committed is read back, and nothing else ever is."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lamina.data.tiers.disk import DiskTier, ReadFailure, StoreNamespace
from lamina.data.tiers.disk_slab import aligned_memory
from lamina.data.tiers.disk_store import Server
from lamina.keys import KEY_BYTES
from lamina.plan import ChunkKey

NAMESPACE = StoreNamespace("ab" * 16, {"model": "tiny", "chunk_tokens": "64"})
EXTENTS = (8192, 4096, 8192)
ODD_EXTENTS = (5000, 4096, 12)


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(KEY_BYTES, "little"))


def open_tier(
    path: Path,
    *,
    extents: tuple[int, ...] = EXTENTS,
    slots: int = 8,
    namespace: StoreNamespace = NAMESPACE,
    rank: int = 0,
    direct: bool | None = None,
    shards: int | None = None,
) -> DiskTier:
    chunk = sum(-(-extent // 4096) * 4096 for extent in extents)
    return DiskTier(
        path=path,
        namespace=namespace,
        rank=rank,
        extent_bytes=extents,
        capacity=slots * chunk + 1,
        direct=direct,
        shards=shards,
    )


def content(number: int, row: int, size: int) -> npt.NDArray[np.uint8]:
    """The bytes of one row of chunk ``number``, in aligned memory."""
    extent = aligned_memory(size)
    extent[:] = np.random.default_rng([number, row]).integers(0, 256, size, dtype=np.uint8)
    return extent


def put(tier: DiskTier, slots: dict[int, int], extents: tuple[int, ...] = EXTENTS) -> None:
    """Store chunk ``slots[slot]`` in every slot, in one batch."""
    tier.begin(list(slots))
    for row, size in enumerate(extents):
        tier.write_row(row, list(slots), [content(n, row, size) for n in slots.values()])
    tier.commit([(slot, key(n)) for slot, n in slots.items()])


def get(
    tier: DiskTier, slots: dict[int, int], extents: tuple[int, ...] = EXTENTS
) -> dict[int, bool]:
    """Whether every row of chunk ``slots[slot]`` is delivered; what is delivered must be right."""
    whole = np.ones(len(slots), np.bool_)
    for row, size in enumerate(extents):
        into = aligned_memory(len(slots) * size).reshape(len(slots), size)
        good = tier.read_row(row, list(slots), [key(n) for n in slots.values()], into).good
        for n, sound, found in zip(slots.values(), good, into, strict=True):
            assert not sound or (found == content(n, row, size)).all()
        whole &= good
    return dict(zip(slots, whole.tolist(), strict=True))


def in_tier(tier: DiskTier) -> dict[int, ChunkKey]:
    return {chunk.slot: chunk.key for chunk in tier.stored()}


@pytest.mark.parametrize("extents", [EXTENTS, ODD_EXTENTS])
@pytest.mark.parametrize("direct", [None, False])
def test_reads_back_what_was_committed_in_any_order_and_after_a_restart(
    tmp_path: Path, extents: tuple[int, ...], direct: bool | None
) -> None:
    tier = open_tier(tmp_path, extents=extents, direct=direct)
    assert tier.slots == 8
    held = {5: 50, 1: 10, 2: 20, 7: 70}
    put(tier, {1: 10, 2: 20, 5: 50}, extents)
    put(tier, {7: 70}, extents)
    assert all(get(tier, held, extents).values())
    tier.close()

    tier = open_tier(tmp_path, extents=extents, direct=direct)
    assert in_tier(tier) == {slot: key(n) for slot, n in held.items()}
    assert all(get(tier, held, extents).values())
    assert tier.failures == {}
    tier.close()


def test_a_batch_deeper_than_the_kernel_queue(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, extents=(16,), slots=600)
    slots = {slot: 1000 + slot for slot in range(600)}
    put(tier, slots, (16,))
    assert all(get(tier, slots, (16,)).values())
    tier.close()


def test_extents_that_are_not_aligned_in_memory_are_written_all_the_same(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, extents=(4096,))
    unaligned = aligned_memory(4096 + 1)[1:]
    unaligned[:] = content(1, 0, 4096)
    tier.begin([0, 1])
    tier.write_row(0, [0, 1], [unaligned, memoryview(bytes(content(2, 0, 4096)))])
    tier.commit([(0, key(1)), (1, key(2))])
    assert get(tier, {0: 1, 1: 2}, (4096,)) == {0: True, 1: True}
    tier.close()


def test_only_the_key_that_is_there_is_delivered(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    put(tier, {0: 1, 1: 2})
    assert get(tier, {0: 1, 1: 3, 2: 4}) == {0: True, 1: False, 2: False}
    assert tier.failures == {ReadFailure.OTHER_KEY: 2 * len(EXTENTS)}
    tier.close()


def test_a_slot_is_forgotten_before_it_is_overwritten(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    put(tier, {0: 1, 1: 2})
    tier.begin([0])
    assert get(tier, {0: 1, 1: 2}) == {0: False, 1: True}
    tier.close()

    tier = open_tier(tmp_path)
    assert in_tier(tier) == {1: key(2)}
    put(tier, {0: 3})
    assert get(tier, {0: 3, 1: 2}) == {0: True, 1: True}
    tier.close()


def test_dropped_slots_stay_dropped(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    put(tier, {0: 1, 1: 2})
    tier.drop([0, 5])
    assert get(tier, {0: 1, 1: 2}) == {0: False, 1: True}
    tier.close()
    tier = open_tier(tmp_path)
    assert in_tier(tier) == {1: key(2)}
    tier.close()


def test_a_chunk_without_all_of_its_rows_is_never_committed(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    tier.begin([0])
    tier.write_row(0, [0], [content(1, 0, EXTENTS[0])])
    with pytest.raises(ValueError, match="all of its rows"):
        tier.commit([(0, key(1))])
    with pytest.raises(ValueError, match="begun"):
        tier.write_row(0, [1], [content(1, 0, EXTENTS[0])])
    with pytest.raises(ValueError, match="4096 bytes"):
        tier.write_row(1, [0], [content(1, 1, 12)])
    assert tier.stored() == ()
    tier.close()


def test_the_later_slot_of_a_key_is_the_one_that_is_found_again(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    put(tier, {3: 1})
    put(tier, {0: 1})
    tier.close()
    tier = open_tier(tmp_path)
    assert in_tier(tier) == {0: key(1)}
    tier.close()


def test_use_is_remembered_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1_000, 2_000))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    tier = open_tier(tmp_path)
    put(tier, {0: 1})
    put(tier, {1: 2})
    tier.note_used([0])
    tier.close()
    tier = open_tier(tmp_path)
    used = {chunk.slot: chunk.last_used for chunk in tier.stored()}
    assert used[0] > used[1]
    tier.close()


@pytest.mark.parametrize("flaw", ["shape", "alignment", "contiguity", "type"])
def test_a_target_that_cannot_be_read_into_is_refused(tmp_path: Path, flaw: str) -> None:
    tier = open_tier(tmp_path)
    memory = aligned_memory(4 * 8192)
    into = {
        "shape": memory[:8192].reshape(2, 4096),
        "alignment": memory[16 : 16 + 8192].reshape(1, 8192),
        "contiguity": memory.reshape(2, 16384)[:1, ::2],
        "type": memory.view(np.int8)[:8192].reshape(1, 8192),
    }[flaw]
    with pytest.raises(ValueError, match=r"C-contiguous uint8 of shape \(1, 8192\)|4096 bytes"):
        tier.read_row(0, [0], [key(1)], into)
    tier.close()


def test_threads_read_while_one_writes(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, slots=32)
    fixed = {slot: 100 + slot for slot in range(16)}
    put(tier, fixed)
    stop = threading.Event()

    def read() -> int:
        rounds = 0
        while not stop.is_set() or not rounds:
            assert all(get(tier, fixed).values())
            rounds += 1
        return rounds

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(4)]
        try:
            for turn in range(20):
                put(tier, {slot: turn * 100 + slot for slot in range(16, 32)})
        finally:
            stop.set()
        assert all(reader.result() for reader in readers)
    assert tier.failures == {}
    tier.close()


def test_only_the_owner_can_look_into_a_store(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        tier = open_tier(tmp_path / "store")
        put(tier, {0: 1})
        found = {p: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "store").rglob("*")}
        tier.close()
    finally:
        os.umask(before)
    assert {mode for path, mode in found.items() if path.is_file()} == {0o600}
    assert {mode for path, mode in found.items() if path.is_dir()} == {0o700}
    assert any(path.name.endswith("-wal") for path in found)


def test_the_disk_is_reserved_at_the_start(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, extents=(1 << 20,), slots=4)
    (slab,) = tmp_path.rglob("*.slab")
    assert slab.stat().st_blocks * 512 >= slab.stat().st_size == 4 << 20
    tier.close()


def test_less_than_one_chunk_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"disk\.capacity: 20479 .* 20480 bytes"):
        DiskTier(path=tmp_path, namespace=NAMESPACE, rank=0, extent_bytes=EXTENTS, capacity=20479)
    assert list(tmp_path.iterdir()) == []


def test_a_namespace_is_hexadecimal() -> None:
    with pytest.raises(ValueError, match="hexadecimal"):
        StoreNamespace("../../etc", {})


@pytest.mark.parametrize("change", [{"slots": 4}, {"slots": 16}, {"extents": (4096, 8192, 8192)}])
def test_another_layout_starts_empty_and_says_so(
    tmp_path: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_tier(tmp_path)
    put(tier, {0: 1})
    tier.close()
    with caplog.at_level(logging.WARNING):
        tier = open_tier(tmp_path, **change)  # type: ignore[arg-type]
    assert tier.stored() == ()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "starts empty" in caplog.text
    extents = change.get("extents", EXTENTS)
    put(tier, {3: 1}, extents)  # type: ignore[arg-type]
    assert get(tier, {3: 1}, extents) == {3: True}  # type: ignore[arg-type]
    (slab,) = tmp_path.rglob("*.slab")
    assert slab.stat().st_size == tier.slots * 20480
    tier.close()


@pytest.mark.parametrize("older", [0, 1])
def test_capacity_bounds_the_path_and_the_least_recently_used_goes_first(
    tmp_path: Path, older: int, caplog: pytest.LogCaptureFixture
) -> None:
    names = [StoreNamespace(f"{n:032x}", {"model": str(n)}) for n in range(3)]
    kib = 1024

    def open_with(number: int, extent: int, spare: int) -> None:
        DiskTier(
            path=tmp_path,
            namespace=names[number],
            rank=0,
            extent_bytes=(extent,),
            capacity=extent + spare,
        ).close()

    open_with(0, 64 * kib, 0)
    open_with(1, 128 * kib, 127 * kib)
    assert len(list(tmp_path.rglob("*.slab"))) == 2
    for file in (tmp_path / names[older].fingerprint).iterdir():
        os.utime(file, (1, 1))
    with caplog.at_level(logging.INFO):
        open_with(2, 1024 * kib, 200 * kib)
    left = {slab.parent.name for slab in tmp_path.rglob("*.slab")}
    assert left == {names[1 - older].fingerprint, names[2].fingerprint}
    assert not (tmp_path / names[older].fingerprint).exists()
    assert f"removed rank 0 of namespace {names[older].fingerprint}" in caplog.text


def test_ranks_are_separate_and_rank_0_answers_for_those_nobody_uses(tmp_path: Path) -> None:
    old = StoreNamespace("0" * 32, {})
    for rank in (0, 1, 2):
        tier = open_tier(tmp_path, namespace=old, rank=rank)
        put(tier, {0: rank})
        tier.close()
    in_use = open_tier(tmp_path, namespace=old, rank=1)
    tier = open_tier(tmp_path, rank=0)
    shards = {str(slab.relative_to(tmp_path)) for slab in tmp_path.rglob("*.slab")}
    assert shards == {f"{old.fingerprint}/rank-1.slab", f"{NAMESPACE.fingerprint}/rank-0.slab"}
    assert get(in_use, {0: 1}) == {0: True}
    tier.close()
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
        tier = open_tier(tmp_path, rank=rank, shards=8)
        put(tier, {0: rank})
        tier.close()
    still_there = open_tier(tmp_path, rank=7, shards=8)
    tiers = [open_tier(tmp_path, rank=rank, shards=4) for rank in range(4)]
    assert ranks_on_disk(tmp_path) == {0, 1, 2, 3, 7}
    assert [get(tier, {0: rank}) for rank, tier in enumerate(tiers)] == [{0: True}] * 4
    assert get(still_there, {0: 7}) == {0: True}
    for tier in (*tiers, still_there):
        tier.close()


def test_of_ranks_that_are_gone_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    def open_with(rank: int, extent: int, spare: int, shards: int | None = None) -> None:
        DiskTier(
            path=tmp_path,
            namespace=NAMESPACE,
            rank=rank,
            extent_bytes=(extent,),
            capacity=extent + spare,
            shards=shards,
        ).close()

    for rank in (1, 2, 3):
        open_with(rank, 64 << 10, 0)
    for rank in (1, 3):
        age(tmp_path, rank, 1000 * rank)
    open_with(0, 1 << 20, 200 << 10, shards=1)
    assert ranks_on_disk(tmp_path) == {0, 1, 2}


def test_a_rank_whose_process_does_not_come_up_for_long_is_not_gone(tmp_path: Path) -> None:
    """Its number says that it belongs to the server."""
    for rank in range(2):
        tier = open_tier(tmp_path, rank=rank, shards=2)
        put(tier, {0: rank})
        tier.close()
    for _ in range(2):  # rank 1 fails before it opens its part
        age(tmp_path, 1, 10_000)
        open_tier(tmp_path, rank=0, shards=2).close()
    assert ranks_on_disk(tmp_path) == {0, 1}


def test_a_rank_that_was_not_there_the_time_before_is_gone(tmp_path: Path) -> None:
    """Where an engine cannot know how many there are."""
    for rank in range(3):
        open_tier(tmp_path, rank=rank).close()
    open_tier(tmp_path, rank=0).close()
    assert ranks_on_disk(tmp_path) == {0, 1, 2}, "others of the same server may still start"
    age(tmp_path, 1, 2000)
    age(tmp_path, 0, 1000)
    age(tmp_path, 2, 1000)
    open_tier(tmp_path, rank=0).close()
    assert ranks_on_disk(tmp_path) == {0, 2}


def test_the_first_start_of_a_rank_says_nothing_about_others(tmp_path: Path) -> None:
    open_tier(tmp_path, rank=1).close()
    age(tmp_path, 1, 100_000)
    open_tier(tmp_path, rank=0).close()
    assert ranks_on_disk(tmp_path) == {0, 1}


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
