"""What pages hold: stamps that name the prefix, the row and the rank they belong to.

The stamp of a token is a hash of every token up to it, so two requests have equal stamps exactly
as far as they have equal prefixes, and nothing but the right bytes passes a comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Stamps = npt.NDArray[np.uint64]

SPOILED = 0xBAD0BAD0BAD0BAD0
"""What is computed on wrong pages differs from what is right by this."""

_MASK = (1 << 64) - 1
_NAMES = 200_000


class Violation(AssertionError):
    """A promise of Lamina was broken; the text says which, where and by what."""


def extend(parent: int, tokens: Sequence[int]) -> list[int]:
    """The hash of each prefix that ends in ``tokens``, given the hash of what is before them."""
    hashes = []
    for token in tokens:
        parent = hash((parent, token)) & _MASK
        hashes.append(parent)
    return hashes


def root_hash(weights: int, salt: int) -> int:
    """The hash of the empty prefix: other weights or another salt give other content."""
    return hash((0x1A417A, weights, salt)) & _MASK


class Ledger:
    """Knows whose prefix a stamp stands for, as long as anybody may ask.

    Args:
        ranks: how many ranks there are.
        rows: rows of the cache.
        replicas: whether all ranks have the same stamps.
    """

    def __init__(self, ranks: int, rows: int, *, replicas: bool = False) -> None:
        salts = [
            [hash((0 if replicas else rank, row, 0x5A17)) & _MASK for row in range(rows)]
            for rank in range(ranks)
        ]
        self.salts: Stamps = np.array(salts, np.uint64)
        self._names: dict[int, tuple[str, int]] = {}

    def note(self, hashes: Sequence[int], whose: str, start: int) -> None:
        """Remember that ``hashes`` are the tokens of ``whose`` from ``start`` on."""
        if len(self._names) > _NAMES:
            self._names.clear()
        for position, value in enumerate(hashes, start):
            self._names[value] = (whose, position)

    def name(self, stamp: int) -> str:
        """What a stamp found in a page is."""
        if stamp == 0:
            return "never written"
        for (rank, row), salt in np.ndenumerate(self.salts):
            for spoiled, text in ((0, ""), (SPOILED, ", computed on wrong pages")):
                found = self._names.get(stamp ^ int(salt) ^ spoiled)
                if found is not None:
                    return f"token {found[1]} of {found[0]}, row {row}, rank {rank}{text}"
        return f"unknown stamp {stamp:#x}"
