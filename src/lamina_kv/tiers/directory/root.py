"""The directory itself: what tells it from another one, and whether it is still there.

A mount may vanish while it is used, and leaves an empty directory on the machine's own disk. What
is written there would fill that disk and be found by nobody. So no path is followed from outside:
each call opens the directory, makes sure that it is the one that it was, and goes on from there.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lamina_kv.tiers.contract import StoreError
from lamina_kv.tiers.directory.files import Publisher, read_whole
from lamina_kv.tiers.directory.layout import FOLDER_MODE, FORMAT_NAME, FORMAT_VERSION, MARKER
from lamina_kv.tiers.directory.present import which_exist

log = logging.getLogger("lamina_kv.tiers")

UNREACHABLE = (
    errno.EIO,
    errno.ENOTCONN,
    errno.ESTALE,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ETIMEDOUT,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.EREMOTEIO,
    errno.ENODEV,
)
"""Errors of a mount whose server, or daemon, is away."""

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

LOOK_SECONDS = 10.0
"""How long a directory that somebody empties while engines use it has no marker: no sweeper works
there meanwhile."""

_DISK_STORE = "lamina-store.json"


class RootLost(OSError):
    """The directory is not the one that it was, or not there."""


class Root:
    """See the module. Any number of threads may use it.

    Args:
        path: the directory.

    Attributes:
        path: as given.
        publisher: publishes files in it; a guess until :meth:`prepare_to_write` has succeeded.
        id: what its marker tells it from others by: another one once it was emptied.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.publisher = Publisher()
        self.id = ""
        self._direct: bool | None = None  # wanted of the publisher; None once that was probed
        self._seen = (0, 0)  # its device and number
        self._looked = -LOOK_SECONDS  # when its marker was read
        self._preparing = threading.Lock()

    def prepare(self, *, writable: bool, direct: bool = False) -> None:
        """Make sure that it is a directory of this format, new if there was none.

        Args:
            writable: whether it is going to be written to.
            direct: whether to bypass the page cache, if its file system can.

        Raises:
            StoreError: if it cannot be used as it is. The text names no key.
            RootLost: if another thread has tried this and not come back.
            OSError: if it cannot be reached, see :data:`UNREACHABLE`.
        """
        if not self._preparing.acquire(blocking=False):
            raise RootLost(errno.EAGAIN, f"{self.path} has not answered since the start")
        try:
            self._make()
            with self._open() as root:
                self._prepare(root, writable=writable, direct=direct)
        finally:
            self._preparing.release()

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the directory, for calls that take one.

        Raises:
            RootLost: if another directory has its place, or none.
            OSError: if it cannot be reached.
        """
        with self._open() as root:
            self._recognize(root)
            yield root

    def prepare_to_write(self, root: int) -> None:
        """Probe for the publisher, where there was no room for that at the start.

        Args:
            root: the directory's descriptor.

        Raises:
            OSError: if nothing can be written there.
        """
        if self._direct is not None:
            self.publisher = Publisher.probe(root, direct=self._direct)
            self._direct = None

    # -- inside ------------------------------------------------------------------------------------

    def _make(self) -> None:
        """Make the directory if there is none."""
        with suppress(FileExistsError):
            try:
                os.mkdir(self.path, FOLDER_MODE)
            except FileNotFoundError:
                raise StoreError(
                    f"{self.path.parent} is not there: mount the shared file system, or make it"
                ) from None
            except OSError as error:
                if error.errno not in READ_ONLY:
                    raise
                if not self.path.exists():
                    raise StoreError(f"cannot make {self.path} ({error.strerror})") from None

    @contextmanager
    def _open(self) -> Iterator[int]:
        try:
            root = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RootLost(errno.ENOENT, f"{self.path} is not there, or no directory") from error
        try:
            yield root
        finally:
            os.close(root)

    def _prepare(self, root: int, *, writable: bool, direct: bool) -> None:
        if _marker(root) is None:
            self._found(root)
        self.id = read_marker(root, self.path)
        if which_exist(root, [MARKER]) != [True]:
            raise StoreError(
                "this machine's C library finds no files: glibc, and /proc, are needed"
            )
        self._seen = _identity(root)
        self._direct = direct
        try:
            self.prepare_to_write(root)
        except OSError as error:
            if error.errno not in (NO_ROOM if writable else (*NO_ROOM, *READ_ONLY)):
                raise
            if writable:
                log.warning(
                    "%s is full (%s): what it holds is read, and nothing is written until there is "
                    "room again: see `lamina-kv sweep`",
                    self.path,
                    error.strerror,
                )

    def _found(self, root: int) -> None:
        """Make the directory one of Lamina's."""
        with suppress(FileNotFoundError):
            os.stat(_DISK_STORE, dir_fd=root)
            raise StoreError(
                f"{self.path} is the store of a tier of kind `disk`, which no other engine can "
                "read: choose another path"
            )
        content = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "id": uuid.uuid4().hex}
        Publisher.probe(root).publish_json(root, MARKER, content)
        if _identity(root)[0] == os.stat("/").st_dev:
            log.warning(
                "%s is new, and on the machine's own disk: if it is to be shared with other "
                "machines, the shared file system is not mounted there. Stop, mount it, and "
                "start again",
                self.path,
            )

    def _begin_anew(self, root: int) -> Mapping[str, object]:
        """The directory was emptied while it is used: make it one of Lamina's again."""
        try:
            self._found(root)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
        return _marker(root) or {"id": self.id}

    def _recognize(self, root: int) -> None:
        """Make sure that it is the directory that it was."""
        identity, now = _identity(root), time.monotonic()
        if identity == self._seen and now < self._looked + LOOK_SECONDS:
            return
        found = _marker(root)
        if identity[0] == self._seen[0]:  # on the same file system
            found = found or self._begin_anew(root)
        elif found is None or found.get("id") != self.id:
            raise RootLost(errno.ENOENT, f"{self.path} is not the directory that it was")
        self.id = str(found.get("id"))
        self._seen, self._looked = identity, now


def read_marker(root: int, path: Path) -> str:
    """Make sure that a directory is one of Lamina's that this version can read.

    Args:
        root: its descriptor.
        path: what a message calls it.

    Returns:
        What tells it from any other directory.

    Raises:
        StoreError: if it is not.
    """
    found = _marker(root) or {}
    if found.get("format") != FORMAT_NAME or not isinstance(found.get("id"), str):
        raise StoreError(
            f"{path} is not a shared directory of Lamina's, or its {MARKER} is damaged: choose an "
            "empty directory, or, if it is one, delete that file; what is stored is found again"
        )
    if (version := found.get("version")) != FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version}, and this Lamina reads and writes version "
            f"{FORMAT_VERSION}: choose another path"
        )
    return str(found["id"])


def _identity(root: int) -> tuple[int, int]:
    stat = os.fstat(root)
    return stat.st_dev, stat.st_ino


def _marker(root: int) -> Mapping[str, object] | None:
    """What the marker says; None if there is none, empty if it says nothing."""
    try:
        found = json.loads(read_whole(root, MARKER))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
