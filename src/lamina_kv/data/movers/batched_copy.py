"""Copies by a device's copy engines: one call of the driver for many pages.

The function is ``cuMemcpyBatchAsync`` of CUDA 12.8. An older driver has none, and then a kernel
copies.

**Not yet run on a GPU**: written from the driver's documentation, tested on a fake of its library.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lamina_kv.data.movers.row_table import RowShape
from lamina_kv.data.near import Indices

NAME, VERSION = b"cuMemcpyBatchAsync", 12080
"""What to ask the driver for. CUDA 13 has another function of that name, without ``failIdx``; the
version says which of the two is meant."""

Words = npt.NDArray[np.uint64]
"""Addresses and sizes as the driver reads them."""

_IN_STREAM_ORDER = 1
"""The source is read when the stream gets there: what comes before may still write it."""

PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_uint,  # an error, or 0
    ctypes.c_void_p,  # targets
    ctypes.c_void_p,  # sources
    ctypes.c_void_p,  # sizes
    ctypes.c_size_t,  # how many
    ctypes.c_void_p,  # attributes
    ctypes.c_void_p,  # the first copy of each of those
    ctypes.c_size_t,  # how many attributes
    ctypes.c_void_p,  # gets which copy was refused
    ctypes.c_void_p,  # stream
)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_uint), ("id", ctypes.c_int))


class Attributes(ctypes.Structure):
    """How copies of a batch are made. Hints where memory is matter for managed memory only."""

    _fields_ = (
        ("source_order", ctypes.c_uint),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Copies of one call; none reads what another one writes.

    Attributes:
        sources: shape ``(n,)``, addresses.
        targets: shape ``(n,)``, addresses.
        sizes: shape ``(n,)``, bytes.
    """

    sources: Words
    targets: Words
    sizes: Words


def batch_of(
    entries: npt.NDArray[np.int64],
    shape: RowShape,
    near: int,
    near_pages: Indices,
    pages: Indices,
    cuts: Sequence[int],
    *,
    to_engine: bool,
) -> Batch:
    """Describe a copy of pages in some rows. Neighbours on both sides are one copy.

    Args:
        entries: of the rows, see :class:`~lamina_kv.data.movers.row_table.RowTable`.
        shape: theirs.
        near: address of the near slab.
        near_pages: pages of it.
        pages: pages of the engine, one for each.
        cuts: addresses in the near slab, increasing, across which no copy may go: where ranges
            begin that were pinned by a call each.
        to_engine: the direction.
    """
    size = shape.page_bytes
    slots, places = np.divmod(near_pages, shape.slot_pages)
    held = (near + entries[:, 1, None] + slots * shape.slot_bytes + places * size).reshape(-1)
    here = (entries[:, 0, None] + pages * shape.block_stride).reshape(-1)
    if not len(held):
        starts = np.empty(0, np.int64)
    else:
        apart = (np.diff(held) != size) | (np.diff(here) != size)
        starts = np.concatenate(([0], np.flatnonzero(apart) + 1))
    sizes = np.diff(starts, append=len(held)) * size
    held, here, sizes = _cut(held[starts], here[starts], sizes, np.array(cuts, np.int64))
    sources, targets = (held, here) if to_engine else (here, held)
    return Batch(*(words.astype(np.uint64) for words in (sources, targets, sizes)))


def _cut(
    held: Indices, here: Indices, sizes: Indices, cuts: Indices
) -> tuple[Indices, Indices, Indices]:
    """Cut copies where a cut goes through their near side."""
    first = np.searchsorted(cuts, held, "right")
    parts = np.searchsorted(cuts, held + sizes - 1, "right") - first + 1
    if (parts == 1).all():  # most pages are far smaller than what one call pins
        return held, here, sizes
    of = np.repeat(np.arange(len(held)), parts)
    part = np.arange(len(of)) - np.repeat(np.cumsum(parts) - parts, parts)
    cut = first[of] + part  # the cut at which each part ends
    begins = np.where(part > 0, cuts[cut - 1], held[of])
    is_last = part == parts[of] - 1
    ends = np.where(is_last, held[of] + sizes[of], cuts[np.minimum(cut, len(cuts) - 1)])
    return begins, here[of] + begins - held[of], ends - begins


class BatchedCopy:
    """The driver's function.

    Args:
        function: of the type :data:`PROTOTYPE`. It releases the GIL.
    """

    def __init__(self, function: Callable[..., int]) -> None:
        self._function = function
        self._attributes = Attributes(source_order=_IN_STREAM_ORDER)

    def submit(self, batch: Batch, stream: int) -> None:
        """Give a stream the copies to make; the arrays may go at once.

        Args:
            batch: the copies.
            stream: handle of a stream that is not the default one.

        Raises:
            RuntimeError: if the driver refuses one. The stream may make some of the others.
        """
        count = len(batch.sizes)
        if not count:
            return
        first, refused = ctypes.c_size_t(0), ctypes.c_size_t(0)
        code = self._function(
            batch.targets.ctypes.data,
            batch.sources.ctypes.data,
            batch.sizes.ctypes.data,
            count,
            ctypes.addressof(self._attributes),
            ctypes.addressof(first),
            1,
            ctypes.addressof(refused),
            stream,
        )
        if code:
            which = min(refused.value, count - 1)
            raise RuntimeError(
                f"the CUDA driver refuses copy {which} of {count}, of {batch.sizes[which]} bytes, "
                f"with error {code}"
            )


def find(library: Any) -> BatchedCopy | None:
    """The function of a driver that has it.

    Args:
        library: the driver's.
    """
    lookup = getattr(library, "cuGetProcAddress_v2", None)
    if lookup is None:
        return None
    function, status = ctypes.c_void_p(), ctypes.c_int()
    code = lookup(
        NAME, ctypes.byref(function), ctypes.c_int(VERSION), ctypes.c_uint64(0),
        ctypes.byref(status),
    )  # fmt: skip
    if code or not function.value:
        return None
    return BatchedCopy(PROTOTYPE(function.value))
