"""Fences of copies on a device, and what its events say on the host's clock."""

from __future__ import annotations

import itertools
import threading
import time
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
        anchor = self._anchor
        if anchor is None or time.perf_counter() - anchor[1] > ANCHOR_SECONDS:
            began = time.perf_counter()
            event = self._device.record(self._stream, timed=True)
            event.wait()
            anchor = event, (began + time.perf_counter()) / 2
            with self._lock:
                self._anchor = anchor
        return anchor


class StreamOrder:
    """Records fences in a stream and numbers them. Thread safe.

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

    def fence(self, began: Event) -> CopyFence:
        """A fence behind what is in the stream now.

        Args:
            began: where the copy began that the fence is behind; timed.
        """
        with self._lock:  # else two threads number their fences in another order than the stream's
            ended = self._device.record(self.stream, timed=True)
            number = next(self._numbers)
        return CopyFence(self, number, began, ended)


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
        order: of its stream.
        number: its place among the fences there.
        began: when the copy begins.
        ended: when it ends.
    """

    def __init__(self, order: StreamOrder, number: int, began: Event, ended: Event) -> None:
        super().__init__(ended, order.clock)
        self._order = order
        self._number = number
        self._began = began

    def span(self) -> tuple[float, float]:
        """See :class:`~lamina_kv.data.movers.base.Fence`."""
        return self._clock.read(self._began), self._clock.read(self.event)

    def join(self, other: Fence) -> Fence:
        """See :class:`~lamina_kv.data.movers.base.Fence`. A stream is in order: one event says of
        both that they have passed."""
        if not isinstance(other, CopyFence) or other._order is not self._order:
            return BothFences(self, other)
        first, last = (self, other) if self._number < other._number else (other, self)
        return CopyFence(self._order, last._number, first._began, last.event)
