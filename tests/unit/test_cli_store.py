"""Guards ``lamina-kv inspect``, ``verify`` and ``clear``: they tell the truth about a disk store,
damage nothing, and leave alone what a server uses or what is not Lamina's.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from disks import OBJECT, PADDING, open_disk, put, slab_of
from lamina_kv.cli import store
from lamina_kv.geometry import OBJECT_HEADER_BYTES
from lamina_kv.tiers.disk.layout import BLOCK, GROUP, HEAD_BYTES, TABLE_BYTES, USED_BYTES
from lamina_kv.tiers.disk.store import DiskStore

NAMESPACE = "ab" * 16
DESCRIPTION = {
    "model": json.dumps({"architectures": ["TinyForCausalLM"]}),
    "chunk_tokens": "64",
}
KIB = 1 << 10

app = typer.Typer()
for verb in (store.inspect, store.verify, store.clear):
    app.command()(verb)


def run(verb: str, path: Path, *more: str, answer: str = "") -> tuple[int, str]:
    result = CliRunner().invoke(app, [verb, str(path), *more], input=answer)
    return result.exit_code, " ".join(result.output.split())


def open_tier(path: Path, rank: int = 0) -> DiskStore:
    return open_disk(path, 10, rank=rank, description=DESCRIPTION)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A store with three chunks of rank 0 and none of rank 1."""
    path = tmp_path / "store"
    tier = open_tier(path)
    put(tier, {0: 1, 1: 2, 5: 3})
    tier.close()
    open_tier(path, rank=1).close()
    return path


def test_inspect_says_what_is_there(filled: Path) -> None:
    code, output = run("inspect", filled)
    assert code == 0
    assert "TinyForCausalLM" in output
    assert NAMESPACE in output
    assert "3 of 10" in output
    assert "192" in output  # tokens
    assert f"{3 * (OBJECT - OBJECT_HEADER_BYTES - PADDING) / KIB:.3g} KiB" in output  # of rows
    assert "0 of 10" in output  # rank 1


def test_inspect_tells_programs_the_same(filled: Path) -> None:
    damage(slab_of(filled), BLOCK + GROUP * USED_BYTES + HEAD_BYTES + 9)
    tier = open_tier(filled, rank=1)
    result = CliRunner().invoke(app, ["inspect", str(filled), "--json"])
    tier.close()
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    (namespace,) = said["namespaces"]
    assert said["place"] == str(filled)
    assert said["bytes"] == sum(part["bytes"] for part in namespace["parts"]) > 0
    assert namespace["namespace"] == NAMESPACE
    assert namespace["description"] == {
        "model": {"architectures": ["TinyForCausalLM"]},
        "chunk_tokens": 64,
    }
    first, second = namespace["parts"]
    assert (first["chunks"], first["capacity_chunks"], first["tokens"]) == (2, 10, 128)
    assert first["kv_cache_bytes"] == 2 * (OBJECT - OBJECT_HEADER_BYTES - PADDING)
    assert 0 < first["oldest"] <= first["newest"] <= time.time()
    assert first["server"] is None
    assert len(first["damage"]) == 1
    assert (second["rank"], second["chunks"], second["oldest"]) == (1, 0, None)
    assert second["server"] == f"pid {os.getpid()}"


def test_a_program_that_asks_in_vain_reads_no_json(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "nothing"), "--json"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "is not there" in result.stderr


@pytest.mark.parametrize("verb", ["inspect", "verify"])
@pytest.mark.parametrize("how", ["file", "variable", "inline"])
def test_a_tier_of_the_configuration_is_looked_into_by_its_name(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, how: str
) -> None:
    tiers = {"tiers": [{"kind": "disk", "name": "local", "path": str(filled), "capacity": "1MiB"}]}
    file = tmp_path / "lamina.yaml"
    file.write_text(json.dumps(tiers))
    monkeypatch.delenv("LAMINA_CONFIG", raising=False)
    given = ["--config", str(file)] if how == "file" else []
    if how == "variable":
        monkeypatch.setenv("LAMINA_CONFIG", str(file))
    elif how == "inline":
        given = ["--kv-transfer-config", json.dumps({"kv_connector_extra_config": tiers})]
    code, output = run(verb, Path("local"), *given)
    assert code == 0, output
    code, output = run(verb, Path("remote"), *given)
    assert code == 1
    assert "neither a Lamina store nor a tier that is configured: local" in output


def test_a_configuration_that_is_wrong_is_said(filled: Path, tmp_path: Path) -> None:
    file = tmp_path / "lamina.yaml"
    file.write_text("tiers: [{kind: s3, url: nowhere}]")
    code, output = run("inspect", filled, "--config", str(file))
    assert code == 1
    assert "tiers[0].url" in output
    code, output = run("inspect", filled, "--kv-transfer-config", "no JSON")
    assert code == 1
    assert "is not valid JSON" in output


def test_inspect_works_while_a_server_runs_and_names_it(filled: Path) -> None:
    tier = open_tier(filled)
    code, output = run("inspect", filled)
    tier.close()
    assert code == 0
    assert "3 of 10" in output
    assert "pid " in output
    assert "pid " not in run("inspect", filled)[1]


