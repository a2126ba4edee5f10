"""Guards what routing knows of a prompt: how long it is, which other ones begin alike, and which
engine is believed to hold how much of it."""

from __future__ import annotations

import json
import random
import string
import time
import tracemalloc

import pytest

from lamina_kv.push.proxy.requests import ApiRequest, parse_fields
from lamina_kv.push.proxy.routing import prompt as prompts
from lamina_kv.push.proxy.routing.prefixes import MAX_AGE, MAX_MARKS, PrefixCache
from lamina_kv.push.proxy.routing.prompt import (
    BLOCK,
    MAX_ID_BYTES,
    MAX_IDS,
    MAX_PIECES,
    PART_TOKENS,
    Mark,
    Prompt,
    read_prompt,
    session_digest,
)
from lamina_kv.push.proxy.routing.prompt import MAX_MARKS as MAX_PROMPT_MARKS
from push_proxy.pools import Clock, chat, completion, request

SYSTEM = "You are careful. " * 100
QUESTION = "What is the speed of light in glass, and why? " * 20
ANSWER = "Slower than in vacuum, because the field makes electrons move. " * 30
MORE = "And in water? " * 10


def read(asked: ApiRequest, bytes_per_token: float = 4.0) -> Prompt:
    return read_prompt(asked, lambda _: bytes_per_token)


def cache_of(*prompts: Prompt, capacity: int | None = None) -> PrefixCache:
    cache = PrefixCache(Clock())
    cache.capacity = capacity
    for prompt in prompts:
        cache.add(prompt.marks)
    return cache


def text(length: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(string.ascii_letters, k=length))


@pytest.mark.parametrize("length", [1, 255, 256, 257, 1024, 100_000])
def test_text_has_as_many_tokens_as_its_bytes_say(length: int) -> None:
    prompt = read(completion(text(length)))
    assert prompt.tokens == round(length / 4)
    assert prompt.text == length
    assert read(completion(text(length)), 2.0).tokens == round(length / 2)


def test_tokens_are_counted() -> None:
    prompt = read(completion([7] * 1000))
    assert (prompt.tokens, prompt.text) == (1000, 0)
    assert read(completion([[7] * 1000])) == prompt
    assert read(completion([text(900)])) == read(completion(text(900)))


def test_a_picture_is_no_text() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10**6}}
    words = {"type": "text", "text": "What is this?"}
    prompt = read(chat(("user", [words, picture])))
    assert PART_TOKENS < prompt.tokens < PART_TOKENS + 10
    other = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "B" * 10**6}}
    assert prompt.marks[-1] != read(chat(("user", [words, other]))).marks[-1]


@pytest.mark.parametrize("ids", [False, True])
def test_what_begins_alike_is_found(ids: bool) -> None:
    rng = random.Random(3)
    common = [rng.randrange(1000) for _ in range(1000)]
    first, second = (
        read(completion([*common, *tail] if ids else "".join(map(chr, (*common, *tail)))))
        for tail in ([1] * 500, [2] * 300)
    )
    cache = cache_of(first)
    shared = 1000 if ids else len("".join(map(chr, common)).encode()) / 4
    assert shared - BLOCK <= cache.hit(second.marks, answers=False) <= shared
    assert cache.hit(first.marks, answers=False) == first.tokens
    assert cache.hit(read(completion("else" * 1000)).marks, answers=False) == 0


def test_what_is_learnt_of_tokens_makes_no_prefix_another_one() -> None:
    cache = cache_of(read(completion(text(5000)), 4.0))
    again = read(completion(text(5000)), 3.3)
    assert cache.hit(again.marks, answers=False) == again.tokens


