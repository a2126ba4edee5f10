"""Guards that the thread that writes to disk goes on whatever the disk does, and says why."""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from lamina.data.threads import Threads
from lamina.data.tiers.disk import DiskTier, StoreNamespace
from lamina.data.tiers.disk_slab import aligned_memory
from lamina.data.tiers.host import HostTier
from lamina.data.worker_pool import WorkerPool
from lamina.data.write_through import DiskWriter
from lamina.keys import KEY_BYTES
from lamina.plan import ChunkKey, Outcome, TransferId, TransferReceipt, WriteThrough

EXTENT = 4096


class Memory:
    """A host tier with one chunk in every slot."""

    def extent(self, row: int, slot: int) -> np.ndarray:
        extent = aligned_memory(EXTENT)
        extent[:] = row + slot
        return extent


class Rig:
    def __init__(self, disk: DiskTier) -> None:
        self.disk = disk
        self.receipts: list[TransferReceipt] = []
        self.loads = WorkerPool("load", 1)
        self.writer = self.new_writer()

    def new_writer(self, threads: Threads | None = None) -> DiskWriter:
        return DiskWriter(
            self.disk,
            cast(HostTier, Memory()),
            self.receipts.extend,
            loads=self.loads,
            rows=1,
            chunk_bytes=EXTENT,
            threads=threads,
        )

    def write(self, *slots: int) -> None:
        self.writer.write([order(slot) for slot in slots], step=0)

    def await_receipts(self, count: int) -> None:
        for _ in range(6000):
            if len(self.receipts) >= count:
                return
            time.sleep(0.01)
        raise AssertionError("no receipt within a minute")

    def close(self) -> list[TransferReceipt]:
        assert self.writer.close(60)
        assert self.loads.close(60)
        self.disk.close()
        return self.receipts


def order(slot: int) -> WriteThrough:
    key = ChunkKey(slot.to_bytes(KEY_BYTES, "little"))
    return WriteThrough(TransferId(slot), key, host_slot=slot, disk_slot=slot)


def disk_at(path: Path) -> DiskTier:
    return DiskTier(
        path=path,
        namespace=StoreNamespace("ab" * 16, {}),
        rank=0,
        extent_bytes=(EXTENT,),
        capacity=4 * EXTENT,
    )


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(disk_at(tmp_path))
    yield rig
    rig.close()


def test_a_store_that_is_deleted_fails_writes_and_says_so_once(
    rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig.write(0)
    rig.await_receipts(1)
    shutil.rmtree(tmp_path)
    rig.write(1)
    rig.write(2, 3)
    rig.writer.drop([0])
    receipts = rig.close()
    assert [receipt.outcome for receipt in receipts] == [Outcome.DONE, *[Outcome.FAILED] * 3]
    assert {receipt.reason for receipt in receipts[1:]} == {"StoreLost"}
    (warning,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "rank-0" in warning.getMessage()


def test_a_writer_without_a_thread_forgets_all_the_same(
    rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Damaged chunks would be found after a restart."""
    rig.write(0, 1)
    rig.await_receipts(2)
    assert rig.writer.close(60)

    def cannot_begin() -> None:
        raise RuntimeError("no device")

    rig.writer = rig.new_writer(Threads(enter=cannot_begin))
    rig.writer.drop([0])
    rig.write(2)
    assert [receipt.outcome for receipt in rig.close()[2:]] == [Outcome.FAILED]
    with closing(disk_at(tmp_path)) as again:
        assert [chunk.slot for chunk in again.stored()] == [1]
    (error,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "no device" in error.getMessage()


def test_slots_that_cannot_be_forgotten_stop_no_write(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: DiskTier, slots: Sequence[int]) -> None:
        raise OSError(errno.EIO, "stop the server")

    monkeypatch.setattr(DiskTier, "drop", broken)
    rig.writer.drop([0])
    rig.writer.drop([2])
    rig.write(1)
    (receipt,) = rig.close()
    assert receipt.outcome is Outcome.DONE
    (warning,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "stop the server" in warning.getMessage()
    assert warning.exc_info is None
