"""Guards: a checkpoint's fingerprint is its content's, wherever it lies and whoever asks, and what
is remembered of it never makes other content look the same."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lamina_kv import checkpoint
from lamina_kv.checkpoint import CheckpointError, fingerprint, locate

PROCESS = """
import logging, sys, time
from pathlib import Path
from lamina_kv import checkpoint
logging.basicConfig(level="INFO")
checkpoint._SETTLED_NS = 0
read = checkpoint._read
def slow(*args):
    time.sleep(0.5 if args[1] else 0)
    return read(*args)
checkpoint._read = slow
print("ready", flush=True)
sys.stdin.readline()
print(checkpoint.fingerprint(Path(sys.argv[1]), cache_dir=Path(sys.argv[2])))
"""


@pytest.fixture(autouse=True)
def old_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of these tests are as good as old ones."""
    monkeypatch.setattr(checkpoint, "_SETTLED_NS", 0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def reads(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """How often files were read since the last call."""
    caplog.set_level(logging.INFO, checkpoint.logger.name)

    def count() -> int:
        found = sum("Reading" in record.message for record in caplog.records)
        caplog.clear()
        return found

    return count


def make_model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"hidden_size": 64}')
    (path / "model-1.safetensors").write_bytes(bytes(range(256)) * 100)
    (path / "model-2.safetensors").write_bytes(b"two" * 100)
    return path


def overwrite(file: Path, offset: int, content: bytes) -> None:
    """Change bytes in place, and put the time of modification back."""
    after = before = file.stat()
    # Clocks of file systems tick slowly; real files are not remembered while that matters.
    while after.st_ctime_ns == before.st_ctime_ns:
        with file.open("r+b") as target:
            target.seek(offset)
            target.write(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )


class TestContent:
    def test_it_never_changes(self, model: Path, cache: Path) -> None:
        # A change here orphans every store in the field: make it on purpose, and give the
        # scheme in lamina_kv.checkpoint another number.
        assert fingerprint(model, cache_dir=cache) == "8ed87007481a3f4812c1355b5cf9bf2f"

    def test_a_copy_has_the_same(self, model: Path, cache: Path, tmp_path: Path) -> None:
        shutil.copytree(model, tmp_path / "elsewhere/copy")
        (tmp_path / "link").symlink_to(model)
        same = {
            fingerprint(path, cache_dir=cache)
            for path in (model, tmp_path / "elsewhere/copy", tmp_path / "link")
        }
        assert len(same) == 1

    def test_a_byte_in_the_middle_of_a_big_file_counts(self, model: Path, cache: Path) -> None:
        big = model / "big.safetensors"
        with big.open("wb") as file:
            file.truncate(130 << 20)
        before = fingerprint(model, cache_dir=cache)
        seen = {before}
        for offset in (1, 63 << 20, 100 << 20, (130 << 20) - 1):
            overwrite(big, offset, b"x")
            seen.add(fingerprint(model, cache_dir=cache))
        assert len(seen) == 5
        for offset in (1, 63 << 20, 100 << 20, (130 << 20) - 1):
            overwrite(big, offset, b"\0")
        assert fingerprint(model, cache_dir=cache) == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: overwrite(model / "config.json", 16, b"5"),
            lambda model: (model / "modeling.py").write_text(""),
            lambda model: (model / "model-2.safetensors").unlink(),
            lambda model: (model / "model-2.safetensors").rename(model / "model-3.safetensors"),
            lambda model: os.truncate(model / "model-2.safetensors", 299),
            lambda model: (model / "preprocessor_config.json").write_text("{}"),
            lambda model: make_model(model / "vision"),
            lambda model: (model / "unknown.format").write_text("anything may matter"),
        ],
    )
    def test_what_matters_counts(
        self, model: Path, cache: Path, change: Callable[[Path], object]
    ) -> None:
        before = fingerprint(model, cache_dir=cache)
        change(model)
        assert fingerprint(model, cache_dir=cache) != before

    @pytest.mark.parametrize(
        "name",
        [
            "README.md",
            "LICENSE",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
            "train.log",
            "curve.png",
            ".gitattributes",
            ".cache/huggingface/model.safetensors",
            "__pycache__/modeling.cpython-311.pyc",
        ],
    )
    def test_what_cannot_change_a_cache_does_not_count(
        self, model: Path, cache: Path, name: str
    ) -> None:
        before = fingerprint(model, cache_dir=cache)
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("new")
        assert fingerprint(model, cache_dir=cache) == before

    def test_contents_do_not_move_between_files(self, model: Path, cache: Path) -> None:
        one, two = model / "model-1.safetensors", model / "model-2.safetensors"
        before = fingerprint(model, cache_dir=cache)
        content = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(content)
        assert fingerprint(model, cache_dir=cache) != before

    def test_one_file_is_a_checkpoint_under_any_name(self, tmp_path: Path, cache: Path) -> None:
        for name in ("a.gguf", "b.gguf"):
            (tmp_path / name).write_bytes(b"GGUF")
        (tmp_path / "c.gguf").write_bytes(b"GGUG")
        a, b, c = (fingerprint(tmp_path / f"{name}.gguf", cache_dir=cache) for name in "abc")
        assert a == b != c

    def test_links_are_followed_but_not_around_in_circles(
        self, model: Path, cache: Path, tmp_path: Path
    ) -> None:
        blob = tmp_path / "blob"
        (model / "model-1.safetensors").rename(blob)
        (model / "model-1.safetensors").symlink_to(blob)
        (model / "self").symlink_to(model)
        (model / "dangling.json").symlink_to(tmp_path / "nothing")
        before = fingerprint(model, cache_dir=cache)
        assert before == fingerprint(make_model(tmp_path / "plain"), cache_dir=cache)
        overwrite(blob, 3, b"x")
        assert fingerprint(model, cache_dir=cache) != before


