"""Sizes and times as the command says them: short, and rounded."""

from __future__ import annotations


def size_of(size: int) -> str:
    """Bytes in the largest unit that there is one of: ``"1.5 MiB"``."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.3g} {unit}"
    return f"{size} B"


def duration(seconds: float) -> str:
    """Seconds in the largest unit that there is one of: ``"3 h"``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
