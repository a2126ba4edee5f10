"""Guards that a file system on which a store is at risk is recognised, and said in words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lamina_kv.tiers.disk import file_system
from lamina_kv.tiers.disk.file_system import concern, reserve


@pytest.mark.parametrize(
    ("type_", "name"),
    [
        (0x6969, "NFS"),
        (0xFF534D42, "CIFS"),
        (0xFE534D42, "SMB"),
        (0x65735546, "FUSE"),
        (0x0BD00BD0, "Lustre"),
        (0x00C36400, "Ceph"),
        (0x47504653, "GPFS"),
        (0x01021997, "9p"),
    ],
)
def test_a_network_file_system_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type_: int, name: str
) -> None:
    monkeypatch.setattr(file_system, "_type", lambda directory: type_)
    found = concern(tmp_path)
    assert found is not None
    assert f"network file system ({name}" in found.found
    assert str(tmp_path) in found.found
    assert "path" in found.advice


@pytest.mark.parametrize(("type_", "name"), [(0x9123683E, "btrfs"), (0x2FC12FC1, "ZFS")])
def test_where_nothing_is_overwritten_in_place_capacity_is_no_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type_: int, name: str
) -> None:
    monkeypatch.setattr(file_system, "_type", lambda directory: type_)
    found = concern(tmp_path)
    assert found is not None
    assert name in found.found
    assert "capacity" in found.found


def test_the_type_is_the_kernels() -> None:
    assert file_system._type(Path("/proc")) == 0x9FA0
    assert concern(Path("/proc")) is None
    with pytest.raises(FileNotFoundError):
        concern(Path("/nowhere/at/all"))


def test_what_cannot_be_reserved_is_told_apart_from_no_room(tmp_path: Path) -> None:
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        assert reserve(file, 1 << 20)
        assert os.fstat(file).st_blocks * 512 >= os.fstat(file).st_size == 1 << 20
        with pytest.raises(OSError, match=r"space|large"):
            reserve(file, 1 << 60)
    finally:
        os.close(file)
    nowhere = os.open("/dev/null", os.O_RDWR)
    try:
        with pytest.raises(OSError, match="device"):
            reserve(nowhere, 1)
    finally:
        os.close(nowhere)
