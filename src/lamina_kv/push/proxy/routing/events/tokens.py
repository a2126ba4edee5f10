"""Which tokens a prompt has: what it says itself, or what an engine says to ``/tokenize``."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Annotated, Protocol

import msgspec

from lamina_kv.push.proxy.requests import ApiRequest
from lamina_kv.push.proxy.routing.prompt import Prompt

WORTH = 512
"""Tokens of a prompt from which an engine is asked: for fewer the answer takes as long as it may
save."""
MAX_KNOWN = 1 << 20
"""Tokens of prompts that are remembered, for another try and for clients that repeat themselves:
some 40 MB."""
QUICK = 0.1
"""Seconds. An engine that refuses a question sooner costs little, and may answer the next one."""
PAUSE = 10.0
"""Seconds for which an engine is not asked that has kept a request waiting for nothing."""

_UNDERSTOOD = (b"/v1/completions", b"/v1/chat/completions")
"""Requests that ``/tokenize`` reads as the engine does."""
_FIELDS = (
    "model",
    "prompt",
    "messages",
    "tools",
    "add_special_tokens",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
)


class Tokenizer(Protocol):
    """An engine, as it is seen from here."""

    @property
    def load(self) -> int:
        """Tokens of the requests outstanding there."""

    async def tokenize(self, body: bytes) -> bytes | None:
        """What it answers to ``/tokenize``; None if it does not, or not soon."""


class _Tokenized(msgspec.Struct):
    tokens: list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]]


_TOKENIZED = msgspec.json.Decoder(_Tokenized)


class Tokens:
    """See the module.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: OrderedDict[int, tuple[int, ...]] = OrderedDict()
        self._size = 0
        self._paused: weakref.WeakKeyDictionary[Tokenizer, float] = weakref.WeakKeyDictionary()

    async def of(
        self, request: ApiRequest, prompt: Prompt, engines: Sequence[Tokenizer]
    ) -> tuple[int, ...]:
        """The tokens of a prompt; none if they are not known, say too little, or are not worth the
        question.

        Args:
            request: the client's.
            prompt: what was read of it.
            engines: one of them is asked.
        """
        path = request.target.partition(b"?")[0]
        if prompt.ids or not prompt.plain or prompt.tokens < WORTH or path not in _UNDERSTOOD:
            return prompt.ids
        if not prompt.marks or prompt.marks[-1].at < prompt.tokens:
            return ()  # so long that others may begin with the same marks
        name = prompt.marks[-1].digest
        if (known := self._known.get(name)) is not None:
            self._known.move_to_end(name)
            return known
        fields = {key: value for key, value in (request.fields or {}).items() if key in _FIELDS}
        answer = await self._ask(engines, msgspec.json.encode(fields))
        if answer is None:
            return ()
        try:
            tokens = tuple(_TOKENIZED.decode(answer).tokens)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return ()
        self._remember(name, tokens)
        return tokens

    async def _ask(self, engines: Sequence[Tokenizer], body: bytes) -> bytes | None:
        """What the engine answers that has least to do."""
        began = self._clock()
        awake = [engine for engine in engines if self._paused.get(engine, began) <= began]
        if not awake:
            return None
        engine = min(awake, key=lambda engine: engine.load)
        answer = await engine.tokenize(body)
        if answer is None and (now := self._clock()) - began >= QUICK:
            self._paused[engine] = now + PAUSE
        return answer

    def _remember(self, name: int, tokens: tuple[int, ...]) -> None:
        self._size += len(tokens) - len(self._known.pop(name, ()))
        self._known[name] = tokens
        while self._size > MAX_KNOWN:
            _, gone = self._known.popitem(last=False)
            self._size -= len(gone)
