"""Turns of pushes to one decode engine: how much is on its way to it, and who is next.

A network takes writes to one peer in the order in which they were begun. So no push may have more
under way than others can wait for, however large it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from lamina_kv.push.transports.base import Spans

SHARE = 8
"""A write is at most one in so many of the bytes that may be on their way."""


class Sender(Protocol):
    """A push, as its destination sees it."""

    def post(self) -> int:
        """Begin its next write; its bytes, or 0 if none waits or can be begun."""


class Destination:
    """See the module. Not thread safe.

    Args:
        max_inflight: bytes that may be on their way; the last write that is begun may exceed it.
        batch: bytes that are worth a write.

    Attributes:
        in_flight: bytes that are on their way.
        write_bytes: no write is larger.
    """

    def __init__(self, max_inflight: int, batch: int) -> None:
        self.in_flight = 0
        self.write_bytes = max(batch, max_inflight // SHARE)
        self._max_inflight = max_inflight
        self._turns: dict[Sender, None] = {}

    def queue(self, sender: Sender) -> None:
        """A push has something to write. Nothing changes if it has its place already."""
        self._turns.setdefault(sender)

    def post(self) -> None:
        """Begin as many writes as may be on their way: of each push one, then of each another."""
        while self._turns and self.in_flight < self._max_inflight:
            sender = next(iter(self._turns))
            del self._turns[sender]
            if size := sender.post():
                self.in_flight += size
                self._turns[sender] = None


def cut(local: Spans, remote: Spans, size: int) -> Iterator[tuple[Spans, Spans]]:
    """Stretches of a write, in parts of ``size`` bytes; a stretch may be cut anywhere."""
    lengths = local[:, 1].astype(np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    if total <= size:
        yield local, remote
        return
    bounds = np.arange(size, total, size)
    starts = np.union1d(ends - lengths, bounds)
    index = np.searchsorted(ends, starts, side="right")
    skipped = starts - (ends - lengths)[index]
    sizes = np.diff(np.append(starts, total))
    cuts = np.searchsorted(starts, bounds)
    ends_of = [
        np.split(np.stack((spans[index, 0].astype(np.int64) + skipped, sizes), axis=1), cuts)
        for spans in (local, remote)
    ]
    for here, there in zip(*ends_of, strict=True):
        yield here.astype(np.uint64), there.astype(np.uint64)
