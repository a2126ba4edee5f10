"""A policy: two ranks by chance, and of these the one with less load."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lamina_kv.push.proxy.routing.least_loaded import LeastLoaded
from lamina_kv.push.proxy.routing.prompt import Prompt
from lamina_kv.push.proxy.routing.words import Candidate, Choice


class PowerOfTwo:
    """Nearly as even as the least loaded of all, and several proxies that know little of each other
    do not all choose the same one.

    Args:
        dice: chooses the two.
    """

    def __init__(self, dice: random.Random | None = None) -> None:
        self._dice = dice or random.Random()
        self._better = LeastLoaded()

    def choose(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Choice:
        """See :class:`~lamina_kv.push.proxy.routing.words.RoutingPolicy`."""
        # One with room is always among them.
        roomy = [candidate for candidate in candidates if not candidate.full] or candidates
        return self._better.choose(prompt, self._dice.sample(roomy, min(2, len(roomy))))
