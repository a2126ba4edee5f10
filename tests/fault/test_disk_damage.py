"""Guards that nothing which happens to a disk store, at rest or at run time, becomes a wrong byte
or stops a server: it is a miss, or an error at the start that says what to do.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import inspect
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lamina.data.tiers import disk, disk_lock
from lamina.data.tiers.disk import DiskTier, ReadFailure, StoreError, StoreNamespace
from lamina.data.tiers.disk_aio import AioQueue
from lamina.data.tiers.disk_index import DiskIndex, summarize
from lamina.data.tiers.disk_lock import StoreLost, Watch, holder
from lamina.data.tiers.disk_slab import Slab, aligned_memory, allocate
from lamina.keys import KEY_BYTES
from lamina.plan import ChunkKey

NAMESPACE = StoreNamespace("ab" * 16, {"model": "tiny"})
EXTENTS = (8192, 4096, 4096)
SLOTS = 4
CHUNK = sum(EXTENTS)


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(KEY_BYTES, "little"))


def open_tier(path: Path, slots: int = SLOTS) -> DiskTier:
    return DiskTier(
        path=path, namespace=NAMESPACE, rank=0, extent_bytes=EXTENTS, capacity=slots * CHUNK
    )


def content(number: int, row: int) -> np.ndarray:
    extent = aligned_memory(EXTENTS[row])
    extent[:] = np.random.default_rng([number, row]).integers(0, 256, len(extent), dtype=np.uint8)
    return extent


def put(tier: DiskTier, slots: dict[int, int]) -> None:
    tier.begin(list(slots))
    for row in range(len(EXTENTS)):
        tier.write_row(row, list(slots), [content(n, row) for n in slots.values()])
    tier.commit([(slot, key(n)) for slot, n in slots.items()])


def sound(tier: DiskTier, number: int, slot: int) -> list[bool]:
    """Per row, whether chunk ``number`` is delivered; what is delivered must be right."""
    found = []
    for row, size in enumerate(EXTENTS):
        into = aligned_memory(size).reshape(1, size)
        (good,) = tier.read_row(row, [slot], [key(number)], into).good
        assert not good or (into[0] == content(number, row)).all()
        found.append(bool(good))
    return found


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store in which slot *s* holds chunk *s*, closed."""
    tier = open_tier(tmp_path)
    put(tier, {slot: slot for slot in range(SLOTS)})
    tier.close()
    return tmp_path


def file_of(store: Path, suffix: str) -> Path:
    (found,) = store.rglob(f"rank-0.{suffix}")
    return found


# -- the slab ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "damage"),
    [
        pytest.param(100, b"\x01", id="a byte"),
        pytest.param(4096, bytes(4096), id="a sector that was never written"),
        pytest.param(8191, b"\xff", id="the last byte of an extent"),
    ],
)
def test_damage_in_the_slab_is_a_miss_there_and_nowhere_else(
    store: Path, offset: int, damage: bytes
) -> None:
    with file_of(store, "slab").open("r+b") as slab:
        slab.seek(1 * EXTENTS[0] + offset)  # row 0 of slot 1
        there = slab.read(len(damage))
        slab.seek(-len(damage), os.SEEK_CUR)
        slab.write(damage if len(damage) > 1 else bytes([there[0] ^ damage[0]]))
    tier = open_tier(store)
    assert sound(tier, 1, 1) == [False, True, True]
    assert sound(tier, 0, 0) == sound(tier, 2, 2) == [True] * 3
    assert tier.failures == {ReadFailure.CHECKSUM: 1}
    tier.close()


def test_one_slot_never_passes_for_another(store: Path) -> None:
    slab = file_of(store, "slab")
    with slab.open("r+b") as file:
        first = file.read(EXTENTS[0])
        file.write(first)  # slot 1 now has the bytes of slot 0, where both are whole
    tier = open_tier(store)
    assert sound(tier, 1, 1) == [False, True, True]
    tier.close()


