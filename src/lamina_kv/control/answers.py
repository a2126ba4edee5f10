"""How long a request waits for a tier to say what it has: as long as answers take, if what they
save is worth that.

A round trip in a data centre takes a millisecond, and a bucket says in 10 to 200 ms whether it has
an object. Whoever never waits so long never finds anything there when its turn comes at once;
whoever always does is slower than without the tier where the tier has nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

LEAST_PATIENCE = 0.02
"""Seconds that a request waits in any case: an idle engine's step takes up to 8 milliseconds."""

MOST_PATIENCE = 1.0
"""Seconds that it waits at most. A store that takes longer is found out about while requests queue.
"""

LEAST_CHANCE = 0.04
"""The chance that is given to a tier that has had nothing so far: with it the wait for a tier that
has nothing costs 4 % of the time to compute the prompt at most."""

SLACK = 2.0
"""An answer is waited for so many times as long as answers take in the mean."""

_WEIGHT = 0.25
"""What the last answer counts for."""


class Answers:
    """What is known of the answers of one tier."""

    def __init__(self) -> None:
        self._seconds = inf
        self._chance = 0.0

    def took(self, seconds: float, present: Sequence[bool] | None) -> None:
        """A question was answered, or not.

        Args:
            seconds: how long the store has worked on it.
            present: what it said of each chunk; None if there was no answer.
        """
        first = self._seconds == inf
        self._seconds = seconds if first else self._seconds + _WEIGHT * (seconds - self._seconds)
        share = sum(present) / len(present) if present else 0.0
        self._chance += _WEIGHT * (share - self._chance)

    def patience(self, prefill: float | None) -> float:
        """Seconds that a request waits for an answer.

        Args:
            prefill: seconds to compute what the tier may have of its prompt; None if nobody knows.
        """
        most = min(SLACK * self._seconds, MOST_PATIENCE)
        return patience_for(most, prefill, max(LEAST_CHANCE, self._chance))


def patience_for(most: float, prefill: float | None, chance: float = LEAST_CHANCE) -> float:
    """Seconds that a request waits for a word from a tier.

    Args:
        most: seconds after which no word comes.
        prefill: seconds that a good word may save; None if nobody knows.
        chance: the chance that it is good.
    """
    worth = 0.0 if prefill is None else prefill * chance
    return max(LEAST_PATIENCE, min(most, worth))
