"""Which tokens a prompt has: what it says itself, or what an engine says to ``/tokenize``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec

from lamina_kv.push.proxy.requests import ApiRequest
from lamina_kv.push.proxy.routing.prompt import Prompt

WORTH = 512
"""Tokens of a prompt from which an engine is asked: for fewer the answer takes as long as it may
save."""
MAX_KNOWN = 512
"""Prompts whose tokens are remembered, for another try and for clients that repeat themselves."""

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

Asks = Callable[[bytes], Awaitable[bytes | None]]
"""Posts a body to some engine's ``/tokenize``; None if there is no answer."""


class _Tokenized(msgspec.Struct):
    tokens: list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]]


_TOKENIZED = msgspec.json.Decoder(_Tokenized)


class Tokens:
    """See the module."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, tuple[int, ...]] = OrderedDict()

    async def of(self, request: ApiRequest, prompt: Prompt, ask: Asks) -> tuple[int, ...]:
        """The tokens of a prompt; none if they are not known, or not worth the question.

        Args:
            request: the client's.
            prompt: what was read of it.
            ask: whom to ask.
        """
        path = request.target.partition(b"?")[0]
        if prompt.ids or prompt.parts or prompt.tokens < WORTH or path not in _UNDERSTOOD:
            return prompt.ids
        if not prompt.marks or prompt.marks[-1].at < prompt.tokens:
            return ()  # so long that others may begin with the same marks
        name = prompt.marks[-1].digest
        if name not in self._known:
            fields = {key: value for key, value in (request.fields or {}).items() if key in _FIELDS}
            answer = await ask(msgspec.json.encode(fields))
            if answer is None:
                return ()
            try:
                self._known[name] = tuple(_TOKENIZED.decode(answer).tokens)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                return ()
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        self._known.move_to_end(name)
        return self._known[name]
