"""Which rows a step has written."""

from __future__ import annotations

from lamina_kv.geometry import CacheGeometry


class WrittenRows:
    """A row is written once all of its layers have written, in whatever order they run: that is the
    model's affair.

    Args:
        geometry: the engine's cache.
    """

    def __init__(self, geometry: CacheGeometry) -> None:
        self._rows = geometry.rows
        self._row_of_layer = geometry.row_of_layer
        self._left: dict[int, set[str]] = {}

    def note(self, layer: str) -> int | None:
        """A layer has written; returns its row if that is written now, else None."""
        row = self._row_of_layer.get(layer)
        if row is None:
            return None
        left = self._left.setdefault(row, set(self._rows[row].layers))
        left.discard(layer)
        return None if left else row

    def clear(self) -> None:
        """The step is over."""
        self._left.clear()
