"""Fences of copies on a device, and what its events say on the host's clock."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lamina_kv.data.movers.base import BothFences, Fence
from lamina_kv.data.movers.device import Device, Event

ANCHOR_SECONDS = 60.0
"""Seconds for which a pair of a device time and a host time is used. torch gives the time between
two events as a float of 32 bits: after a minute it is good for some microseconds."""


class DeviceClock:
    """Says on the host's clock when events have passed. Thread safe.

    Args:
        device: the device.
    """

    def __init__(self, device: Device[Any]) -> None:
        self._device = device
        self._stream = device.stream(0)  # nothing else runs there
        self._lock = threading.Lock()
        self._anchor: tuple[Event, float] | None = None

    def read(self, event: Event) -> float:
        """When ``event``, which is timed, has passed."""
        anchor, host = self._newest()
        return host + event.seconds_since(anchor)

    def _newest(self) -> tuple[Event, float]:
        with self._lock:
            began = time.perf_counter()
            if self._anchor is None or began - self._anchor[1] > ANCHOR_SECONDS:
                event = self._device.record(self._stream, timed=True)
                event.wait()
                self._anchor = event, (began + time.perf_counter()) / 2
            return self._anchor


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
        """See :class:`~lamina_kv.data.movers.base.Fence`."""
        self.event.wait()

    def passed(self) -> bool:
        """See :class:`~lamina_kv.data.movers.base.Fence`."""
        return self.event.passed()

    def span(self) -> tuple[float, float]:
        """See :class:`~lamina_kv.data.movers.base.Fence`."""
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
        """See :class:`~lamina_kv.data.movers.base.Fence`."""
        return self._clock.read(self._began), self._clock.read(self.event)

    def join(self, other: Fence) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Fence`. A stream is in order: one event says of
        both that they have passed."""
        if not isinstance(other, CopyFence) or other._stream is not self._stream:
            return BothFences(self, other)
        first, last = (self, other) if self._number < other._number else (other, self)
        return CopyFence(self._stream, last._number, first._began, last.event)
