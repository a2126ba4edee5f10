"""NUMA: which memory a device is near, and how host memory is put there.

A link to a GPU crosses the link between sockets if the memory is on the other one.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

DEVICES = Path("/sys/bus/pci/devices")
NODES = Path("/sys/devices/system/node")

_MBIND = {"x86_64": 237, "aarch64": 235}
"""The system call's number. libc has no function for it, and libnuma is seldom installed."""

_MPOL_PREFERRED = 1
_MASK_BITS = 1024  # nodes of the largest kernel

_libc = ctypes.CDLL(None, use_errno=True)


def node_of(address: str) -> int | None:
    """The NUMA node of a PCI device.

    Args:
        address: as the system writes it, ``0000:3b:00.0``.

    Returns:
        None if the machine has a single node, or does not say.
    """
    try:
        node = int((DEVICES / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def cores_of(node: int) -> frozenset[int]:
    """The cores of a node; empty if the system does not say."""
    try:
        words = (NODES / f"node{node}" / "cpulist").read_text().strip()
    except OSError:
        return frozenset()
    cores: set[int] = set()
    for word in filter(None, words.split(",")):
        first, _, last = word.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def prefer(address: int, length: int, node: int) -> None:
    """Have pages of a mapping that are not resident yet come from ``node`` while it has any.

    Args:
        address: of the mapping's first page.
        length: bytes.
        node: the node.

    Raises:
        OSError: if the system refuses. Containers may: Docker allows it with ``CAP_SYS_NICE`` only.
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        raise OSError(f"mbind has no known number on {platform.machine()}")
    mask = (ctypes.c_ulong * (_MASK_BITS // (8 * ctypes.sizeof(ctypes.c_ulong))))()
    word, bit = divmod(node, 8 * ctypes.sizeof(ctypes.c_ulong))
    mask[word] = 1 << bit
    # Preferred, not bound: a tier larger than the node's memory goes on elsewhere.
    done = _libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(length),
        ctypes.c_int(_MPOL_PREFERRED),
        mask,
        ctypes.c_ulong(_MASK_BITS),
        ctypes.c_uint(0),
    )
    if done != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
