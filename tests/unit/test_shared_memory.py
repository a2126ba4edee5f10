"""Memory files are seen by every process that opens them, are never mistaken for others, and are
gone with the last one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from lamina_kv.data.movers.host_memory import HostMemory
from lamina_kv.data.shared_memory import MemoryAddress, MemoryFile

SIZE = 3 * 4096

OTHER = """
import sys
from lamina_kv.data.shared_memory import MemoryAddress, MemoryFile
process, descriptor, name, size = sys.argv[1:]
file = MemoryFile.open(MemoryAddress(int(process), int(descriptor), name))
memory = file.map(int(size), writable=True)
memory[-4:] = memory[:4][::-1]
"""


def test_another_process_sees_the_same_memory() -> None:
    file = MemoryFile.create()
    memory = file.map(SIZE, writable=True)
    assert bytes(memory) == bytes(SIZE)
    memory[:4] = b"abcd"
    address = file.address
    arguments = (address.process, address.descriptor, address.name, SIZE)
    command = [sys.executable, "-c", OTHER, *map(str, arguments)]
    subprocess.run(command, check=True, timeout=60)
    assert memory[-4:] == b"dcba"
    file.close()
    file.close()
    assert memory[-4:] == b"dcba"


def test_a_file_is_gone_with_the_last_who_had_it() -> None:
    file = MemoryFile.create()
    memory = file.map(SIZE, writable=True)
    other = MemoryFile.open(file.address)
    name = file.address.name
    file.close()
    assert name in mapped()
    other.close()
    memory.close()
    assert name not in mapped()


def mapped() -> str:
    with open("/proc/self/maps") as maps:
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in held_descriptors()]
        return maps.read() + " ".join(links)


def held_descriptors() -> list[str]:
    held = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:  # the one that listed them
            continue
        held.append(descriptor)
    return held


def test_the_same_numbers_elsewhere_are_not_the_same_file() -> None:
    file, other = MemoryFile.create(), MemoryFile.create()
    for wrong in (
        replace(file.address, name=other.address.name),
        replace(file.address, descriptor=0),
        replace(file.address, descriptor=9999),
        MemoryAddress(2**22 + 1, 3, file.address.name),
    ):
        with pytest.raises((FileNotFoundError, OSError), match=r"is not the memory file|/proc/"):
            MemoryFile.open(wrong)
    file.close()
    other.close()


def test_who_only_reads_cannot_write() -> None:
    file = MemoryFile.create()
    file.map(SIZE, writable=True)[:2] = b"xy"
    memory = file.map(SIZE, writable=False)
    assert memory[:2] == b"xy"
    with pytest.raises(TypeError):
        memory[:2] = b"yx"
    file.close()


def test_another_size_is_refused_and_changes_nothing() -> None:
    file = MemoryFile.create()
    memory = file.map(SIZE, writable=True)
    for size in (SIZE - 4096, SIZE + 4096):
        with pytest.raises(ValueError, match=f"{SIZE} bytes"):
            file.map(size, writable=True)
    assert bytes(memory) == bytes(SIZE)
    file.close()


def test_memory_that_no_machine_has_is_refused() -> None:
    file = MemoryFile.create()
    with pytest.raises(OSError, match=r"lower host\.capacity"):
        HostMemory(1 << 46, file=file)
    file.close()
