"""Guards ``lamina inspect``, ``verify`` and ``clear``: they tell the truth about a disk store,
damage nothing, and leave alone what a server uses or what is not Lamina's.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from lamina.cli import store
from lamina.data.tiers.disk import DiskTier, StoreNamespace
from lamina.keys import KEY_BYTES
from lamina.plan import ChunkKey

NAMESPACE = StoreNamespace(
    "ab" * 16,
    {"model": json.dumps({"architectures": ["TinyForCausalLM"]}), "chunk_tokens": "64"},
)
EXTENTS = (8192, 4096)

app = typer.Typer()
for verb in (store.inspect, store.verify, store.clear):
    app.command()(verb)


def run(verb: str, path: Path, *more: str, answer: str = "") -> tuple[int, str]:
    result = CliRunner().invoke(app, [verb, str(path), *more], input=answer)
    return result.exit_code, " ".join(result.output.split())


def open_tier(path: Path, rank: int = 0) -> DiskTier:
    return DiskTier(
        path=path, namespace=NAMESPACE, rank=rank, extent_bytes=EXTENTS, capacity=10 * 12288
    )


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A store with three chunks of rank 0 and none of rank 1."""
    path = tmp_path / "store"
    tier = open_tier(path)
    slots = [0, 1, 5]
    tier.begin(slots)
    for row, size in enumerate(EXTENTS):
        tier.write_row(row, slots, [np.full(size, slot + row, np.uint8) for slot in slots])
    tier.commit([(slot, ChunkKey(bytes([slot]) * KEY_BYTES)) for slot in slots])
    tier.close()
    open_tier(path, rank=1).close()
    return path


def test_inspect_says_what_is_there(filled: Path) -> None:
    code, output = run("inspect", filled)
    assert code == 0
    assert "TinyForCausalLM" in output
    assert NAMESPACE.fingerprint in output
    assert "3 of 10" in output
    assert "192" in output  # tokens
    assert "36 KiB" in output  # of KV cache
    assert "0 of 10" in output  # rank 1


def test_inspect_works_while_a_server_runs_and_names_it(filled: Path) -> None:
    tier = open_tier(filled)
    code, output = run("inspect", filled)
    tier.close()
    assert code == 0
    assert "3 of 10" in output
    assert "pid " in output
    assert "pid " not in run("inspect", filled)[1]


