"""Who uses a store: one lock for each rank, and a look at whether its files are still there.

The lock is ``flock``'s: it belongs to the open file, and ends with the last process that has it
open. A forked child has it, too, and could keep a store locked after its server has died; so a
child gives it up at once, and a lock that is held all the same names those who hold it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lamina_kv.tiers.contract import StoreError

_POLL = 0.05
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_SHOWN = 5

_held: weakref.WeakSet[RankLock] = weakref.WeakSet()


class StoreLost(OSError):
    """A file of a store that is in use is not there any more; the text says what to do."""


class RankLock:
    """A rank's part of a store, taken for this process. A child of it does not have it.

    Args:
        store: the store's directory.
        rank: the rank.
        file: descriptor of its lock file, locked; closed by :meth:`close`.

    Attributes:
        before: when it was taken the time before, in seconds since the epoch; 0 if never.
    """

    def __init__(self, store: Path, rank: int, file: int) -> None:
        self._store = store
        self._rank = rank
        self._file = file
        stat = os.fstat(file)
        self.before = stat.st_mtime if stat.st_size else 0.0
        with suppress(OSError):  # only for messages, and a full disk has no room for it
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
            os.utime(file)
        _held.add(self)

    def keep(self) -> None:
        """Take the rank again where its lock file is gone: a cleaner may delete it, as nobody
        writes to it.

        Raises:
            StoreLost: if another process has the rank now, or there can be no lock.
        """
        path = lock_file(self._store, self._rank)
        if not _is_gone(path, os.fstat(self._file)):
            return
        try:
            again = acquire(self._store, self._rank)
        except StoreError as error:
            raise StoreLost(
                errno.ESTALE,
                f"{path} was deleted while this server uses the store, and another may have it now "
                f"({error}): nothing more is written to the store, and what it holds serves "
                "until the server stops. See that every server has a path of its own, and start "
                "the server again",
            ) from error
        self._file, again._file = again._file, self._file
        again.close()

    def close(self) -> None:
        """Give the rank back. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _give_up_in_child() -> None:
    for lock in list(_held):
        with suppress(OSError):
            lock.close()


os.register_at_fork(after_in_child=_give_up_in_child)


def lock_file(path: Path, rank: int) -> Path:
    """The file that is locked for a rank of a store."""
    return path / f"rank-{rank}.lock"


def acquire(path: Path, rank: int, patience: float = 0.0) -> RankLock:
    """Take a rank's part of a store for this process.

    Args:
        path: the store.
        rank: the rank.
        patience: seconds to wait for another process to give it back.

    Raises:
        StoreError: if another process has it, or there can be no lock. The text names no key.
    """
    lock = lock_file(path, rank)
    give_up = time.monotonic() + patience
    while True:
        try:
            file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"cannot lock {path}: {error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_nlink:
                return RankLock(path, rank, file)
            os.close(file)  # cleared between open and lock: it no longer stands for the rank
        except BlockingIOError as error:
            said = _said(file)
            os.close(file)
            if time.monotonic() < give_up:  # perhaps somebody only removes an old shard
                time.sleep(_POLL)
                continue
            raise StoreError(_in_use(path, rank, said)) from error
        except OSError as error:
            os.close(file)
            raise StoreError(f"cannot lock {path}: {error}") from error


@contextmanager
def hold(path: Path, ranks: Iterable[int], patience: float = 0.0) -> Iterator[list[RankLock]]:
    """Hold some ranks' parts of a store, see :func:`acquire`."""
    with ExitStack() as held:
        locks = []
        for rank in ranks:
            locks.append(acquire(path, rank, patience))
            held.callback(locks[-1].close)
        yield locks


def holder(path: Path, rank: int) -> str:
    """The process id of who uses a rank's part of a store; empty if nobody does."""
    lock = lock_file(path, rank)
    with suppress(OSError), lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            said = _said(file.fileno())
            if not _lives(said) and (there := _who_has_open(lock)):
                return str(there[0][0])
            return said or "unknown"
    return ""


class Watch:
    """Notices that files were deleted, moved or replaced while they are in use.

    Args:
        lock: of the rank that they belong to.
        files: where they are to be, and what they were when they were opened. They must be kept
            open: another file could have the number of one that is not.
    """

    def __init__(self, lock: RankLock, files: Iterable[tuple[Path, os.stat_result]]) -> None:
        self._lock = lock
        self._files = tuple(files)

    def check(self) -> None:
        """See whether all of them are still there.

        Raises:
            StoreLost: if one is not. What cannot be told is left to whoever uses them next.
        """
        for path, opened in self._files:
            if _is_gone(path, opened):
                raise StoreLost(
                    errno.ESTALE,
                    f"{path} was deleted or replaced while this server uses the store: nothing "
                    "more is written to it, what it holds serves until the server stops and is not "
                    "found again. See that nothing else touches the store, and start "
                    "the server again",
                )
        self._lock.keep()


def _is_gone(path: Path, opened: os.stat_result) -> bool:
    """Whether what was opened under a path is not there any more, as far as can be told."""
    try:
        return not os.path.samestat(os.stat(path), opened)
    except OSError as error:
        return error.errno in _GONE


def _said(file: int) -> str:
    with suppress(OSError):
        return os.pread(file, 32, 0).decode(errors="replace").strip()
    return ""


def _in_use(path: Path, rank: int, said: str) -> str:
    store = f"rank {rank} of {path}"
    if _lives(said):
        return (
            f"{store} is in use by process {said}: stop it, or choose another path; every server "
            "needs its own"
        )
    if there := _who_has_open(lock_file(path, rank)):
        names = " and ".join(f"process {pid} ({name})" for pid, name in there[:_SHOWN])
        return (
            f"{store} was in use by process {said}, which has ended, and is still locked by "
            f"{names}, perhaps a child that it left behind: stop that, or choose another path"
        )
    return (
        f"{store} is in use by process {said or 'unknown'}, which cannot be seen from here "
        "(another container, machine or user): stop it, or what it left behind, or choose another "
        "path"
    )


def _lives(said: str) -> bool:
    return said.isdecimal() and Path(f"/proc/{said}").exists()


def _who_has_open(file: Path) -> list[tuple[int, str]]:
    """Other processes that have a file open, and their names, as far as this user may see."""
    found: list[tuple[int, str]] = []
    try:
        wanted = os.stat(file)
    except OSError:  # given back meanwhile
        return found
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        with suppress(OSError):
            if any(_is_same(entry.path, wanted) for entry in os.scandir(process / "fd")):
                name = (process / "comm").read_text(errors="replace").strip()
                found.append((int(process.name), name))
    return found


def _is_same(descriptor: str, wanted: os.stat_result) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.stat(descriptor), wanted)
    return False
