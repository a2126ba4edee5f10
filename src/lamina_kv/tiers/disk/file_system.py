"""Which file system a store lies on, and what an operator must know about it."""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)


_NOT_THERE = (errno.EOPNOTSUPP, errno.ENOSYS)


class Trait(Enum):
    """What is special about a file system."""

    SHARED = "shared"
    """It is, or can be, another machine's."""
    COPY_ON_WRITE = "copy on write"
    """An overwrite goes to a new place, so that no space can be reserved for it."""


_KNOWN: dict[int, tuple[str, Trait]] = {
    0x6969: ("NFS", Trait.SHARED),
    0x517B: ("SMB", Trait.SHARED),
    0xFF534D42: ("CIFS", Trait.SHARED),
    0xFE534D42: ("SMB", Trait.SHARED),
    0x65735546: ("FUSE or virtiofs", Trait.SHARED),
    0x01021997: ("9p", Trait.SHARED),
    0x00C36400: ("Ceph", Trait.SHARED),
    0x0BD00BD0: ("Lustre", Trait.SHARED),
    0x47504653: ("GPFS", Trait.SHARED),
    0x19830326: ("BeeGFS", Trait.SHARED),
    0x20030528: ("OrangeFS", Trait.SHARED),
    0xAAD7AAEA: ("PanFS", Trait.SHARED),
    0x01161970: ("GFS2", Trait.SHARED),
    0x7461636F: ("OCFS2", Trait.SHARED),
    0x5346414F: ("AFS", Trait.SHARED),
    0x6B414653: ("AFS", Trait.SHARED),
    0x786F4256: ("VirtualBox's shared folder", Trait.SHARED),
    0xBACBACBC: ("VMware's shared folder", Trait.SHARED),
    0x9123683E: ("btrfs", Trait.COPY_ON_WRITE),
    0x2FC12FC1: ("ZFS", Trait.COPY_ON_WRITE),
    0xCA451A4E: ("bcachefs", Trait.COPY_ON_WRITE),
}
"""By the type that ``statfs`` tells. What is not here is a local file system that overwrites in
place, or one that nothing is known about."""


@dataclass(frozen=True, slots=True)
class Concern:
    """What an operator must know about a directory's file system.

    Attributes:
        found: what is the case, and what it means.
        advice: what to do.
    """

    found: str
    advice: str


def concern(directory: Path) -> Concern | None:
    """What there is to know about the file system of ``directory``; None if nothing is.

    Raises:
        OSError: if the directory is not there.
    """
    known = _KNOWN.get(_type(directory))
    if known is None:
        return None
    name, trait = known
    if trait is Trait.SHARED:
        return Concern(
            f"{directory} is on a network file system ({name}). A store is one machine's: another "
            "machine may not see its locks, and may overwrite what is stored (a wrong byte is "
            "never served); while the file server hangs, so does what is on its way",
            "use a local file system (ext4, xfs) for the tier's path",
        )
    return Concern(
        f"{directory} is on {name}, which writes what is overwritten to a new place: nothing can "
        "be reserved for the tier's capacity, and if others fill the disk later, writes stop",
        "use ext4 or xfs for the tier's path, or keep as much free as its capacity (btrfs: "
        "chattr +C on the directory while it is empty)",
    )


def reserve(file: int, size: int) -> bool:
    """Reserve the first ``size`` bytes of a file on its disk.

    Args:
        file: its descriptor.
        size: bytes; a shorter file grows to it if they can be reserved.

    Returns:
        Whether the file system can reserve anything.

    Raises:
        OSError: if it can, and has not that much room.
    """
    # The C library would write to every block instead, which takes hours and, where blocks are
    # written anew each time, reserves nothing.
    if _fallocate(file, 1) in _NOT_THERE:
        return False
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return False
        raise
    return True


def _fallocate(file: int, size: int) -> int:
    """The system call on the first ``size`` bytes; 0 or an errno."""
    done = _libc.fallocate(
        ctypes.c_int(file), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size)
    )
    return 0 if done == 0 else ctypes.get_errno()


def _type(directory: Path) -> int:
    """The type that ``statfs`` tells of a directory's file system, an unsigned 32-bit number."""
    answer = (ctypes.c_long * 64)()  # more than any machine's struct statfs, which begins with it
    if _libc.statfs(os.fsencode(directory), ctypes.byref(answer)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(directory))
    return int(answer[0]) & 0xFFFFFFFF
