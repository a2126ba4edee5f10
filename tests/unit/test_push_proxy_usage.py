"""Guards the number of cached tokens in answers: it is put right wherever the answer is cut into
pieces, nothing else changes, and no answer changes its length."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable

import pytest

from lamina_kv.push.proxy.usage import cached_by, corrected

USAGE = {"prompt_tokens": 1000, "prompt_tokens_details": {"cached_tokens": 999}, "total": 1001}
ANSWER = json.dumps({"choices": [{"text": 'say "cached_tokens": 12'}], "usage": USAGE}).encode()


def correct(pieces: Iterable[bytes], cached: int | None, *, events: bool = False) -> list[bytes]:
    async def given() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def tokens() -> int | None:
        return cached

    async def collect() -> list[bytes]:
        return [piece async for piece in corrected(given(), tokens, events=events)]

    return asyncio.run(collect())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
@pytest.mark.parametrize("space", ["", " "])
def test_it_is_put_right_however_the_answer_is_cut(size: int, space: str) -> None:
    answer = ANSWER.replace(b": ", b":" + space.encode())
    pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
    got = b"".join(correct(pieces, 64))
    assert len(got) == len(answer)
    assert json.loads(got)["usage"]["prompt_tokens_details"] == {"cached_tokens": 64}
    assert json.loads(got)["choices"] == json.loads(answer)["choices"]


def test_it_may_be_the_last_thing_that_is_said() -> None:
    assert correct([b'{"cached_tokens": 999', b"}"], 7) == [b'{"cached_tokens":   7}']


def test_more_than_the_engine_found_is_never_said() -> None:
    assert json.loads(b"".join(correct([ANSWER], 5000)))["usage"] == USAGE


def test_what_the_decode_engine_knows_itself_stays() -> None:
    assert b"".join(correct([ANSWER], None)) == ANSWER


@pytest.mark.parametrize(
    "text",
    [
        rb'{"text": "\"cached_tokens\": 12"}',
        b'{"top_logprobs": {"cached_tokens": 0.0, "cached_tokens": -1.5, "cached_tokens": 1e-3}}',
        b'{"cached_tokens": null}',
        b'{"uncached_tokens": 5}',
        b"",
    ],
)
def test_nothing_else_is_touched(text: bytes) -> None:
    assert b"".join(correct([text], 0)) == text


def test_events_are_not_held_back() -> None:
    events = [b'data: {"usage": {"cached_tokens": 10}}\n\n', b"data: [DONE]\n\n"]
    assert correct(events, 3, events=True) == [
        b'data: {"usage": {"cached_tokens":  3}}\n\n',
        b"data: [DONE]\n\n",
    ]


@pytest.mark.parametrize(
    ("answer", "cached"),
    [
        (b'{"usage": {"prompt_tokens_details": {"cached_tokens": 12}}}', 12),
        (b'{"usage": {"prompt_tokens_details": {"cached_tokens": null}}}', 0),
        (b'{"choices": [{"finish_reason": "length"}], "usage": null}', 0),
        (b'{"output": [], "usage": {"input_tokens_details": {"cached_tokens": 12}}}', 12),
        (b'{"choices": [{"finish_reason": "abort"}], "usage": null}', None),
        (b'{"usage": {"input_tokens_details": {"cached_tokens": 12}, "output_tokens": 0}}', None),
        (b'{"usage": {"input_tokens_details": {"cached_tokens": 12}, "output_tokens": 1}}', 12),
        (b"no json", 0),
        (b"\xff", 0),
    ],
)
def test_what_a_prefill_engine_says_it_had(answer: bytes, cached: int | None) -> None:
    assert cached_by(answer) == cached
