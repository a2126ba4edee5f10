"""Host memory: usable at once, resident and pinned in the background.

A slab of many GiB must not delay the start of a server, and its first use must not pay for page
faults: they cost many times what the copy itself does. So the address space is reserved at once.
:mod:`~lamina_kv.data.movers.populating` makes it resident from its beginning on, and a thread pins
behind that what is resident: pinning alone would fault the pages in, on one core.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from lamina_kv.data import numa
from lamina_kv.data.movers.populating import Populating
from lamina_kv.data.shared_memory import MemoryFile, private_memory
from lamina_kv.data.threads import Threads, usable_cores

log = logging.getLogger("lamina_kv.data")

FIRST_STEP, LARGEST_STEP = 64 << 20, 1 << 30
"""Bytes to pin by one call, the first and the largest: few calls end sooner, at the close, too."""

LONGEST_CALL = 0.02
"""Seconds that one call should take at most: what the engine launches meanwhile may have to wait
for the driver. A faster call makes the next one larger, a slower one smaller."""

_mappings: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_kept: list[mmap.mmap] = []
"""Mappings that only the end of the process may undo."""


def _keep_in_child() -> None:
    """In a forked child, never unmap what was its parent's.

    The child does not have that memory, so the kernel may give its addresses to something else
    there; unmapping them, once the child collects the parent's garbage, would take that away.
    """
    _kept.extend(_mappings)


os.register_at_fork(after_in_child=_keep_in_child)


class Pinner(Protocol):
    """Pins host memory for a device. Its calls release the GIL."""

    def register(self, address: int, length: int) -> None:
        """Pin bytes that are mapped and not pinned.

        Raises:
            RuntimeError: if the system does not allow it.
        """

    def unregister(self, address: int) -> None:
        """Undo the :meth:`register` of this address."""


class HostMemory:
    """One mapping, on huge pages where the kernel has them.

    Children of a fork do not get it: a fork would otherwise copy its page tables, and the pages
    themselves where they are pinned. If the system gives less than all of it, what was ready
    before stays so, and a warning says what that means.

    Args:
        size: bytes.
        file: memory that other processes have mapped or will map; None for private memory. Each
            process makes it resident, which is cheap behind the first, and pins it for itself.
        pinner: pins it; None leaves it at resident.
        node: the NUMA node to take it from while that has any; None for that of whichever core
            touches it first. What another process has mapped before stays where it is.
        enter: the first call of its threads, see :class:`~lamina_kv.data.threads.Threads`.
        populators: threads that make it resident; by default as many as the cores allow.

    Attributes:
        tensor: the memory, flat, uint8, zeros; the mapping lives as long as it does.

    Raises:
        ValueError: if ``size`` is not positive, or not the size of ``file``.
        OSError: if the machine has no such amount of memory.
    """

    def __init__(
        self,
        size: int,
        *,
        file: MemoryFile | None = None,
        pinner: Pinner | None = None,
        node: int | None = None,
        enter: Callable[[], None] | None = None,
        populators: int | None = None,
    ) -> None:
        if size <= 0:
            raise ValueError(f"host memory of {size} bytes")
        is_new = file is None or file.is_empty
        try:
            mapping = private_memory(size) if file is None else file.map(size, writable=True)
        except OSError as error:
            reason = f"{size} bytes of host memory cannot be reserved: lower host.capacity"
            raise OSError(error.errno, reason) from error
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
        _mappings.add(mapping)
        mapping.madvise(mmap.MADV_DONTFORK)
        self.tensor = torch.frombuffer(mapping, dtype=torch.uint8)
        self._mapping: mmap.mmap | None = mapping
        self._size = size
        self._base = self.tensor.data_ptr()
        self._pinner = pinner
        self._pins: list[int] = []
        self._progress = threading.Condition()
        self._ready = 0
        self._closing = self._ended = False
        self._error: BaseException | None = None
        cores = usable_cores()
        if node is not None and is_new:
            cores = self._bind(node, cores)
        threads = Threads(cores=cores) if enter is None else Threads(enter, cores)
        self._populating = Populating(self._base, size, threads, populators)
        self._thread = threads.start("host-memory", self._run, self._died)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the bytes of a contiguous host tensor are part of this memory."""
        start = tensor.data_ptr() - self._base
        return start >= 0 and start + tensor.nbytes <= self._size

    @property
    def ready(self) -> int:
        """Bytes, from the first one on, that are resident, and pinned if they are to be."""
        return self._ready

    @property
    def most(self) -> int:
        """Bytes that will be ready in the end; less than the size only after a failure."""
        with self._progress:  # both, or neither
            return self._ready if self._ended else self._size

    @property
    def pins(self) -> Sequence[int]:
        """Where each range begins, in bytes, that one call has pinned; grows at its end. A copy
        engine takes no copy that lies in two of them."""
        return self._pins

    def wait(self, end: int | None = None) -> None:
        """Block until the first bytes of the memory are ready.

        Args:
            end: how many; all if None.

        Raises:
            RuntimeError: if they never will be, or the memory was closed before they were.
        """
        wanted = self._size if end is None else end
        if self._ready >= wanted:
            return
        with self._progress:
            self._progress.wait_for(lambda: self._ready >= wanted or self._ended)
        if self._ready >= wanted:
            return
        if self._error is not None:
            raise RuntimeError(self._shortage()) from self._error
        raise RuntimeError("host memory was closed before it was ready")

    def close(self, *, process_ends: bool = False) -> None:
        """Stop what runs in the background, and undo the pinning. Idempotent.

        Args:
            process_ends: leave the pinning to the end of the process, which undoes all of it at
                once. The mapping is kept until then.
        """
        self._closing = True
        self._populating.stop()
        self._thread.join()
        mapping, self._mapping = self._mapping, None
        if mapping is None or self._pinner is None:
            return
        if process_ends:
            _kept.append(mapping)
            return
        for start in self._pins:
            self._pinner.unregister(self._base + start)

    def _bind(self, node: int, cores: frozenset[int]) -> frozenset[int]:
        """Have pages come from a node.

        Returns:
            Cores for the threads that make them resident.
        """
        try:
            numa.prefer(self._base, self._size, node)
        except OSError as error:  # then they come from the node of who touches them first
            log.info("host memory cannot be bound to NUMA node %d: %s", node, error)
        return cores & numa.cores_of(node) or cores

    def _run(self) -> None:
        step = FIRST_STEP
        while self._ready < self._size:
            end = self._populating.await_first(min(self._ready + step, self._size))
            if end == self._ready or self._closing:
                break
            seconds = self._pin(self._ready, end)
            if seconds < LONGEST_CALL / 2:
                step = min(2 * step, LARGEST_STEP)
            elif seconds > LONGEST_CALL:
                step = max(step // 2, FIRST_STEP)
            with self._progress:
                self._ready = end
                self._progress.notify_all()
        self._end(self._populating.error)

    def _pin(self, start: int, end: int) -> float:
        """Pin a range; returns how long that took, in seconds."""
        if self._pinner is None:
            return 0.0
        began = time.perf_counter()
        self._pinner.register(self._base + start, end - start)
        self._pins.append(start)
        return time.perf_counter() - began

    def _died(self, error: BaseException) -> None:
        self._populating.end()
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        if error is not None:
            log.warning("%s", self._shortage())
        with self._progress:
            self._ended = True
            self._progress.notify_all()

    def _shortage(self) -> str:
        if self._pinner is None:
            return (
                f"only {self._ready} of {self._size} bytes of host memory could be made resident "
                f"({self._error}): the rest is slow at its first use, or ends the process: lower "
                "host.capacity"
            )
        if not self._ready:
            return (
                f"no host memory could be pinned ({self._error}): the host tier is off and Lamina "
                "keeps nothing: lower host.capacity, and see what `lamina-kv doctor` says"
            )
        return (
            f"only {self._ready} of {self._size} bytes of host memory could be pinned "
            f"({self._error}): the host tier of this rank is that much smaller: lower host.capacity"
        )
