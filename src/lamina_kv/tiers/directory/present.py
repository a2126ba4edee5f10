"""Which of many files are there, asked for in one call.

A thread of an engine that computes in Python waits up to 5 ms for the interpreter after each call
that has let go of it. 500 calls of ``stat`` on JuiceFS took 0.2 s beside such a thread, and one
call of ``glob`` for the same files 0.04 s (2 cores; 0.07 s and 0.03 s without it). The C library's
``glob`` looks for each alternative of a pattern in braces, and tells which it has found.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from contextlib import suppress

_libc = ctypes.CDLL(None, use_errno=True)

_NOSORT, _BRACE = 1 << 2, 1 << 10  # GLOB_NOSORT, GLOB_BRACE
_NO_MATCH = 3


class _Found(ctypes.Structure):
    """``glob_t``."""

    _fields_ = [
        ("count", ctypes.c_size_t),
        ("paths", ctypes.POINTER(ctypes.c_char_p)),
        ("offset", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("functions", ctypes.c_void_p * 5),
    ]


def which_exist(root: int, paths: Sequence[str]) -> list[bool]:
    """Which of some files are there.

    Args:
        root: descriptor of the directory that they are in.
        paths: relative to it; letters, digits, dots, dashes and slashes.

    Raises:
        OSError: if that cannot be told.
    """
    if not paths:
        return []
    start = f"/proc/self/fd/{root}/"
    # Braces around a single name would be taken for a part of it.
    pattern = f"{start}{{{','.join([*paths, paths[0]])}}}".encode()
    found = _Found()
    result = _libc.glob(
        ctypes.c_char_p(pattern), ctypes.c_int(_NOSORT | _BRACE), None, ctypes.byref(found)
    )
    try:
        if result not in (0, _NO_MATCH):
            raise OSError(errno.EIO, "the C library cannot look for files")
        there = {found.paths[i] for i in range(found.count)}
    finally:
        _libc.globfree(ctypes.byref(found))
    present = [(start + path).encode() in there for path in paths]
    if False in present:
        # A file is missing for any error: see that this one is.
        with suppress(FileNotFoundError):
            os.stat(paths[present.index(False)], dir_fd=root, follow_symlinks=False)
    return present
