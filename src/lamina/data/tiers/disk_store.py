"""The directory of a disk store: its format, who uses it, what lies in it.

::

    lamina-store.json            the format and its version
    rank-<k>.lock                locked while a server uses rank k
    <namespace>/namespace.json   what the fingerprint stands for, for people
    <namespace>/rank-<k>.slab    rank k's chunks
    <namespace>/rank-<k>.sqlite  which chunks these are

A namespace's files of one rank are a *shard*. Only their owner may read or write them.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lamina.data.tiers.disk_lock import StoreError, hold, lock_file

log = logging.getLogger("lamina.data")

FORMAT_NAME = "lamina disk store"
FORMAT_VERSION = 1
"""Changed with anything that changes what a file of the store means."""

_STORE_FILE = "lamina-store.json"
_NAMESPACE_FILE = "namespace.json"
_NAMESPACE = re.compile(r"[0-9a-f]{8,128}")
_SHARD_FILE = re.compile(r"rank-(\d+)\.(?:slab|sqlite(?:-wal|-shm|\.damaged)?)")
_LOCK_FILE = re.compile(r"rank-(\d+)\.lock")
LOCK_PATIENCE = 2.0
"""Seconds that a server waits for its part of a store, while another one may be removing an old
model's shard from it."""
START_SECONDS = 600.0
"""Seconds within which all ranks of a server open their shards."""
_TEMPORARY = re.compile(r"\.lamina-\d+\.tmp")


@dataclass(frozen=True, slots=True)
class StoreNamespace:
    """What sets the chunks of one model and configuration apart from all others.

    Attributes:
        fingerprint: hexadecimal; names the directory.
        description: for people. ``chunk_tokens`` lets them be told how many tokens are stored.
    """

    fingerprint: str
    description: Mapping[str, str]

    def __post_init__(self) -> None:
        if not _NAMESPACE.fullmatch(self.fingerprint):
            raise ValueError(f"a namespace's fingerprint is hexadecimal, not {self.fingerprint!r}")


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

    @property
    def index(self) -> Path:
        """The SQLite file."""
        return self.directory / f"rank-{self.rank}.sqlite"

    def files(self) -> list[Path]:
        """What there is of it."""
        return [
            path
            for path in _entries(self.directory)
            if (match := _SHARD_FILE.fullmatch(path.name)) and int(match[1]) == self.rank
        ]

    def disk_bytes(self) -> int:
        """Bytes that it takes on the disk."""
        return sum(stat.st_blocks * 512 for stat in map(_stat, self.files()) if stat)

    def last_used(self) -> float:
        """When it was written last, in seconds since the epoch."""
        times = [stat.st_mtime for stat in map(_stat, self.files()) if stat]
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
            f"disk.path: cannot make a store in {path} ({error}): choose a directory that this "
            "user can write to"
        ) from error
    check_format(path)


def check_format(path: Path) -> None:
    """Make sure that ``path`` is a store that this Lamina can read.

    Raises:
        StoreError: if it is not.
    """
    _require_access(path)
    found = _read(path / _STORE_FILE)
    if found.get("format") != FORMAT_NAME:
        raise StoreError(
            f"disk.path: {path} is not a Lamina store, or its {_STORE_FILE} is damaged: choose an "
            "empty directory, or, if it is a store, delete that file; what is stored is found again"
        )
    if not isinstance(found.get("version"), int):
        raise StoreError(
            f"disk.path: {_STORE_FILE} in {path} is damaged: delete that file; what is stored is "
            "found again"
        )
    if found.get("version") != FORMAT_VERSION:
        raise StoreError(
            f"disk.path: {path} is a store of format version {found.get('version')}, and this "
            f"Lamina reads and writes version {FORMAT_VERSION}: choose another path, or give up "
            f"what is stored with `lamina clear {path}`"
        )


def is_store(path: Path) -> bool:
    """Whether ``path`` is a store of any version."""
    return _read(path / _STORE_FILE).get("format") == FORMAT_NAME


def require_store(path: Path) -> None:
    """Make sure that ``path`` is a store of any version.

    Raises:
        StoreError: if it is not.
    """
    _require_access(path)
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


