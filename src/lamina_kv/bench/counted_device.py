"""A device that does nothing, and counts what it is asked for."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum

import torch

from lamina_kv.data.movers.batched_copy import Batch
from lamina_kv.data.movers.device import Device, Event
from lamina_kv.data.movers.row_table import RowRange
from lamina_kv.data.near import Indices


class Asked(StrEnum):
    """What costs a host something."""

    LAUNCH = "launches"
    EVENT = "events"
    HOLD = "waits of a stream"
    UPLOAD = "uploads"
    WAIT = "waits of a thread"
    JOB = "jobs"


class CountedEvent(Event):
    """Has passed when it is asked for the second time, or was waited for.

    Args:
        counts: where waits are counted.
    """

    def __init__(self, counts: Counter[Asked]) -> None:
        self._counts = counts
        self._asked = False

    def wait(self) -> None:
        """See :class:`~lamina_kv.data.movers.fences.Fence`."""
        self._counts[Asked.WAIT] += 1
        self._asked = True

    def passed(self) -> bool:
        """See :class:`~lamina_kv.data.movers.fences.Fence`."""
        passed, self._asked = self._asked, True
        return passed

    def seconds_since(self, earlier: Event) -> float:
        """None have passed."""
        return 0.0


class CountedDevice(Device[None]):
    """See the module.

    Attributes:
        counts: what it was asked for.
    """

    def __init__(self) -> None:
        self.counts: Counter[Asked] = Counter()

    def choose(self) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""

    def stream(self, priority: int) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""

    def current_stream(self) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""

    def record(self, stream: None, *, timed: bool = False) -> Event:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        self.counts[Asked.EVENT] += 1
        return CountedEvent(self.counts)

    def hold(self, stream: None, event: Event) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        self.counts[Asked.HOLD] += 1

    def upload(self, stream: None, values: Indices) -> torch.Tensor:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        self.counts[Asked.UPLOAD] += 1
        return torch.from_numpy(values)

    def on(self, stream: None) -> AbstractContextManager[object]:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        return nullcontext()

    def copy(
        self,
        stream: None,
        near: torch.Tensor,
        rows: torch.Tensor,
        part: RowRange,
        pairs: torch.Tensor,
        *,
        to_engine: bool,
    ) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        self.counts[Asked.LAUNCH] += 1

    @property
    def has_copy_engines(self) -> bool:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        return True

    def copy_batch(self, stream: None, batch: Batch) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        self.counts[Asked.LAUNCH] += 1

    def pinned(self, size: int) -> torch.Tensor:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        return torch.empty(size, dtype=torch.uint8)

    @property
    def numa_node(self) -> int | None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        return None

    def register(self, address: int, length: int) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""

    def unregister(self, address: int) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""

    def synchronize(self, stream: None) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
