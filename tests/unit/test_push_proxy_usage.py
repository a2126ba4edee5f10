"""Guards the number of cached tokens in answers: it is put right wherever the answer is cut into
pieces, nothing else changes, and no answer changes its length."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable

import pytest

from lamina_kv.push.proxy.usage import Usage, cached_by, corrected, read_usage

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


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 10_000])
@pytest.mark.parametrize(("turns", "right"), [([999], [64]), ([999, 2, 1050, 5], [64, 2, 1050, 5])])
def test_of_a_response_the_first_turn_is_put_right(
    size: int, turns: list[int], right: list[int]
) -> None:
    def answer(cached: list[int]) -> bytes:
        details = {
            "cached_tokens": sum(cached),
            "cache_write_tokens": 0,
            "input_tokens_per_turn": [1000] * len(cached),
            "cached_tokens_per_turn": cached,
        }
        usage = {"input_tokens": 1000 * len(cached), "input_tokens_details": details}
        return json.dumps({"output": ["x" * 2000], "usage": usage}).encode()

    said = answer(turns)
    pieces = [said[at : at + size] for at in range(0, len(said), size)]
    got = b"".join(correct(pieces, 64))
    assert len(got) == len(said)
    assert json.loads(got) == json.loads(answer(right))


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


def details(**more: object) -> dict[str, object]:
    return {"cached_tokens": 30, "cache_write_tokens": 0, **more}


TURNS = {"input_tokens_per_turn": [100, 150], "cached_tokens_per_turn": [30, 120]}


@pytest.mark.parametrize(
    ("usage", "right"),
    [
        ({"prompt_tokens": 100}, Usage(100, None)),
        ({"prompt_tokens": 100, "prompt_tokens_details": None}, Usage(100, None)),
        ({"prompt_tokens": 100, "prompt_tokens_details": details()}, Usage(100, 30)),
        ({"input_tokens": 100, "input_tokens_details": details()}, Usage(100, 30)),
        ({"input_tokens": 250, "input_tokens_details": details(**TURNS)}, Usage(100, 30)),
        ({"input_tokens": 100}, Usage(100, None)),
        ({"input_tokens": 60, "cache_read_input_tokens": 30}, Usage(90, 30)),
        (
            {
                "input_tokens": 60,
                "cache_read_input_tokens": 30,
                "cache_creation_input_tokens": 10,
            },
            Usage(100, 30),
        ),
        ({"output_tokens": 5}, None),
        ({"prompt_tokens": "many"}, None),
    ],
)
@pytest.mark.parametrize("within", ["", "response", "message"])
def test_what_an_engine_says_of_a_prompt(
    usage: dict[str, object], right: Usage | None, within: str
) -> None:
    answer: dict[str, object] = {"usage": usage}
    if within:
        answer = {"type": "x", within: answer}
    body = json.dumps(answer).encode()
    assert read_usage(body) == right
    event = b"data: " + body + b"\n\n"
    for piece in (
        event,
        b"event: response.completed\n" + event,
        b'data: {"choices": []}\n\n' + event + b"data: [DONE]\n\n",
    ):
        assert read_usage(piece) == right


def test_what_says_nothing_of_a_prompt() -> None:
    texts = (b"", b'{"usage": null}', b'{"text": "\\"prompt_tokens\\": 5"}', b"data: [DONE]\n\n")
    assert [read_usage(text) for text in texts] == [None] * 4
