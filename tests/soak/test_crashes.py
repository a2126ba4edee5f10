"""Promises 4 and 5 under ``kill -9``: whenever a server ends, the next one opens its store without
help, finds every chunk that was reported durable, delivers no wrong byte, and loses no space.

A failure names the store's seed and the server; where time is virtual it happens again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from soak.conftest import Note
from soak.crash import Life

pytestmark = pytest.mark.scaled

CYCLES = int(os.environ.get("LAMINA_SOAK_CYCLES", "20"))
SEED = int(os.environ.get("LAMINA_SOAK_SEED", "0"))
PER_STORE = 10


@pytest.fixture
def store(seed: int, tmp_path: Path) -> Iterator[Path]:
    """A directory on disk; every other one in memory, where more happens until the kill."""
    memory = "/dev/shm"
    if seed // 2 % 2 and os.access(memory, os.W_OK):
        with tempfile.TemporaryDirectory(dir=memory) as path:
            yield Path(path) / "store"
    else:
        yield tmp_path / "store"


def test_a_life_in_virtual_time_can_be_repeated(tmp_path: Path) -> None:
    counts = []
    for name in ("first", "second"):
        life = Life(4, tmp_path / name)
        life.run(4)
        counts.append(life.counts)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("seed", range(SEED, SEED + CYCLES // PER_STORE))
def test_servers_that_are_killed(seed: int, store: Path, note: Note) -> None:
    life = Life(seed, store)
    life.run(PER_STORE)
    note("stores", 1)
    for name, count in sorted(life.counts.items()):
        note(name, count)