def test_a_slab_cut_short_or_gone_starts_empty_and_says_so(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(file_of(store, "slab"), CHUNK)
    tier = open_tier(store)
    assert tier.stored() == ()
    assert "cut short" in caplog.text
    put(tier, {0: 7})
    tier.close()

    file_of(store, "slab").unlink()
    caplog.clear()
    tier = open_tier(store)
    assert tier.stored() == ()
    assert "missing" in caplog.text
    tier.close()


def test_a_slab_cut_short_at_run_time_is_a_counted_miss(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_tier(store)
    os.truncate(file_of(store, "slab"), SLOTS * EXTENTS[0] + EXTENTS[1])
    assert sound(tier, 0, 0) == [True, True, False]
    assert sound(tier, 3, 3) == [True, False, False]
    assert tier.failures == {ReadFailure.IO_ERROR: 3}
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    tier.close()


@pytest.mark.parametrize(("error", "damage"), [(errno.EIO, True), (errno.EAGAIN, False)])
def test_an_unreadable_sector_is_a_counted_miss_of_its_extent(
    store: Path, monkeypatch: pytest.MonkeyPatch, error: int, damage: bool
) -> None:
    """A machine that is short of something now has lost nothing."""
    run = AioQueue.run

    def flaky(self: AioQueue, *arguments: object) -> np.ndarray:
        failed = run(self, *arguments)  # type: ignore[arg-type]
        failed[1] = error
        return failed

    tier = open_tier(store)
    monkeypatch.setattr(AioQueue, "run", flaky)
    into = aligned_memory(3 * EXTENTS[0]).reshape(3, -1)
    read = tier.read_row(0, [0, 1, 2], [key(0), key(1), key(2)], into)
    assert read.good.tolist() == [True, False, True]
    assert read.damaged.tolist() == [False, damage, False]
    assert (into[2] == content(2, 0)).all()
    assert tier.failures == {ReadFailure.IO_ERROR: 1}
    tier.close()


# -- the index -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like ``store``, to be copied and never changed."""
    path = tmp_path_factory.mktemp("pristine")
    tier = open_tier(path)
    put(tier, {slot: slot for slot in range(SLOTS)})
    tier.close()
    return path


@settings(max_examples=60, deadline=None)
@example(at=0, damage=b"not a database at all")
@example(at=18, damage=b"\xff\xff")
@example(at=18, damage=b"\x03")
@example(at=100, damage=bytes(8000))
@given(at=st.integers(0, 1 << 15), damage=st.binary(min_size=1, max_size=300))
def test_any_damage_to_the_index_costs_at_most_what_was_stored(
    pristine: Path, at: int, damage: bytes
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        shutil.copytree(pristine, store)
        index = file_of(store, "sqlite")
        original = index.read_bytes()
        at %= len(original)
        index.write_bytes(original[:at] + damage + original[at + len(damage) :])
        tier = open_tier(store)
        for chunk in tier.stored():
            assert 0 <= chunk.slot < SLOTS
            assert chunk.last_used >= 0
        for slot in range(SLOTS):
            sound(tier, slot, slot)
        put(tier, {0: 9, 3: 8})
        assert sound(tier, 9, 0) == sound(tier, 8, 3) == [True] * 3
        tier.close()


def test_a_damaged_index_is_kept_aside(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = file_of(store, "sqlite")
    index.write_bytes(b"x" * 5000)
    tier = open_tier(store)
    assert tier.stored() == ()
    assert index.with_name("rank-0.sqlite.damaged").read_bytes() == b"x" * 5000
    assert "is damaged" in caplog.text
    put(tier, {0: 1})
    tier.close()
    tier = open_tier(store)
    assert len(tier.stored()) == 1
    tier.close()


def test_damage_that_only_a_later_write_would_meet_is_found_at_the_start(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with file_of(store, "sqlite").open("r+b") as index:
        index.seek(32)  # of the file header: the first free page, and how many there are
        index.write(bytes([0, 0, 0, 2, 0, 0, 0, 1]))
    tier = open_tier(store)
    assert tier.stored() == ()
    assert "is damaged" in caplog.text
    tier.close()


def test_without_its_index_a_slab_is_empty(store: Path) -> None:
    file_of(store, "sqlite").unlink()
    tier = open_tier(store)
    assert tier.stored() == ()
    assert sound(tier, 0, 0) == [False] * 3
    tier.close()


def test_an_index_of_an_earlier_time_never_delivers_what_came_later(store: Path) -> None:
    index = file_of(store, "sqlite")
    earlier = index.read_bytes()
    tier = open_tier(store)
    put(tier, {0: 5})
    tier.close()
    index.write_bytes(earlier)
    tier = open_tier(store)
    assert sound(tier, 0, 0) == [False] * 3
    assert sound(tier, 5, 0) == [False] * 3
    assert sound(tier, 1, 1) == [True] * 3
    tier.close()


def test_an_index_with_keys_in_the_wrong_slots_delivers_nothing(store: Path) -> None:
    with closing(sqlite3.connect(file_of(store, "sqlite"))) as index, index:
        for slot, number in ((0, 1), (1, 0)):
            index.execute("UPDATE chunk SET key = ? WHERE slot = ?", (key(number), slot))
    tier = open_tier(store)
    assert len(tier.stored()) == SLOTS
    assert sound(tier, 1, 0) == sound(tier, 0, 1) == [False] * 3
    assert tier.failures == {ReadFailure.CHECKSUM: 6}
    tier.close()


@pytest.mark.parametrize(
    "change",
    [
        "slot = slot + 1000",
        "slot = slot - 2",
        "key = substr(key, 2)",
        "key = substr(hex(key), 1, 20)",
        "checksums = checksums || x'00'",
        "last_used = 'yesterday'",
    ],
)
def test_an_index_that_makes_no_sense_is_not_used(
    store: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(file_of(store, "sqlite"))) as index, index:
        index.execute(f"UPDATE chunk SET {change} WHERE slot = 1")
    tier = open_tier(store)
    assert tier.stored() == ()
    assert "make no sense" in caplog.text
    tier.close()


# -- crashes -------------------------------------------------------------------------------------


def killed_after(store: Path, work: Callable[[DiskTier], None]) -> None:
    """Let another process open the store and do some work, and kill it without warning."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()

    def serve() -> None:
        tier = open_tier(store)
        work(tier)
        ready.set()
        signal.pause()

    server = fork.Process(target=serve)
    server.start()
    assert ready.wait(60)
    server.kill()
    server.join()


def test_what_was_committed_survives_a_kill(tmp_path: Path) -> None:
    def work(tier: DiskTier) -> None:
        put(tier, {0: 1, 1: 2})
        put(tier, {0: 3})

    killed_after(tmp_path, work)
    tier = open_tier(tmp_path)
    assert {c.slot: c.key for c in tier.stored()} == {0: key(3), 1: key(2)}
    assert sound(tier, 3, 0) == sound(tier, 2, 1) == [True] * 3
    tier.close()


def test_what_was_begun_and_not_committed_is_gone_after_a_kill(store: Path) -> None:
    def work(tier: DiskTier) -> None:
        tier.begin([0, 1])
        for row in range(len(EXTENTS)):
            tier.write_row(row, [0, 1], [content(8, row), content(9, row)])

    killed_after(store, work)
    tier = open_tier(store)
    assert {c.slot for c in tier.stored()} == {2, 3}
    for number in (0, 8):
        assert sound(tier, number, 0) == [False] * 3
    assert sound(tier, 2, 2) == [True] * 3
    tier.close()


def test_use_is_written_with_what_is_committed_next(tmp_path: Path) -> None:
    def work(tier: DiskTier) -> None:
        put(tier, {0: 1})
        put(tier, {1: 2})
        tier.note_used([0])
        put(tier, {2: 3})

    killed_after(tmp_path, work)
    tier = open_tier(tmp_path)
    used = {chunk.slot: chunk.last_used for chunk in tier.stored()}
    assert used[1] < used[0] <= used[2]
    tier.close()


def test_bytes_are_durable_before_the_index_names_them(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fdatasync = os.fdatasync
    named = []

    def watched(file: int) -> None:
        fdatasync(file)
        named.append(summarize(file_of(store, "sqlite")).entries)

    monkeypatch.setattr(os, "fdatasync", watched)
    tier = open_tier(store)
    put(tier, {0: 7})
    assert named == [SLOTS - 1]
    assert summarize(file_of(store, "sqlite")).entries == SLOTS
    tier.close()


# -- the start -----------------------------------------------------------------------------------


def test_a_second_server_is_refused_with_the_pid_of_the_first(store: Path) -> None:
    tier = open_tier(store)
    with pytest.raises(StoreError, match=rf"in use by process {os.getpid()}.*own"):
        open_tier(store)
    tier.close()
    tier.close()
    open_tier(store).close()


def test_a_server_that_was_killed_does_not_keep_its_store(tmp_path: Path) -> None:
    killed_after(tmp_path, lambda tier: None)
    open_tier(tmp_path).close()


def left_behind(store: Path, fork: Callable[[], int]) -> tuple[int, int]:
    """A server that has opened the store and was killed, and a child of it that lives on."""
    processes = multiprocessing.get_context("fork")
    child, ready = processes.Value("i"), processes.Event()

    def serve() -> None:
        tier = open_tier(store)
        if pid := fork():
            child.value = pid
            ready.set()
        signal.pause()
        tier.close()

    server = processes.Process(target=serve)
    server.start()
    assert ready.wait(60)
    assert server.pid is not None
    assert child.value > 1
    server.kill()
    server.join()
    return server.pid, child.value


def test_a_child_that_a_server_leaves_behind_does_not_keep_its_store(store: Path) -> None:
    """A fork has every file of its parent open, and so its locks."""
    _, child = left_behind(store, os.fork)
    try:
        open_tier(store).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_that_keeps_a_store_all_the_same_is_named(store: Path) -> None:
    """A library that forks does not ask Python first."""
    server, child = left_behind(store, ctypes.PyDLL(None).fork)
    try:
        with pytest.raises(
            StoreError, match=rf"process {server}, which has ended, .* locked by process {child} "
        ):
            open_tier(store)
        assert holder(store, 0) == str(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_failed_start_gives_the_store_back(store: Path) -> None:
    with pytest.raises(StoreError):
        open_tier(store, slots=1 << 40)
    open_tier(store).close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"format": "lamina disk store", "version": 7}), "version 7.*lamina clear"),
        (json.dumps({"format": "something else"}), "not a Lamina store"),
        ("[]", "not a Lamina store"),
        ("{", "not a Lamina store"),
    ],
)
def test_a_store_of_another_format_is_refused_and_left_alone(
    store: Path, text: str, message: str
) -> None:
    (store / "lamina-store.json").write_text(text)
    before = {path: path.stat().st_size for path in store.rglob("*")}
    with pytest.raises(StoreError, match=message):
        open_tier(store)
    assert {path: path.stat().st_size for path in store.rglob("*")} == before


def test_a_path_that_cannot_be_written_to_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "store", Path("/proc/lamina")):
        with pytest.raises(StoreError, match=r"disk\.path: cannot make a store in"):
            open_tier(path)


def test_a_kernel_without_asynchronous_io_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamina.data.tiers.disk_aio._SETUP", 9999)
    with pytest.raises(StoreError, match=r"no asynchronous I/O .*: allow io_setup"):
        open_tier(tmp_path)


def test_a_kernel_that_has_no_more_queues_makes_a_counted_miss(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(store)
    run = AioQueue.run
    inside: list[list[bool]] = []

    def meanwhile(self: AioQueue, *arguments: object) -> np.ndarray:
        monkeypatch.setattr(AioQueue, "run", run)
        monkeypatch.setattr("lamina.data.tiers.disk_aio._SETUP", 9999)
        inside.append(sound(tier, 0, 0))  # the only queue is taken, and there is no other
        return run(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(AioQueue, "run", meanwhile)
    assert sound(tier, 1, 1) == [True] * 3
    assert inside == [[False] * 3]
    assert tier.failures == {ReadFailure.IO_ERROR: 3}
    tier.close()


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    return


def test_more_than_the_disk_has_is_refused_before_anything_is_lost(store: Path) -> None:
    with pytest.raises(StoreError, match=r"disk\.capacity: .* bytes free"):
        open_tier(store, slots=1 << 40)
    tier = open_tier(store)
    assert len(tier.stored()) == SLOTS
    tier.close()


@pytest.mark.usefixtures("no_room")
def test_a_disk_that_is_full_after_all_is_refused_and_given_back(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"disk\.capacity: .* bytes free"):
        open_tier(tmp_path)
    assert list(tmp_path.rglob("*.slab")) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])
@pytest.mark.parametrize("number", [errno.EINTR, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("more", [0, 1])
def test_no_call_that_fails_at_the_start_takes_away_what_is_stored(
    store: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, more: int
) -> None:
    """Of the same capacity, or a larger one that the disk does not grant."""

    def failing(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(StoreError, match=r"disk\.(path|capacity): .*(cannot|bytes free)"):
            open_tier(store, SLOTS + more)
    tier = open_tier(store)
    assert [sound(tier, slot, slot) for slot in range(SLOTS)] == [[True] * 3] * SLOTS
    tier.close()


def test_a_start_that_dies_when_a_lost_slab_is_whole_again_promises_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slab,) = store.rglob("*.slab")
    slab.unlink()

    def allocated_and_died(path: Path, size: int) -> bool:
        allocate(path, size)
        return died()

    with monkeypatch.context() as patch:
        patch.setattr(disk, "allocate", allocated_and_died)
        with pytest.raises(StoreError, match="died here"):
            open_tier(store)
    tier = open_tier(store)
    assert not tier.stored()
    tier.close()


def died(*arguments: object) -> NoReturn:
    raise OSError(errno.EIO, "died here")


def test_a_file_system_that_reserves_nothing_is_used_and_said(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*arguments: object) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    tier = open_tier(store)
    assert [sound(tier, slot, slot) for slot in range(SLOTS)] == [[True] * 3] * SLOTS
    tier.close()
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "cannot reserve space" in warning
    assert "disk.capacity" in warning
    assert "rank-0.slab" in warning


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file can be written beyond ``limit`` bytes, as if the disk were full there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# -- files that go away ---------------------------------------------------------------------------


def replace(file: Path) -> None:
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)


GOES_AWAY = {
    "slab deleted": ("rank-0.slab", Path.unlink),
    "slab replaced": ("rank-0.slab", replace),
    "index deleted": ("rank-0.sqlite", Path.unlink),
    "journal deleted": ("rank-0.sqlite-wal", Path.unlink),
    "model deleted": (NAMESPACE.fingerprint, shutil.rmtree),
    "model moved": (NAMESPACE.fingerprint, lambda path: path.rename(path.with_name("cafe0123"))),
}


@pytest.mark.parametrize("case", GOES_AWAY)
def test_what_goes_away_under_a_server_is_said_once_and_nothing_is_written_any_more(
    store: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, happen = GOES_AWAY[case]
    tier = open_tier(store)
    (path,) = store.rglob(name)
    happen(path)
    for _ in range(2):
        with pytest.raises(StoreLost, match="while this server uses the store"):
            put(tier, {0: 7})
    tier.drop([1])
    assert sound(tier, 7, 0) == sound(tier, 1, 1) == [False] * 3
    assert sound(tier, 2, 2) == [True] * 3
    tier.close()
    (warning,) = [r for r in caplog.records if "while this server uses" in r.getMessage()]
    assert name in warning.getMessage()
    assert "start the server again" in warning.getMessage()


def test_what_goes_away_while_it_is_written_is_no_chunk(store: Path) -> None:
    tier = open_tier(store)
    tier.begin([0])
    for row in range(len(EXTENTS)):
        tier.write_row(row, [0], [content(7, row)])
    shutil.rmtree(store)
    with pytest.raises(StoreLost):
        tier.commit([(0, key(7))])
    assert sound(tier, 7, 0) == [False] * 3
    tier.close()


@pytest.mark.parametrize("happen", [Path.unlink, replace])
def test_a_lock_file_that_a_cleaner_deletes_is_made_anew(
    store: Path, happen: Callable[[Path], None]
) -> None:
    tier = open_tier(store)
    happen(store / "rank-0.lock")
    put(tier, {0: 7})
    tier.drop([1])
    with pytest.raises(StoreError, match="in use by process"):
        open_tier(store)
    tier.close()
    again = open_tier(store)
    assert {chunk.slot: chunk.key for chunk in again.stored()} == {
        0: key(7),
        2: key(2),
        3: key(3),
    }
    again.close()


def test_of_two_servers_that_a_lost_lock_let_in_the_first_leaves_the_store_alone(
    store: Path,
) -> None:
    first = open_tier(store)
    (store / "rank-0.lock").unlink()
    second = open_tier(store)
    with pytest.raises(StoreLost, match=r"rank-0.lock was deleted .* in use by process"):
        put(first, {0: 7})
    put(second, {0: 8})
    first.drop([0, 1])
    first.note_used([2])
    first.close()
    second.close()
    third = open_tier(store)
    assert {chunk.slot: chunk.key for chunk in third.stored()} == {
        0: key(8),
        1: key(1),
        2: key(2),
        3: key(3),
    }
    third.close()


# -- I/O without an end --------------------------------------------------------------------------


def test_a_kernel_that_says_nothing_of_io_loses_a_queue_and_no_chunk(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_tier(store)
    with monkeypatch.context() as patch:
        patch.setattr("lamina.data.tiers.disk_aio._GETEVENTS", 9999)
        into = aligned_memory(EXTENTS[0]).reshape(1, -1)
        read = tier.read_row(0, [0], [key(0)], into)
        assert not read.good.any()
        assert not read.damaged.any()
        with pytest.raises(OSError, match="I/O in flight"):
            put(tier, {1: 7})
    assert "does not say what became of I/O in flight" in caplog.text
    assert sound(tier, 0, 0) == sound(tier, 2, 2) == [True] * 3
    put(tier, {1: 7})
    assert sound(tier, 7, 1) == [True] * 3
    tier.close()


def test_memory_that_the_kernel_may_still_write_to_is_used_for_nothing_else(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_tier(store)
    into = aligned_memory(EXTENTS[0]).reshape(1, -1)
    with monkeypatch.context() as patch:
        patch.setattr("lamina.data.tiers.disk_aio._GETEVENTS", 9999)
        patch.setattr("lamina.data.tiers.disk_aio._DESTROY", 9999)
        read = tier.read_row(0, [0], [key(0)], into)
        assert not read.good.any()
        assert not read.damaged.any()
    kept = weakref.ref(into)
    before = into.copy()
    del into
    gc.collect()
    lent = kept()
    assert lent is not None, "the memory was given back"
    assert not tier.read_row(0, [1], [key(1)], lent).good.any()
    assert (lent == before).all(), "the memory was used again"
    with pytest.raises(OSError, match="out of use until a restart"):
        put(tier, {1: 7})
    assert "out of use until this server is restarted" in caplog.text
    tier.close()
    tier = open_tier(store)
    assert sound(tier, 0, 0) == sound(tier, 2, 2) == [True] * 3
    tier.close()


# -- forgetting ----------------------------------------------------------------------------------


def test_what_was_dropped_on_a_full_disk_does_not_come_back(store: Path) -> None:
    def work(tier: DiskTier) -> None:
        with file_size_limit(EXTENTS[1]), suppress(OSError):  # as far as slot 0 begins
            tier.drop([0])

    killed_after(store, work)
    tier = open_tier(store)
    assert sound(tier, 0, 0)[0] is False
    assert sound(tier, 1, 1) == sound(tier, 3, 3) == [True] * 3
    tier.close()


def test_where_nothing_at_all_can_be_written_the_store_starts_empty(store: Path) -> None:
    def work(tier: DiskTier) -> None:
        with file_size_limit(0), suppress(OSError):
            tier.drop([1])
        assert sound(tier, 1, 1) == [False] * 3
        assert sound(tier, 2, 2) == [True] * 3
        with pytest.raises(StoreLost, match=r"starts empty after a restart"):
            put(tier, {0: 7})

    killed_after(store, work)
    tier = open_tier(store)
    assert tier.stored() == ()
    tier.close()


def test_a_write_that_a_full_disk_refuses_costs_no_more_than_that(store: Path) -> None:
    """Control drops the slot of every write that failed."""

    def work(tier: DiskTier) -> None:
        with file_size_limit(0):
            with suppress(OSError):
                tier.begin([0])
            tier.drop([0])
        put(tier, {1: 7})

    killed_after(store, work)
    tier = open_tier(store)
    assert {chunk.slot: chunk.key for chunk in tier.stored()} == {1: key(7), 2: key(2), 3: key(3)}
    assert sound(tier, 7, 1) == sound(tier, 2, 2) == [True] * 3
    tier.close()


def test_what_could_not_be_forgotten_is_forgotten_with_the_next_change(store: Path) -> None:
    def work(tier: DiskTier) -> None:
        with file_size_limit(EXTENTS[1]), suppress(OSError):
            tier.drop([0])
        put(tier, {3: 7})

    killed_after(store, work)
    tier = open_tier(store)
    assert {chunk.slot for chunk in tier.stored()} == {1, 2, 3}
    tier.close()


# -- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, EXTENTS[0] // 2])
def test_a_write_that_the_disk_refuses_or_takes_in_part_is_an_error_and_no_chunk(
    store: Path, limit: int
) -> None:
    tier = open_tier(store)
    tier.begin([0])
    with file_size_limit(limit), pytest.raises(OSError, match="cannot write"):
        tier.write_row(0, [0], [content(7, 0)])
    assert sound(tier, 7, 0) == sound(tier, 0, 0) == [False] * 3
    put(tier, {0: 7})
    assert sound(tier, 7, 0) == [True] * 3
    tier.close()


def test_bytes_that_do_not_become_durable_are_no_chunk(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    tier = open_tier(store)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            put(tier, {0: 7})
    assert sound(tier, 7, 0) == [False] * 3
    tier.close()
    tier = open_tier(store)
    assert {chunk.slot for chunk in tier.stored()} == {1, 2, 3}
    tier.close()


def test_an_index_that_cannot_be_written_is_an_error_and_no_chunk(store: Path) -> None:
    tier = open_tier(store)
    with file_size_limit(0), pytest.raises(OSError, match="index of the disk tier"):
        tier.begin([0])
    assert sound(tier, 0, 0) == [False] * 3
    with pytest.raises(ValueError, match="begun"):
        tier.write_row(0, [0], [content(7, 0)])
    put(tier, {0: 7})
    assert sound(tier, 7, 0) == [True] * 3
    tier.close()


# -- would these tests see it? -------------------------------------------------------------------


def unlink_on_failure(path: Path, size: int) -> bool:
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.posix_fallocate(file, 0, size)
        os.fsync(file)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(file)
    return True


def forget_the_memory(self: AioQueue, error: int) -> NoReturn:
    raise OSError(error, "the kernel does not say what became of I/O in flight")


class Nothing(set[object]):
    """A set that keeps nothing."""

    def add(self, element: object) -> None:
        pass


BREAKS: dict[str, tuple[object, str, object, str]] = {
    "a call that fails deletes the slab": (
        disk,
        "allocate",
        unlink_on_failure,
        "test_no_call_that_fails_at_the_start_takes_away_what_is_stored",
    ),
    "nobody looks whether the files are there": (
        Watch,
        "check",
        lambda self: None,
        "test_what_goes_away_under_a_server_is_said_once_and_nothing_is_written_any_more",
    ),
    "nobody looks before the index names a chunk": (
        DiskTier,
        "_see_that_it_is_there",
        lambda self: None,
        "test_what_goes_away_while_it_is_written_is_no_chunk",
    ),
    "a lost lock is not looked at": (
        Watch,
        "check",
        lambda self: None,
        "test_of_two_servers_that_a_lost_lock_let_in_the_first_leaves_the_store_alone",
    ),
    "a child keeps the lock": (
        disk_lock,
        "_held",
        Nothing(),
        "test_a_child_that_a_server_leaves_behind_does_not_keep_its_store",
    ),
    "bytes that cannot be forgotten stay": (
        Slab,
        "spoil",
        lambda self, slots: None,
        "test_what_was_dropped_on_a_full_disk_does_not_come_back",
    ),
    "an index that cannot forget stays": (
        DiskIndex,
        "delete",
        lambda self, reason: StoreLost(errno.ENOSPC, "it starts empty after a restart"),
        "test_where_nothing_at_all_can_be_written_the_store_starts_empty",
    ),
    "what is owed is forgotten": (
        DiskIndex,
        "_owed",
        property(lambda self: set(), lambda self, owed: None),
        "test_what_could_not_be_forgotten_is_forgotten_with_the_next_change",
    ),
    "memory of I/O in flight is used again": (
        AioQueue,
        "_abandon",
        forget_the_memory,
        "test_memory_that_the_kernel_may_still_write_to_is_used_for_nothing_else",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_of_the_product_is_seen(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    place, attribute, broken, guard = BREAKS[name]
    fixtures = {
        "store": store,
        "monkeypatch": monkeypatch,
        "caplog": caplog,
        "call": "fsync",
        "number": errno.EINTR,
        "more": 0,
        "case": "slab deleted",
    }
    test = globals()[guard]
    monkeypatch.setattr(place, attribute, broken, raising=False)
    with pytest.raises((AssertionError, StoreError, pytest.fail.Exception)):
        test(**{name: fixtures[name] for name in inspect.signature(test).parameters})
