"""Stores on disk as tests damage them, while they are served or at rest."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np

from lamina_kv.geometry import OBJECT_HEADER_BYTES
from lamina_kv.tiers.disk.data import Slab
from lamina_kv.tiers.disk.heads import Heads
from lamina_kv.tiers.disk.layout import BLOCK, Layout, decode_label


def slab_of(store: Path, rank: int = 0) -> tuple[Path, Layout]:
    """The file of a rank's chunks, and what is where in it."""
    (slab,) = store.glob(f"*/rank-{rank}.slab")
    with slab.open("rb") as file:
        layout = decode_label(file.read(BLOCK))
    assert layout is not None
    return slab, layout


def chunks_in(store: Path, rank: int = 0) -> int:
    """Chunks that a rank's file names."""
    path, layout = slab_of(store, rank)
    with closing(Slab(path, layout, direct=False, writable=False)) as slab:
        return len(Heads(slab))


def flip(store: Path, slots: Iterable[int] | None = None, rank: int = 0) -> None:
    """Flip one bit in the first row of the chunks in some slots, of all without any."""
    slab, layout = slab_of(store, rank)
    wanted = np.array(list(range(layout.slots) if slots is None else slots))
    with slab.open("r+b") as file:
        for start in layout.objects(wanted).tolist():
            file.seek(start + OBJECT_HEADER_BYTES + 1)
            (byte,) = file.read(1)
            file.seek(start + OBJECT_HEADER_BYTES + 1)
            file.write(bytes([byte ^ 0x10]))


def cut(store: Path) -> None:
    """A rank's file ends behind the first eighth of its slots."""
    slab, layout = slab_of(store)
    (end,) = layout.objects(np.array([layout.slots // 8])).tolist()
    with slab.open("r+b") as file:
        file.truncate(end)
