"""Guards the bodies that the proxy sends: what is a single prompt, what a prefill engine gets of a
request, and that values which are none of the proxy's business stay as they were written."""

from __future__ import annotations

import json

import pytest

from lamina_kv.push.proxy.errors import Refusal
from lamina_kv.push.proxy.requests import ApiRequest, harmless, parse_fields


def request(body: str | dict[str, object], path: bytes = b"/v1/completions") -> ApiRequest:
    text = (body if isinstance(body, str) else json.dumps(body)).encode()
    return ApiRequest("id", "POST", path, {}, parse_fields(text), len(text))


@pytest.mark.parametrize(
    "prompt", ["text", [1, 2, 3], ["one text"], [[1, 2]], [], "[1, [2]]", None]
)
def test_one_prompt_is_pushed(prompt: object) -> None:
    assert request({"prompt": prompt}).pushable


@pytest.mark.parametrize("prompt", ['["a","b"]', "[ [1], [2] ]", '[\n"a", "b"]', "[[1],[2],[3]]"])
def test_several_prompts_are_not(prompt: str) -> None:
    assert not request(f'{{"prompt": {prompt}}}').pushable


@pytest.mark.parametrize(
    ("field", "yes", "no"),
    [
        ("n", 1, 2),
        ("best_of", None, 3),
        ("use_beam_search", False, True),
        ("prompt_embeds", None, "AAAA"),
        ("prompt_logprobs", None, 0),
        ("echo", False, True),
        ("truncate_prompt_tokens", None, -1),
    ],
)
def test_what_makes_a_request_one_for_a_decode_engine_alone(
    field: str, yes: object, no: object
) -> None:
    assert request({"prompt": "a", field: yes}).pushable
    assert not request({"prompt": "a", field: no}).pushable


def test_a_request_without_a_body_is_not_pushed() -> None:
    assert not ApiRequest("id", "GET", b"/v1/models", {}).pushable
    assert ApiRequest("id", "GET", b"/v1/models", {}).for_decode() == b""


def test_a_prefill_engine_is_asked_for_one_token_and_nothing_about_it() -> None:
    asked = {
        "prompt": [5, 6],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 500,
        "min_tokens": 20,
        "n": 1,
        "logprobs": 3,
        "temperature": 0.7,
        "cache_salt": "pepper",
        "kv_transfer_params": {"own": 1},
    }
    assert json.loads(request(asked).for_prefill("abc")) == {
        "prompt": [5, 6],
        "stream": False,
        "max_tokens": 1,
        "temperature": 0.7,
        "cache_salt": "pepper",
        "kv_transfer_params": {"lamina_push": {"id": "abc"}},
    }


def test_a_prefill_engine_is_asked_the_same_of_a_chat() -> None:
    chat = {
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "max_completion_tokens": 500,
        "logprobs": True,
        "top_logprobs": 5,
    }
    assert json.loads(request(chat, b"/v1/chat/completions").for_prefill("abc")) == {
        "messages": chat["messages"],
        "tools": chat["tools"],
        "stream": False,
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "kv_transfer_params": {"lamina_push": {"id": "abc"}},
    }


def test_a_prefill_engine_is_asked_the_same_of_a_response() -> None:
    asked = request(
        {
            "input": "Hi",
            "stream": True,
            "max_output_tokens": 500,
            "background": False,
            "text": {"format": {"type": "json_object"}},
        },
        b"/v1/responses?a=b",
    )
    assert asked.pushable
    assert json.loads(asked.for_prefill("abc")) == {
        "input": "Hi",
        "stream": False,
        "store": False,
        "max_output_tokens": 1,
        "kv_transfer_params": {"lamina_push": {"id": "abc"}},
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("background", True),
        ("truncation", "auto"),
        ("truncation", None),
    ],
)
def test_what_a_response_depends_on_beyond_its_request(field: str, value: object) -> None:
    assert not request({"input": "Hi", field: value}, b"/v1/responses").pushable


def test_both_engines_are_asked_for_a_message() -> None:
    """Whose usage vLLM has to put right, and whose thinking may be longer than one token."""
    asked = request(
        {
            "messages": [],
            "max_tokens": 500,
            "thinking": {"type": "enabled", "budget_tokens": 400},
            "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {}}},
            "kv_transfer_params": {"lamina": {"keep": False}},
        },
        b"/v1/messages",
    )
    told, prefill = (json.loads(b) for b in (asked.for_decode("a", "h:1"), asked.for_prefill("a")))
    assert told["max_tokens"] == 500
    assert told["kv_transfer_params"] == {
        "lamina": {"keep": False},
        "do_remote_prefill": True,
        "remote_prefill_cached_tokens": 0,
        "lamina_push": {"id": "a", "prefill": "h:1"},
    }
    assert prefill["max_tokens"] == 1
    assert prefill["thinking"] == {"type": "enabled", "budget_tokens": 400}
    assert prefill["output_config"] == {"effort": "low"}, "no grammar, and the same prompt"
    assert told["output_config"]["format"] == {"type": "json_schema", "schema": {}}
    assert prefill["kv_transfer_params"] == {
        "lamina": {"keep": False},
        "do_remote_decode": True,
        "lamina_push": {"id": "a"},
    }
    assert json.loads(asked.for_decode())["kv_transfer_params"] == {"lamina": {"keep": False}}