@pytest.mark.parametrize(
    "other", [{"model": "n"}, {"cache_salt": "s"}, {"chat_template": "x"}, {"tools": [{"a": 1}]}]
)
def test_what_changes_every_token_is_part_of_every_prefix(other: dict[str, object]) -> None:
    first = read(chat(("system", SYSTEM), ("user", QUESTION)))
    second = read(chat(("system", SYSTEM), ("user", QUESTION), **other))
    assert cache_of(first).hit(second.marks, answers=True) == 0


def test_sampling_changes_nothing() -> None:
    first = read(chat(("user", QUESTION), temperature=0.5, max_tokens=9))
    assert read(chat(("user", QUESTION), seed=4)).marks == first.marks


def test_the_next_turn_finds_the_answer_where_it_was_given() -> None:
    turns = [("system", SYSTEM), ("user", QUESTION)]
    first = read(chat(*turns))
    second = read(chat(*turns, ("assistant", ANSWER), ("user", MORE)))
    cache = cache_of(first)
    assert cache.hit(second.marks, answers=False) == first.tokens
    with_answer = cache.hit(second.marks, answers=True)
    assert with_answer == pytest.approx(first.tokens + len(ANSWER) / 4, abs=1)
    cache.add(second.marks)
    third = read(
        chat(*turns, ("assistant", ANSWER), ("user", MORE), ("assistant", ANSWER), ("user", MORE))
    )
    hit = cache.hit(third.marks, answers=True)
    assert hit == pytest.approx(second.tokens + len(ANSWER) / 4, abs=1)


def test_another_turn_is_not_found_behind_an_answer_to_something_else() -> None:
    cache = cache_of(read(chat(("user", QUESTION))))
    other = read(chat(("user", QUESTION + "?"), ("assistant", ANSWER), ("user", MORE)))
    assert cache.hit(other.marks, answers=True) <= len(QUESTION) // 4


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": None},
        {"prompt": 3},
        {"prompt": ["a", "b"]},
        {"prompt": [10**40]},
        {"prompt": [[1], [2]]},
        {"messages": "hello"},
        {"messages": [3]},
        {"messages": [{}]},
        {"messages": [{"role": 5, "content": {"text": 4}}]},
        {"messages": [{"role": "user", "content": [1, None, {"text": {}}, {"type": "x"}]}]},
        {"model": 4, "user": 5, "max_tokens": "many", "prompt": "x"},
        {"max_tokens": -4, "prompt": ""},
    ],
)
def test_a_request_that_makes_no_sense_is_read_all_the_same(body: object) -> None:
    raw = json.dumps(body).encode()
    prompt = read(ApiRequest("id", "POST", b"/v1/completions", {}, parse_fields(raw)))
    assert prompt.tokens >= 0
    assert prompt.answer >= 0


def quickly_read(asked: ApiRequest) -> Prompt:
    """A prompt that must not keep the event loop, nor take much memory."""
    tracemalloc.start()
    began = time.process_time()
    prompt = read(asked)
    took = time.process_time() - began
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 5, "with every allocation traced"
    assert most < 8 * asked.size
    assert len(prompt.marks) <= MAX_PROMPT_MARKS + 1
    return prompt


MEGABYTES = 12 << 20


