"""Fences of copies on a device, and what its events say on the host's clock.

A device time becomes a host time by a moment that is known on both clocks, the *anchor*. Who takes
one waits for the device. So the first is taken when nothing runs yet, and later ones on a thread of
their own: whoever asks what time it was gets an answer at once.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lamina_kv.data.movers.device import Device, Event
from lamina_kv.data.movers.fences import BothFences, Fence
from lamina_kv.data.threads import Threads
from lamina_kv.data.worker_pool import WorkerPool

log = logging.getLogger("lamina_kv.data")

ANCHOR_SECONDS = 60.0
"""Seconds after which a new anchor is taken. torch gives the time between two events as a float of
32 bits: after a minute it is good for some microseconds, after an hour for a quarter of a
millisecond."""


class DeviceClock:
    """Says on the host's clock when events have passed. Thread safe.

    Args:
        device: the device; waited for once.
        threads: how the thread begins that takes later anchors. There is none before the first of
            them.
    """

    def __init__(self, device: Device[Any], threads: Threads) -> None:
        self._device = device
        self._threads = threads
        self._stream = device.stream(0)  # nothing else runs there
        self._lock = threading.Lock()
        self._renewer: WorkerPool | None = None
        self._renews = False
        self._anchor = self._measure()

    def read(self, event: Event) -> float:
        """When ``event``, which is timed, has passed."""
        event_at, host = anchor = self._anchor
        if time.perf_counter() - host > ANCHOR_SECONDS:
            self._renew(anchor)
        return host + event.seconds_since(event_at)

    def close(self, timeout: float) -> bool:
        """Take no further anchor; False if one could not be taken within ``timeout`` seconds."""
        with self._lock:
            self._renews = True
            renewer, self._renewer = self._renewer, None
        return renewer is None or renewer.close(timeout)

    def _measure(self) -> tuple[Event, float]:
        began = time.perf_counter()
        event = self._device.record(self._stream, timed=True)
        event.wait()
        return event, (began + time.perf_counter()) / 2

    def _renew(self, old: tuple[Event, float]) -> None:
        """Have a new anchor taken, unless that is under way or was done."""
        with self._lock:
            if self._renews or self._anchor is not old:
                return
            self._renews = True
            if self._renewer is None:
                self._renewer = WorkerPool("clock", 1, self._threads)
            self._renewer.submit((0, 0), self._take_anchor, self._not_taken)

    def _take_anchor(self) -> None:
        self._anchor = self._measure()
        self._renews = False

    def _not_taken(self, error: BaseException) -> None:
        """The old one stays: a device that has failed measures nothing more."""
        log.debug("the time of the device is not known any better: %r", error)


class CopyStream:
    """A stream for copies. One thread launches at a time: the times of a copy are its own then, and
    its fence has a place among the others.

    Args:
        device: the device.
        stream: the stream.
        clock: what its fences are read on.
    """

    def __init__(self, device: Device[Any], stream: Any, clock: DeviceClock) -> None:
        self.stream = stream
        self.clock = clock
        self._device = device
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, the stream is the calling thread's current one, and that thread's alone."""
        with self._lock, self._device.on(self.stream):
            yield

    def passes_within(self, seconds: float) -> bool:
        """Wait for what is in the stream now, ``seconds`` at most; returns whether it has run.

        Raises:
            RuntimeError: if the device has failed.
        """
        return self._device.record(self.stream).passes_within(seconds)

    def fence(self, began: Event) -> CopyFence:
        """A fence behind what is in the stream now; in a :meth:`turn`.

        Args:
            began: where the copy began that the fence is behind; timed.
        """
        ended = self._device.record(self.stream, timed=True)
        return CopyFence(self, next(self._numbers), began, ended)


class TimedFence(Fence):
    """A timed event, which is read on the host's clock.

    Args:
        event: the event.
        clock: what it is read on.

    Attributes:
        event: as given.
    """

    def __init__(self, event: Event, clock: DeviceClock) -> None:
        self.event = event
        self._clock = clock

    def wait(self) -> None:
        """See :class:`~lamina_kv.data.movers.fences.Fence`."""
        self.event.wait()

    def passed(self) -> bool:
        """See :class:`~lamina_kv.data.movers.fences.Fence`."""
        return self.event.passed()

    def passes_within(self, seconds: float) -> bool:
        """See :class:`~lamina_kv.data.movers.fences.Fence`."""
        return self.event.passes_within(seconds)

    def span(self) -> tuple[float, float]:
        """See :class:`~lamina_kv.data.movers.fences.Fence`."""
        at = self._clock.read(self.event)
        return at, at


class CopyFence(TimedFence):
    """The end of a copy in a stream.

    Args:
        stream: where.
        number: its place among the fences there.
        began: when the copy begins.
        ended: when it ends.
    """

    def __init__(self, stream: CopyStream, number: int, began: Event, ended: Event) -> None:
        super().__init__(ended, stream.clock)
        self._stream = stream
        self._number = number
        self._began = began

    def span(self) -> tuple[float, float]:
        """See :class:`~lamina_kv.data.movers.fences.Fence`."""
        return self._clock.read(self._began), self._clock.read(self.event)

    def join(self, other: Fence) -> Fence:
        """See :class:`~lamina_kv.data.movers.fences.Fence`. A stream is in order: one event says of
        both that they have passed."""
        if not isinstance(other, CopyFence) or other._stream is not self._stream:
            return BothFences(self, other)
        first, last = (self, other) if self._number < other._number else (other, self)
        return CopyFence(self._stream, last._number, first._began, last.event)
