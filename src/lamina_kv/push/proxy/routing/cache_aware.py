"""A policy: where most of the prompt is, as long as that rank has not much more to do.

A rank costs its load, and the tokens of the prompt that it would still have to compute. So a prefix
that everybody shares draws requests to one rank only until that rank's load outweighs computing the
prefix somewhere else, and no rank is left without work for long.

A session stays where it is longer than that: its next turn is worth more there than this one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from lamina_kv.push.proxy.routing.least_loaded import by_load
from lamina_kv.push.proxy.routing.power_of_two import PowerOfTwo
from lamina_kv.push.proxy.routing.prompt import Prompt
from lamina_kv.push.proxy.routing.words import Candidate, Choice, Reason

FAITHFUL = 2.0
"""A session's rank may have so many times the prompt more load than the least loaded one: leaving
costs the prompt once now, and whatever the next turn adds on both sides."""

SLACK = 2048
"""Tokens of load that are never worth leaving a session's rank for."""


class CacheAware:
    """See the module.

    Args:
        dice: chooses among ranks that hold nothing of a prompt.
    """

    def __init__(self, dice: random.Random | None = None) -> None:
        self._beneath = PowerOfTwo(dice)

    def choose(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Choice:
        """See :class:`~lamina_kv.push.proxy.routing.words.RoutingPolicy`."""
        stay = next((candidate for candidate in candidates if candidate.sticky), None)
        if stay is not None and _is_bearable(prompt, stay, candidates):
            return Choice(stay, Reason.SESSION)
        if not any(candidate.hit for candidate in candidates):
            return self._beneath.choose(prompt, candidates)
        best = min(candidates, key=lambda candidate: (candidate.full, _cost(prompt, candidate)))
        # A system prompt's worth of tokens on all of them is no reason.
        known = best.hit > min(candidate.hit for candidate in candidates)
        return Choice(best, Reason.PREFIX if known else Reason.LOAD)


def _cost(prompt: Prompt, candidate: Candidate) -> tuple[float, int]:
    """Tokens; among equals, visits."""
    return prompt.tokens - candidate.hit + candidate.load, candidate.visits


def _is_bearable(prompt: Prompt, stay: Candidate, candidates: Sequence[Candidate]) -> bool:
    """Whether a session can stay where it is."""
    least = min(candidates, key=by_load)
    if stay.full and not least.full:
        return False
    return stay.load - least.load <= FAITHFUL * prompt.tokens + SLACK
