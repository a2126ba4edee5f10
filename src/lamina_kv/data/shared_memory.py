"""Memory that processes of one machine share and that none of them can leave behind.

A memory file has no name in any file system: it is there as long as a process has it open or
mapped, and gone with the last one, however that ends. Another process opens it through the
descriptor table of one that has it.
"""

from __future__ import annotations

import mmap
import os
import uuid
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MemoryAddress:
    """Where a memory file is found, for other processes of the machine.

    Attributes:
        process: the id of a process that has it open.
        descriptor: as what.
        name: its own; another machine, or a later process, may use the same numbers.
    """

    process: int
    descriptor: int
    name: str


class MemoryFile:
    """A memory file that this process has open. It is empty until it is first mapped.

    Args:
        descriptor: of the file; closed by :meth:`close`.
        name: see :class:`MemoryAddress`.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name

    @classmethod
    def create(cls) -> MemoryFile:
        """A new one.

        Raises:
            OSError: if the system gives none.
        """
        name = f"lamina-{uuid.uuid4().hex}"
        return cls(os.memfd_create(name, os.MFD_CLOEXEC), name)

    @classmethod
    def open(cls, address: MemoryAddress) -> MemoryFile:
        """One that another process has open.

        Raises:
            OSError: if it is not there, or is not ours to open.
        """
        path = f"/proc/{address.process}/fd/{address.descriptor}"
        if os.readlink(path) != f"/memfd:{address.name} (deleted)":
            raise FileNotFoundError(f"{path} is not the memory file {address.name}")
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), address.name)

    @property
    def address(self) -> MemoryAddress:
        """For other processes; good until :meth:`close`."""
        return MemoryAddress(os.getpid(), self._descriptor, self._name)

    @property
    def is_empty(self) -> bool:
        """Whether nobody has mapped it yet."""
        return os.fstat(self._descriptor).st_size == 0

    def map(self, size: int, *, writable: bool) -> mmap.mmap:
        """Map it, all of it. Who maps it first gives it its size.

        Raises:
            OSError: if the machine has no such amount of memory.
            ValueError: if it has another size.
        """
        found = os.fstat(self._descriptor).st_size
        if not found:
            # Only private memory is refused where the machine can never have that much.
            private_memory(size).close()
            os.ftruncate(self._descriptor, size)
        elif found != size:
            raise ValueError(f"memory file {self._name} has {found} bytes, not {size}")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return mmap.mmap(self._descriptor, size, mmap.MAP_SHARED, protection)

    def close(self) -> None:
        """Close the descriptor; mappings stay. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def private_memory(size: int) -> mmap.mmap:
    """Memory of this process alone.

    Raises:
        OSError: if the machine has no such amount of memory.
    """
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
