"""The directory of a store: its format, and which files are Lamina's.

::

    lamina-store.json            the format and its version
    rank-<k>.lock                locked while a server uses rank k
    <namespace>/namespace.json   what the fingerprint stands for, for people
    <namespace>/rank-<k>.slab    rank k's chunks

A rank's file of one namespace is a *shard*. Only their owner may read or write them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lamina_kv.tiers.contract import StoreError
from lamina_kv.tiers.disk.lock import hold

FORMAT_NAME = "lamina disk store"
FORMAT_VERSION = 2
"""Changed with anything that changes what a file of the store means."""

_STORE_FILE = "lamina-store.json"
_NAMESPACE_FILE = "namespace.json"
_NAMESPACE = re.compile(r"[0-9a-f]{8,128}")
# Version 1 kept what is in a slab in an SQLite database beside it.
_SHARD_FILE = re.compile(r"rank-(\d+)\.(?:slab|sqlite(?:-wal|-shm|\.damaged)?)")
_LOCK_FILE = re.compile(r"rank-(\d+)\.lock")
# What schedulers learnt about costs was kept here once.
_COSTS_FILE = re.compile(r"costs-[0-9a-f]{16}-\d+\.(?:json|new)")
_TEMPORARY = re.compile(r"\.lamina-\d+\.tmp")


@dataclass(frozen=True, slots=True)
class Shard:
    """Where one rank's part of one namespace lies.

    Attributes:
        directory: the namespace's.
        rank: the rank.
    """

    directory: Path
    rank: int

    @property
    def slab(self) -> Path:
        """The file of chunks."""
        return self.directory / f"rank-{self.rank}.slab"

    def files(self) -> list[Path]:
        """What there is of it."""
        return [
            path
            for path in _entries(self.directory)
            if (match := _SHARD_FILE.fullmatch(path.name)) and int(match[1]) == self.rank
        ]

    def disk_bytes(self) -> int:
        """Bytes that it takes on the disk."""
        return sum(stat.st_blocks * 512 for stat in map(stat_of, self.files()) if stat)

    def last_used(self) -> float:
        """When it was written last, in seconds since the epoch; every server that opens it does."""
        times = [stat.st_mtime for stat in map(stat_of, self.files()) if stat]
        return max(times, default=0.0)

    def remove(self) -> None:
        """Delete it, and the namespace's directory with the last shard in it."""
        for path in self.files():
            path.unlink(missing_ok=True)
        _remove_if_empty(self.directory)


