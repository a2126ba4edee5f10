"""Batches of reads or writes, each batch one system call: Linux AIO, laid out by numpy.

A batch releases the interpreter lock twice, however many requests it has. No other way to read a
disk beside an engine in the same process is cheaper (``docs/disk.md`` has the figures). The C
library has no wrapper for these calls.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import platform
import time
from enum import IntEnum
from typing import NoReturn

import numpy as np
import numpy.typing as npt

log = logging.getLogger("lamina_kv.tiers")

DEPTH = 256
"""Requests in flight at most, for each queue."""

_RETRY = 1.0
"""Seconds after which a kernel that does not end I/O is asked again."""

Integers = npt.NDArray[np.int64]


class Operation(IntEnum):
    """What a batch does; the kernel's ``IOCB_CMD_*``."""

    READ = 0
    WRITE = 1


# io_setup, io_destroy, io_submit, io_getevents
_X86_64 = (206, 207, 209, 208)
_GENERIC = (0, 1, 2, 4)
_SETUP, _DESTROY, _SUBMIT, _GETEVENTS = _X86_64 if platform.machine() == "x86_64" else _GENERIC

_REQUEST = np.dtype(
    [
        ("data", np.uint64),
        ("key", np.uint32),
        ("rw_flags", np.uint32),
        ("operation", np.uint16),
        ("priority", np.int16),
        ("file", np.uint32),
        ("address", np.uint64),
        ("size", np.uint64),
        ("offset", np.int64),
        ("reserved", np.uint64),
        ("flags", np.uint32),
        ("event_file", np.uint32),
    ]
)
"""The kernel's ``struct iocb`` on a little-endian machine."""

_EVENT = np.dtype(
    [("data", np.uint64), ("request", np.uint64), ("result", np.int64), ("more", np.int64)]
)
"""The kernel's ``struct io_event``."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(number: int, *arguments: int) -> int:
    """A system call; releases the interpreter lock. Returns its result or a negative errno."""
    result = int(_libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)))
    return result if result >= 0 else -ctypes.get_errno()


class AioQueue:
    """A queue to the kernel, for one thread at a time.

    Attributes:
        usable: whether it can be used again; not once the kernel has not answered.

    Raises:
        OSError: if the kernel gives none; says what to do.
    """

    def __init__(self) -> None:
        context = ctypes.c_ulong(0)
        result = _call(_SETUP, DEPTH, ctypes.addressof(context))
        if result < 0:
            remedy = (
                "all that fs.aio-max-nr allows are in use: raise it with sysctl"
                if -result == errno.EAGAIN
                else "allow io_setup, io_submit and io_getevents where system calls are filtered"
            )
            raise OSError(-result, f"no asynchronous I/O ({os.strerror(-result)}): {remedy}")
        self._context = context.value
        self.usable = True
        self._requests = np.zeros(DEPTH, _REQUEST)
        self._requests["data"] = np.arange(DEPTH)
        self._pointers = self._requests.ctypes.data + _REQUEST.itemsize * np.arange(DEPTH)
        self._events = np.zeros(DEPTH, _EVENT)

    def run(
        self,
        operation: Operation,
        file: int,
        offsets: Integers,
        addresses: Integers,
        sizes: Integers,
    ) -> npt.NDArray[np.int32]:
        """Move ``sizes[i]`` bytes between ``addresses[i]`` and byte ``offsets[i]`` of the file.

        No request is in flight any more when this returns or raises. What the kernel moves only in
        part is continued.

        Args:
            operation: which way.
            file: the descriptor.
            offsets: bytes from the start of the file, one for each request.
            addresses: of memory.
            sizes: bytes.

        Returns:
            For each request 0, or the errno of its failure; ``ENODATA`` at the end of the file.

        Raises:
            OSError: if the kernel does not say what became of the requests.
        """
        failed = np.zeros(len(offsets), np.int32)
        moved = np.zeros(len(offsets), np.int64)
        todo = np.arange(len(offsets))
        while todo.size:
            now, todo = todo[:DEPTH], todo[DEPTH:]
            done = moved[now]
            requests = self._requests[: len(now)]
            requests["operation"] = operation
            requests["file"] = file
            requests["offset"] = offsets[now] + done
            requests["address"] = addresses[now] + done
            requests["size"] = sizes[now] - done
            result = self._flush(len(now))
            moved[now] += np.maximum(result, 0)
            failed[now] = np.where(result > 0, 0, np.where(result == 0, errno.ENODATA, -result))
            todo = np.concatenate([now[(result > 0) & (moved[now] < sizes[now])], todo])
        return failed

    def close(self) -> None:
        """Give the queue back; no request may be in flight."""
        if self._context:
            _call(_DESTROY, self._context)
            self._context = 0

    def _abandon(self, error: int) -> NoReturn:
        """Give up the queue: the kernel does not say what became of requests in flight.

        Until they have ended the kernel may use their memory, so this waits until it takes the
        queue back. That ends them.
        """
        self.usable = False
        context, self._context = self._context, 0
        warned = False
        while (refused := -_call(_DESTROY, context)) > 0:
            if not warned:
                log.warning(
                    "the kernel neither says what became of I/O in flight (%s) nor ends it (%s): a "
                    "thread and its memory wait for it. Where system calls are filtered, allow "
                    "io_getevents and io_destroy",
                    os.strerror(error),
                    os.strerror(refused),
                )
                warned = True
            time.sleep(_RETRY)
        raise OSError(
            error, f"the kernel does not say what became of I/O in flight ({os.strerror(error)})"
        )

    def _flush(self, count: int) -> Integers:
        """Submit the first ``count`` requests and wait for all: bytes moved or a negative errno.

        Raises:
            OSError: if the queue had to be given up.
        """
        results = np.zeros(count, np.int64)
        sent = in_flight = 0
        while sent < count or in_flight:
            if sent < count:
                pointers = self._pointers.ctypes.data + 8 * sent
                taken = _call(_SUBMIT, self._context, count - sent, pointers)
                if taken > 0:
                    sent += taken
                    in_flight += taken
                elif not (taken == -errno.EAGAIN and in_flight) and taken != -errno.EINTR:
                    results[sent] = taken
                    sent += 1
            if in_flight:
                events = self._events.ctypes.data
                came = _call(_GETEVENTS, self._context, in_flight, DEPTH, events, 0)
                if came < 0 and came != -errno.EINTR:
                    self._abandon(-came)
                seen = self._events[: max(came, 0)]
                results[seen["data"].astype(np.int64)] = seen["result"]
                in_flight -= len(seen)
        return results
