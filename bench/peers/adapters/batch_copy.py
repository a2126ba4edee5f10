"""The copy of memory that stands in for a device's: many pieces in one call, without the
interpreter's lock. The environment has it compiled beside its Python."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lamina_kv.bench.pacing import Link

Addresses = npt.NDArray[np.uint64]

LINK = Link()
"""What loads come through, if the bench gives it a pace."""

_LIBRARY = ctypes.CDLL(str(Path(sys.prefix) / "batch_copy.so"))
_LIBRARY.batch_copy.argtypes = [ctypes.c_size_t, *[ctypes.c_void_p] * 3]
_LIBRARY.batch_copy.restype = None


def batch_copy(
    sources: Addresses, targets: Addresses, sizes: Addresses, *, load: bool = False
) -> int:
    """Copy ``sizes[i]`` bytes from ``sources[i]`` to ``targets[i]``, one after the other.

    Args:
        sources: addresses.
        targets: addresses.
        sizes: bytes.
        load: whether they come into the engine, and so through the link.

    Returns:
        How many bytes were copied.
    """
    total = int(sizes.sum())
    arrays = [np.ascontiguousarray(each, np.uint64) for each in (sources, targets, sizes)]
    if load:
        LINK.carry(total)
    _LIBRARY.batch_copy(len(sizes), *(each.ctypes.data for each in arrays))
    return total
