"""What an engine says of the tokens of one answer."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

MAX_BYTES = 1 << 20
"""Bytes of an answer that are looked at; longer ones are not parsed only to count their prompt."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer.

    Attributes:
        prompt: tokens of the prompt.
        cached: of these, what the engine did not compute; None if it does not say, which it does
            with ``--enable-prompt-tokens-details``.
    """

    prompt: int
    cached: int | None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Tokens(msgspec.Struct):
    prompt_tokens: int
    prompt_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    usage: _Tokens | None = None


_ANSWER = msgspec.json.Decoder(_Answer)


def read_usage(body: bytes) -> Usage | None:
    """Of a whole answer, or of a piece of a stream; None if it says nothing.

    Args:
        body: JSON, or server-sent events.
    """
    if len(body) > MAX_BYTES or b'"prompt_tokens"' not in body:
        return None
    if body.startswith(b"data:"):
        events = (line[5:] for line in body.split(b"\n") if b'"prompt_tokens"' in line)
        body = next(events, b"")
    try:
        tokens = _ANSWER.decode(body).usage
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    if tokens is None:
        return None
    details = tokens.prompt_tokens_details
    return Usage(tokens.prompt_tokens, None if details is None else details.cached_tokens)
