"""Transfers as spans of their requests.

A chunk is a transfer, and a prompt has thousands. So transfers of one kind and one request that
overlap in time are one span: a step's saves, or all chunks that a request waits for.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lamina_kv.control.transfers import Kind, Transfer

if TYPE_CHECKING:
    from lamina_kv.observe.spans import Span, Spans

_TOLD = (Kind.MOVE_IN, Kind.LOAD, Kind.SAVE, Kind.PUSH, Kind.RECEIVE)
"""What is done for a request. Writes to far tiers are for those that may come."""


@dataclass(slots=True)
class _Burst:
    """Transfers that are one span.

    Attributes:
        span: the span.
        live: how many have not ended.
        tiers: where from, or where to.
        chunks: how many chunks they are; 0 of loads and pushes, which move blocks.
        moved: bytes that they have moved, all ranks.
        waited: the longest time for which the model waited for one of them, in seconds.
        errors: why some have failed.
    """

    span: Span
    live: int = 0
    tiers: set[str] = field(default_factory=set)
    chunks: int = 0
    moved: int = 0
    waited: float = 0.0
    errors: set[str] = field(default_factory=set)


class TransferSpans:
    """See the module. Told by the transfer table, from the scheduler's thread and from that of the
    link.

    Args:
        spans: of the engine's requests.
    """

    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        self._bursts: dict[tuple[Kind, str], _Burst] = {}
        self._lock = threading.Lock()

    def opened(self, transfer: Transfer) -> None:
        """A transfer was ordered."""
        if transfer.kind not in _TOLD or not transfer.request_id:
            return
        name = transfer.kind, transfer.request_id
        with self._lock:
            burst = self._bursts.get(name)
            if burst is None:
                span = self._spans.begin(transfer.kind.value, transfer.request_id)
                burst = self._bursts[name] = _Burst(span)
            burst.live += 1
            burst.chunks += len(transfer.keys)

    def closed(self, transfer: Transfer) -> None:
        """It has ended on every rank, and the scheduler has heard of it."""
        name = transfer.kind, transfer.request_id
        with self._lock:
            burst = self._bursts.get(name)
            if burst is None:
                return
            burst.live -= 1
            burst.tiers.add(transfer.tier)
            burst.moved += transfer.moved_bytes
            burst.waited = max(burst.waited, transfer.waited)
            if transfer.failed or transfer.poisoned:
                burst.errors.add(transfer.reason or "poisoned")
            if burst.live:
                return
            del self._bursts[name]
        said: dict[str, str | int | float] = {"bytes": burst.moved}
        if burst.chunks:
            said |= {"tier": ",".join(sorted(burst.tiers)), "chunks": burst.chunks}
        if transfer.kind is Kind.LOAD:
            said["waited_seconds"] = burst.waited
        burst.span.end(said, ", ".join(sorted(burst.errors)))