@pytest.mark.parametrize("config", [None, "text", {}, {"effort": "low"}])
def test_a_message_whose_output_is_not_restricted_stays_as_it_is(config: object) -> None:
    asked = request({"messages": [], "output_config": config}, b"/v1/messages")
    assert json.loads(asked.for_prefill("a"))["output_config"] == config


def test_nothing_else_is_split() -> None:
    for method, path in (("POST", b"/v1/embeddings"), ("PATCH", b"/v1/completions")):
        assert not ApiRequest("id", method, path, {}, parse_fields(b"{}")).pushable
    assert ApiRequest("id", "POST", b"/v1/%63ompletions", {}, parse_fields(b"{}")).pushable


@pytest.mark.parametrize(
    ("own", "passed"),
    [
        (
            {"lamina": {"keep": False}, "lamina_push": {"id": "x", "prefill": "evil:1"}, "a": 1},
            True,
        ),
        ({"remote_host": "evil"}, False),
        ("lamina", False),
        (["lamina"], False),
        (None, False),
    ],
)
def test_of_a_clients_own_parameters_what_can_do_no_harm_is_passed_on(
    own: object, passed: bool
) -> None:
    asked = request({"prompt": "Once", "kv_transfer_params": own})
    regard = {"lamina": {"keep": False}} if passed else {}
    push = {"id": "abc", "prefill": "host:1"}
    for body, wanted in (
        (asked.for_prefill("abc"), {"lamina_push": {"id": "abc"}, **regard}),
        (asked.for_decode("abc", "host:1"), {"lamina_push": push, **regard}),
        (asked.for_decode(), regard),
    ):
        assert json.loads(body).get("kv_transfer_params", {}) == wanted


@pytest.mark.parametrize("own", [b'{"\xff": 1}', b'{"lamina": 1, "\xed\xa0\x80": 1}'])
def test_parameters_of_transfers_that_cannot_be_read_are_left_out(own: bytes) -> None:
    body = b'{"prompt": "Once", "kv_transfer_params": %s}' % own
    asked = ApiRequest("id", "POST", b"/v1/completions", {}, parse_fields(body), len(body))
    assert json.loads(asked.for_decode()) == {"prompt": "Once"}
    told = json.loads(asked.for_prefill("abc"))
    assert told["kv_transfer_params"] == {"lamina_push": {"id": "abc"}}


@pytest.mark.parametrize(
    "body",
    [
        b'{"sampling_params": {"%s": 1, "extra_args": {"kv_transfer_params": {}}}}',
        b'{"sampling_params": {"extra_args": {"%s": 1, "kv_transfer_params": {}}}}',
        b'{"%s": 1, "kv_transfer_params": {}}',
    ],
)
@pytest.mark.parametrize("name", [b"\xff", b"\xed\xa0\x80"])
def test_what_may_hide_behind_a_name_that_is_no_text_is_refused(body: bytes, name: bytes) -> None:
    """Python's own parser takes half a surrogate pair, and an engine would find what follows."""
    with pytest.raises(Refusal, match="not JSON") as refused:
        harmless(body % name, "application/json")
    assert refused.value.status == 400


def test_values_reach_the_decode_engine_as_they_were_written() -> None:
    values = (
        '"seed": 123456789012345678901234567890',
        '"temperature": 0.10000000000000000555',
        '"top_p": 1E-0',
        '"prompt": "\\ud83d\\ude00 \u00fc \\u0041"',
        '"stop": [ "a" ,\t{"deep" : [1.50]} ]',
    )
    sent = request("{" + ",\n".join(values) + "}").for_decode("abc", "host:1").decode()
    for value in values:
        name, _, written = value.partition(": ")
        assert f"{name}:{written}" in sent
    push = json.loads(sent)["kv_transfer_params"]
    assert push == {"lamina_push": {"id": "abc", "prefill": "host:1"}}


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'{"a":}', b'{"\xff": 1}', b'{"a": 1}{'])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(Refusal, match="not a JSON object") as refused:
        parse_fields(body)
    assert refused.value.status == 400