def describe(path: Path, namespace: StoreNamespace) -> Path:
    """Make a namespace's directory and say in it, for people, what the namespace is.

    Raises:
        OSError: if that is not possible.
    """
    directory = path / namespace.fingerprint
    directory.mkdir(mode=0o700, exist_ok=True)
    if _read(directory / _NAMESPACE_FILE) != namespace.description:
        _write(directory / _NAMESPACE_FILE, dict(namespace.description))
    return directory


def description(shard: Shard) -> dict[str, str]:
    """What :func:`describe` said; empty if that is lost."""
    return {str(k): str(v) for k, v in _read(shard.directory / _NAMESPACE_FILE).items()}


@dataclass(frozen=True, slots=True)
class Server:
    """What a rank knows of the server that it belongs to, when it opens its shard.

    Attributes:
        shards: how many shards the server has, from rank 0 on; None if the rank cannot know.
        before: when the rank was opened the time before, in seconds since the epoch; 0 if never.
    """

    shards: int | None = None
    before: float = 0.0

    def has_left(self, path: Path, shard: Shard) -> bool:
        """Whether a shard of the server's model is that of a rank which there is no more: its
        number is too high. Where the rank cannot know that, it was not opened when this rank was,
        the time before."""
        if self.shards is not None:
            return shard.rank >= self.shards
        lock = _stat(lock_file(path, shard.rank))
        used = max(shard.last_used(), lock.st_mtime if lock else 0.0)
        return used < self.before - START_SECONDS


def make_room(path: Path, own: Shard, size: int, capacity: int, server: Server) -> None:
    """Remove shards that are not the server's, least recently used first, until those that are
    left and ``size`` bytes of our own do not exceed ``capacity``.

    They are this rank's of other namespaces; rank 0 also answers for ranks that no server uses any
    more, of other namespaces and of this one.
    """
    candidates = [
        shard
        for shard in shards(path)
        if own.rank in {shard.rank, 0}
        and shard != own
        and (shard.directory != own.directory or server.has_left(path, shard))
    ]
    taken = {shard: shard.disk_bytes() for shard in candidates}
    for shard in sorted(candidates, key=Shard.last_used):
        if sum(taken.values()) + size <= capacity:
            return
        if shard.rank != own.rank:
            try:
                with hold(path, [shard.rank]):
                    shard.remove()
            except StoreError:
                del taken[shard]  # in use, so its own rank answers for it
                continue
        else:
            shard.remove()
        log.info(
            "disk tier: removed rank %d of namespace %s (%d bytes) to stay within disk.capacity",
            shard.rank,
            shard.directory.name,
            taken.pop(shard),
        )


def check_room(slab: Path, size: int) -> None:
    """Make sure that a slab of ``size`` bytes fits on the disk.

    Raises:
        StoreError: if it does not.
    """
    if _missing(slab, size) > _free_bytes(slab.parent):
        raise no_room(slab, size)


def no_room(slab: Path, size: int, error: OSError | None = None) -> StoreError:
    """The error for a slab that is to have ``size`` bytes.

    Args:
        slab: the file.
        size: what it is to have.
        error: what the system says; a quota is seen in nothing else.
    """
    said = "" if error is None else f" ({error.strerror})"
    return StoreError(
        f"disk.capacity: {slab.parent} has {_free_bytes(slab.parent)} bytes free, and "
        f"{_missing(slab, size)} more are needed{said}: lower disk.capacity, free some space, or "
        "choose another disk.path"
    )


def _missing(slab: Path, size: int) -> int:
    return max(0, size - (slab.stat().st_blocks * 512 if slab.exists() else 0))


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
            if _LOCK_FILE.fullmatch(file.name) or _TEMPORARY.fullmatch(file.name):
                file.unlink()
        (path / _STORE_FILE).unlink()
    return sorted(path.iterdir())


def _free_bytes(directory: Path) -> int:
    system = os.statvfs(directory)
    return system.f_bavail * system.f_frsize


def _stat(file: Path) -> os.stat_result | None:
    with suppress(FileNotFoundError):  # another rank removes what is its own, at any time
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


def _require_access(path: Path) -> None:
    """Make sure that a store, if there is one, is this user's to read.

    Raises:
        StoreError: if it is not.
    """
    try:
        (path / _STORE_FILE).open("rb").close()
    except PermissionError as error:
        raise StoreError(
            f"disk.path: {error.filename} may not be read by this user: a store is its owner's"
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
