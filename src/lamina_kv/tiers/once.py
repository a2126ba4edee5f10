"""What is said once: a store that fails fails thousands of times."""

from __future__ import annotations

from collections.abc import Hashable


class Once:
    """Which kinds of trouble were said already. Any thread may ask."""

    def __init__(self) -> None:
        self._said: set[tuple[Hashable, ...]] = set()

    def first(self, *kind: Hashable) -> bool:
        """Whether trouble of this kind is to be said: it was not before."""
        if kind in self._said:
            return False
        self._said.add(kind)
        return True
