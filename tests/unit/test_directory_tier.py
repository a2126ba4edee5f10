"""Guards a tier in a shared directory: files appear whole and never change, uses are written down,
and a person can look inside."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from disks import key
from lamina_kv.cli.main import app
from lamina_kv.tiers.contract import Fate
from lamina_kv.tiers.directory import store
from shared_directory import OBJECT, Directory, file_of, open_engine, put, tenant
from store_contract import TIMEOUT, Backing, StoreContract


def lamina(*arguments: object) -> tuple[int, str]:
    """Run a command; returns its exit code and output."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, " ".join(result.output.split())


class TestLookingInside:
    def test_inspect_says_what_is_there(self, tmp_path: Path) -> None:
        put(tmp_path, 1, 2, 3)
        put(tmp_path, 1, owner=tenant(shard=1))
        put(tmp_path, 1, 2, owner=tenant(namespace="cd" * 16, model="large"))
        code, output = lamina("inspect", tmp_path)
        assert code == 0
        assert f"{tmp_path}: {6 * OBJECT / 1024:.3g} KiB" in output
        assert "tiny; chunk_tokens 64" in output
        assert "0 3 192 36 KiB" in output  # rank, chunks, tokens, bytes
        assert "1 1 64 12 KiB" in output
        assert "large" in output
        assert "0 2 ? 24 KiB" in output
        assert "server" not in output

    def test_verify_names_what_is_damaged_and_ignores_what_is_not_ours(
        self, tmp_path: Path
    ) -> None:
        put(tmp_path, 1, 2, 3)
        others = file_of(tmp_path, 1).with_name("notes")
        others.write_text("mine")
        (tmp_path / "photos").mkdir()
        code, output = lamina("verify", tmp_path)
        assert (code, "Everything reads back" in output) == (0, True)
        for number, content in ((1, b""), (2, file_of(tmp_path, 2).read_bytes()[:-2000])):
            file_of(tmp_path, number).write_bytes(content)
        code, output = lamina("verify", tmp_path)
        assert code == 1
        assert [f"chunk {key(n).hex()}.0 of namespace" in output for n in (1, 2, 3)] == [
            True,
            True,
            False,
        ]
        assert "replaces it" in output

    def test_clear_says_why_it_does_not(self, tmp_path: Path) -> None:
        put(tmp_path, 1)
        code, output = lamina("clear", tmp_path, "--yes")
        assert code == 1
        assert "nobody deletes what others use" in output
        assert "lamina-kv sweep" in output
        assert file_of(tmp_path, 1).exists()

    def test_a_url_that_no_store_has(self, tmp_path: Path) -> None:
        code, output = lamina("inspect", "gopher://user:secret@host/1")
        assert code == 1
        assert "gopher:// is no place" in output
        assert "secret" not in output


class TestTouches:
    """The file's time is all that a sweeper knows."""

    def test_a_use_is_written_down_once_in_a_while(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = open_engine(tmp_path)
        engine.put(1, 2)
        first, second = file_of(tmp_path, 1), file_of(tmp_path, 2)
        for _ in range(2):
            os.utime(first, (1000, 1000))
            engine.store.touch([(key(1), 0), (key(3), 0)])
            assert first.stat().st_mtime > 1000
            os.utime(first, (1000, 1000))
            engine.store.touch([(key(1), 0)])
            engine.put(1)
            assert first.stat().st_mtime == 1000
            monkeypatch.setattr(store, "TOUCH_SECONDS", 0.0)
            engine.put(1)
            assert first.stat().st_mtime > 1000, "to compute it again is a use"
            monkeypatch.undo()
            engine.store.close()
            engine = open_engine(tmp_path)
        assert second.stat().st_mtime > 1000
        engine.store.close()

    def test_beginnings_are_younger_than_ends(self, tmp_path: Path) -> None:
        engine = open_engine(tmp_path)
        engine.put(*range(10))
        engine.store.touch([(key(number), 0) for number in reversed(range(10))])
        ages = [file_of(tmp_path, number).stat().st_mtime_ns for number in range(10)]
        assert ages == sorted(ages, reverse=True)
        engine.store.close()


def test_find_says_nothing_where_it_cannot_tell(tmp_path: Path) -> None:
    engine = open_engine(tmp_path)
    engine.put(1)
    assert engine.find([1, 2]) == [True, False]
    folder = file_of(tmp_path, 2).parent
    folder.symlink_to(folder)
    assert engine.store.find([key(1), key(2)], TIMEOUT) is None
    assert engine.find([1]) == [True]
    engine.store.close()


def test_a_probe_fails_while_the_directory_is_not_there(tmp_path: Path) -> None:
    root = tmp_path / "mounted"
    engine = open_engine(root)
    engine.put(1)
    assert engine.store.probe(TIMEOUT)
    root.rename(tmp_path / "elsewhere")
    assert not engine.store.probe(TIMEOUT)
    (tmp_path / "elsewhere").rename(root)
    assert engine.store.probe(TIMEOUT)
    engine.store.close()


def fail(patch: pytest.MonkeyPatch, number: int, *, makes: str) -> None:
    """Let all calls that make something fail: files (``open``), folders (``mkdir``), links."""
    real = getattr(os, makes)

    def call(path: Any, *arguments: Any, **keys: Any) -> Any:
        if makes == "open" and not arguments[0] & os.O_CREAT:
            return real(path, *arguments, **keys)
        raise OSError(number, os.strerror(number))

    patch.setattr(os, makes, call)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
class TestNoRoomAtTheStart:
    """A cache that is full keeps no engine from starting."""

    def test_what_is_there_is_read(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        number: int,
    ) -> None:
        put(tmp_path, 1)
        caplog.clear()
        with monkeypatch.context() as patch:
            fail(patch, number, makes="open")
            reader = open_engine(tmp_path, keep="nothing", direct=True)
            assert not caplog.messages, "who only reads needs no room"
            engine = open_engine(tmp_path, direct=True)
            assert [text for text in caplog.messages if "is full" in text and "sweep" in text]
            for each in (engine, reader):
                assert each.find([1, 2]) == [True, False]
                assert each.read([1]) == [Fate.DONE]
            assert engine.write([2]) == [Fate.REFUSED]
        fail(monkeypatch, errno.EOPNOTSUPP, makes="link")
        engine.put(2)  # what the file system can do was looked at once there was room
        assert reader.read([2]) == [Fate.DONE]
        for each in (engine, reader):
            each.store.close()

    @pytest.mark.parametrize("makes", ["mkdir", "open"])
    def test_a_new_directory_is_used_once_there_is_room(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        number: int,
        makes: str,
    ) -> None:
        with monkeypatch.context() as patch:
            fail(patch, number, makes=makes)
            engine = open_engine(tmp_path / "new")
            assert [text for text in caplog.messages if os.strerror(number) in text]
            assert engine.write([1]) == [Fate.REFUSED]
        engine.put(1)
        assert engine.read([1]) == [Fate.DONE]
        engine.store.close()


class TestDirectory(StoreContract):
    @pytest.fixture(params=[False, True], ids=["buffered", "direct"])
    def backing(self, tmp_path: Path, request: pytest.FixtureRequest) -> Backing:
        return Directory(tmp_path / "shared", direct=request.param)
