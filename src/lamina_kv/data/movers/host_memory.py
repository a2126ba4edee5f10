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

import torch

from lamina_kv.data import numa
from lamina_kv.data.movers.pinning import STUCK_SECONDS, Pinner, Pinning
from lamina_kv.data.movers.populating import Populating
from lamina_kv.data.shared_memory import MemoryFile, private_memory
from lamina_kv.data.threads import Threads, usable_cores
from lamina_kv.quantities import size_of

log = logging.getLogger("lamina_kv.data")

LOOK_SECONDS = 1.0
"""Seconds between two looks whether the driver hangs, of who waits for memory."""

NO_END = threading.TIMEOUT_MAX / 2
"""Seconds of a wait that has no end."""

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
            reason = f"{size_of(size)} of host memory cannot be reserved: lower host.capacity"
            raise OSError(error.errno, reason) from error
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
        _mappings.add(mapping)
        mapping.madvise(mmap.MADV_DONTFORK)
        self.tensor = torch.frombuffer(mapping, dtype=torch.uint8)
        self._mapping: mmap.mmap | None = mapping
        self._size = size
        self._base = self.tensor.data_ptr()
        self._pinning = Pinning(self._base, pinner)
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
        return self._pinning.starts

    def wait(self, end: int | None = None) -> None:
        """Block until the first bytes of the memory are ready.

        Args:
            end: how many; all if None.

        Raises:
            RuntimeError: if they never will be, the driver hangs in a call that pins them, or the
                memory was closed before they were.
        """
        wanted = self._size if end is None else end
        if self._ready >= wanted:
            return
        with self._progress:
            while not self._progress.wait_for(
                lambda: self._ready >= wanted or self._ended, LOOK_SECONDS
            ):
                if self.say_if_stuck():
                    raise RuntimeError(self._describe_stuck(self._pinning.stuck()))
        if self._ready >= wanted:
            return
        if self._error is not None:
            raise RuntimeError(self._shortage()) from self._error
        raise RuntimeError("host memory was closed before it was ready")

    def say_if_stuck(self) -> bool:
        """Whether the driver hangs in a call that pins, and the memory grows no more until that
        returns. Says so once for each such call."""
        stuck = self._pinning.stuck()
        if stuck:
            self._pinning.say_once(self._describe_stuck(stuck))
        return stuck > 0

    def close(self, *, process_ends: bool = False, timeout: float | None = None) -> bool:
        """Stop what runs in the background, and undo the pinning. Idempotent.

        Args:
            process_ends: leave the pinning to the end of the process, which undoes all of it at
                once. The mapping is kept until then.
            timeout: seconds that the present calls of the system have to end; None for as long as
                they take.

        Returns:
            Whether they have. If not, the mapping is kept until the process ends.
        """
        due = time.monotonic() + (NO_END if timeout is None else timeout)
        self._closing = True
        ended = self._populating.stop(max(0.0, due - time.monotonic()))
        self._thread.join(max(0.0, due - time.monotonic()))
        ended &= not self._thread.is_alive()
        if not ended or (process_ends and self._pinning.is_wanted):
            self.keep()
        elif self._mapping is not None:
            self._mapping = None
            self._pinning.undo()
        return ended

    def keep(self) -> None:
        """Leave the memory, and its pinning, to the end of the process. It grows no more."""
        self._closing = True
        self._populating.end()
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            _kept.append(mapping)

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
        while self._ready < self._size:
            wanted = min(self._ready + self._pinning.step, self._size)
            end = self._populating.await_first(wanted)
            if end == self._ready or self._closing:
                break
            if self._pinning.pin(self._ready, end):
                with self._progress:
                    self._ready = end
                    self._progress.notify_all()
        self._end(self._populating.error)

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

    def _describe_stuck(self, length: int) -> str:
        return (
            f"the driver has not returned for {STUCK_SECONDS:.0f} s from pinning {length} bytes of "
            f"host memory: the host tier of this rank stays at {self._ready} of {self._size} bytes "
            "until it does. Look at the kernel's log and at the driver, and restart the engine; a "
            "lower host.capacity pins less"
        )

    def _shortage(self) -> str:
        if not self._pinning.is_wanted:
            return (
                f"only {size_of(self._ready)} of {size_of(self._size)} of host memory could be "
                f"made resident ({self._error}): the rest is slow at its first use, or ends the "
                "process: lower host.capacity"
            )
        if not self._ready:
            return (
                f"no host memory could be pinned ({self._error}): the host tier is off and Lamina "
                "keeps nothing: lower host.capacity, and see what `lamina-kv doctor` says"
            )
        return (
            f"only {size_of(self._ready)} of {size_of(self._size)} of host memory could be pinned "
            f"({self._error}): the host tier of this rank is that much smaller: lower host.capacity"
        )


def close_all(
    memories: list[HostMemory], *, process_ends: bool = False, timeout: float | None = None
) -> bool:
    """Close host memory and forget it.

    Args:
        memories: emptied.
        process_ends: see :meth:`HostMemory.close`.
        timeout: seconds for all of them together; None for as long as it takes.

    Returns:
        Whether nothing of it is under way any more.
    """
    due, ended = time.monotonic() + (NO_END if timeout is None else timeout), True
    while memories:
        left = max(0.0, due - time.monotonic())
        ended &= memories.pop().close(process_ends=process_ends, timeout=left)
    return ended
