"""Opens a slab in whatever state it is: new, cut short, damaged, or of another size or layout."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path

from lamina_kv.tiers.disk.config import DiskConfig
from lamina_kv.tiers.disk.data import Slab, allocate, read_label
from lamina_kv.tiers.disk.heads import Heads
from lamina_kv.tiers.disk.layout import Layout
from lamina_kv.tiers.disk.room import OUT_OF_SPACE, no_room
from lamina_kv.tiers.disk.shrinking import shrink

log = logging.getLogger("lamina_kv.tiers")


def open_slab(
    config: DiskConfig, path: Path, layout: Layout, opened: ExitStack, *, alone: bool
) -> tuple[Slab, Heads]:
    """Open a slab that may be missing, and make it whole. What is stored stays as it is until there
    is room for all of it.

    Args:
        config: the tier.
        path: the file.
        layout: how it is to be laid out.
        opened: closes it.
        alone: whether no other rank has a part of the same chunks.

    Raises:
        NoRoom: if the disk has no room.
        OSError: if the file cannot be used.
    """
    is_new = not path.exists()
    before = read_label(path)
    if before is not None and before.object_bytes != layout.object_bytes:
        log.warning(
            "tier %s: %s was laid out for %s and is needed for %s; it starts empty",
            config.name,
            path,
            before,
            layout,
        )
        os.truncate(path, 0)
        before = None
    direct = None if config.direct == "auto" else config.direct
    stored = 0
    if before is not None and layout.slots < before.slots:
        stored = shrink(path, before, layout, direct, alone=alone)
    slab = Slab(path, layout, direct)
    opened.callback(slab.close)
    heads = Heads(slab)
    was_cut = before is not None and slab.size < before.file_bytes
    try:
        if not allocate(path, layout.file_bytes):
            log.warning(
                "tier %s: the file system of %s cannot reserve space, so that the capacity is only "
                "known to fit now: if others fill the disk later, writes stop. Use ext4 or xfs for "
                "%s, or keep as much free",
                config.name,
                path,
                config.key("path"),
            )
    except OSError as error:
        if is_new:
            path.unlink()
        if error.errno in OUT_OF_SPACE:
            raise no_room(path, layout.file_bytes, error) from error
        raise
    slab.write_label()
    heads.write()
    slab.sync()
    if before is not None and before.slots != layout.slots:
        log.info(
            "tier %s: %s has room for %d chunks now and had for %d: %d chunks are kept, and %d are "
            "given up",
            config.name,
            path,
            layout.slots,
            before.slots,
            len(heads),
            max(0, stored - len(heads)),
        )
    if was_cut or heads.damaged:
        log.warning(
            "tier %s: %s %s: %d chunks are known to be lost, what is left serves",
            config.name,
            path,
            "was cut short" if was_cut else "has damaged heads",
            heads.lost + heads.damaged,
        )
    return slab, heads
