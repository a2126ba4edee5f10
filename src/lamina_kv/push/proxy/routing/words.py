"""The words of routing: what is known of an engine, what a policy answers, what a route is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lamina_kv.push.proxy.routing.prompt import Prompt
    from lamina_kv.push.proxy.routing.ranks import Rank


class Disaggregate(StrEnum):
    """Which prompts a prefill engine computes."""

    AUTO = "auto"
    """Those that the decode engine would answer later if it computed them itself."""
    ALWAYS = "always"
    """Every prompt that can be pushed."""
    NEVER = "never"


class PolicyName(StrEnum):
    """As ``--policy`` has it."""

    CACHE_AWARE = "cache_aware"
    POWER_OF_TWO = "power_of_two"
    LEAST_LOADED = "least_loaded"


class Why(StrEnum):
    """Who computes a prompt, and why."""

    PUSHED = "pushed"
    """A prefill engine: every other one is the decode engine itself."""
    SHORT = "short"
    """The prompt is short."""
    CACHED = "cached"
    """The decode engine has nearly all of it."""
    SOONER = "sooner"
    """The decode engine is expected to have it sooner, others' delay included."""
    REQUEST = "request"
    """The request cannot be pushed."""
    NEVER = "never"
    """Pushes are switched off."""
    NO_PREFILL_ENGINE = "no_prefill_engine"
    """No prefill engine is usable, or none that this decode engine can be pushed to from."""


class Reason(StrEnum):
    """Why a policy has chosen an engine."""

    SESSION = "session"
    """It has answered the session before."""
    PREFIX = "prefix"
    """It holds a prefix of the prompt."""
    LOAD = "load"
    """It has less to do."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One rank that a request may be sent to, as it is now.

    Attributes:
        rank: the rank.
        hit: tokens of this prompt that it is expected to hold.
        queued: tokens that it has to compute before anything that is sent now.
        held: tokens whose KV cache its requests hold.
        requests: that are outstanding there, those of other clients and proxies included.
        crowd: answers in the making there, now or in the last minute on average: whichever is more.
        full: whether its KV cache has no room for another request.
        visits: requests sent there so far.
        sticky: whether it has answered the request's session before.
    """

    rank: Rank
    hit: int = 0
    queued: int = 0
    held: int = 0
    requests: int = 0
    crowd: float = 0.0
    full: bool = False
    visits: int = 0
    sticky: bool = False

    @property
    def load(self) -> float:
        """Tokens that are to be computed, and what all else costs beside these."""
        return self.queued + HELD * self.held + REQUEST_TOKENS * self.requests


HELD = 0.1
"""Cost of a token that is held, beside one that is to be computed. A step of decoding reads what is
held at the speed of memory; what is computed costs a pass of the model."""

REQUEST_TOKENS = 128
"""What a request costs an engine besides its tokens: its turn in every step."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy's answer.

    Attributes:
        candidate: one of those it was given.
        reason: why this one.
    """

    candidate: Candidate
    reason: Reason


class RoutingPolicy(Protocol):
    """Chooses among ranks of one role. Called on the event loop, so it must not block."""

    def choose(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Choice:
        """One of ``candidates``.

        Args:
            prompt: what is to be sent there.
            candidates: at least one, all of them usable.
        """


@dataclass(frozen=True, slots=True)
class Route:
    """Where one try of a request goes.

    Attributes:
        decode: answers the request.
        prefill: computes the prompt and pushes it; None if ``decode`` computes it.
        why: why the prompt is computed there.
        reason: why ``decode`` was chosen.
    """

    decode: Candidate
    prefill: Candidate | None
    why: Why
    reason: Reason
