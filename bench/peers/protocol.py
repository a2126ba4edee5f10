"""What the bench says to a system's process, and what that answers: one line of JSON each.

Both sides are this file, imported in two environments. A question is answered by exactly one line,
a :class:`Failed` if anything was raised.
"""

from __future__ import annotations

from typing import Any

import msgspec

from lamina_kv.bench.shapes import LlamaShape
from peers.systems import Store, System


class Start(msgspec.Struct, frozen=True, tag=True):
    """Serve. Answered by :class:`Done`.

    Attributes:
        system: what serves.
        shape: the model.
        model: directory of its ``config.json``.
        cache_tokens: tokens that the engine's cache holds.
        step_tokens: tokens that one step computes at most.
        store: what may be kept outside the engine.
        lamina: Lamina's configuration beyond its tiers.
    """

    system: System
    shape: LlamaShape
    model: str
    cache_tokens: int
    step_tokens: int
    store: Store
    lamina: dict[str, Any] = {}


class Arrival(msgspec.Struct, frozen=True):
    """One request.

    Attributes:
        at: seconds after the first may come.
        prompt: token ids.
        tokens: how many to generate.
    """

    at: float
    prompt: list[int]
    tokens: int


class Serve(msgspec.Struct, frozen=True, tag=True):
    """Serve requests as they arrive. Answered by :class:`Served`, when all have ended."""

    arrivals: list[Arrival]


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Let what is being saved come to its end, and empty the engine's own prefix cache. Answered by
    :class:`Done`."""


class Copy(msgspec.Struct, frozen=True, tag=True):
    """Copy ``size`` bytes of memory once. Answered by :class:`Done`, with the time it took."""

    size: int


class Pace(msgspec.Struct, frozen=True, tag=True):
    """Set the pace of the link, see :meth:`lamina_kv.bench.pacing.Link.pace`. Answered by
    :class:`Done`."""

    bandwidth: float
    latency: float


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Let what is being saved come to its end, and end. Answered by :class:`Done`."""


class Response(msgspec.Struct, frozen=True):
    """What became of an :class:`Arrival`; seconds count from when it should have come.

    Attributes:
        first: until its first token was there.
        last: until its last one was.
        cached: tokens of the prompt that were not computed.
        tokens: what was generated.
    """

    first: float
    last: float
    cached: int
    tokens: list[int]

    @property
    def per_token(self) -> float:
        """Seconds between two tokens, on average; 0 if there was only one."""
        gaps = len(self.tokens) - 1
        return (self.last - self.first) / gaps if gaps else 0.0


class Served(msgspec.Struct, frozen=True, tag=True):
    """One response for each arrival, in their order."""

    responses: list[Response]


class Done(msgspec.Struct, frozen=True, tag=True):
    """It is done, and took so many seconds."""

    seconds: float = 0.0


class Failed(msgspec.Struct, frozen=True, tag=True):
    """It could not be done."""

    account: str


Question = Start | Serve | Forget | Copy | Pace | Stop
Answer = Served | Done | Failed

_ENCODER = msgspec.json.Encoder()
_QUESTIONS: msgspec.json.Decoder[Question] = msgspec.json.Decoder(Question)
_ANSWERS: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


def line(message: Question | Answer) -> bytes:
    """A message as it is sent."""
    return _ENCODER.encode(message) + b"\n"


def question(text: bytes) -> Question:
    """What was asked.

    Raises:
        msgspec.ValidationError: if it is no question.
    """
    return _QUESTIONS.decode(text)


def answer(text: bytes) -> Answer:
    """What was answered.

    Raises:
        msgspec.ValidationError: if it is no answer.
    """
    return _ANSWERS.decode(text)
