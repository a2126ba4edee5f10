"""Guards ``lamina-kv sweep``: the longest unused go first, nothing else does, and one at a time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from disks import key
from lamina_kv.cli.main import app
from lamina_kv.tiers.contract import Fate
from lamina_kv.tiers.directory.layout import LEASE, temporary_beside
from lamina_kv.tiers.directory.lease import LEASE_SECONDS, Lease, LeaseLost
from lamina_kv.tiers.directory.sweeper import Limits, Swept, sweep
from lamina_kv.tiers.directory.walk import files, folders, namespaces
from lamina_kv.tiers.names import ABOUT
from shared_directory import OBJECT, Directory, file_of, put, tenant
from store_contract import Engine

PROGRAM = "from lamina_kv.cli.main import main; main()"
HOUR, DAY = 3600.0, 86_400.0


def age(file: Path, seconds: float) -> None:
    moment = time.time() - seconds
    os.utime(file, (moment, moment))


def nothing() -> None:
    """The sweep goes on."""


def swept(path: Path, go_on: Callable[[], None] = nothing, **limits: float) -> Swept:
    return sweep(path, Limits(**limits), time.time(), go_on)


def left(path: Path) -> list[int]:
    """Which of chunks 0 to 99 are there."""
    return [number for number in range(100) if file_of(path, number).exists()]


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Ten chunks; number n was used n + 1 hours ago."""
    put(tmp_path, *range(10))
    for number in range(10):
        age(file_of(tmp_path, number), (number + 1) * HOUR)
    return tmp_path


class TestWhatGoes:
    def test_the_longest_unused_go_until_the_rest_fits(self, filled: Path) -> None:
        done = swept(filled, capacity=6.4 * OBJECT)
        assert left(filled) == [0, 1, 2, 3, 4, 5]  # 95 % of 6.4
        assert (done.chunks, done.size) == (10, 10 * OBJECT)
        assert (done.freed, done.freed_size) == (4, 4 * OBJECT)
        assert done.age == pytest.approx(7 * HOUR, abs=60)

    def test_what_fits_stays(self, filled: Path) -> None:
        assert not swept(filled, capacity=10 * OBJECT).did
        assert left(filled) == list(range(10))

    def test_what_is_too_old_goes_though_there_is_room(self, filled: Path) -> None:
        assert swept(filled, max_age=4.5 * HOUR, capacity=100 * OBJECT).freed == 6
        assert left(filled) == [0, 1, 2, 3]

    def test_of_both_limits_the_stricter_one_holds(self, filled: Path) -> None:
        swept(filled, max_age=8.5 * HOUR, capacity=4 * OBJECT)
        assert left(filled) == [0, 1, 2]

    def test_of_chunks_of_the_same_second_no_more_go_than_must(self, tmp_path: Path) -> None:
        put(tmp_path, *range(10))
        moment = time.time() - HOUR
        for number in range(10):
            os.utime(file_of(tmp_path, number), (moment, moment))
        assert swept(tmp_path, capacity=8 * OBJECT).freed == 3
        assert len(left(tmp_path)) == 7

    def test_what_is_young_stays_whatever_there_is(self, filled: Path) -> None:
        put(filled, 20, 21)
        swept(filled, capacity=1)
        assert left(filled) == [20, 21]
        swept(filled, max_age=0.001)
        assert left(filled) == [20, 21]

    def test_all_namespaces_and_ranks_share_one_room(self, filled: Path) -> None:
        other, second = tenant(namespace="cd" * 16), tenant(shard=1)
        put(filled, 1, owner=other)
        put(filled, 1, owner=second)
        age(file_of(filled, 1, other), 20 * HOUR)
        age(file_of(filled, 1, second), 30 * HOUR)
        swept(filled, capacity=11.6 * OBJECT)
        assert left(filled) == list(range(10))
        assert file_of(filled, 1, other).exists()
        assert not file_of(filled, 1, second).exists()

    def test_what_is_used_between_counting_and_deleting_stays(self, filled: Path) -> None:
        looked = 0

        def go_on() -> None:
            nonlocal looked
            looked += 1
            if looked == 1 + sum(len(list(folders(str(filled / n)))) for n in namespaces(filled)):
                age(file_of(filled, 9), 0)

        swept(filled, go_on, capacity=8 * OBJECT)
        assert left(filled) == [0, 1, 2, 3, 4, 5, 6, 9]

    def test_a_prompt_loses_its_end_first_once_it_was_used(self, tmp_path: Path) -> None:
        put(tmp_path, *range(20))
        for number in range(20):  # as it was written: its beginning is the oldest
            age(file_of(tmp_path, number), 2 * HOUR - number)
        store = Directory(tmp_path).open(tenant())
        store.touch([(key(number), 0) for number in reversed(range(10))])
        store.close()
        for number in range(20):
            used = file_of(tmp_path, number).stat().st_mtime
            os.utime(file_of(tmp_path, number), (used - HOUR, used - HOUR))
        swept(tmp_path, capacity=5 * OBJECT)
        assert set(left(tmp_path)) <= set(range(10))
        assert len(left(tmp_path)) == 4


