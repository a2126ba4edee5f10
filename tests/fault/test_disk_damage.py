"""Guards that nothing which happens to a disk store, at rest or at run time, becomes a wrong byte
or stops a server: it is a miss, or an error at the start that says what to do.
"""

from __future__ import annotations

import ctypes
import errno
import inspect
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from disks import (
    NAMESPACE,
    OBJECT,
    PADDING,
    held,
    key,
    open_disk,
    put,
    read,
    slab_of,
    sound,
    used,
    write,
)
from lamina_kv.tiers.contract import Fate, StoreError
from lamina_kv.tiers.disk import heads, lock, mending
from lamina_kv.tiers.disk.aio import AioQueue
from lamina_kv.tiers.disk.data import allocate
from lamina_kv.tiers.disk.heads import Heads
from lamina_kv.tiers.disk.layout import BLOCK, GROUP, HEAD_BYTES, TABLE_BYTES, USED_BYTES, Layout
from lamina_kv.tiers.disk.lock import Watch, holder
from lamina_kv.tiers.disk.store import DiskStore

SLOTS = 4
ALL = {slot: slot for slot in range(SLOTS)}
LAYOUT = Layout(OBJECT, SLOTS)
HEADS_AT = BLOCK + GROUP * USED_BYTES
OBJECTS_AT = BLOCK + TABLE_BYTES


def only(*slots: int) -> dict[int, bool]:
    """Those slots are delivered and the others are not."""
    return {slot: slot in slots for slot in range(SLOTS)}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store in which slot *s* holds chunk *s*, closed."""
    tier = open_disk(tmp_path, SLOTS)
    put(tier, ALL)
    tier.close()
    return tmp_path


def patch_file(file: Path, at: int, change: Callable[[bytes], bytes], size: int) -> None:
    """Change ``size`` bytes of a file."""
    with file.open("r+b") as out:
        out.seek(at)
        before = out.read(size)
        out.seek(at)
        out.write(change(before))


def flip(there: bytes) -> bytes:
    return bytes([there[0] ^ 1]) + there[1:]


# -- objects ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "change", "size"),
    [
        pytest.param(10, flip, 1, id="a byte of the header"),
        pytest.param(100, flip, 1, id="a byte"),
        pytest.param(8192, lambda there: bytes(4096), 4096, id="a sector that was never written"),
        pytest.param(OBJECT - PADDING - 1, flip, 1, id="the last byte of the last row"),
    ],
)
def test_damage_to_an_object_is_a_miss_there_and_nowhere_else(
    store: Path, offset: int, change: Callable[[bytes], bytes], size: int
) -> None:
    patch_file(slab_of(store), OBJECTS_AT + OBJECT + offset, change, size)
    tier = open_disk(store, SLOTS)
    assert held(tier) == {slot: key(slot) for slot in range(SLOTS)}
    assert read(tier, ALL)[1] is Fate.CORRUPT
    assert sound(tier, ALL) == only(0, 2, 3)
    tier.close()


def test_one_slot_never_passes_for_another(store: Path) -> None:
    with slab_of(store).open("r+b") as slab:
        slab.seek(OBJECTS_AT)
        slab.write(slab.read(OBJECT))  # slot 1 now has the bytes of slot 0, where both are whole
    tier = open_disk(store, SLOTS)
    assert sound(tier, ALL) == only(0, 2, 3)
    assert sound(tier, {1: 0}) == {1: False}
    tier.close()


def test_one_rank_never_passes_for_another(store: Path) -> None:
    slab_of(store).rename(slab_of(store).with_name("rank-1.slab"))
    tier = open_disk(store, SLOTS, rank=1)
    assert set(read(tier, ALL, rank=1).values()) == {Fate.CORRUPT}
    tier.close()


def test_a_slab_cut_short_keeps_what_is_left_and_says_so(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(slab_of(store), OBJECTS_AT + OBJECT + 5000)
    tier = open_disk(store, SLOTS)
    assert held(tier) == {0: key(0)}
    assert "was cut short: 3 chunks are known to be lost" in caplog.text
    put(tier, {3: 7})
    tier.close()
    caplog.clear()
    tier = open_disk(store, SLOTS)
    assert sound(tier, {0: 0, 3: 7}) == {0: True, 3: True}
    assert held(tier) == {0: key(0), 3: key(7)}
    assert caplog.text == ""
    tier.close()


@pytest.mark.parametrize("left", [0, 100, BLOCK, HEADS_AT + 64])
def test_a_slab_cut_to_less_than_its_tables_is_empty(
    store: Path, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(slab_of(store), left)
    tier = open_disk(store, SLOTS)
    assert held(tier) == {}
    assert ("was cut short" in caplog.text) == (left > 0)
    put(tier, ALL)
    assert all(sound(tier, ALL).values())
    tier.close()


def test_without_its_slab_a_store_is_empty(store: Path) -> None:
    slab_of(store).unlink()
    tier = open_disk(store, SLOTS)
    assert held(tier) == {}
    put(tier, {0: 7})
    assert sound(tier, {0: 7}) == {0: True}
    tier.close()


def test_a_slab_cut_short_at_run_time_is_a_miss_and_said_once(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_disk(store, SLOTS)
    os.truncate(slab_of(store), OBJECTS_AT + 2 * OBJECT + 4096)
    assert read(tier, ALL) == {0: Fate.DONE, 1: Fate.DONE, 2: Fate.GONE, 3: Fate.GONE}
    assert read(tier, {3: 3}) == {3: Fate.GONE}
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "cannot be read" in warning
    tier.close()


@pytest.mark.parametrize(("error", "fate"), [(errno.EIO, Fate.GONE), (errno.EAGAIN, Fate.DOWN)])
def test_an_unreadable_sector_is_a_miss_of_its_chunk(
    store: Path, monkeypatch: pytest.MonkeyPatch, error: int, fate: Fate
) -> None:
    """A machine that is short of something now has lost nothing."""
    run = AioQueue.run

    def flaky(self: AioQueue, *arguments: object) -> np.ndarray:
        failed = run(self, *arguments)  # type: ignore[arg-type]
        failed[1] = error
        return failed

    tier = open_disk(store, SLOTS)
    monkeypatch.setattr(AioQueue, "run", flaky)
    assert read(tier, ALL) == {0: Fate.DONE, 1: fate, 2: Fate.DONE, 3: Fate.DONE}
    tier.close()


# -- heads -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like ``store``, to be copied and never changed."""
    path = tmp_path_factory.mktemp("pristine")
    tier = open_disk(path, SLOTS)
    put(tier, ALL)
    tier.close()
    return path


