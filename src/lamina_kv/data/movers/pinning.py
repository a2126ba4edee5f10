"""Pinning a mapping for a device, piece by piece from its beginning on."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol

log = logging.getLogger("lamina_kv.data")

FIRST_STEP, LARGEST_STEP = 64 << 20, 1 << 30
"""Bytes to pin by one call, the first and the largest: few calls end sooner, at the close, too."""

LONGEST_CALL = 0.02
"""Seconds that one call should take at most: what the engine launches meanwhile may have to wait
for the driver. A faster call makes the next one larger, a slower one smaller."""

LEAST_STEP = 4 << 20
"""Bytes of the smallest piece that is tried where the system refuses a larger one: it may have room
for a part, or be unable to pin a large piece by one call."""

STUCK_SECONDS = 30.0
"""Seconds after which a call that pins is taken to hang. The slowest one takes a second."""


class Pinner(Protocol):
    """Pins host memory for a device. Its calls release the GIL."""

    def register(self, address: int, length: int) -> None:
        """Pin bytes that are mapped and not pinned.

        Raises:
            RuntimeError: if the system does not allow it.
        """

    def unregister(self, address: int) -> None:
        """Undo the :meth:`register` of this address."""


class Pinning:
    """What of a mapping is pinned. One thread pins; any may ask.

    Args:
        address: of the mapping's first byte.
        pinner: pins it; None if no device is to reach it, and then every call does nothing.

    Attributes:
        step: bytes to be pinned by the next call.
    """

    def __init__(self, address: int, pinner: Pinner | None) -> None:
        self.step = FIRST_STEP
        self._most = LARGEST_STEP
        self._address = address
        self._pinner = pinner
        self._starts: list[int] = []
        self._call: tuple[float, int] | None = None  # the present one: since when, how many bytes
        self._said = False

    @property
    def is_wanted(self) -> bool:
        """Whether a device is to reach the memory."""
        return self._pinner is not None

    @property
    def starts(self) -> Sequence[int]:
        """Where each range begins, in bytes, that one call has pinned; grows at its end."""
        return self._starts

    def pin(self, start: int, end: int) -> bool:
        """Pin a range of the mapping, and find the size of the next one.

        Returns:
            Whether it is pinned; if not, a smaller one may be.

        Raises:
            RuntimeError: if not even a small one can be pinned.
        """
        if self._pinner is None:
            self.step = min(2 * self.step, self._most)
            return True
        began, length = time.perf_counter(), end - start
        self._said, self._call = False, (began, length)
        try:
            self._pinner.register(self._address + start, length)
        except RuntimeError as error:
            self.step = self._most = length // 2 // LEAST_STEP * LEAST_STEP
            if not self.step:
                raise
            log.info("memory is pinned by %d bytes at a time from now on: %s", self.step, error)
            return False
        finally:
            self._call = None
        self._starts.append(start)
        seconds = time.perf_counter() - began
        if seconds < LONGEST_CALL / 2:
            self.step = min(2 * self.step, self._most)
        elif seconds > LONGEST_CALL:
            self.step = min(max(self.step // 2, FIRST_STEP), self._most)
        return True

    def stuck(self) -> int:
        """Bytes of the present call, if that hangs; else 0."""
        call = self._call
        hangs = call is not None and time.perf_counter() - call[0] > STUCK_SECONDS
        return call[1] if call is not None and hangs else 0

    def say_once(self, message: str) -> None:
        """Warn of the present call, unless that was done."""
        if not self._said:
            self._said = True
            log.warning("%s", message)

    def undo(self) -> None:
        """Unpin all of it; takes its time."""
        while self._pinner is not None and self._starts:
            self._pinner.unregister(self._address + self._starts.pop())