def test_inspect_survives_damage(filled: Path) -> None:
    slab = slab_of(filled)
    slab.write_bytes(b"x" * BLOCK + slab.read_bytes()[BLOCK:])
    before = slab.read_bytes()
    code, output = run("inspect", filled)
    assert code == 0
    assert "rank-0.slab is damaged or missing" in output
    assert "0 of 10" in output  # rank 1
    assert slab.read_bytes() == before


def test_inspect_says_that_heads_are_damaged(filled: Path) -> None:
    damage(slab_of(filled), BLOCK + GROUP * USED_BYTES + HEAD_BYTES + 9)
    code, output = run("inspect", filled)
    assert code == 0
    assert "2 of 10" in output
    assert "the heads of up to 1 chunks are damaged" in output


def damage(file: Path, at: int) -> None:
    with file.open("r+b") as out:
        out.seek(at)
        (there,) = out.read(1)
        out.seek(at)
        out.write(bytes([there ^ 0xFF]))


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


def test_inspect_says_in_what_namespaces_differ(filled: Path) -> None:
    assert "differs" not in run("inspect", filled)[1]
    model = {"architectures": ["TinyForCausalLM"], "rope": {"theta": 7}}
    other = {"model": json.dumps(model), "chunk_tokens": "64", "cache_dtype": "fp8"}
    open_disk(filled, namespace="cd" * 16, rank=5, description=other).close()
    output = run("inspect", filled)[1]
    assert "differs from others in cache_dtype: -; model.rope.theta: -" in output
    assert "differs from others in cache_dtype: fp8; model.rope.theta: 7" in output
    assert "chunk_tokens:" not in output


def test_verify_finds_nothing_in_a_sound_store(filled: Path) -> None:
    code, output = run("verify", filled)
    assert code == 0
    assert "Everything reads back" in output


def test_verify_says_that_there_is_nothing_to_read(tmp_path: Path) -> None:
    open_tier(tmp_path).close()
    code, output = run("verify", tmp_path)
    assert code == 0
    assert "There is nothing in it." in output
    assert "reads back" not in output


def test_verify_names_what_is_damaged(filled: Path) -> None:
    damage(slab_of(filled), BLOCK + TABLE_BYTES + 5 * OBJECT + 5000)
    code, output = run("verify", filled)
    assert code == 1
    assert "the chunk in slot 5 is damaged" in output
    assert output.count(" in slot ") == 1


def test_verify_says_what_is_missing(filled: Path) -> None:
    os.truncate(slab_of(filled), BLOCK + TABLE_BYTES + 3 * OBJECT)
    code, output = run("verify", filled)
    assert code == 1
    assert "rank-0.slab: the file was cut short by 1 chunks" in output
    os.truncate(slab_of(filled), 0)
    code, output = run("verify", filled)
    assert code == 1
    assert "rank-0.slab is damaged or missing" in output


def test_verify_changes_nothing_in_a_damaged_store(filled: Path) -> None:
    slab = slab_of(filled)
    damage(slab, BLOCK + GROUP * USED_BYTES + 9)
    before = slab.read_bytes()
    code, output = run("verify", filled)
    assert code == 1
    assert "the heads of up to 1 chunks are damaged" in output
    assert slab.read_bytes() == before


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
    (filled / NAMESPACE / "other.slab").write_text("mine")
    (filled / "cafe0123").mkdir()
    (filled / "cafe0123" / "data").write_text("mine")
    code, output = run("clear", filled, answer="y\n")
    assert code == 0
    assert "notes.txt" in output
    left = {str(p.relative_to(filled)) for p in filled.rglob("*") if p.is_file()}
    assert left == {"notes.txt", f"{NAMESPACE}/other.slab", "cafe0123/data"}


def test_clear_leaves_an_empty_directory_that_serves_again(filled: Path) -> None:
    (filled / f"costs-{'ab' * 8}-12.json").write_text("{}")  # of an earlier version
    assert run("clear", filled, "--yes")[0] == 0
    assert list(filled.iterdir()) == []
    tier = open_tier(filled)
    assert tier.stored(keys=False).slots.size == 0
    tier.close()


@pytest.mark.parametrize("version", [1, 99])
def test_clear_empties_a_store_of_another_version(filled: Path, version: int) -> None:
    (filled / "lamina-store.json").write_text(
        json.dumps({"format": "lamina disk store", "version": version})
    )
    for suffix in ("sqlite", "sqlite-wal", "sqlite-shm", "sqlite.damaged"):  # of version 1
        (filled / NAMESPACE / f"rank-0.{suffix}").write_text("an index")
    for verb in ("inspect", "verify"):
        code, output = run(verb, filled)
        assert code == 1
        assert f"version {version}" in output
    assert run("clear", filled, "--yes")[0] == 0
    assert list(filled.iterdir()) == []


@pytest.mark.parametrize("verb", ["inspect", "verify", "clear"])
def test_what_is_no_store_is_refused(tmp_path: Path, verb: str) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file"):
        code, output = run(verb, path)
        assert code == 1
        assert "not a Lamina store" in output
    assert run(verb, tmp_path / "nothing") == (1, f"{tmp_path}/nothing is not there")
    assert (tmp_path / "file").read_text() == "mine"