@settings(max_examples=60, deadline=None)
@example(at=0, damage=b"not a slab at all")
@example(at=0, damage=bytes(OBJECTS_AT))
@example(at=0, damage=b"\xff" * OBJECTS_AT)
@example(at=BLOCK, damage=b"\xff" * 64)
@example(at=HEADS_AT, damage=b"\xff" * 64)
@given(
    at=st.one_of(
        st.integers(0, OBJECTS_AT),
        st.integers(BLOCK, BLOCK + SLOTS * USED_BYTES),
        st.integers(HEADS_AT, HEADS_AT + SLOTS * HEAD_BYTES),
    ),
    damage=st.binary(min_size=1, max_size=300),
)
def test_any_damage_to_the_tables_costs_at_most_what_was_stored(
    pristine: Path, at: int, damage: bytes
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        shutil.copytree(pristine, store)
        patch_file(slab_of(store), at, lambda there: damage, 0)
        tier = open_disk(store, SLOTS)
        assert set(held(tier).items()) <= {(slot, key(slot)) for slot in range(SLOTS)}
        assert all(0 <= when <= time.time() for when in used(tier).values())
        sound(tier, ALL)
        put(tier, {0: 9, 3: 8})
        assert sound(tier, {0: 9, 3: 8}) == {0: True, 3: True}
        tier.close()


def test_a_damaged_head_costs_its_chunk_and_is_said_once(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    patch_file(slab_of(store), HEADS_AT + 2 * HEAD_BYTES + 5, flip, 1)
    tier = open_disk(store, SLOTS)
    assert sound(tier, ALL) == only(0, 1, 3)
    assert "has damaged heads" in caplog.text
    tier.close()
    caplog.clear()
    tier = open_disk(store, SLOTS)
    assert sorted(held(tier)) == [0, 1, 3]
    assert caplog.text == ""
    tier.close()


def test_tables_that_cannot_be_read_cost_what_they_name(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = AioQueue.run

    def unreadable(self: AioQueue, operation: int, *arguments: object) -> np.ndarray:
        failed = run(self, operation, *arguments)  # type: ignore[arg-type]
        return failed if operation else np.full_like(failed, errno.EIO)

    with monkeypatch.context() as patch:
        patch.setattr(AioQueue, "run", unreadable)
        tier = open_disk(store, SLOTS)
    assert held(tier) == {}
    assert "has damaged heads" in caplog.text
    put(tier, {0: 7})
    assert sound(tier, {0: 7}) == {0: True}
    tier.close()


def test_a_damaged_label_costs_nothing(store: Path) -> None:
    patch_file(slab_of(store), 0, lambda there: bytes(BLOCK), BLOCK)
    tier = open_disk(store, SLOTS)
    assert all(sound(tier, ALL).values())
    tier.close()


def test_heads_of_an_earlier_time_never_deliver_what_came_later(store: Path) -> None:
    earlier = slab_of(store).read_bytes()[:OBJECTS_AT]
    tier = open_disk(store, SLOTS)
    put(tier, {0: 5})
    tier.close()
    patch_file(slab_of(store), 0, lambda there: earlier, 0)
    tier = open_disk(store, SLOTS)
    assert sound(tier, ALL) == only(1, 2, 3)
    assert sound(tier, {0: 5}) == {0: False}
    tier.close()


def test_heads_in_the_wrong_slots_name_nothing(store: Path) -> None:
    patch_file(
        slab_of(store),
        HEADS_AT,
        lambda there: there[HEAD_BYTES:] + there[:HEAD_BYTES],
        2 * HEAD_BYTES,
    )
    tier = open_disk(store, SLOTS)
    assert sorted(held(tier)) == [2, 3]
    tier.close()


# -- crashes ---------------------------------------------------------------------------------------


def killed_after(store: Path, work: Callable[[DiskStore], None]) -> None:
    """Let another process open the store and do some work, and kill it without warning."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()

    def serve() -> None:
        tier = open_disk(store, SLOTS)
        work(tier)
        ready.set()
        signal.pause()

    server = fork.Process(target=serve)
    server.start()
    assert ready.wait(60)
    server.kill()
    server.join()


def test_what_was_written_survives_a_kill(tmp_path: Path) -> None:
    def work(tier: DiskStore) -> None:
        put(tier, {0: 1, 1: 2})
        put(tier, {0: 3})

    killed_after(tmp_path, work)
    tier = open_disk(tmp_path, SLOTS)
    assert held(tier) == {0: key(3), 1: key(2)}
    assert sound(tier, {0: 3, 1: 2}) == {0: True, 1: True}
    tier.close()


@pytest.mark.parametrize("cut", ["objects", "heads"])
def test_a_kill_within_a_batch_leaves_misses_and_nothing_wrong(
    store: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """Whichever half of a chunk has reached the disk: its object, or its head."""

    def work(tier: DiskStore) -> None:
        def stop(*arguments: object) -> NoReturn:
            raise KeyboardInterrupt

        if cut == "objects":
            monkeypatch.setattr(Heads, "enter", stop)
        else:
            zeros = np.zeros(2, np.int32)
            monkeypatch.setattr(tier._slab, "move_objects", lambda *arguments: zeros)
            monkeypatch.setattr(tier._slab, "sync", stop)
        with pytest.raises(KeyboardInterrupt):
            write(tier, {0: 8, 1: 9})

    killed_after(store, work)
    monkeypatch.undo()
    tier = open_disk(store, SLOTS)
    if cut == "objects":
        assert set(held(tier)) == {2, 3}, "a kill leaves no head of what is overwritten"
    assert sound(tier, ALL) == only(2, 3)
    assert sound(tier, {0: 8, 1: 9}) == {0: False, 1: False}
    put(tier, {0: 8})
    assert sound(tier, {0: 8}) == {0: True}
    tier.close()


def test_a_batch_costs_one_sync_and_that_has_objects_and_heads(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fdatasync = os.fdatasync
    synced = []

    def watched(file: int) -> None:
        fdatasync(file)
        slab = slab_of(store).read_bytes()
        synced.append((key(70) in slab[:OBJECTS_AT], slab[OBJECTS_AT:].count(key(70)), held(tier)))

    tier = open_disk(store, SLOTS)
    monkeypatch.setattr(os, "fdatasync", watched)
    put(tier, {0: 70, 1: 71})
    assert synced == [(True, 1, {2: key(2), 3: key(3)})]
    assert set(held(tier)) == {0, 1, 2, 3}
    tier.close()


def test_a_kill_loses_at_most_a_minute_of_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1_000, 2_000))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))

    def work(tier: DiskStore) -> None:
        put(tier, {0: 1})
        put(tier, {1: 2})
        tier.touch([(key(1), 0)])
        late = time.monotonic() + heads.RECENCY_SECONDS
        monkeypatch.setattr("time.monotonic", lambda: late)
        put(tier, {2: 3})
        tier.touch([(key(2), 1)])

    killed_after(tmp_path, work)
    monkeypatch.undo()
    tier = open_disk(tmp_path, SLOTS)
    when = used(tier)
    assert when[1] < when[0] < when[2]
    tier.close()


# -- the start -------------------------------------------------------------------------------------


def test_a_second_server_is_refused_with_the_pid_of_the_first(store: Path) -> None:
    tier = open_disk(store, SLOTS)
    with pytest.raises(
        StoreError, match=rf"tiers\.disk\.path: .* in use by process {os.getpid()}.*own"
    ):
        open_disk(store, SLOTS)
    tier.close()
    tier.close()
    open_disk(store, SLOTS).close()


def test_a_server_that_was_killed_does_not_keep_its_store(tmp_path: Path) -> None:
    killed_after(tmp_path, lambda tier: None)
    open_disk(tmp_path, SLOTS).close()


def left_behind(store: Path, fork: Callable[[], int]) -> tuple[int, int]:
    """A server that has opened the store and was killed, and a child of it that lives on."""
    processes = multiprocessing.get_context("fork")
    child, ready = processes.Value("i"), processes.Event()

    def serve() -> None:
        tier = open_disk(store, SLOTS)
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
        open_disk(store, SLOTS).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_that_keeps_a_store_all_the_same_is_named(store: Path) -> None:
    """A library that forks does not ask Python first."""
    server, child = left_behind(store, ctypes.PyDLL(None).fork)
    try:
        with pytest.raises(
            StoreError, match=rf"process {server}, which has ended, .* locked by process {child} "
        ):
            open_disk(store, SLOTS)
        assert holder(store, 0) == str(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_failed_start_gives_the_store_back(store: Path) -> None:
    with pytest.raises(StoreError):
        open_disk(store, 1 << 40)
    open_disk(store, SLOTS).close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"format": "lamina disk store", "version": 1}), "version 1, .*lamina-kv clear"),
        (json.dumps({"format": "lamina disk store", "version": 7}), "version 7, .*lamina-kv clear"),
        (json.dumps({"format": "lamina disk store"}), "damaged: delete that file"),
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
        open_disk(store, SLOTS)
    assert {path: path.stat().st_size for path in store.rglob("*")} == before


def test_a_slab_of_the_first_version_is_never_taken_for_one_of_this(tmp_path: Path) -> None:
    """Somebody has deleted the file that says which version it is."""
    slab = tmp_path / NAMESPACE / "rank-0.slab"
    slab.parent.mkdir()
    slab.write_bytes(np.random.default_rng(0).bytes(SLOTS * OBJECT))
    tier = open_disk(tmp_path, SLOTS)
    assert held(tier) == {}
    put(tier, ALL)
    assert all(sound(tier, ALL).values())
    tier.close()


def test_a_path_that_cannot_be_written_to_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "store", Path("/proc/lamina")):
        with pytest.raises(StoreError, match=r"tiers\.disk\.path: cannot make a store in"):
            open_disk(path, SLOTS)


def test_a_kernel_without_asynchronous_io_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamina_kv.tiers.disk.aio._SETUP", 9999)
    with pytest.raises(StoreError, match=r"no asynchronous I/O .*: allow io_setup"):
        open_disk(tmp_path, SLOTS)


def test_a_kernel_that_has_no_more_queues_makes_a_miss_and_loses_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_disk(store, SLOTS)
    run = AioQueue.run
    inside: list[dict[int, Fate]] = []

    def meanwhile(self: AioQueue, *arguments: object) -> np.ndarray:
        monkeypatch.setattr(AioQueue, "run", run)
        monkeypatch.setattr("lamina_kv.tiers.disk.aio._SETUP", 9999)
        inside.append(read(tier, {0: 0}))  # the only queue is taken, and there is no other
        return run(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(AioQueue, "run", meanwhile)
    assert sound(tier, {1: 1}) == {1: True}
    assert inside == [{0: Fate.DOWN}]
    assert sound(tier, {0: 0}) == {0: True}
    tier.close()


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)


def test_more_than_the_disk_has_is_refused_before_anything_is_lost(store: Path) -> None:
    with pytest.raises(StoreError, match=r"tiers\.disk\.capacity: .* free, and"):
        open_disk(store, 1 << 40)
    tier = open_disk(store, SLOTS)
    assert all(sound(tier, ALL).values())
    tier.close()


@pytest.mark.usefixtures("no_room")
def test_a_disk_that_is_full_after_all_is_refused_and_given_back(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"tiers\.disk\.capacity: .* free, and"):
        open_disk(tmp_path, SLOTS)
    assert list(tmp_path.rglob("*.slab")) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync", "fdatasync"])
@pytest.mark.parametrize("number", [errno.EINTR, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("more", [0, 1])
def test_no_call_that_fails_at_the_start_takes_away_what_is_stored(
    store: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, more: int
) -> None:
    """Of the same capacity, or a larger one that the disk does not grant."""
    with monkeypatch.context() as patch:
        patch.setattr(os, call, lambda *arguments: fail(number))
        with pytest.raises(StoreError, match=r"disk\.(path|capacity): .*(cannot|free, and)"):
            open_disk(store, SLOTS + more)
    tier = open_disk(store, SLOTS)
    assert all(sound(tier, ALL).values())
    tier.close()


def fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("left", [None, OBJECTS_AT + OBJECT])
def test_a_start_that_dies_when_a_lost_slab_is_whole_again_delivers_nothing_of_it(
    store: Path, monkeypatch: pytest.MonkeyPatch, left: int | None
) -> None:
    slab = slab_of(store)
    if left is None:
        slab.unlink()
    else:
        os.truncate(slab, left)

    def allocated_and_died(path: Path, size: int) -> bool:
        allocate(path, size)
        return fail(errno.EIO)

    with monkeypatch.context() as patch:
        patch.setattr(mending, "allocate", allocated_and_died)
        with pytest.raises(StoreError, match="cannot use"):
            open_disk(store, SLOTS)
    tier = open_disk(store, SLOTS)
    assert sound(tier, ALL) == (only() if left is None else only(0))
    tier.close()


def test_a_file_system_that_reserves_nothing_is_used_and_said(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: fail(errno.EOPNOTSUPP))
    tier = open_disk(store, SLOTS)
    assert all(sound(tier, ALL).values())
    tier.close()
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "cannot reserve space" in warning
    assert "tiers.disk.path" in warning
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


# -- files that go away ----------------------------------------------------------------------------


def replace(file: Path) -> None:
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)


GOES_AWAY = {
    "slab deleted": ("rank-0.slab", Path.unlink),
    "slab replaced": ("rank-0.slab", replace),
    "model deleted": (NAMESPACE, shutil.rmtree),
    "model moved": (NAMESPACE, lambda path: path.rename(path.with_name("cafe0123"))),
}


@pytest.mark.parametrize("case", GOES_AWAY)
def test_what_goes_away_under_a_server_is_said_once_and_nothing_is_written_any_more(
    store: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, happen = GOES_AWAY[case]
    tier = open_disk(store, SLOTS)
    (path,) = store.rglob(name)
    happen(path)
    for _ in range(2):
        assert write(tier, {0: 7}) == [Fate.DOWN]
    tier.drop([1])
    tier.touch([(key(2), 2)])
    assert sound(tier, {0: 7, 1: 1}) == {0: False, 1: False}
    assert sound(tier, {2: 2}) == {2: True}
    assert not tier.probe(10.0), "it will not be written to again"
    tier.close()
    (warning,) = [r for r in caplog.records if "while this server uses" in r.getMessage()]
    assert name in warning.getMessage()
    assert "start the server again" in warning.getMessage()


def test_what_goes_away_while_it_is_written_is_no_chunk(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fdatasync = os.fdatasync

    def and_gone(file: int) -> None:
        fdatasync(file)
        shutil.rmtree(store)

    tier = open_disk(store, SLOTS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", and_gone)
        assert write(tier, {0: 7}) == [Fate.DOWN]
    assert sound(tier, {0: 7}) == {0: False}
    tier.close()


@pytest.mark.parametrize("happen", [Path.unlink, replace])
def test_a_lock_file_that_a_cleaner_deletes_is_made_anew(
    store: Path, happen: Callable[[Path], None]
) -> None:
    tier = open_disk(store, SLOTS)
    happen(store / "rank-0.lock")
    put(tier, {0: 7})
    tier.drop([1])
    with pytest.raises(StoreError, match="in use by process"):
        open_disk(store, SLOTS)
    tier.close()
    again = open_disk(store, SLOTS)
    assert held(again) == {0: key(7), 2: key(2), 3: key(3)}
    again.close()


def test_of_two_servers_that_a_lost_lock_let_in_the_first_leaves_the_store_alone(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_disk(store, SLOTS)
    (store / "rank-0.lock").unlink()
    second = open_disk(store, SLOTS)
    put(second, {0: 8})
    before = slab_of(store).read_bytes()
    assert write(first, {0: 7}) == [Fate.DOWN]
    assert "rank-0.lock was deleted" in caplog.text
    assert "in use by process" in caplog.text
    first.drop([0, 1])
    first.touch([(key(2), 2)])
    first.close()
    assert slab_of(store).read_bytes() == before
    second.close()
    third = open_disk(store, SLOTS)
    assert sound(third, ALL | {0: 8}) == only(0, 1, 2, 3)
    third.close()


# -- I/O without an end ----------------------------------------------------------------------------


def test_a_kernel_that_says_nothing_of_io_loses_a_queue_and_no_chunk(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_disk(store, SLOTS)
    with monkeypatch.context() as patch:
        patch.setattr("lamina_kv.tiers.disk.aio._GETEVENTS", 9999)
        assert read(tier, {0: 0}) == {0: Fate.DOWN}
        assert write(tier, {1: 7}) == [Fate.DOWN]
    assert "does not say what became of I/O in flight" in caplog.text
    assert sound(tier, {0: 0, 2: 2}) == {0: True, 2: True}
    put(tier, {1: 7})
    assert sound(tier, {1: 7}) == {1: True}
    tier.close()


def test_a_call_does_not_return_while_the_kernel_may_use_its_memory(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lamina_kv.tiers.disk.aio._RETRY", 0.01)
    tier = open_disk(store, SLOTS)
    found: list[dict[int, Fate]] = []
    reader = threading.Thread(target=lambda: found.append(read(tier, {0: 0})))
    with monkeypatch.context() as patch:
        patch.setattr("lamina_kv.tiers.disk.aio._GETEVENTS", 9999)
        patch.setattr("lamina_kv.tiers.disk.aio._DESTROY", 9999)
        reader.start()
        reader.join(0.3)
        assert reader.is_alive()
        assert found == []
    reader.join(10)
    assert found == [{0: Fate.DOWN}]
    assert caplog.text.count("a thread and its memory wait for it") == 1
    assert sound(tier, {0: 0}) == {0: True}
    tier.close()


# -- writing and forgetting ------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, OBJECTS_AT + OBJECT // 2, OBJECTS_AT + OBJECT])
def test_a_write_that_the_disk_refuses_or_takes_in_part_is_no_chunk(
    store: Path, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_disk(store, SLOTS)
    with file_size_limit(limit):
        fates = write(tier, {0: 7, 1: 8})
        assert fates == write(tier, {0: 7, 1: 8})
    whole = limit >= OBJECTS_AT + OBJECT
    assert fates == [Fate.DONE if whole else Fate.REFUSED, Fate.REFUSED]
    assert sound(tier, {0: 7, 1: 8}) == {0: whole, 1: False}
    assert sound(tier, ALL) == only(2, 3)
    put(tier, {0: 7})
    assert sound(tier, {0: 7}) == {0: True}
    tier.close()
    assert caplog.text.count("cannot be written (File too large)") == 1


def test_a_write_that_a_full_disk_refuses_costs_no_more_than_that(store: Path) -> None:
    def work(tier: DiskStore) -> None:
        with file_size_limit(0):
            assert write(tier, {0: 7}) == [Fate.REFUSED]
        put(tier, {1: 7})

    killed_after(store, work)
    tier = open_disk(store, SLOTS)
    assert held(tier) == {1: key(7), 2: key(2), 3: key(3)}
    assert sound(tier, {1: 7, 2: 2, 3: 3}) == {1: True, 2: True, 3: True}
    tier.close()


def test_bytes_that_do_not_become_durable_are_no_chunk(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_disk(store, SLOTS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda file: fail(errno.EIO))
        assert write(tier, {0: 7}) == [Fate.DOWN]
    assert sound(tier, {0: 7}) == {0: False}
    tier.close()
    tier = open_disk(store, SLOTS)
    assert set(held(tier)) == {1, 2, 3}
    tier.close()


def test_heads_that_cannot_be_written_are_no_chunks(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_disk(store, SLOTS)
    with monkeypatch.context() as patch:
        patch.setattr(Heads, "write", lambda self, slots=None: errno.EIO)
        assert write(tier, {0: 7}) == [Fate.DOWN]
    assert sound(tier, {0: 7, 1: 1}) == {0: False, 1: True}
    put(tier, {0: 7})
    assert sound(tier, {0: 7}) == {0: True}
    tier.close()


def test_a_slot_that_could_not_be_dropped_on_the_disk_is_dropped_with_the_next_change(
    store: Path,
) -> None:
    """Until then it comes back after a kill, and only what verifies is delivered."""

    def drop_in_vain(tier: DiskStore) -> None:
        with file_size_limit(0):
            tier.drop([0])
        assert sound(tier, ALL) == only(1, 2, 3)

    def drop_and_write(tier: DiskStore) -> None:
        drop_in_vain(tier)
        put(tier, {3: 7})

    killed_after(store, drop_in_vain)
    tier = open_disk(store, SLOTS)
    assert set(held(tier)) == {0, 1, 2, 3}
    tier.close()
    killed_after(store, drop_and_write)
    tier = open_disk(store, SLOTS)
    assert set(held(tier)) == {1, 2, 3}
    tier.close()


# -- would these tests see it? ---------------------------------------------------------------------


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


def give_up(self: AioQueue, error: int) -> NoReturn:
    raise OSError(error, "the kernel does not say what became of I/O in flight")


class Nothing(set[object]):
    """A set that keeps nothing."""

    def add(self, element: object) -> None:
        pass


BREAKS: dict[str, tuple[object, str, object, str]] = {
    "a call that fails deletes the slab": (
        mending,
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
    "nobody looks once a batch is durable": (
        DiskStore,
        "_is_there",
        lambda self: True,
        "test_what_goes_away_while_it_is_written_is_no_chunk",
    ),
    "a lost lock is not looked at": (
        Watch,
        "check",
        lambda self: None,
        "test_of_two_servers_that_a_lost_lock_let_in_the_first_leaves_the_store_alone",
    ),
    "a child keeps the lock": (
        lock,
        "_held",
        Nothing(),
        "test_a_child_that_a_server_leaves_behind_does_not_keep_its_store",
    ),
    "a batch is not synced": (
        DiskStore,
        "_commit",
        lambda self, slots: self._heads.write(slots),
        "test_a_batch_costs_one_sync_and_that_has_objects_and_heads",
    ),
    "heads are found before they are durable": (
        Heads,
        "enter",
        lambda self, slots, *rest, enter=Heads.enter: (enter(self, slots, *rest), self.show(slots)),
        "test_a_batch_costs_one_sync_and_that_has_objects_and_heads",
    ),
    "a head is good in any slot": (
        heads,
        "_SLOT_FACTOR",
        0,
        "test_heads_in_the_wrong_slots_name_nothing",
    ),
    "what is dropped stays on the disk": (
        DiskStore,
        "drop",
        lambda self, slots: self._heads._held.__setitem__(slots, False),
        "test_a_slot_that_could_not_be_dropped_on_the_disk_is_dropped_with_the_next_change",
    ),
    "memory of I/O in flight is given back": (
        AioQueue,
        "_abandon",
        give_up,
        "test_a_call_does_not_return_while_the_kernel_may_use_its_memory",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_of_the_product_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    place, attribute, broken, guard = BREAKS[name]
    monkeypatch.setattr(place, attribute, broken, raising=False)
    tier = open_disk(tmp_path, SLOTS)
    put(tier, ALL)
    tier.close()
    fixtures = {
        "store": tmp_path,
        "monkeypatch": monkeypatch,
        "caplog": caplog,
        "call": "fsync",
        "number": errno.EINTR,
        "more": 0,
        "case": "slab deleted",
    }
    test = globals()[guard]
    with pytest.raises((AssertionError, StoreError, ValueError, pytest.fail.Exception)):
        test(**{name: fixtures[name] for name in inspect.signature(test).parameters})
