"""Whether a decode engine computes a prompt itself, or a prefill engine does and pushes it.

A prompt costs a decode engine time in which its answers come more slowly, and a push costs a hop, a
wait in the other queue and the tail of the transfer. Seconds of both are learnt from streams: from
when a request was sent until its first byte, against the tokens that had to be computed first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lamina_kv.push.proxy.routing.pace import Line, first_known
from lamina_kv.push.proxy.routing.prompt import Prompt
from lamina_kv.push.proxy.routing.words import Candidate, Disaggregate, Why

FEW = 64
"""New tokens that are never worth a push: one step computes them beside everything else, and the
hop alone takes as long."""

UNKNOWN = 256
"""New tokens below which a decode engine computes them itself while nothing is known of either
side. vLLM's own figure for its second turns is 64; measured with Lamina, pushes of 256 were slower
than computing on an idle engine."""

CROWDED = 0.5
"""Part of a prefill's time by which each answer in the making comes later: chunks of the prompt
share steps with them."""

FIRST_GUESS = 0.02
"""Seconds that a push takes beyond the prefill, until the first one was seen."""


@dataclass(frozen=True, slots=True)
class _Sides:
    """Seconds, on the decode engine and with a push.

    Attributes:
        local: until the decode engine has computed it, others' delay included.
        pushed: until a push of it has come.
    """

    local: float
    pushed: float


class Placement:
    """See the module. One for all engines: pools are alike, and what differs is in a rank's pace.

    Args:
        mode: what the operator wants.
        clock: monotonic seconds.

    Attributes:
        local: how long decode engines take to compute a prompt.
        prefill: how long prefill engines take.
        overhead: seconds that pushes take beyond the prefill.
    """

    def __init__(self, mode: Disaggregate, clock: Callable[[], float]) -> None:
        self.local = Line(clock)
        self.prefill = Line(clock)
        self.overhead = FIRST_GUESS
        self._mode = mode

    def place(self, prompt: Prompt, decode: Candidate, prefill: Candidate | None) -> Why:
        """Where a prompt is computed.

        Args:
            prompt: the prompt.
            decode: where it is answered.
            prefill: where it could be computed; None if nowhere.
        """
        if not prompt.pushable:
            return Why.REQUEST
        if self._mode is Disaggregate.NEVER:
            return Why.NEVER
        if prefill is None:
            return Why.NO_PREFILL_ENGINE
        if self._mode is Disaggregate.ALWAYS:
            return Why.PUSHED
        new = prompt.tokens - decode.hit
        sides = self._compare(prompt, decode, prefill)
        if new <= (FEW if sides else UNKNOWN):
            return Why.SHORT if new == prompt.tokens or prompt.tokens <= FEW else Why.CACHED
        return Why.SOONER if sides and sides.local <= sides.pushed else Why.PUSHED

    def pushed(self, seconds: float, prefill_seconds: float) -> None:
        """A push was there so many seconds after its request was sent, and the prefill engine had
        computed it after so many."""
        beyond = min(max(0.0, seconds - prefill_seconds), 10 * FIRST_GUESS + 2 * self.overhead)
        self.overhead += 0.1 * (beyond - self.overhead)

    def local_seconds(self, prompt: Prompt, decode: Candidate) -> float | None:
        """Until a decode engine has computed a prompt itself; None while too little is known."""
        # What only one side has shown is a fair guess of the other: the model is the same.
        lines = (decode.rank.pace, self.local, self.prefill)
        return first_known(prompt.tokens - decode.hit, decode.queued, lines)

    def pushed_seconds(self, prompt: Prompt, prefill: Candidate) -> float | None:
        """Until a prefill engine has computed and pushed a prompt; None while too little is
        known."""
        lines = (prefill.rank.pace, self.prefill, self.local)
        seconds = first_known(prompt.tokens - prefill.hit, prefill.queued, lines)
        return None if seconds is None else seconds + self.overhead

    def _compare(self, prompt: Prompt, decode: Candidate, prefill: Candidate) -> _Sides | None:
        """None while too little is known."""
        alone = self.local_seconds(prompt, replace(decode, queued=0))
        local = self.local_seconds(prompt, decode)
        pushed = self.pushed_seconds(prompt, prefill)
        if alone is None or local is None or pushed is None:
            return None
        return _Sides(local + CROWDED * decode.crowd * alone, pushed)
