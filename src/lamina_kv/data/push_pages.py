"""Where the pages of a push are in the memory of the two ranks, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lamina_kv.plan import PushPages
from lamina_kv.push.cards import RankCard, Route, RowCard
from lamina_kv.push.transports.base import Spans

_Runs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Source blocks, target blocks and lengths in blocks of runs that are neighbours on both sides."""


class PageSpans:
    """The pages of one order for one decode rank. What blocks there are is worked out once; for a
    row only its place is added.

    Args:
        pages: what goes where.
        route: which part of a page goes where.
        local: this rank.
        remote: the decode rank.
    """

    def __init__(
        self, pages: Sequence[PushPages], route: Route, local: RankCard, remote: RankCard
    ) -> None:
        self._route = route
        self._local = local.rows
        self._remote = remote.rows
        self._single = {part.group: _singles(part) for part in pages}
        self._merged = {part.group: _merge(part) for part in pages}

    def row(self, row: int) -> tuple[Spans, Spans]:
        """What of ``row`` is read here and written there; stretch for stretch of equal lengths."""
        here, there = self._local[row], self._remote[row]
        whole = _is_dense(here, self._route.local) and _is_dense(there, self._route.remote)
        runs = self._merged if whole else self._single
        parts = [runs[group] for group in here.groups if group in runs]
        if not parts:
            return np.empty((0, 2), np.uint64), np.empty((0, 2), np.uint64)
        sources, targets, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
        size = counts * (here.page_bytes // self._route.local[1])
        return (
            _spans(here, self._route.local, sources, size),
            _spans(there, self._route.remote, targets, size),
        )


def _is_dense(row: RowCard, part: tuple[int, int]) -> bool:
    return part[1] == 1 and row.stride == row.page_bytes


def _spans(
    row: RowCard,
    part: tuple[int, int],
    blocks: npt.NDArray[np.int64],
    size: npt.NDArray[np.int64],
) -> Spans:
    offset = row.page_bytes // part[1] * part[0]
    first = row.address + offset + blocks * row.stride
    return np.stack((first, size), axis=1).astype(np.uint64)


def _singles(part: PushPages) -> _Runs:
    sources, targets = np.array(part.sources, np.int64), np.array(part.targets, np.int64)
    return sources, targets, np.ones(len(sources), np.int64)


def _merge(part: PushPages) -> _Runs:
    sources, targets, _ = _singles(part)
    breaks = np.flatnonzero((np.diff(sources) != 1) | (np.diff(targets) != 1)) + 1
    starts = np.concatenate(([0], breaks)).astype(np.int64)
    counts = np.diff(np.concatenate((starts, [len(sources)])))
    return sources[starts], targets[starts], counts
