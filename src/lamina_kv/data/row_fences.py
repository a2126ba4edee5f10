"""Rows of a load in the step that are launched, and that the device has still to copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from lamina_kv.data.movers.fences import Fence


class RowFences:
    """By row, the fence behind all of its copies. A fence that has passed is asked no more.

    A device that fails copies nothing any more: its rows count as passed, and who is told of the
    error says that they are not there.

    Args:
        passed: called with a row, its fence and its bytes once the fence has passed.
        failed: called with the error of a device that has failed, or if ``passed`` has raised.
    """

    def __init__(
        self,
        passed: Callable[[int, Fence, int], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._passed = passed
        self._failed = failed
        self._fences: dict[int, Fence] = {}
        self._sizes: dict[int, int] = {}

    def add(self, row: int, fence: Fence, size: int) -> None:
        """A copy of ``size`` bytes of a row is launched, and ends with ``fence``."""
        held = self._fences.get(row)
        self._fences[row] = fence if held is None else held.join(fence)
        self._sizes[row] = self._sizes.get(row, 0) + size

    def of(self, row: int) -> Fence | None:
        """The fence of a row; None if it has none, or that is known to have passed."""
        return self._fences.get(row)

    def has_passed(self, row: int) -> bool:
        """Whether a row has no fence, or that has passed."""
        if (fence := self._fences.get(row)) is None:
            return True
        try:
            if not fence.passed():
                return False
            self._passed(row, fence, self._sizes[row])
        except Exception as error:
            self._failed(error)
        del self._fences[row]
        return True

    @property
    def all_passed(self) -> bool:
        """Whether all have passed. In the order of the stream: of those that have not, one is
        asked."""
        return all(self.has_passed(row) for row in sorted(self._fences))

    def pass_within(self, seconds: float) -> bool:
        """Wait for ``seconds`` at most; returns whether all have passed."""
        due = time.perf_counter() + seconds
        for _, fence in sorted(self._fences.items()):
            with suppress(Exception):  # asked below, and answered with the same error
                fence.passes_within(max(0.0, due - time.perf_counter()))
        return self.all_passed
