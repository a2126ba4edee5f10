"""Nothing outlives its request: thousands of requests, many of which go away early, on a real
engine whose tiers are all too small, and at the end it holds what it held at the beginning.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path

import pytest

from engine.driver import EngineSpec, Fleet, child_environment
from lamina_kv.geometry import OBJECT_HEADER_BYTES, align_up
from soak import leaks
from soak.conftest import Note
from soak.leaks import Account

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.scaled]

SEED = int(os.environ.get("LAMINA_SOAK_SEED", "0"))
REQUESTS = int(os.environ.get("LAMINA_SOAK_REQUESTS", "500"))
WARM_UP = 1500 if REQUESTS > 2000 else REQUESTS // 2
EVERY = max(1, REQUESTS // 20)
SECONDS = 60 + REQUESTS * 0.2
LAST_JOBS = 40
"""Objects of a class that threads with nothing to do may remember of their last job."""
BLOCKS = 5000
"""Pieces of Python's memory by which two moments may differ."""
SLACK = (12 if REQUESTS > 2000 else 48) << 20
"""Bytes by which resident memory may differ: allocators do not give back everything, and few
requests do not warm an engine up."""
DISK_CHUNKS = 80
CHUNK_BYTES = 4 * 2 * 2 * 32 * 4 * 64
"""Rows, keys and values, heads, head size, float32, tokens."""
OBJECT_BYTES = align_up(OBJECT_HEADER_BYTES + CHUNK_BYTES)
"""What a tier takes for a chunk."""


@pytest.fixture(scope="module")
def account(llama: Path, fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Account:
    folder = tmp_path_factory.mktemp("leaks")
    spec = EngineSpec(
        llama,
        {
            "host": {"capacity": 40 * OBJECT_BYTES},
            "tiers": [
                {
                    "kind": "disk",
                    "path": str(folder / "store"),
                    "capacity": DISK_CHUNKS * OBJECT_BYTES,
                }
            ],
        },
        {"num_gpu_blocks_override": 120, "max_model_len": 1024, "max_num_batched_tokens": 1024},
        # oneDNN keeps a program for each of the last 1,024 shapes, which would look like a leak.
        environment={"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"},
    )
    log = folder / "engine.log"
    pipe, theirs = multiprocessing.Pipe()
    with child_environment({}):
        forkserver.set_forkserver_preload(["engine.preloaded"])
        process = multiprocessing.get_context("forkserver").Process(
            target=leaks.run,
            args=(theirs, spec, log, SEED),
            kwargs={"warm_up": WARM_UP, "requests": REQUESTS, "every": EVERY},
        )
        process.start()
    theirs.close()
    try:
        assert pipe.poll(SECONDS), f"hung: {log.read_text()[-4000:]}"
        good, answer = pipe.recv()
        assert good, answer
        process.join(60)
        assert process.exitcode == 0, log.read_text()[-4000:]
    finally:
        process.kill()
        process.join()
    return answer


def test_it_was_work(account: Account, note: Note) -> None:
    """Else nothing below would mean anything."""
    first, *_, last = account.censuses
    note("requests to one engine, after a warm-up", last.requests - first.requests)
    note("  of which were aborted, warm-up included", account.aborted)
    for name in ("load", "save", "write"):
        chunks = int(account.metrics[f"lamina_{name}_bytes_total"]) // CHUNK_BYTES
        note(f"  chunks: {name}", chunks)
    for name in ("threads", "files", "memory", "blocks"):
        note(f"  {name} before and after", f"{getattr(first, name):,} {getattr(last, name):,}")
    assert account.aborted > REQUESTS * leaks.LEAVING / 2
    for name in ("load", "save", "write"):
        assert account.metrics[f"lamina_{name}_bytes_total"] > REQUESTS // 10 * CHUNK_BYTES
    assert account.metrics["lamina_write_bytes_total"] > 2 * DISK_CHUNKS * CHUNK_BYTES, "evictions"


def test_nothing_is_held(account: Account) -> None:
    for census in account.censuses:
        assert not any(census.held.values()), census.held


def test_objects_are_as_many_as_before(account: Account) -> None:
    first, *_, last = account.censuses
    more = last.objects - first.objects
    assert not more or max(more.values()) < LAST_JOBS, more


def test_threads_files_and_shared_memory_are_as_many_as_before(account: Account) -> None:
    first, *_, last = account.censuses
    assert (last.threads, last.files, last.shared) == (first.threads, first.files, first.shared)


def test_memory_is_as_much_as_before(account: Account) -> None:
    first, *_, last = account.censuses
    assert last.blocks - first.blocks < BLOCKS
    assert last.memory - first.memory < SLACK
