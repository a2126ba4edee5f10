"""How a request of each API is split between a prefill and a decode engine: which requests can be,
and how a prefill engine is asked for the same prompt and one token that nobody looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

_NO: Final = (b"false", b"null")
_ONE: Final = (b"1", b"null")
_NONE: Final = (b"null",)

# They restrict what is sampled, and a grammar takes seconds to compile. They are no part of the
# prompt: vLLM's chat templates are given tools and `tool_choice`, which therefore stay.
_GRAMMARS: Final = ("response_format", "structured_outputs")


@dataclass(frozen=True, slots=True)
class Split:
    """One API.

    Attributes:
        only_if: values with which a request is one prompt, with one answer, of tokens that both
            engines count alike; a field that is absent is as good.
        prefill: what a prefill engine gets instead, as JSON.
        left_out: what it does not get.
        left_out_within: of a field that is an object, the one in it that it does not get.
        prefill_told: more of its ``kv_transfer_params``.
        decode_told: more of those of the decode engine.
    """

    only_if: Mapping[str, tuple[bytes, ...]]
    prefill: Mapping[str, bytes]
    left_out: tuple[str, ...]
    left_out_within: Mapping[str, str] = field(default_factory=dict)
    prefill_told: Mapping[str, object] = field(default_factory=dict)
    decode_told: Mapping[str, object] = field(default_factory=dict)


_OPENAI = Split(
    only_if={
        "n": _ONE,
        "best_of": _ONE,
        "use_beam_search": _NO,
        "prompt_embeds": _NONE,
        # The decode engine has to compute the whole prompt for its probabilities.
        "prompt_logprobs": _NONE,
        "echo": _NO,
        # May depend on max_tokens, which the prefill engine is not given.
        "truncate_prompt_tokens": _NONE,
    },
    prefill={"stream": b"false", "max_tokens": b"1"},
    left_out=(
        "stream_options",
        "min_tokens",
        "n",
        "best_of",
        "logprobs",
        "top_logprobs",
        "logprob_token_ids",
        "return_token_ids",
        "return_prompt_text",
        *_GRAMMARS,
    ),
)

SPLITS: Final[Mapping[str, Split]] = {
    "/v1/completions": _OPENAI,
    "/v1/chat/completions": Split(
        _OPENAI.only_if,
        {**_OPENAI.prefill, "max_completion_tokens": b"1"},
        _OPENAI.left_out,
    ),
    "/v1/responses": Split(
        only_if={
            # What was said before is in one decode engine.
            "previous_response_id": _NONE,
            "conversation": _NONE,
            "background": _NO,
            # Anything else depends on max_output_tokens.
            "truncation": (b'"disabled"',),
        },
        prefill={"stream": b"false", "store": b"false", "max_output_tokens": b"1"},
        # `text` says how the answer is to look: its `format` is a grammar.
        left_out=("background", "include", "top_logprobs", "text", *_GRAMMARS),
    ),
    "/v1/messages": Split(
        only_if={},
        prefill={"stream": b"false", "max_tokens": b"1"},
        left_out=(),
        # A grammar, too; `effort` beside it is shown to the model.
        left_out_within={"output_config": "format"},
        # vLLM's word for a prefill's part, which may have a budget of thinking above max_tokens.
        prefill_told={"do_remote_decode": True},
        # Its answers say how many tokens were cached and how many were not, from the first event
        # on. The proxy cannot put both right; vLLM does, and knows nothing better than none.
        decode_told={"do_remote_prefill": True, "remote_prefill_cached_tokens": 0},
    ),
}
"""By path. All that is asked elsewhere goes to a decode engine as it came."""