class TestMemory:
    def test_what_was_read_is_not_read_again(
        self, model: Path, cache: Path, reads: Callable[[], int]
    ) -> None:
        first = fingerprint(model, cache_dir=cache)
        assert reads() == 1
        assert fingerprint(model, cache_dir=cache) == first
        assert reads() == 0

    def test_only_what_changed_is_read(
        self, model: Path, cache: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with (model / "big.safetensors").open("wb") as file:
            file.truncate(64 << 20)
        fingerprint(model, cache_dir=cache)
        overwrite(model / "model-2.safetensors", 0, b"2")
        with caplog.at_level(logging.INFO):
            fingerprint(model, cache_dir=cache)
        assert "Reading 0.00 GiB" in caplog.text

    def test_a_young_file_is_read_again(
        self,
        model: Path,
        cache: Path,
        reads: Callable[[], int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(checkpoint, "_SETTLED_NS", 3600 * 10**9)
        assert fingerprint(model, cache_dir=cache) == fingerprint(model, cache_dir=cache)
        assert reads() == 2

    def test_a_file_that_changes_while_it_is_read_is_not_remembered(
        self,
        model: Path,
        cache: Path,
        reads: Callable[[], int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        read = checkpoint._segment_digest

        def meanwhile(file: Path, start: int) -> bytes:
            digest = read(file, start)
            if file.name == "model-2.safetensors":
                overwrite(file, 0, b"new")
            return digest

        monkeypatch.setattr(checkpoint, "_segment_digest", meanwhile)
        torn = fingerprint(model, cache_dir=cache)
        monkeypatch.setattr(checkpoint, "_segment_digest", read)
        reads()
        assert fingerprint(model, cache_dir=cache) != torn
        assert reads() == 1

    def test_damage_is_noticed(self, model: Path, cache: Path, reads: Callable[[], int]) -> None:
        truth = fingerprint(model, cache_dir=cache)
        (memory,) = cache.rglob("*.digests")
        good = memory.read_bytes()
        flips = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(0, len(good), 5)]
        reads()
        for bad in [b"", b"{}", b"[" * 99999, good[:-1], good[:40], good + b"\n", *flips]:
            memory.write_bytes(bad)
            assert fingerprint(model, cache_dir=cache) == truth
            assert reads() == 1
            assert memory.read_bytes() == good

    def test_a_memory_of_another_directory_is_not_believed(
        self, model: Path, cache: Path, tmp_path: Path
    ) -> None:
        other = make_model(tmp_path / "other")
        overwrite(other / "model-2.safetensors", 0, b"x")
        fingerprint(other, cache_dir=cache)
        (theirs,) = cache.rglob("*.digests")
        truth = fingerprint(model, cache_dir=tmp_path / "another")
        fingerprint(model, cache_dir=cache)
        (ours,) = set(cache.rglob("*.digests")) - {theirs}
        ours.write_bytes(theirs.read_bytes())
        assert fingerprint(model, cache_dir=cache) == truth

    @pytest.mark.parametrize("obstacle", ["a file", "checkpoints", "digests", "lock"])
    def test_an_unusable_cache_directory_is_no_error(
        self, model: Path, cache: Path, tmp_path: Path, obstacle: str
    ) -> None:
        truth = fingerprint(model, cache_dir=tmp_path / "usable")
        if obstacle == "a file":
            cache.write_text("")
        elif obstacle == "checkpoints":
            cache.mkdir()
            (cache / "checkpoints").write_text("")
        else:
            (name,) = (path.stem for path in (tmp_path / "usable").rglob("*.digests"))
            (cache / "checkpoints" / f"{name}.{obstacle}" / "full").mkdir(parents=True)
        assert fingerprint(model, cache_dir=cache) == truth
        assert fingerprint(model, cache_dir=cache) == truth
        assert not [*cache.rglob("*.[0-9]*")] if cache.is_dir() else True

    def test_the_cache_is_in_its_usual_place(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        fingerprint(model)
        assert [*(tmp_path / "xdg/lamina").rglob("*.digests")]
        monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
        fingerprint(model)
        assert [*(tmp_path / "home/.cache/lamina").rglob("*.digests")]


class TestCompany:
    def test_of_many_processes_one_reads(self, model: Path, cache: Path) -> None:
        source = str(Path(checkpoint.__file__).parents[1])
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, str(model), str(cache)],
                env={**os.environ, "PYTHONPATH": source},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(3)
        ]
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        ended = [process.communicate(timeout=240) for process in processes]
        assert {out.strip() for out, _ in ended} == {fingerprint(model, cache_dir=cache)}
        assert sum("Reading" in err for _, err in ended) == 1

    def test_one_that_never_ends_does_not_hold_the_others(
        self, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        truth = fingerprint(model, cache_dir=cache)
        (lock,) = cache.rglob("*.lock")
        overwrite(model / "model-2.safetensors", 0, b"x")
        monkeypatch.setattr(checkpoint, "_LOCK_SECONDS", 0.1)
        with lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            answer: list[str] = []
            thread = threading.Thread(
                target=lambda: answer.append(fingerprint(model, cache_dir=cache)), daemon=True
            )
            thread.start()
            thread.join(60)
        assert answer
        assert answer != [truth]


class TestErrors:
    @pytest.mark.parametrize("content", [[], ["config.json"], ["README.md", "tokenizer.model"]])
    def test_no_weights(self, tmp_path: Path, cache: Path, content: list[str]) -> None:
        for name in content:
            (tmp_path / name).write_text("{}")
        with pytest.raises(CheckpointError, match=r"no weight files.*`identity`"):
            fingerprint(tmp_path, cache_dir=cache)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"cannot read.*`identity`"):
            fingerprint(tmp_path / "nothing")

    def test_a_file_that_cannot_be_read(self, model: Path, cache: Path) -> None:
        (model / "model-3.safetensors").symlink_to("/proc/self/mem")
        with pytest.raises(CheckpointError, match=r"cannot read.*`identity`"):
            fingerprint(model, cache_dir=cache)


class TestLocate:
    def test_a_path_is_where_it_is(self, model: Path) -> None:
        assert locate(str(model)) == model

    def test_a_name_is_looked_up_in_the_hubs_cache(self, tmp_path: Path, cache: Path) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / "hub/models--some--model"
        snapshot = make_model(repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(commit)
        for revision in (None, "main", commit):
            found = locate("some/model", revision=revision, download_dir=tmp_path / "hub")
            assert found.resolve() == snapshot.resolve()
        assert fingerprint(found, cache_dir=cache) == fingerprint(
            make_model(tmp_path / "copy"), cache_dir=cache
        )

    @pytest.mark.parametrize("name", ["some/other", "s3://bucket/model", "a/b/c", "no such thing"])
    def test_what_is_not_there_asks_for_an_identity(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(CheckpointError, match="set `identity`"):
            locate(name, download_dir=tmp_path)
