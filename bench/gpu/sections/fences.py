"""D: fences, with one of the streams held up in every round.

A layer writes a stamp, it is saved, and the block is another's as soon as the receipt is there.
Then a stale write is still queued when the stamp is loaded again, and the attention reads it.
Controls do the same wrong: streams that wait for no event, a block that is given away without its
receipt. Where a control sees no wrong byte, the section has proved nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from gpu.lab import Engine, Lab
from gpu.pages import layer_outermost
from gpu.plan import Bench
from gpu.report import Bound, Row
from lamina_kv.data.near import NearSlab

ROUNDS, CONTROL_ROUNDS = 300, 60
LONGEST_DELAY = 5e-3
"""Seconds: far more than the copy of a row takes."""

PAGE, BLOCKS = 32 << 10, 64
ANOTHERS, STALE, STAMPS = 255, 254, 251

SHARE, CONTROL_SHARE = 0.5, 0.15
"""Of the section's time, for the promise and for each control."""


def run(bench: Bench[Lab]) -> Generator[Row, None, None]:
    """See the module."""
    whole = bench.left
    yield from _promise(bench, whole * SHARE)
    for name, ordered, receipt in (
        ("streams that wait for no event", False, True),
        ("a block given away without its receipt", True, False),
    ):
        seen = 0
        end = bench.clock() + whole * CONTROL_SHARE
        engine = bench.lab.open(layer_outermost(PAGE, BLOCKS, rows=1), ordered=ordered)
        try:
            for wrong in rounds(engine, CONTROL_ROUNDS, receipt=receipt):
                seen += sum(wrong)
                if seen or bench.clock() > end:
                    break
        finally:
            engine.close()
        yield Row(f"control: {name}: wrong rounds seen", seen, "", Bound(1, at_least=True))


def _promise(bench: Bench[Lab], seconds: float) -> Generator[Row, None, None]:
    end = bench.clock() + seconds
    engine = bench.lab.open(layer_outermost(PAGE, BLOCKS, rows=1))
    done = saves = loads = 0
    try:
        for save, load in rounds(engine, ROUNDS):
            done, saves, loads = done + 1, saves + save, loads + load
            if bench.clock() > end:
                break
    finally:
        engine.close()
    yield Row("rounds", done, "", Bound(min(ROUNDS, 100), at_least=True))
    yield Row("saves of other bytes than the layer wrote", saves, "", Bound(0))
    yield Row("attention that read other bytes than were loaded", loads, "", Bound(0))


def rounds(
    engine: Engine, count: int, *, receipt: bool = True, seed: int = 0
) -> Iterator[tuple[int, int]]:
    """Rounds as the module says.

    Args:
        engine: of one row.
        count: how many.
        receipt: whether a save's fence is waited for before its block is given away.
        seed: which stream is held up, and for how long.

    Yields:
        Whether the save was wrong, and whether the load was: 0 or 1 each.
    """
    rng = np.random.default_rng(seed)
    mover, memory = engine.mover, engine.allocations[0]
    geometry = layer_outermost(PAGE, BLOCKS, rows=1)
    slots = BLOCKS // geometry.blocks_per_chunk
    near = NearSlab(geometry, slots * geometry.object_bytes, mover.allocate_host)
    ids = np.arange(BLOCKS, dtype=np.int64)
    mover.await_near(near, ids)
    pairs = mover.pairs(near, ids, ids)
    with ThreadPoolExecutor(1, initializer=mover.enter_thread) as thread:
        for number in range(count):
            stamp = 1 + number % STAMPS
            _hold_up(engine, rng)
            with engine.computing():
                engine.fill(memory, stamp)
                written = mover.fence_compute()
                saved = thread.submit(mover.save, [0], pairs, written).result()
                if receipt:
                    saved.wait()
                engine.fill(memory, ANOTHERS)
            saved.wait()
            save_is_wrong = not (_held(near) == stamp).all()
            near.memory.fill_(stamp)  # what the load must bring does not hang on the save
            _hold_up(engine, rng)
            with engine.computing():
                engine.fill(memory, STALE)
                after = mover.fence_compute()
                loaded = thread.submit(mover.load, [0], pairs, after).result()
                mover.hold_compute(loaded)
                total = engine.total(memory)
            load_is_wrong = total() != stamp * memory.numel()
            loaded.wait()
            yield int(save_is_wrong), int(load_is_wrong)


def _hold_up(engine: Engine, rng: np.random.Generator) -> None:
    stream = engine.streams[int(rng.integers(len(engine.streams)))]
    engine.delay(stream, float(rng.uniform(0.2, 1.0)) * LONGEST_DELAY)


def _held(near: NearSlab) -> npt.NDArray[np.uint8]:
    """The bytes of all near pages of row 0; shape ``(slots, bytes)``."""
    geometry = near.geometry
    start, size = geometry.extent_offsets[0], geometry.extent_bytes[0]
    content: npt.NDArray[np.uint8] = near.memory.numpy()
    return content.reshape(near.slots, -1)[:, start : start + size]
