"""Whether a bench fits on this machine, asked before it has run for minutes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lamina_kv.bench.engine import BenchError
from lamina_kv.config.memory import memory_bytes

_ENGINE_BYTES = 2 << 30
"""About what two processes take before they hold anything."""


def require_room(*, memory: int, disk: int, directory: Path) -> None:
    """Refuse to start what would not fit.

    Args:
        memory: bytes that the engines will hold at once.
        disk: bytes that will be written.
        directory: where.

    Raises:
        BenchError: says how much is needed, how much there is, and what to do.
    """
    needed, there = memory + _ENGINE_BYTES, min(memory_bytes(), _available_memory())
    if needed > there:
        raise BenchError(
            f"this needs about {_gib(needed)} of memory and {_gib(there)} are free: "
            f"choose fewer --tokens or --layers"
        )
    if not disk:
        return
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        raise BenchError(f"--directory {directory} is not a directory that can be written to")
    free = shutil.disk_usage(directory).free
    if disk > free:
        raise BenchError(
            f"this needs about {_gib(disk)} in {directory} and {_gib(free)} are free: choose "
            f"another --directory, or fewer --tokens"
        )


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return memory_bytes()


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