@pytest.mark.parametrize(
    ("element", "field"),
    [
        (b'{"role":"assistant"}', b"messages"),
        (b"1", b"messages"),
        (b'"a"', b"prompt"),
        (b"[]", b"prompt"),
        (b"7", b"prompt"),
        (b"100000", b"prompt"),
        (b'{"role":"user","content":[' + b"1," * 5000 + b"1]}", b"messages"),
        (b'{"role":"user",' + b'"a":1,' * 5000 + b'"b":1}', b"messages"),
        (b'{"role":"user","content":[' + b'"%s",' % (b"a" * 100) * 5000 + b"1]}", b"messages"),
        (b'{"role":"assistant","content":"' + b"a" * 2000 + b'"}', b"messages"),
    ],
)
def test_no_prompt_keeps_the_event_loop(element: bytes, field: bytes) -> None:
    many = b",".join([element] * (MEGABYTES // (len(element) + 1)))
    body = b'{"%s":[%s]}' % (field, many)
    asked = ApiRequest("id", "POST", b"/v1/x", {}, parse_fields(body), len(body))
    prompt = quickly_read(asked)
    assert prompt.tokens >= MEGABYTES // 8


def test_of_many_messages_the_first_are_looked_at() -> None:
    turns = [("assistant" if n % 2 else "user", f"{n}") for n in range(MAX_PIECES)]
    first = read(chat(*turns, ("user", "one")))
    second = read(chat(*turns, ("user", "another one")))
    assert len(first.marks) <= MAX_PROMPT_MARKS
    assert first.marks == second.marks
    assert first.tokens > first.marks[-1].at
    assert cache_of(first).hit(second.marks, answers=False) == first.marks[-1].at


def test_tokens_are_kept_if_somebody_needs_them() -> None:
    asked = completion([7] * 1000)
    assert read(asked).ids == ()
    assert read_prompt(asked, lambda _: 4.0, ids=True).ids == (7,) * 1000
    salted = completion([7] * 1000, cache_salt="s")
    assert read_prompt(salted, lambda _: 4.0, ids=True).ids == ()
    unsalted = completion([7] * 1000, cache_salt=None)
    assert len(read_prompt(unsalted, lambda _: 4.0, ids=True).ids) == 1000


def test_of_many_tokens_the_last_are_counted() -> None:
    length = MAX_ID_BYTES // 2
    for more in (0, 1, 1000):
        asked = completion([7] * (length + more))
        assert read(asked).tokens == length + more
        assert len(read_prompt(asked, lambda _: 4.0, ids=True).ids) == MAX_IDS


def test_ids_that_are_not_read_are_counted_and_have_no_mark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompts, "MAX_ID_BYTES", 1000)
    prompt = read(completion([7] * 1000))
    assert prompt.tokens == 1000
    assert 0 < prompt.marks[-1].at <= 500


def test_who_asks() -> None:
    assert read(completion("x", user="ann")).session == session_digest("ann")
    assert read(completion("x", user="ann", session_id="s")).session == session_digest("s")
    assert read(completion("x", prompt_cache_key="k", user="ann")).session == session_digest("k")
    asked = request({"prompt": "x", "user": "ann"}, **{"x-session-id": "h"})
    assert read(asked).session == session_digest("h")
    assert not read(completion("x")).session


def test_a_name_of_megabytes_is_not_kept() -> None:
    first, second = (read(completion("x", user="n" * 5_000_000 + end)) for end in "ab")
    assert len(first.session) == 16
    assert first.session != second.session


def test_a_cache_forgets_what_was_not_used_for_longest_and_ends_first() -> None:
    old, new = (read(completion([n] * 10 * BLOCK)) for n in (1, 2))
    cache = cache_of(old, new, capacity=15 * BLOCK)
    assert cache.hit(new.marks, answers=False) == new.tokens
    assert cache.hit(old.marks, answers=False) == 5 * BLOCK
    cache.add(old.marks)
    assert cache.hit(old.marks, answers=False) == old.tokens
    assert cache.hit(new.marks, answers=False) == 5 * BLOCK
    assert cache.tokens <= 15 * BLOCK


def test_a_cache_is_bounded_and_ages() -> None:
    clock = Clock()
    cache = PrefixCache(clock)
    for prompt in range(0, 2 * MAX_MARKS, 1000):
        cache.add([Mark(prompt + n, n, n) for n in range(1, 1001)])
    assert len(cache) == MAX_MARKS
    last = [Mark(2 * MAX_MARKS - 1000 + n, n, n) for n in range(1, 1001)]
    assert cache.hit(last, answers=False) == 1000
    clock.now += MAX_AGE + 1
    assert cache.hit(last, answers=False) == 0
    cache.add(last[:1])
    assert len(cache) == 1
