"""What an engine says of an answer's tokens, and what clients are told of them. A decode engine
takes a prompt that was pushed to it for one that it had in its cache, and clients are billed by
that; what was cached is what the prefill engine has not computed."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import msgspec

MAX_BYTES = 1 << 20
"""Bytes of an answer that are looked at; longer ones are not parsed only to count their prompt."""

_SAID = re.compile(rb'(?<!\\)("cached_tokens":\s*)(\d+)(?![\d.eE])')
"""A key of JSON, never text inside a string: there the closing quote would be escaped."""
_NAME = b'"cached_tokens"'
_LONGEST = 64
"""Bytes that the name and its number have at most."""


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


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens: int | None = None


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _WholeAnswer(_Answer):
    choices: list[_Choice] = []


_ANSWER = msgspec.json.Decoder(_Answer)
_WHOLE_ANSWER = msgspec.json.Decoder(_WholeAnswer)


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
        said = _ANSWER.decode(body).usage
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    if said is None or said.prompt_tokens is None:
        return None
    details = said.prompt_tokens_details
    return Usage(said.prompt_tokens, None if details is None else details.cached_tokens)


def cached_by(answer: bytes) -> int | None:
    """Tokens of the prompt that a prefill engine had in its cache.

    Args:
        answer: the prefill engine's, to its part of a request.

    Returns:
        0 if it does not say (``--enable-prompt-tokens-details``): what nobody knows is not called
        cached. None if the decode engine needed no push, so that its own number is right.
    """
    try:
        said = _WHOLE_ANSWER.decode(answer)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return 0
    usage = said.usage or _Usage()
    # The responses API does not say how an answer has ended: one that was computed has a token.
    if usage.output_tokens == 0 or any(c.finish_reason == "abort" for c in said.choices):
        return None
    details = usage.prompt_tokens_details or usage.input_tokens_details or _Details()
    return details.cached_tokens or 0


async def corrected(
    pieces: AsyncIterator[bytes], cached: Callable[[], Awaitable[int | None]], *, events: bool
) -> AsyncIterator[bytes]:
    """An answer in which ``cached_tokens`` is right. No byte more and no byte less, as its length
    was told before: a shorter number stands behind blanks, which JSON allows there.

    Args:
        pieces: the decode engine's answer.
        cached: tokens that were not computed, when that is known; None leaves the number as it is.
        events: whether each piece consists of whole events, which are not held back.
    """
    held = b""
    async for piece in pieces:
        held += piece
        end = len(held) if events else _safe_end(held)
        right, held = await _correct(held[:end], cached), held[end:]
        if right:
            yield right
    if held:
        yield await _correct(held, cached)


def _safe_end(text: bytes) -> int:
    """How much of a text can be passed on while what follows is not known."""
    end = max(0, len(text) - _LONGEST)
    return next((m.start() for m in _SAID.finditer(text) if m.start() < end <= m.end()), end)


async def _correct(text: bytes, cached: Callable[[], Awaitable[int | None]]) -> bytes:
    if _NAME not in text or not _SAID.search(text):
        return text
    tokens = await cached()
    if tokens is None:
        return text

    def right(match: re.Match[bytes]) -> bytes:
        digits = match[2]
        return match[1] + str(min(tokens, int(digits))).encode().rjust(len(digits))

    return _SAID.sub(right, text)
