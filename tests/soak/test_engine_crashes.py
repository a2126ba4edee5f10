"""Promises 1 and 5 under ``kill -9`` of a real engine in the middle of saving: the next one opens
the store without help, nothing that was reported durable is lost, every answer is the answer that
there is without Lamina. Between two engines a file of the store may have been damaged.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from engine.driver import (
    Answer,
    Ask,
    Engine,
    EngineError,
    EngineSpec,
    EngineStartError,
    Fleet,
    Start,
    differences,
)
from engine.server import Server
from engine.stores import chunks_in, slab_of
from engine.workload import CHUNK, loadable, random_tokens
from lamina_kv.cli import store as store_commands
from lamina_kv.geometry import OBJECT_HEADER_BYTES, align_up
from lamina_kv.tiers.disk.layout import TABLE_BYTES
from lamina_kv.tiers.disk.lock import holder
from soak.conftest import Note
from soak.damage import damage_store

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.scaled]

CYCLES = int(os.environ.get("LAMINA_SOAK_ENGINE_CYCLES", "3"))
SERVER_CYCLES = int(os.environ.get("LAMINA_SOAK_SERVER_CYCLES", "1"))
SEED = int(os.environ.get("LAMINA_SOAK_SEED", "0"))
PER_STORE = 3
DAMAGED = 0.6
CHUNK_BYTES = 4 * CHUNK * 2 * 2 * 32 * 4
"""Rows, tokens, keys and values, heads, head size, float32."""
OBJECT_BYTES = align_up(OBJECT_HEADER_BYTES + CHUNK_BYTES)
"""What a tier takes for a chunk."""
SLOTS = 400
STORE_FILE = "lamina-store.json"


def lamina(store: Path) -> dict[str, object]:
    """A host tier that is much too small, a disk that is not."""
    return {
        "host": {"capacity": 60 * OBJECT_BYTES},
        "tiers": [{"kind": "disk", "path": str(store), "capacity": SLOTS * OBJECT_BYTES}],
    }


def new_asks(random: Random, count: int = 24) -> list[Ask]:
    """Prompts that share beginnings, of up to nine chunks."""
    bases = [random_tokens(random, 6 * CHUNK) for _ in range(3)]
    return [
        Ask(
            random.choice(bases)[: random.randrange(6 * CHUNK)]
            + random_tokens(random, random.randrange(1, 3 * CHUNK))
        )
        for _ in range(count)
    ]


def somewhere(random: Random, store: Path, used: int) -> int:
    """A byte of a slab whose first ``used`` slots are in use: of a chunk, or of what names it."""
    _, layout = slab_of(store)
    if random.random() < 0.3:
        (start,) = layout.tables(np.array([0])).tolist()
        return int(start) + random.randrange(TABLE_BYTES)
    (start,) = layout.objects(np.array([random.randrange(max(1, used))])).tolist()
    return int(start) + random.randrange(OBJECT_BYTES)


def verify(store: Path) -> None:
    """Expect that ``lamina-kv verify`` finds nothing wrong, once every process has really ended."""
    while holder(store, 0):
        time.sleep(0.01)
    app = typer.Typer()
    app.command()(store_commands.verify)
    result = CliRunner().invoke(app, [str(store)])
    assert result.exit_code == 0, result.output


@contextlib.contextmanager
def killed_after(seconds: float, process: int) -> Iterator[None]:
    """All of a process group ends after that time, if it has not ended before."""
    timer = threading.Timer(seconds, lambda: os.killpg(process, signal.SIGKILL))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def work_until_the_end(engine: Engine, asks: list[Ask], expected: list[Answer], known: int) -> int:
    """Save as much as there is until the engine is gone; returns how many chunks it has reported
    durable, ``known`` ones included.
    """
    durable = known
    with contextlib.suppress(EngineError, ConnectionError):
        names = engine.submit(asks)
        while True:
            for answer in engine.step():
                assert not differences([answer], [expected[names.index(answer.name)]])
            durable = known + int(engine.metrics().total("lamina_write_bytes_total")) // CHUNK_BYTES
    return durable


def start_on(start: Start, spec: EngineSpec, store: Path) -> Engine:
    """Start an engine; the one file whose damage is an error is named by it, and removed."""
    try:
        return start(spec)
    except EngineStartError as error:
        if STORE_FILE not in str(error) and "format version" not in str(error):
            raise
        (store / STORE_FILE).unlink()
        return start(spec)


@pytest.mark.parametrize("seed", range(SEED, SEED + CYCLES // PER_STORE))
def test_engines_that_are_killed(
    llama: Path, fleet: Fleet, start: Start, tmp_path: Path, seed: int, note: Note
) -> None:
    random = Random(seed)
    plain = fleet.get(EngineSpec(llama))
    store = tmp_path / "store"
    spec = EngineSpec(llama, lamina(store))
    asks: list[Ask] = []
    known = 0
    for _ in range(PER_STORE):
        asks += new_asks(random)
        expected = plain.generate(asks)
        engine = start_on(start, spec, store)
        known = chunks_in(store)
        order = random.sample(range(len(asks)), len(asks))
        with killed_after(math.exp(random.uniform(-4, 0.5)), engine.process.pid):
            durable = work_until_the_end(
                engine, [asks[i] for i in order], [expected[i] for i in order], known
            )
        engine.kill()
        note("real engines killed", 1)
        note("  chunks they reported durable", durable - known)
        note("  chunks they had stored", chunks_in(store) - known)
        assert durable <= chunks_in(store) <= SLOTS
        verify(store)
        if random.random() < DAMAGED:
            damage = damage_store(
                store, random, partial(somewhere, random, store, chunks_in(store))
            )
            note(f"  {damage.name}", 1)
    engine = start_on(start, spec, store)
    engine.ask(Ask((1,)))
    used = engine.metrics().total("lamina_tier_used_bytes", tier="disk")
    assert used == chunks_in(store) * CHUNK_BYTES
    for _ in range(2):
        assert not differences(engine.generate(asks), expected)
        engine.forget()
    again = engine.generate(asks)
    assert not differences(again, expected)
    hits = sum(answer.cached for answer in again)
    # Chunks that leave the host before their turn to be written came are lost, and may be.
    assert hits > 0.8 * sum(loadable(len(ask.tokens)) for ask in asks)
    assert engine.metrics().total("lamina_leased_blocks") == 0


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(SEED, SEED + SERVER_CYCLES))
def test_servers_that_are_killed(
    llama: Path, fleet: Fleet, tmp_path: Path, seed: int, note: Note
) -> None:
    """The same with a server in processes of its own, asked by several clients at once."""
    random = Random(seed)
    asks = new_asks(random, 40)
    expected = [answer.tokens for answer in fleet.answers(EngineSpec(llama), asks)]
    store = tmp_path / "store"
    spec = EngineSpec(llama, lamina(store))
    answers: dict[int, tuple[int, ...]] = {}
    durable = 0

    with Server(spec, fleet.next_log()) as server, ThreadPoolExecutor(5) as clients:

        def ask(index: int) -> None:
            with contextlib.suppress(OSError):
                answers[index] = server.complete(asks[index].tokens)

        waiting = [clients.submit(ask, index) for index in range(len(asks))]
        with killed_after(random.uniform(0.1, 1.5), server._process.pid):
            while not all(future.done() for future in waiting):
                with contextlib.suppress(OSError):
                    total = server.metrics().total("lamina_write_bytes_total")
                    durable = max(durable, int(total) // CHUNK_BYTES)
    note("real servers killed", 1)
    note("  requests they had answered", len(answers))
    note("  chunks that servers reported durable", durable)
    note("  chunks that servers had stored", chunks_in(store))
    assert all(expected[index] == tokens for index, tokens in answers.items())
    assert durable <= chunks_in(store)
    verify(store)

    with Server(spec, fleet.next_log()) as server:
        assert [server.complete(ask.tokens) for ask in asks] == expected
        metrics = server.metrics()
        assert metrics.total("lamina_failures_total") == 0
        if durable:
            assert metrics.total("lamina_hit_tokens_total", tier="disk") > 0
