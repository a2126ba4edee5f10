"""Sizes and times for people: short, and rounded.

:func:`lamina_kv.values.format_size` is exact instead, for what is to be typed.
"""

from __future__ import annotations


def size_of(size: int) -> str:
    """Bytes in the largest unit that there is one of: ``"1.5 MiB"``."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            amount = size / (1 << shift)
            return f"{amount:.3g} {unit}" if amount < 999.5 else f"{amount:,.0f} {unit}"
    return f"{size} B"


def time_of(seconds: float) -> str:
    """Seconds with three digits, or in two units: ``"3.2 ms"``, ``"2 h 14 min"``."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = int(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def duration(seconds: float) -> str:
    """Seconds in the largest unit that there is one of: ``"3 h"``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
