"""A walk through a shared directory: only what is Lamina's, and no link is followed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.directory.layout import FOLDER, NAMESPACE, TEMPORARY
from lamina_kv.tiers.names import parse_object_name

Failed = Callable[[OSError], None]
"""Told of a file or folder that cannot be read, which is then left out; or raises."""


def _raise(error: OSError) -> None:
    raise error


class File(NamedTuple):
    """A file in a folder of chunks.

    Attributes:
        path: the file.
        chunk: key and shard; None if it is not written to its end yet.
        size: bytes.
        changed: when it was written or touched, in seconds since the epoch by the server's clock.
    """

    path: str
    chunk: tuple[ChunkKey, int] | None
    size: int
    changed: float


def namespaces(root: Path) -> list[str]:
    """The namespaces in a directory."""
    return sorted(entry.name for entry in _folders(str(root)) if NAMESPACE.fullmatch(entry.name))


def folders(namespace: str, failed: Failed = _raise) -> list[str]:
    """The folders of chunks in a namespace's own folder."""
    return [entry.path for entry in _folders(namespace, failed) if FOLDER.fullmatch(entry.name)]


def files(folder: str, failed: Failed = _raise) -> Iterator[File]:
    """What is Lamina's in one folder of chunks. What vanishes meanwhile is left out."""
    for entry in _entries(folder, failed):
        chunk = parse_object_name(entry.name)
        if chunk is None and not TEMPORARY.fullmatch(entry.name):
            continue
        try:
            if not entry.is_file(follow_symlinks=False):
                continue
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        except OSError as error:
            failed(error)
            continue
        yield File(entry.path, chunk, status.st_size, status.st_mtime)


def _folders(path: str, failed: Failed = _raise) -> list[os.DirEntry[str]]:
    found = []
    for entry in _entries(path, failed):
        try:
            if entry.is_dir(follow_symlinks=False):
                found.append(entry)
        except OSError as error:
            failed(error)
    return found


def _entries(path: str, failed: Failed) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            yield from entries
    except FileNotFoundError:
        return
    except OSError as error:
        failed(error)
