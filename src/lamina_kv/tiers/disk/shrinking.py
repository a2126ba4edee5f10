"""Makes a slab smaller: before its end is cut off, chunks that were used last move to slots that
stay, over chunks that were unused for longer.

A prompt is found up to its first chunk that is missing. What happens to lie in the first half of a
file is half of the chunks, and of few prompts all.

Ranks that share chunks need each in the same slot, and each rank knows of a chunk's last use by its
own clock. So where there are several nothing moves.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import numpy as np

from lamina_kv.tiers.disk.aio import Operation
from lamina_kv.tiers.disk.data import Slab
from lamina_kv.tiers.disk.heads import Heads, Keys
from lamina_kv.tiers.disk.layout import Integers, Layout
from lamina_kv.tiers.objects import aligned_memory, row_bytes

MOST_SECONDS = 60.0
"""Seconds by which a start may be later; at half of what a disk of 1 GB/s does, 30 GB. Chunks that
have not moved by then are given up."""

_BATCH_BYTES = 64 << 20


def shrink(path: Path, before: Layout, layout: Layout, direct: bool | None, *, alone: bool) -> int:
    """Move what was used last in front of the new end, if that may be. Nothing is cut off yet: a
    process that is killed meanwhile leaves a slab of the former layout, of which some chunks may be
    there twice.

    Args:
        path: the slab.
        before: its layout.
        layout: the one that it is to have, with fewer slots of the same size.
        direct: whether to bypass the page cache; None where the file system can.
        alone: whether no other rank has a part of the same chunks.

    Returns:
        Chunks that were stored.

    Raises:
        OSError: if the file cannot be used.
    """
    with closing(Slab(path, before, direct)) as slab:
        heads = Heads(slab)
        stored = heads.stored(keys=True)
        assert stored.keys is not None
        assert stored.used is not None
        slots = stored.slots.astype(np.int64)
        if not alone:
            return len(slots)
        newest = np.argsort(-stored.used, kind="stable")[: layout.slots]
        stay = slots[newest] < layout.slots
        free = np.setdiff1d(np.arange(layout.slots), slots[newest[stay]])
        unused_since = np.full(before.slots, -np.inf)
        unused_since[slots] = stored.used
        free = free[np.argsort(unused_since[free], kind="stable")]  # empty ones first
        behind = newest[~stay]
        batch = max(1, _BATCH_BYTES // layout.object_bytes)
        buffers = aligned_memory(batch * layout.object_bytes).reshape(batch, layout.object_bytes)
        due = time.monotonic() + MOST_SECONDS
        for start in range(0, len(behind), batch):
            some = behind[start : start + batch]
            sources, targets = slots[some], free[start : start + len(some)]
            moved = time.monotonic() < due and _move(
                slab, heads, sources, targets, stored.keys[some], stored.used[some], buffers
            )
            if not moved:
                break
        return len(slots)


def _move(
    slab: Slab,
    heads: Heads,
    sources: Integers,
    targets: Integers,
    keys: Keys,
    used: np.ndarray[tuple[int], np.dtype[np.float64]],
    buffers: np.ndarray[tuple[int, int], np.dtype[np.uint8]],
) -> bool:
    """Move a batch as a store writes one; whether the next may be tried."""
    read = slab.move_objects(Operation.READ, sources, list(buffers[: len(sources)])) == 0
    sources, targets, keys, used = sources[read], targets[read], keys[read], used[read]
    objects = [buffers[i] for i in np.flatnonzero(read).tolist()]
    heads.erase(targets)
    if heads.write():
        return False
    written = slab.move_objects(Operation.WRITE, targets, objects) == 0
    lengths = np.array([row_bytes(each) for each in objects], np.int64)
    heads.enter(targets[written], keys[written], lengths[written], used[written])
    if heads.write(targets[written]):
        return False
    slab.sync()
    return bool(written.all())
