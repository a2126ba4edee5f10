"""Guards a shared directory's tier against what goes wrong: full, unmounted, damaged, killed, hung.

Real file systems: tmpfs and bind mounts where root may mount, JuiceFS by FUSE for mounts that hang.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from disks import key
from lamina_kv.tiers import open_audit
from lamina_kv.tiers.contract import Fate, StoreError
from lamina_kv.tiers.directory import root
from lamina_kv.tiers.directory.layout import FORMAT_NAME, MARKER
from lamina_kv.tiers.directory.sweeper import Limits, sweep
from shared_directory import OBJECT, Directory, file_of, open_engine, put
from store_contract import TIMEOUT, Backing, StoreContract

Mount = Callable[..., None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mounts something, as ``mount`` would; unmounted at the end of the test."""
    mounted: list[str] = []

    def mount(*arguments: object) -> None:
        words = list(map(str, arguments))
        done = subprocess.run(["mount", *words], check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this user may not mount: {done.stderr.strip()}")
        mounted.append(words[-1])

    yield mount
    for path in reversed(mounted):
        subprocess.run(["umount", "-l", path], check=False, capture_output=True)


def unmount(path: Path) -> None:
    subprocess.run(["umount", str(path)], check=True)


def unfinished(path: Path) -> list[Path]:
    return list(path.rglob(".lamina-*"))


class TestSpace:
    def test_a_full_file_system_refuses_and_goes_on_when_there_is_room(
        self, tmp_path: Path, mount: Mount, caplog: pytest.LogCaptureFixture
    ) -> None:
        mount("-t", "tmpfs", "-o", "size=160k", "tmpfs", tmp_path)
        engine = open_engine(tmp_path)
        fates = engine.write(range(20))
        stored = fates.count(Fate.DONE)
        assert 1 < stored < 20
        assert fates == [Fate.DONE] * stored + [Fate.REFUSED] * (20 - stored)
        assert engine.read(range(20)) == [Fate.DONE] * stored + [Fate.GONE] * (20 - stored)
        assert not unfinished(tmp_path)
        assert sum("No space left" in line and "sweep" in line for line in caplog.messages) == 1
        sweep(tmp_path, Limits(max_age=1), time.time() + 3600, lambda: None)
        assert engine.write([50]) == [Fate.DONE]
        engine.store.close()

    def test_a_read_only_mount_is_read(self, tmp_path: Path, mount: Mount) -> None:
        put(tmp_path, 1, 2)
        mount("--bind", "-o", "ro", tmp_path, tmp_path)
        subprocess.run(["mount", "-o", "remount,bind,ro", tmp_path], check=True)
        with pytest.raises(StoreError, match=r"tiers\.directory\.path: .*Read-only"):
            open_engine(tmp_path)
        engine = open_engine(tmp_path, keep="nothing")
        assert engine.read([1, 2, 3]) == [Fate.DONE, Fate.DONE, Fate.GONE]
        assert engine.find([1, 3]) == [True, False]
        assert engine.write([3]) == [Fate.REFUSED]
        engine.store.touch([(key(1), 0)])
        engine.store.close()


class TestMounts:
    def test_nothing_is_written_below_a_mount_that_is_gone(
        self, tmp_path: Path, mount: Mount, caplog: pytest.LogCaptureFixture
    ) -> None:
        share, path = tmp_path / "share", tmp_path / "path"
        share.mkdir()
        path.mkdir()
        mount("-t", "tmpfs", "tmpfs", share)
        mount("--bind", share, path)
        engine = open_engine(path)
        engine.put(1, 2)
        unmount(path)
        assert engine.read([1]) == [Fate.DOWN]
        assert engine.write([3, 4]) == [Fate.DOWN] * 2
        assert engine.store.find([key(1)], TIMEOUT) is None
        engine.store.touch([(key(1), 0)])
        assert list(path.iterdir()) == []
        assert sum("not the directory that it was" in line for line in caplog.messages) == 1
        mount("--bind", share, path)
        assert engine.read([1, 2, 3]) == [Fate.DONE, Fate.DONE, Fate.GONE]
        engine.put(3)
        assert any("is there again" in line for line in caplog.messages)
        engine.store.close()

    def test_another_directory_in_its_place_is_not_used(self, tmp_path: Path, mount: Mount) -> None:
        path = tmp_path / "path"
        path.mkdir()
        mount("-t", "tmpfs", "tmpfs", path)
        engine = open_engine(path)
        engine.put(1)
        mount("-t", "tmpfs", "tmpfs", path)
        put(path, 1)
        assert engine.read([1]) == [Fate.DOWN]
        assert engine.write([2]) == [Fate.DOWN]
        assert not file_of(path, 2).exists()
        engine.store.close()

    def test_one_that_was_emptied_is_filled_again(self, tmp_path: Path) -> None:
        path = tmp_path / "path"
        engine = open_engine(path)
        engine.put(1)
        path.rename(tmp_path / "away")
        assert engine.read([1]) == [Fate.DOWN]
        path.mkdir()
        assert engine.read([1]) == [Fate.GONE]
        engine.put(1)
        other = open_engine(path)
        assert other.read([1]) == [Fate.DONE]
        other.store.close()
        engine.store.close()

    def test_one_that_was_emptied_can_be_swept_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = open_engine(tmp_path)
        engine.put(1)
        for each in tmp_path.iterdir():
            shutil.rmtree(each) if each.is_dir() else each.unlink()
        monkeypatch.setattr(root, "LOOK_SECONDS", 0.0)
        engine.put(1)
        with closing(open_audit(str(tmp_path))) as audit:
            (part,) = audit.parts()
        assert (part.chunks, part.description["model"]) == (1, "tiny")
        engine.store.close()

    def test_a_disk_store_in_its_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(root, "LOOK_SECONDS", 0.0)
        path = tmp_path / "path"
        engine = open_engine(path)
        engine.put(1)
        shutil.rmtree(path)
        path.mkdir()
        (path / "lamina-store.json").write_text("{}")
        assert engine.read([1]) == [Fate.DOWN]
        assert engine.write([2]) == [Fate.DOWN]
        assert engine.store.find([key(1)], TIMEOUT) is None
        assert [each.name for each in path.iterdir()] == ["lamina-store.json"]
        engine.store.close()

    def test_the_machines_own_disk_is_worth_a_word(
        self, tmp_path: Path, mount: Mount, caplog: pytest.LogCaptureFixture
    ) -> None:
        mount("-t", "tmpfs", "tmpfs", tmp_path)
        open_engine(tmp_path / "a").store.close()
        assert not caplog.messages
        if tmp_path.parent.stat().st_dev == os.stat("/").st_dev:
            open_engine(tmp_path.parent / f"{tmp_path.name}-own").store.close()
            assert "own disk" in caplog.text


class TestWrongDirectories:
    def test_a_parent_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"tiers\.directory\.path: .*mount the shared"):
            open_engine(tmp_path / "mnt" / "lamina")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            (MARKER, "{}", "not a shared directory"),
            (MARKER, "\0", "not a shared directory"),
            (MARKER, f'{{"format": "{FORMAT_NAME}", "version": 9, "id": "x"}}', "version 9"),
            ("lamina-store.json", "{}", "kind `disk`"),
        ],
    )
    def test_a_directory_of_something_else(
        self, tmp_path: Path, name: str, content: str, said: str
    ) -> None:
        (tmp_path / name).write_text(content)
        with pytest.raises(StoreError, match=said):
            open_engine(tmp_path)
        assert [each.name for each in tmp_path.iterdir()] == [name]

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(StoreError, match=r"tiers\.directory\.path"):
            open_engine(tmp_path / "file")


