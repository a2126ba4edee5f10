"""How much a store on disk can have, before there is one."""

from __future__ import annotations

import os
from pathlib import Path


def room_at(directory: Path) -> int | None:
    """Bytes that files in a directory can have: what is free, and what they have already.

    Args:
        directory: it need not be there, and is not made.

    Returns:
        None if the directory cannot be looked at, or is in a file system that keeps no files.
    """
    try:
        there = next(place for place in (directory, *directory.parents) if place.exists())
        volume = os.statvfs(there)
        taken = sum(
            _taken(os.path.join(folder, name))
            for folder, folders, files in os.walk(directory)
            for name in (*folders, *files)
        )
    except (OSError, StopIteration):
        return None
    if volume.f_blocks == 0:
        return None
    return volume.f_bavail * volume.f_frsize + taken


def _taken(path: str) -> int:
    """Bytes of a file on disk; a link's own, and 0 if it was deleted since it was listed."""
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
