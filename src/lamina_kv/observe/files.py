"""Files that Lamina writes about itself."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path


def new_file(path: Path) -> FileIO:
    """A new file in place of what is there. Does not wait: opening a pipe would, until somebody
    reads it.

    Raises:
        OSError: if it cannot be made, or something is there that is no regular file.
    """
    file = FileIO(
        path, "wb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666)
    )
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it must be a regular file", str(path))
    return file


def write_all(file: FileIO, content: bytes) -> None:
    """Write all of it: a disk that is nearly full takes a part.

    Raises:
        OSError: if it does not take the rest.
    """
    while content:
        content = content[file.write(content) :]