class TestDamage:
    @pytest.mark.parametrize("length", [0, 100, OBJECT - 1, OBJECT, OBJECT + 1])
    def test_what_is_damaged_is_replaced_when_it_is_written_again(
        self, tmp_path: Path, length: int
    ) -> None:
        engine = open_engine(tmp_path)
        engine.put(1)
        file = file_of(tmp_path, 1)
        content = bytearray(file.read_bytes() + b"x")[:length]
        if length == OBJECT:  # as a crash of the server leaves it: the length is right
            content[4096:] = bytes(OBJECT - 4096)
        file.write_bytes(content)
        assert engine.read([1]) == [Fate.CORRUPT]
        engine.put(1)
        assert engine.read([1]) == [Fate.DONE]
        assert not unfinished(tmp_path)
        engine.store.close()

    def test_something_else_in_the_place_of_a_chunk(self, tmp_path: Path) -> None:
        engine = open_engine(tmp_path)
        engine.put(1, 2, 3)
        secret = tmp_path / "secret"
        secret.write_bytes(file_of(tmp_path, 1).read_bytes())
        for number in (1, 2, 3):
            file_of(tmp_path, number).unlink()
        file_of(tmp_path, 1).symlink_to(secret)
        os.mkfifo(file_of(tmp_path, 2))
        file_of(tmp_path, 3).mkdir()
        assert engine.read([1, 2, 3]) == [Fate.CORRUPT] * 3
        engine.put(1, 2)
        assert engine.read([1, 2]) == [Fate.DONE] * 2
        assert secret.stat().st_nlink == 1
        engine.store.close()

    def test_a_writer_that_is_killed_leaves_no_chunk(self, tmp_path: Path) -> None:
        put(tmp_path, 1)
        program = (
            "import os, sys, time\n"
            "from pathlib import Path\n"
            "from shared_directory import open_engine\n"
            "engine = open_engine(Path(sys.argv[1]))\n"
            "def stop(*arguments, **named):\n"
            "    print('written', flush=True)\n"
            "    time.sleep(600)\n"
            "os.link = stop\n"
            "engine.put(2)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "written\n"
        finally:
            process.kill()
            process.wait()
        engine = open_engine(tmp_path)
        assert len(unfinished(tmp_path)) == 1
        assert engine.find([1, 2]) == [True, False]
        assert engine.read([1, 2]) == [Fate.DONE, Fate.GONE]
        engine.put(2)
        assert engine.read([2]) == [Fate.DONE]
        assert sweep(tmp_path, Limits(), time.time() + 7200, lambda: None).unfinished == 1
        assert not unfinished(tmp_path)
        assert engine.read([1, 2]) == [Fate.DONE] * 2
        engine.store.close()


class TestErrors:
    """What a mount's errors mean; they cannot be had from a real one at will."""

    @pytest.mark.parametrize(
        ("number", "reading", "writing"),
        [
            (errno.EIO, Fate.DOWN, Fate.DOWN),
            (errno.ENOTCONN, Fate.DOWN, Fate.DOWN),
            (errno.ESTALE, Fate.GONE, Fate.DOWN),
            (errno.ETIMEDOUT, Fate.LATE, Fate.LATE),
            (errno.EDQUOT, Fate.REFUSED, Fate.REFUSED),
            (errno.EACCES, Fate.REFUSED, Fate.REFUSED),
        ],
    )
    def test_of_single_files(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        number: int,
        reading: Fate,
        writing: Fate,
    ) -> None:
        engine = open_engine(tmp_path)
        engine.put(1, 2)
        caplog.clear()
        really = os.open

        def fail(path: str, flags: int, *more: int, **named: int) -> int:
            if "/" in str(path) and "dir_fd" in named:
                raise OSError(number, os.strerror(number), path)
            return really(path, flags, *more, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", fail)
            assert engine.read([1, 2]) == [reading] * 2
            assert engine.write([3]) == [writing]
        assert engine.read([1, 2]) == [Fate.DONE] * 2
        expected = 1 + (reading is not Fate.GONE)  # once for each verb
        assert sum(os.strerror(number) in line for line in caplog.messages) == expected
        engine.store.close()

    def test_close_says_that_there_was_no_room(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A network file system writes when a file is closed."""
        engine = open_engine(tmp_path)
        really = os.close

        def fail(file: int) -> None:
            writes = os.readlink(f"/proc/self/fd/{file}").endswith(".tmp")
            really(file)
            if writes:
                raise OSError(errno.EDQUOT, "quota")

        monkeypatch.setattr(os, "close", fail)
        assert engine.write([1]) == [Fate.REFUSED]
        monkeypatch.undo()
        assert engine.read([1]) == [Fate.GONE]
        engine.store.close()


class TestWithoutLinks(StoreContract):
    """Everything, where the file system has no hard links."""

    @pytest.fixture
    def backing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backing:
        def refuse(*arguments: object, **named: object) -> None:
            raise OSError(errno.EPERM, "no links")

        monkeypatch.setattr(os, "link", refuse)
        return Directory(tmp_path)