class TestWhatIsOfNoUse:
    def test_files_that_nobody_ended(self, filled: Path) -> None:
        folder = file_of(filled, 0).parent
        for there in (folder, folder.parent, filled):
            old, young = (there / temporary_beside("x") for _ in range(2))
            for file, seconds in ((old, 1.1 * HOUR), (young, 0.9 * HOUR)):
                file.write_bytes(b"half")
                age(file, seconds)
            assert swept(filled, capacity=1 << 40).unfinished == 1
            assert (old.exists(), young.exists()) == (False, True)
        assert left(filled) == list(range(10))

    def test_empty_folders_but_not_at_once(self, filled: Path) -> None:
        swept(filled, max_age=1)
        assert left(filled) == []
        folder = file_of(filled, 0).parent
        assert folder.exists(), "somebody may be about to write there"
        for each in (*filled.rglob("*"),):
            age(each, HOUR)
        assert swept(filled, max_age=1).folders == 10
        assert not folder.exists()
        (namespace,) = namespaces(filled)
        assert [each.name for each in (filled / namespace).iterdir()] == [ABOUT]
        age(filled / namespace / ABOUT, 2 * DAY)
        swept(filled, max_age=1)
        assert namespaces(filled) == []

    def test_what_is_not_laminas_stays(self, filled: Path, tmp_path_factory: object) -> None:
        elsewhere = filled.parent / f"{filled.name}-elsewhere"
        put(elsewhere, 1)
        age(file_of(elsewhere, 1), DAY)
        (filled / "ef").symlink_to(elsewhere)
        (filled / ("ef" * 16)).symlink_to(elsewhere / ("ab" * 16))
        notes = file_of(filled, 3).with_name("notes")
        notes.write_text("mine")
        age(notes, DAY)
        link = file_of(filled, 4)
        link.unlink()
        link.symlink_to(file_of(elsewhere, 1))
        os.utime(link, (0, 0), follow_symlinks=False)
        swept(filled, max_age=1)
        assert file_of(elsewhere, 1).exists()
        assert notes.read_text() == "mine"
        assert link.is_symlink()
        assert left(filled) == [4]


def fail(patch: pytest.MonkeyPatch, call: str, number: int, victim: Path) -> None:
    """Let a call of ``os`` fail for one file or folder."""
    real = getattr(os, call)

    def failing(path: Any, *arguments: Any, **keys: Any) -> Any:
        if str(path).endswith("/".join(victim.parts[-2:])):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **keys)

    patch.setattr(os, call, failing)


