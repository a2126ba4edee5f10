"""One load on its way into the engine."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from lamina_kv.data.near import Indices
from lamina_kv.geometry import CacheGeometry, Row
from lamina_kv.plan import LoadOrder, Outcome, PageMap, TransferReceipt

PIECE_BYTES = 8 << 20
"""Bytes of one row that one thread moves at a time: enough to stream, little enough to share."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some pages of a load, in each row that has any of their group.

    Attributes:
        group: the cache group.
        near: near pages.
        blocks: the engine block that each goes to.
    """

    group: int
    near: Indices
    blocks: Indices


class Load:
    """A load, and what has become of it. It fails as a whole.

    Args:
        order: what to load.
        geometry: the engine's cache.

    Attributes:
        order: what to load.
        pieces: the same, cut for threads.
        began: when it was made; monotonic seconds.
        ended: when the last piece so far was over.
        moved_bytes: bytes that are in the engine.
        outstanding: pieces of rows that are not over.
        reason: why it has failed; empty while it has not.
    """

    def __init__(self, order: LoadOrder, geometry: CacheGeometry) -> None:
        self.order = order
        most = max(1, PIECE_BYTES // max(row.page_bytes for row in geometry.rows))
        self.pieces = tuple(piece for pages in order.pages for piece in _cut(pages, most))
        self.began = self.ended = time.perf_counter()
        self.moved_bytes = 0
        self._counts = Counter(piece.group for piece in self.pieces)
        self.outstanding = sum(self.pieces_of(row) for row in geometry.rows)
        self.reason = ""

    def pieces_of(self, row: Row) -> int:
        """How many pieces have something in a row."""
        return sum(self._counts[group] for group in row.groups)

    def fail(self, reason: str) -> None:
        """It will not be delivered; the first reason counts."""
        self.reason = self.reason or reason

    def receipt(self, active: float, waited: float) -> TransferReceipt:
        """What to report of it now that it is over.

        Args:
            active: see :class:`~lamina_kv.plan.TransferReceipt`.
            waited: likewise.
        """
        return TransferReceipt(
            transfer=self.order.transfer,
            outcome=Outcome.FAILED if self.reason else Outcome.DONE,
            moved_bytes=self.moved_bytes,
            seconds=self.ended - self.began,
            active=active,
            waited=waited,
            reason=self.reason,
        )


def _cut(pages: PageMap, most: int) -> list[Piece]:
    near, blocks = pages.near.astype(np.int64), pages.blocks.astype(np.int64)
    return [
        Piece(pages.group, near[i : i + most], blocks[i : i + most])
        for i in range(0, len(near), most)
    ]
