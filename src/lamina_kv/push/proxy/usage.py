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

_LONGEST = 1024
"""Bytes that the numbers of cached tokens take at most, and what stands between them: some hundred
turns of a response."""
_SAID = re.compile(
    rb'(?<!\\)("cached_tokens":\s*)(\d+)(?![\d.eE])'
    rb'(?:([^{}\\]{0,%d}?"cached_tokens_per_turn":\s*\[\s*)(\d+)(?![\d.eE]))?' % _LONGEST
)
"""Keys of JSON, never text inside a string: there the closing quote would be escaped. Responses say
it again for each turn between the model and its tools, of which the first alone is pushed."""
_NAME = b'"cached_tokens"'
_COUNTS = (b'"prompt_tokens"', b'"input_tokens"')
"""Of an answer that says how many tokens its prompt has, one or the other is in it."""


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
    input_tokens_per_turn: list[int] = []
    cached_tokens_per_turn: list[int] = []


class _Usage(msgspec.Struct):
    """Completions and chats, responses, and messages each have words of their own."""

    prompt_tokens: int | None = None
    input_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    output_tokens: int | None = None

    @property
    def details(self) -> _Details:
        """Of the prompt."""
        return self.prompt_tokens_details or self.input_tokens_details or _Details()

    @property
    def prompt(self) -> Usage | None:
        """What is said of the prompt, of a response of its first one."""
        details, read = self.details, self.cache_read_input_tokens
        if details.input_tokens_per_turn and details.cached_tokens_per_turn:
            return Usage(details.input_tokens_per_turn[0], details.cached_tokens_per_turn[0])
        if self.prompt_tokens is not None:
            return Usage(self.prompt_tokens, details.cached_tokens)
        if self.input_tokens is None:
            return None
        # A message's `input_tokens` are those that were neither read from a cache nor written.
        tokens = self.input_tokens + (read or 0) + (self.cache_creation_input_tokens or 0)
        return Usage(tokens, details.cached_tokens if read is None else read)


class _Part(msgspec.Struct):
    usage: _Usage | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Answer(_Part):
    """A whole one, or an event: those of responses and messages have the answer within."""

    response: _Part | None = None
    message: _Part | None = None


class _WholeAnswer(_Part):
    choices: list[_Choice] = []


_ANSWER = msgspec.json.Decoder(_Answer)
_WHOLE_ANSWER = msgspec.json.Decoder(_WholeAnswer)


def read_usage(body: bytes) -> Usage | None:
    """Of a whole answer, or of a piece of a stream; None if it says nothing.

    Args:
        body: JSON, or server-sent events.
    """
    if len(body) > MAX_BYTES or not _counts(body):
        return None
    if body.startswith((b"data:", b"event:")):
        lines = body.split(b"\n")
        events = (line[5:] for line in lines if line.startswith(b"data:") and _counts(line))
        body = next(events, b"")
    try:
        said = _ANSWER.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    parts = (said, said.response, said.message)
    usage = next((part.usage for part in parts if part is not None and part.usage), None)
    return None if usage is None else usage.prompt


def _counts(text: bytes) -> bool:
    return any(name in text for name in _COUNTS)


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
    return usage.details.cached_tokens or 0


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
        name, total, between, first = match.groups(b"")
        # Other turns than the first were not pushed.
        pushed = int(first or total)
        less = max(0, pushed - tokens)
        return b"".join(
            (name, _padded(int(total) - less, total), between, _padded(pushed - less, first))
        )

    return _SAID.sub(right, text)


def _padded(number: int, digits: bytes) -> bytes:
    """A number in place of a longer one; nothing in place of none."""
    return str(max(0, number)).encode().rjust(len(digits)) if digits else b""
