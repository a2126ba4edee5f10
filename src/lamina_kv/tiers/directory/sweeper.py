"""Which files of a shared directory are deleted: those that were not used for longest.

A directory knows of a chunk when it was written or touched, and nothing else. Engines touch a used
prefix from its end to its beginning, and a prompt is written from its beginning on within seconds.
So what is oldest are whole prompts that nobody used, and of others the ends.

A sweep walks through the directory once to count, and a second time only if something is to go: it
remembers bytes by age and no names, so that ten million files take it some megabytes.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import floor, inf
from pathlib import Path

from lamina_kv.tiers.directory.root import UNREACHABLE
from lamina_kv.tiers.directory.walk import File, files, folders, namespaces
from lamina_kv.tiers.names import ABOUT

YOUNG_SECONDS = 60.0
"""A chunk, or an empty folder, is left alone for so long after it was written or touched."""

UNFINISHED_SECONDS = 3600.0
"""After so long without a write, a file that is not written to its end has nobody to end it."""

EMPTY_SECONDS = 86_400.0
"""How long a namespace stays that no chunk is left in: an engine may be about to write there."""

LEAVES = 0.95
"""Share of the capacity that a sweep leaves if there was more, so that not every sweep has to walk
twice."""


_AWAY = frozenset(UNREACHABLE) - {errno.EIO, errno.ESTALE}
"""Errors that end a sweep, because the server is away. EIO and ESTALE are also errors of a single
file; if the server is away, renewing the lease says so."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What may stay.

    Attributes:
        capacity: bytes of chunks.
        max_age: seconds since a chunk was used or written.
    """

    capacity: float = inf
    max_age: float = inf


@dataclass(slots=True)
class Swept:
    """What a sweep found, and did.

    Attributes:
        chunks: that were there.
        size: their bytes.
        freed: chunks that were deleted.
        freed_size: their bytes.
        age: seconds since the youngest of these was used; 0 without any.
        unfinished: files that nobody wrote to their end, deleted.
        folders: empty ones, deleted.
        kept: files that could not be deleted.
        unread: files and folders that could not be read.
        error: why the first of these failed.
        ahead: seconds by which the most recent chunk is younger than the server's present.
        seconds: what it took.
    """

    chunks: int = 0
    size: int = 0
    freed: int = 0
    freed_size: int = 0
    age: float = 0.0
    unfinished: int = 0
    folders: int = 0
    kept: int = 0
    unread: int = 0
    error: str = ""
    ahead: float = 0.0
    seconds: float = 0.0
    ages: Counter[int] = field(default_factory=Counter)  # bytes by the second of the last use

    @property
    def did(self) -> bool:
        """Whether anything was deleted, or could not be deleted or read."""
        return bool(self.freed or self.unfinished or self.folders or self.kept or self.unread)

    def skip(self, error: OSError) -> None:
        """Count a file or folder that cannot be read, and go on."""
        _raise_if_away(error)
        self.unread += 1
        self.error = self.error or str(error.strerror)

    def keep(self, error: OSError) -> None:
        """Count a file that cannot be deleted, and go on."""
        _raise_if_away(error)
        self.kept += 1
        self.error = self.error or str(error.strerror)


@dataclass(frozen=True, slots=True)
class _Line:
    """Which chunks go.

    Attributes:
        before: all that were used last before this second.
        within: bytes of those that were used in it.
    """

    before: int
    within: int


def sweep(root: Path, limits: Limits, now: float, go_on: Callable[[], None]) -> Swept:
    """Delete what may not stay, and what is of no use.

    Args:
        root: the directory.
        limits: what may stay.
        now: the server's time, in seconds since the epoch.
        go_on: called often; raises to end the sweep.

    Raises:
        OSError: if the directory itself cannot be read, or its server is away. A single file or
            folder that fails is counted, and the sweep goes on.
    """
    began = time.monotonic()
    swept = Swept()
    _look(swept, str(root), now)
    for namespace in namespaces(root):
        _look(swept, str(root / namespace), now)
        for folder in folders(str(root / namespace), swept.skip):
            go_on()
            if not _look(swept, folder, now, chunks=True):
                swept.folders += _remove(folder, now, YOUNG_SECONDS)
        _end_namespace(swept, root / namespace, now)
    line = _line(swept.ages, limits, now)
    if line.within or any(second < line.before for second in swept.ages):
        _free(swept, _chunks(root, go_on), line, now)
    swept.seconds = time.monotonic() - began
    return swept


def _look(swept: Swept, folder: str, now: float, *, chunks: bool = False) -> bool:
    """Delete files in a folder that nobody will end, and count chunks if it may have any; returns
    whether there are files."""
    found = False
    for file in files(folder, swept.skip):
        found = True
        if file.chunk is None:
            if now - file.changed > UNFINISHED_SECONDS:
                swept.unfinished += _delete(swept, file.path)
        elif chunks:
            swept.chunks += 1
            swept.size += file.size
            swept.ages[floor(file.changed)] += file.size
            swept.ahead = max(swept.ahead, file.changed - now)
    return found


def _line(ages: Counter[int], limits: Limits, now: float) -> _Line:
    """Which chunks go, by their bytes in each second."""
    youngest = floor(now - YOUNG_SECONDS)
    line = _Line(min(youngest, floor(now - min(limits.max_age, now))), 0)
    size = sum(ages.values())
    if size <= limits.capacity:
        return line
    too_much = size - floor(limits.capacity * LEAVES)
    for second in sorted(ages):
        if second >= youngest:
            break
        if too_much <= ages[second]:
            return max(line, _Line(second, too_much), key=lambda each: (each.before, each.within))
        too_much -= ages[second]
    return _Line(youngest, 0)


def _chunks(root: Path, go_on: Callable[[], None]) -> Iterator[File]:
    """All chunks. What cannot be read was counted by the first walk."""
    for namespace in namespaces(root):
        for folder in folders(str(root / namespace), _raise_if_away):
            go_on()
            for file in files(folder, _raise_if_away):
                if file.chunk is not None:
                    yield file
                    go_on()  # each file that fails may have taken a timeout


def _free(swept: Swept, chunks: Iterator[File], line: _Line, now: float) -> None:
    left, latest = line.within, 0.0
    for file in chunks:  # looked at anew: what was touched meanwhile stays
        second = floor(file.changed)
        if second > line.before or (second == line.before and left <= 0):
            continue
        if _delete(swept, file.path):
            left -= file.size if second == line.before else 0
            latest = max(latest, file.changed)
            swept.freed += 1
            swept.freed_size += file.size
    swept.age = now - latest if latest else 0.0


def _delete(swept: Swept, path: str) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        swept.keep(error)
        return False
    return True


def _raise_if_away(error: OSError) -> None:
    if error.errno in _AWAY:
        raise error


def _remove(folder: str | Path, now: float, seconds: float) -> bool:
    """Delete a folder if it is empty, and nothing was done in it for so long."""
    try:
        if now - os.stat(folder).st_mtime <= seconds:
            return False
        os.rmdir(folder)
    except OSError:
        return False
    return True


def _end_namespace(swept: Swept, folder: Path, now: float) -> None:
    about = folder / ABOUT
    with suppress(OSError):
        if set(os.listdir(folder)) == {ABOUT} and now - about.stat().st_mtime > EMPTY_SECONDS:
            about.unlink()
            folder.rmdir()
            swept.folders += 1