class Entries:
    """``os.scandir``, but one entry's status cannot be read."""

    def __init__(self, path: Any, victim: str, number: int, scandir: Any) -> None:
        self._found = scandir(path)
        self._victim, self._number = victim, number

    def __enter__(self) -> Entries:
        return self

    def __exit__(self, *_: object) -> None:
        self._found.close()

    def __iter__(self) -> Iterator[Any]:
        for entry in self._found:
            yield Unreadable(entry, self._number) if entry.name == self._victim else entry


class Unreadable:
    def __init__(self, entry: os.DirEntry[str], number: int) -> None:
        self.name, self.path, self._number = entry.name, entry.path, number

    def is_file(self, **_: object) -> bool:
        raise OSError(self._number, os.strerror(self._number), self.path)

    is_dir = is_file


class TestWhatFails:
    """One bad file or folder must not let the rest of the directory fill up."""

    @pytest.mark.parametrize("number", [errno.EBUSY, errno.EIO, errno.ESTALE, errno.EACCES])
    def test_a_file_that_cannot_be_deleted_stays_and_the_rest_goes(
        self, filled: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        fail(monkeypatch, "unlink", number, file_of(filled, 3))
        done = swept(filled, max_age=1)
        assert left(filled) == [3]
        assert (done.freed, done.kept, done.unread) == (9, 1, 0)
        code, output = lamina(filled, "--max-age", "1s", "--once")
        assert code == 0
        assert f"not deleted: 1 files; not read: 0 files or folders ({os.strerror(number)})" in (
            output
        )

    @pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOTDIR])
    def test_a_folder_that_cannot_be_read_stays_and_the_rest_goes(
        self, filled: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        fail(monkeypatch, "scandir", number, file_of(filled, 3).parent)
        done = swept(filled, max_age=1)
        assert left(filled) == [3]
        assert (done.chunks, done.freed, done.kept, done.unread) == (9, 9, 0, 1)
        assert done.did
        _, output = lamina(filled, "--max-age", "1s", "--once")
        assert f"not read: 1 files or folders ({os.strerror(number)})" in output

    @pytest.mark.parametrize("which", ["file", "folder"])
    def test_an_entry_without_a_status_stays_and_the_rest_goes(
        self, filled: Path, monkeypatch: pytest.MonkeyPatch, which: str
    ) -> None:
        put(filled, 3, owner=tenant(shard=1))  # beside it, in the same folder
        beside = file_of(filled, 3, tenant(shard=1))
        age(beside, DAY)
        victim = file_of(filled, 3) if which == "file" else beside.parent
        real = os.scandir
        monkeypatch.setattr(
            os, "scandir", lambda path: Entries(path, victim.name, errno.ESTALE, real)
        )
        done = swept(filled, max_age=1)
        assert left(filled) == [3]
        assert beside.exists() == (which == "folder")
        assert done.unread == 1

    @pytest.mark.parametrize("call", ["unlink", "scandir"])
    def test_a_server_that_is_away_ends_the_sweep(
        self, filled: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        file = file_of(filled, 3)
        victim = file if call == "unlink" else file.parent
        fail(monkeypatch, call, errno.ENOTCONN, victim)
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            swept(filled, max_age=1)


class TestWhoSweeps:
    @pytest.fixture
    def root(self, filled: Path) -> int:
        return os.open(filled, os.O_PATH)

    def test_one_at_a_time(self, root: int) -> None:
        first, second = Lease(), Lease()
        assert first.take(root)
        assert first.take(root)
        assert not second.take(root)
        assert str(os.getpid()) in second.holder
        first.release(root)
        assert second.take(root)
        second.now(root)

    def test_a_lease_that_nobody_renews_is_taken_over(self, filled: Path, root: int) -> None:
        first, second = Lease(), Lease()
        assert first.take(root)
        age(filled / LEASE, LEASE_SECONDS - 10)
        assert not second.take(root)
        first.now(root)
        age(filled / LEASE, LEASE_SECONDS + 10)
        assert second.take(root)
        with pytest.raises(LeaseLost):
            first.now(root)
        first.release(root)
        second.now(root)  # still its own

    def test_renewing_tells_the_servers_time(self, filled: Path, root: int) -> None:
        lease = Lease()
        lease.take(root)
        age(filled / LEASE, 50)
        assert lease.now(root) == pytest.approx(time.time(), abs=5)
        assert (filled / LEASE).stat().st_mtime == pytest.approx(time.time(), abs=5)


def lamina(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["sweep", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


class TestCommand:
    def test_says_what_it_did(self, filled: Path) -> None:
        code, output = lamina(filled, "--capacity", "78KiB", "--once")
        assert code == 0
        assert f"{filled}: 10 chunks, 120 KiB; freed 4, 48 KiB, unused for 7 h or longer" in output
        assert left(filled) == [0, 1, 2, 3, 4, 5]
        assert not (filled / LEASE).exists()
        code, output = lamina(filled, "--capacity", "1TiB", "--max-age", "3.5h", "--once")
        assert (code, left(filled)) == (0, [0, 1, 2])
        code, output = lamina(filled, "--capacity", "1TiB", "--once")
        assert "3 chunks, 36 KiB; freed none" in output

    def test_leaves_it_to_who_does_it_already(self, filled: Path) -> None:
        root = os.open(filled, os.O_PATH)
        lease = Lease()
        assert lease.take(root)
        code, output = lamina(filled, "--max-age", "1s", "--once")
        assert code == 0
        assert "sweeps it, nothing is done" in output
        assert left(filled) == list(range(10))
        lease.now(root)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ([], "--capacity SIZE, --max-age AGE"),
            (["--capacity", "1TB"], '"1TiB"'),
            (["--max-age", "soon"], '"7d"'),
        ],
    )
    def test_wrong_arguments(self, filled: Path, arguments: list[str], said: str) -> None:
        code, output = lamina(filled, "--once", *arguments)
        assert (code, said in output) == (1, True)
        assert left(filled) == list(range(10))

    def test_a_directory_that_is_not_laminas(self, tmp_path: Path) -> None:
        victim = tmp_path / ("ab" * 16) / "aa" / f"{'aabb' * 10}.0"
        victim.parent.mkdir(parents=True)
        victim.write_text("mine")
        age(victim, DAY)
        code, output = lamina(tmp_path, "--max-age", "1s", "--once")
        assert (code, "is not a shared directory" in output) == (1, True)
        assert victim.exists()
        assert lamina(tmp_path / "none", "--max-age", "1s", "--once")[0] == 1

    def test_a_signal_ends_it(self, filled: Path) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "sweep", str(filled), "--max-age", "4.5h"],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert "freed 6" in process.stdout.readline()
            assert (filled / LEASE).exists()
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
        assert not (filled / LEASE).exists()


def test_readers_lose_what_is_swept_and_nothing_else(tmp_path: Path) -> None:
    put(tmp_path, *range(60))
    for number in range(60):
        age(file_of(tmp_path, number), HOUR + number)
    engine = Engine(Directory(tmp_path).open(tenant()), tenant())
    seen: list[list[Fate]] = []
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: [seen.append(engine.read(range(60))) for _ in range(10)])
        for capacity in range(50, 0, -10):
            swept(tmp_path, capacity=capacity * OBJECT)
        reading.result()
    engine.store.close()
    assert {fate for fates in seen for fate in fates} <= {Fate.DONE, Fate.GONE}
    there = left(tmp_path)
    assert there == list(range(len(there)))
    assert engine.read(there) == [Fate.DONE] * len(there)


def test_the_walk_sees_what_the_store_writes(filled: Path) -> None:
    (namespace,) = namespaces(filled)
    found = [file for folder in folders(str(filled / namespace)) for file in files(folder)]
    assert {file.chunk for file in found} == {(key(number), 0) for number in range(10)}
