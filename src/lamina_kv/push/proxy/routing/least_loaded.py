"""A policy: the least load, wherever prefixes are."""

from __future__ import annotations

from collections.abc import Sequence

from lamina_kv.push.proxy.routing.prompt import Prompt
from lamina_kv.push.proxy.routing.words import Candidate, Choice, Reason


class LeastLoaded:
    """The rank with the least load; among equals the one with the fewest visits so far. Of one
    proxy the best that can be done without looking at prompts; of several, all send their next
    request to the same rank until its engine says what it is doing."""

    def choose(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Choice:
        """See :class:`~lamina_kv.push.proxy.routing.words.RoutingPolicy`."""
        return Choice(min(candidates, key=by_load), Reason.LOAD)


def by_load(candidate: Candidate) -> tuple[bool, float, int]:
    """A key that sorts the least loaded first, and full ones last."""
    return candidate.full, candidate.load, candidate.visits
