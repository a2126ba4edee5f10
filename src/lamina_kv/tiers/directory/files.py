"""Files of a shared directory: how one appears whole or not at all, and how one is read.

A file is written under a temporary name of its own and then linked to its real one, which fails if
somebody was faster. Where a file system has no links it is renamed, which takes the place of a file
that appeared in the same moment: that held the same chunk.

Nothing is synced. After a crash of the server a file may be short or hold zeros: a reader sees that
from its length and its checksum, and the next writer of the chunk replaces it.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lamina_kv.geometry import DIRECT_IO_ALIGNMENT
from lamina_kv.tiers.directory.layout import FILE_MODE, FOLDER_MODE, temporary_beside
from lamina_kv.tiers.objects import Object, aligned_memory

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)

_ATTEMPTS = 5
"""To make a file in a folder that a sweeper may remove between two calls, as it is empty."""


@dataclass(frozen=True, slots=True)
class Publisher:
    """Makes files appear.

    Attributes:
        links: whether the file system has hard links.
        flags: flags to open a chunk's file with, beside the usual ones: ``O_DIRECT`` or none.
    """

    links: bool = True
    flags: int = 0

    @classmethod
    def probe(cls, root: int, *, direct: bool = False) -> Publisher:
        """See what a directory's file system can do.

        Args:
            root: the directory's descriptor.
            direct: whether to bypass the page cache, if possible.

        Raises:
            OSError: if nothing can be written there.
        """
        flags = os.O_DIRECT if direct and _has_direct(root) else 0
        first, second = temporary_beside(""), temporary_beside("")
        try:
            os.close(_create(root, first))
            os.link(first, second, src_dir_fd=root, dst_dir_fd=root)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return cls(links=False, flags=flags)
        finally:
            for path in (first, second):
                with suppress(OSError):
                    os.unlink(path, dir_fd=root)
        return cls(links=True, flags=flags)

    def publish(
        self, root: int, path: str, content: Object | bytes, *, replace: bool = False
    ) -> bool:
        """Make a file appear with all of its content.

        Args:
            root: the directory's descriptor.
            path: the file; its folders are made.
            content: what it is to hold.
            replace: whether to take the place of a file that is there.

        Returns:
            Whether it is this one that is there now; False if another one was there before.

        Raises:
            OSError: if it could not be written; it is not there then.
        """
        temporary = temporary_beside(path)
        file = _create_in_folder(root, temporary, 0 if isinstance(content, bytes) else self.flags)
        try:
            try:
                _write_all(file, content)
            finally:
                os.close(file)  # a network file system says here that there was no room
            if replace or not self.links:
                os.rename(temporary, path, src_dir_fd=root, dst_dir_fd=root)
                return True
            try:
                os.link(temporary, path, src_dir_fd=root, dst_dir_fd=root, follow_symlinks=False)
            except FileExistsError:
                return False
            return True
        finally:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=root)

    def publish_json(self, root: int, path: str, content: Mapping[str, Any]) -> bool:
        """The same with what people may read; never replaces anything."""
        return self.publish(root, path, json.dumps(content, indent=1).encode() + b"\n")


def read_object(root: int, path: str, buffer: Object, flags: int = 0) -> bool:
    """Fill ``buffer`` with a file.

    Args:
        root: the directory's descriptor.
        path: the file.
        buffer: of the length that the file has to have.
        flags: more flags to open it with.

    Returns:
        Whether it is a file of that length. The buffer holds anything if not.

    Raises:
        OSError: if it cannot be read.
    """
    # Not blocking: whoever may write here might have left a pipe.
    flags |= os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    file = os.open(path, flags, dir_fd=root)
    try:
        if not _is_of(os.fstat(file), len(buffer)):
            return False
        done, into = 0, buffer.data
        while done < len(buffer):
            came = os.preadv(file, [into[done:]], done)
            if not came:
                return False
            done += came
        return True
    finally:
        os.close(file)


def read_whole(root: int, path: str, most: int = 1 << 20) -> bytes:
    """What a small file holds.

    Raises:
        OSError: if it cannot be read.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=root)
    with os.fdopen(file, "rb") as opened:
        return opened.read(most)


def _is_of(status: os.stat_result, size: int) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def _has_direct(root: int) -> bool:
    """Whether a directory's file system takes direct I/O."""
    path = temporary_beside("")
    try:
        file = _create(root, path, os.O_DIRECT)
        try:
            _write_all(file, aligned_memory(DIRECT_IO_ALIGNMENT))
        finally:
            os.close(file)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        with suppress(OSError):
            os.unlink(path, dir_fd=root)
    return True


def _create(root: int, path: str, flags: int = 0) -> int:
    flags |= os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return os.open(path, flags, FILE_MODE, dir_fd=root)


def _create_in_folder(root: int, path: str, flags: int) -> int:
    for attempt in range(_ATTEMPTS):
        try:
            return _create(root, path, flags)
        except FileNotFoundError:
            if attempt == _ATTEMPTS - 1:
                raise
            _make_folders(root, os.path.dirname(path))
    raise AssertionError


def _make_folders(root: int, folder: str) -> None:
    parts = folder.split("/")
    for count in range(1, len(parts) + 1):
        with suppress(FileExistsError, FileNotFoundError):  # others make and remove them, too
            os.mkdir("/".join(parts[:count]), FOLDER_MODE, dir_fd=root)


def _write_all(file: int, content: Object | bytes) -> None:
    source = memoryview(content) if isinstance(content, bytes) else content.data
    done = 0
    while done < len(source):
        done += os.pwritev(file, [source[done:]], done)