def prepare(path: Path) -> None:
    """Make sure that ``path`` is a store of this format, empty if there was none.

    Raises:
        StoreError: if it is not and cannot be.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (path / _STORE_FILE).exists():
            _write(path / _STORE_FILE, {"format": FORMAT_NAME, "version": FORMAT_VERSION})
    except OSError as error:
        raise StoreError(
            f"cannot make a store in {path} ({error}): choose a directory that this user can write "
            "to"
        ) from error
    check_format(path)


def check_format(path: Path) -> None:
    """Make sure that ``path`` is a store that this Lamina can read.

    Raises:
        StoreError: if it is not.
    """
    require_access(path)
    found = _read(path / _STORE_FILE)
    if found.get("format") != FORMAT_NAME:
        raise StoreError(
            f"{path} is not a Lamina store, or its {_STORE_FILE} is damaged: choose an empty "
            "directory, or, if it is a store, delete that file; what is stored is found again"
        )
    version = found.get("version")
    if not isinstance(version, int):
        raise StoreError(
            f"{_STORE_FILE} in {path} is damaged: delete that file; what is stored is found again"
        )
    if version != FORMAT_VERSION:
        age = "an older" if version < FORMAT_VERSION else "a newer"
        raise StoreError(
            f"{path} is a store of format version {version}, of {age} Lamina; this one reads and "
            f"writes version {FORMAT_VERSION}: choose another path, or give up what is stored with "
            f"`lamina-kv clear {path}`"
        )


def is_store(path: Path) -> bool:
    """Whether ``path`` is a store of any version."""
    return _read(path / _STORE_FILE).get("format") == FORMAT_NAME


def require_store(path: Path) -> None:
    """Make sure that ``path`` is a store of any version.

    Raises:
        StoreError: if it is not.
    """
    require_access(path)
    if not is_store(path):
        raise StoreError(f"{path} is not a Lamina disk store")


def shards(path: Path) -> list[Shard]:
    """Every shard in a store, by namespace and rank."""
    found = {
        Shard(directory, int(match[1]))
        for directory in _namespaces(path)
        for file in _entries(directory)
        if (match := _SHARD_FILE.fullmatch(file.name))
    }
    return sorted(found, key=lambda shard: (shard.directory, shard.rank))


def describe(path: Path, namespace: str, description: Mapping[str, str]) -> Path:
    """Make a namespace's directory and say in it, for people, what the namespace is.

    Args:
        path: the store.
        namespace: its fingerprint, hexadecimal.
        description: what that stands for. ``chunk_tokens`` lets people be told how many tokens are
            stored.

    Raises:
        ValueError: if the fingerprint is none.
        OSError: if that is not possible.
    """
    if not _NAMESPACE.fullmatch(namespace):
        raise ValueError(f"a namespace's fingerprint is hexadecimal, not {namespace!r}")
    directory = path / namespace
    directory.mkdir(mode=0o700, exist_ok=True)
    if _read(directory / _NAMESPACE_FILE) != description:
        _write(directory / _NAMESPACE_FILE, dict(description))
    return directory


def description(shard: Shard) -> dict[str, str]:
    """What :func:`describe` said; empty if that is lost."""
    return {str(k): str(v) for k, v in _read(shard.directory / _NAMESPACE_FILE).items()}


def sync_directories(*directories: Path) -> None:
    """Make durable which files are in these directories.

    Raises:
        OSError: if that fails.
    """
    for directory in directories:
        file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def clear(path: Path) -> list[Path]:
    """Delete everything in a store that is Lamina's, and nothing else.

    Returns:
        What is left in the directory.

    Raises:
        StoreError: if a server uses it; nothing was deleted then.
    """
    locks = {int(m[1]) for file in path.iterdir() if (m := _LOCK_FILE.fullmatch(file.name))}
    found = shards(path)
    with hold(path, sorted(locks | {shard.rank for shard in found})):
        for shard in found:
            shard.remove()
        for directory in _namespaces(path):
            _remove_if_empty(directory)
        for file in list(path.iterdir()):
            if any(each.fullmatch(file.name) for each in (_LOCK_FILE, _COSTS_FILE, _TEMPORARY)):
                file.unlink()
        (path / _STORE_FILE).unlink()
    return sorted(path.iterdir())


def stat_of(file: Path) -> os.stat_result | None:
    """A file's; None if it is not there. Other ranks remove what is theirs at any time."""
    with suppress(FileNotFoundError):
        return file.stat()
    return None


def _entries(directory: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return list(directory.iterdir())
    return []


def _namespaces(path: Path) -> list[Path]:
    return [each for each in path.iterdir() if _NAMESPACE.fullmatch(each.name) and each.is_dir()]


def _remove_if_empty(namespace: Path) -> None:
    """Delete a namespace's directory if no shard is left in it, nor anything that is not ours."""
    there = _entries(namespace)
    if not any(_SHARD_FILE.fullmatch(path.name) for path in there):
        for path in there:
            if path.name == _NAMESPACE_FILE or _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            namespace.rmdir()


def require_access(path: Path) -> None:
    """Make sure that a store, if there is one, is this user's to read.

    Raises:
        StoreError: if it is not.
    """
    try:
        (path / _STORE_FILE).open("rb").close()
    except PermissionError as error:
        raise StoreError(
            f"{error.filename} may not be read by this user: a store is its owner's"
        ) from error
    except OSError:
        pass  # there is none


def _read(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: Path, content: Mapping[str, object]) -> None:
    temporary = file.with_name(f".lamina-{os.getpid()}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        json.dump(content, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)