def test_inspect_survives_a_damaged_index(filled: Path) -> None:
    index = filled / NAMESPACE.fingerprint / "rank-0.sqlite"
    index.write_bytes(b"x" * 5000)
    code, output = run("inspect", filled)
    assert code == 0
    assert "is damaged" in output
    assert index.read_bytes() == b"x" * 5000


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Nothing under ``path`` can be written to; root may write to anything but to such a mount."""
    if os.geteuid():
        for file in (path, *path.rglob("*")):
            file.chmod(0o500 if file.is_dir() else 0o400)
        yield
        for file in (path, *path.rglob("*")):
            file.chmod(0o700 if file.is_dir() else 0o600)
        return
    mount = ["mount", "--bind", "-o", "ro", str(path), str(path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("root, and may not mount")
    subprocess.run(["mount", "-o", "remount,bind,ro", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_inspect_works_where_nothing_can_be_written(filled: Path) -> None:
    with read_only(filled):
        code, output = run("inspect", filled)
    assert code == 0
    assert "3 of 10" in output
    assert "192" in output


def test_inspect_says_why_it_cannot_look_at_what_a_server_was_killed_over(filled: Path) -> None:
    journal = filled / NAMESPACE.fingerprint / "rank-0.sqlite-wal"
    journal.write_bytes(b"x" * 100)
    with read_only(filled):
        code, output = run("inspect", filled)
    assert code == 0
    assert "rank-0.sqlite cannot be read here" in output
    assert "look at it where it can be written to" in output
    assert "0 of 10" in output  # rank 1


def test_inspect_says_in_what_namespaces_differ(filled: Path) -> None:
    assert "differs" not in run("inspect", filled)[1]
    model = {"architectures": ["TinyForCausalLM"], "rope": {"theta": 7}}
    other = StoreNamespace(
        "cd" * 16, {"model": json.dumps(model), "chunk_tokens": "64", "cache_dtype": "fp8"}
    )
    DiskTier(path=filled, namespace=other, rank=5, extent_bytes=EXTENTS, capacity=12288).close()
    output = run("inspect", filled)[1]
    assert "differs from others in cache_dtype: -; model.rope.theta: -" in output
    assert "differs from others in cache_dtype: fp8; model.rope.theta: 7" in output
    assert "chunk_tokens:" not in output


def test_verify_finds_nothing_in_a_sound_store(filled: Path) -> None:
    code, output = run("verify", filled)
    assert code == 0
    assert "Everything reads back" in output


def test_verify_names_what_is_damaged(filled: Path) -> None:
    slab = filled / NAMESPACE.fingerprint / "rank-0.slab"
    with slab.open("r+b") as file:
        file.seek(10 * EXTENTS[0] + 5 * EXTENTS[1])
        file.write(b"\xff")
    code, output = run("verify", filled)
    assert code == 1
    assert "row 1 of slot 5 is damaged" in output
    assert output.count(" of slot ") == 1


@pytest.mark.parametrize("lost", ["rank-0.sqlite", "rank-0.slab"])
def test_verify_says_what_is_missing(filled: Path, lost: str) -> None:
    (filled / NAMESPACE.fingerprint / lost).unlink()
    code, output = run("verify", filled)
    assert code == 1
    assert lost in output


def test_verify_changes_nothing_in_a_damaged_store(filled: Path) -> None:
    index = filled / NAMESPACE.fingerprint / "rank-0.sqlite"
    content = index.read_bytes()
    index.write_bytes(content[:4096] + b"\xff" * 200 + content[4296:])
    damaged = index.read_bytes()
    code, output = run("verify", filled)
    assert code == 1
    assert "damaged" in output or "cannot be read" in output
    assert index.read_bytes() == damaged


@pytest.mark.parametrize("verb", ["verify", "clear"])
def test_a_store_in_use_is_left_alone(filled: Path, verb: str) -> None:
    tier = open_tier(filled, rank=1)
    code, output = run(verb, filled, *(["--yes"] if verb == "clear" else []))
    tier.close()
    assert code == 1
    assert "in use by process" in output
    assert "3 of 10" in run("inspect", filled)[1]


def test_clear_asks_first(filled: Path) -> None:
    code, output = run("clear", filled, answer="n\n")
    assert code != 0
    assert "Delete" in output
    assert "3 of 10" in run("inspect", filled)[1]


def test_clear_deletes_what_is_laminas_and_nothing_else(filled: Path) -> None:
    (filled / "notes.txt").write_text("mine")
    (filled / NAMESPACE.fingerprint / "other.slab").write_text("mine")
    (filled / "cafe0123").mkdir()
    (filled / "cafe0123" / "data").write_text("mine")
    code, output = run("clear", filled, answer="y\n")
    assert code == 0
    assert "notes.txt" in output
    left = {str(p.relative_to(filled)) for p in filled.rglob("*") if p.is_file()}
    assert left == {"notes.txt", f"{NAMESPACE.fingerprint}/other.slab", "cafe0123/data"}


def test_clear_leaves_an_empty_directory_that_serves_again(filled: Path) -> None:
    assert run("clear", filled, "--yes")[0] == 0
    assert list(filled.iterdir()) == []
    tier = open_tier(filled)
    assert tier.stored() == ()
    tier.close()


def test_clear_empties_a_store_of_another_version(filled: Path) -> None:
    (filled / "lamina-store.json").write_text(
        json.dumps({"format": "lamina disk store", "version": 99})
    )
    for verb in ("inspect", "verify"):
        code, output = run(verb, filled)
        assert code == 1
        assert "version 99" in output
    assert run("clear", filled, "--yes")[0] == 0
    assert list(filled.iterdir()) == []


@pytest.mark.parametrize("verb", ["inspect", "verify", "clear"])
def test_what_is_no_store_is_refused(tmp_path: Path, verb: str) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file", tmp_path / "nothing"):
        code, output = run(verb, path)
        assert code == 1
        assert "not a Lamina disk store" in output
    assert (tmp_path / "file").read_text() == "mine"
