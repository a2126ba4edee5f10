"""A fetch brings the bytes that were written, says when it cannot, and lets every load go first."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lamina.data import fetch_pipeline
from lamina.data.fetch_pipeline import DiskFetcher
from lamina.data.movers import make_mover
from lamina.data.tiers.disk import DiskTier, StoreNamespace
from lamina.data.tiers.disk_slab import aligned_memory
from lamina.data.tiers.host import HostTier
from lamina.data.worker_pool import WorkerPool
from lamina.geometry import CacheGeometry, Row
from lamina.keys import KEY_BYTES
from lamina.plan import ChunkKey, FetchOrder, Outcome, TransferId, TransferReceipt

BLOCKS, PAGES = 8, (512, 640, 384)
GEOMETRY = CacheGeometry(
    rows=tuple(Row((f"layer.{i}",), 0, i * BLOCKS * 640, 640, p) for i, p in enumerate(PAGES)),
    num_blocks=BLOCKS,
    block_tokens=16,
    chunk_tokens=32,
    allocation_bytes=(len(PAGES) * BLOCKS * 640,),
)
STORED = 4
PATIENCE = 60.0
"""Seconds after which something hangs."""


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(KEY_BYTES, "little"))


def order(number: int, host_slot: int, disk_slot: int | None = None) -> FetchOrder:
    where = number if disk_slot is None else disk_slot
    return FetchOrder(TransferId(number), key(number), where, host_slot)


class Rank:
    """A disk with chunks 0, 1, … in slots of the same number, and a host to fetch them to."""

    def __init__(self, path: Path) -> None:
        mover = make_mover(GEOMETRY, [torch.zeros(GEOMETRY.allocation_bytes, dtype=torch.uint8)])
        self.host = HostTier(GEOMETRY, 8 * GEOMETRY.chunk_bytes, mover.allocate_host)
        self.disk = DiskTier(
            path=path,
            namespace=StoreNamespace("ab" * 16, {}),
            rank=0,
            extent_bytes=GEOMETRY.extent_bytes,
            capacity=1 << 20,
        )
        slots = list(range(STORED))
        self.disk.begin(slots)
        self.content: list[list[bytes]] = [[] for _ in slots]
        for row, size in enumerate(GEOMETRY.extent_bytes):
            extents = []
            for slot in slots:
                extent = aligned_memory(size)
                extent[:] = np.random.default_rng([slot, row]).integers(0, 256, size, np.uint8)
                self.content[slot].append(extent.tobytes())
                extents.append(extent)
            self.disk.write_row(row, slots, extents)
        self.disk.commit([(slot, key(slot)) for slot in slots])
        self.pool = WorkerPool("load-disk", 1)
        self.receipts: queue.Queue[TransferReceipt] = queue.Queue()
        self.on_report: Callable[[], None] = lambda: None
        self.fetcher = DiskFetcher(self.disk, self.host, mover, GEOMETRY, self.pool, self._report)

    def _report(self, receipts: Iterable[TransferReceipt]) -> None:
        self.on_report()
        for receipt in receipts:
            self.receipts.put(receipt)

    def receipt(self) -> TransferReceipt:
        return self.receipts.get(timeout=PATIENCE)

    def held(self, slot: int) -> list[bytes]:
        return [self.host.extent(row, slot).tobytes() for row in range(len(PAGES))]


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    rank = Rank(tmp_path)
    yield rank
    assert rank.fetcher.close(PATIENCE)
    assert rank.pool.close(PATIENCE)
    rank.disk.close()


def test_what_was_written_is_in_the_host(rank: Rank) -> None:
    rank.fetcher.fetch([order(2, host_slot=5), order(0, host_slot=1)], step=0)
    rank.fetcher.fetch([order(3, host_slot=7)], step=1)
    got = [rank.receipt() for _ in range(3)]
    assert [(r.transfer, r.outcome) for r in got] == [(n, Outcome.DONE) for n in (2, 0, 3)]
    assert {r.moved_bytes for r in got} == {GEOMETRY.chunk_bytes}
    assert [rank.held(slot) for slot in (5, 1, 7)] == [rank.content[n] for n in (2, 0, 3)]


def test_a_slot_with_another_chunk_is_refused_and_the_next_is_fetched(rank: Rank) -> None:
    rank.fetcher.fetch([order(7, host_slot=0, disk_slot=1), order(2, host_slot=3)], step=0)
    refused, good = rank.receipt(), rank.receipt()
    assert (refused.outcome, refused.reason) == (Outcome.FAILED, "disk_other_key")
    assert (refused.bad_chunks, refused.moved_bytes) == ((key(7),), 0)
    assert good.outcome is Outcome.DONE


def test_a_disk_that_raises_fails_the_fetch_and_not_the_next(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(rank.disk, "read_row", lambda *_: 1 / 0)
        rank.fetcher.fetch([order(1, host_slot=0)], step=0)
        receipt = rank.receipt()
    assert (receipt.outcome, receipt.reason) == (Outcome.FAILED, "ZeroDivisionError")
    assert not receipt.bad_chunks
    rank.fetcher.fetch([order(1, host_slot=0)], step=1)
    assert rank.receipt().outcome is Outcome.DONE
    assert "raised" in caplog.text


def test_a_load_goes_before_the_next_chunk(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_pipeline, "GIVE_WAY", PATIENCE)
    loading = threading.Event()
    rank.pool.submit((1.0, 0), lambda: loading.wait(PATIENCE), pytest.fail)
    rank.fetcher.fetch([order(n, host_slot=n) for n in range(STORED)], step=0)
    time.sleep(0.1)
    assert rank.receipts.empty()
    loading.set()
    assert [rank.receipt().outcome for _ in range(STORED)] == [Outcome.DONE] * STORED


def test_a_disk_that_is_never_idle_keeps_nobody_waiting_for_ever(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_pipeline, "GIVE_WAY", 0.01)
    loading = threading.Event()
    rank.pool.submit((1.0, 0), lambda: loading.wait(PATIENCE), pytest.fail)
    rank.fetcher.fetch([order(1, host_slot=1)], step=0)
    assert rank.receipt().outcome is Outcome.DONE
    loading.set()


def test_at_the_end_no_further_chunk_is_fetched(rank: Rank) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def report() -> None:
        begun.set()
        assert may_go_on.wait(PATIENCE)

    rank.on_report = report
    rank.fetcher.fetch([order(n, host_slot=n) for n in range(STORED)], step=0)
    assert begun.wait(PATIENCE)
    assert not rank.fetcher.close(0), "the chunk under way has not ended"
    may_go_on.set()
    assert rank.fetcher.close(PATIENCE)
    assert rank.receipts.qsize() == 1


def test_chunks_that_come_one_by_one_do_not_mix(rank: Rank) -> None:
    for _ in range(200):
        for number in range(1, STORED):
            rank.fetcher.fetch([order(number, host_slot=number)], step=0)
        for _ in range(1, STORED):
            assert rank.receipt().outcome is Outcome.DONE
        assert [rank.held(n) for n in range(1, STORED)] == rank.content[1:]


def test_who_waits_for_a_pool_waits_for_the_job_that_runs() -> None:
    pool, go_on = WorkerPool("test", 1), threading.Event()
    assert pool.await_idle(0)
    pool.submit((0.0, 0), lambda: go_on.wait(PATIENCE), pytest.fail)
    assert not pool.await_idle(0.01)
    go_on.set()
    assert pool.await_idle(PATIENCE)
    assert pool.close(PATIENCE)
    assert pool.await_idle(0), "nobody waits for a pool that has ended"
