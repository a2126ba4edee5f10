"""Guards the API that clients use: whatever an engine serves is passed on as it came, headers pass
both ways, nobody compiles a grammar for nothing, each request has its line in the access log."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
from collections.abc import Iterator

import httpx
import pytest

from push_proxy.engines import EVENTS, Call, FakeEngine, obey, says
from push_proxy.proxies import CHAT, COMPLETION, Proxy, proxied
from push_proxy.running import PATIENCE, until

ACCESS = "lamina_kv.push.proxy.access"


@pytest.fixture
def proxy(shared_proxy: Proxy, prefill: FakeEngine, decode: FakeEngine) -> Iterator[Proxy]:
    decode.script = echo
    yield shared_proxy
    until(lambda: shared_proxy.metric("engine_load") == 0)


async def echo(call: Call) -> None:
    """Answers with nothing but that it was asked."""
    await call.answer(200, {"asked": call.target})


# -- what is passed on -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/messages/count_tokens"),
        ("POST", "/inference/v1/generate"),
        ("POST", "/tokenize"),
        ("POST", "/v2/rerank"),
        ("PUT", "/something/new?a=b%20c"),
        ("PATCH", "/v1/completions"),
        ("DELETE", "/v1/responses/resp_1"),
    ],
)
def test_what_is_not_to_be_split_goes_to_a_decode_engine_as_it_came(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine, method: str, path: str
) -> None:
    before = proxy.metric("unpushed_total")
    body = b'{ "input":\t"Hi",  "temperature": 0.10000000000000000555 }'
    headers = {"content-type": "application/json; charset=utf-8"}
    answer = proxy.client.request(method, path, content=body, headers=headers)
    assert (answer.status_code, answer.json()) == (200, {"asked": path})
    (call,) = decode.calls
    assert (call.method, call.target, call.raw) == (method, path, body)
    assert call.headers["content-type"] == headers["content-type"]
    assert not prefill.calls
    assert proxy.metric("unpushed_total") == before


def test_a_form_with_a_file_is_not_touched(proxy: Proxy, decode: FakeEngine) -> None:
    sound = bytes(range(256)) * 64
    files = {"file": ("a.wav", sound, "audio/wav")}
    data = {"model": "model", "vllm_xargs": '{"kv_transfer_params": 1}'}
    sent = proxy.client.build_request("POST", "/v1/audio/transcriptions", data=data, files=files)
    body = sent.read()
    assert proxy.client.send(sent).is_success
    (call,) = decode.calls
    assert call.raw == body
    assert sound in body
    assert call.headers["content-type"] == sent.headers["content-type"]


@pytest.mark.parametrize("body", [b"", b"[1, 2]", b'"text"', b"null", b'{"a": 1}'])
def test_json_of_any_kind_is_passed_on(proxy: Proxy, decode: FakeEngine, body: bytes) -> None:
    assert proxy.client.post("/pooling", content=body).is_success
    assert decode.calls[0].raw == body


@pytest.mark.parametrize(
    "smuggled",
    [
        {"kv_transfer_params": {"lamina_push": {"id": "x", "prefill": "elsewhere:1"}}},
        {"ec_transfer_params": {"peer": "elsewhere:1"}},
        {
            "sampling_params": {
                "temperature": 0.5,
                "extra_args": {"kv_transfer_params": {"host": "elsewhere"}, "mine": 1},
            }
        },
    ],
)
@pytest.mark.parametrize("media_type", ["application/json", "", "application/x+json", "text/plain"])
def test_what_a_client_says_of_transfers_is_left_out_everywhere(
    proxy: Proxy, decode: FakeEngine, smuggled: dict[str, object], media_type: str
) -> None:
    body = json.dumps({"input": "Hi", **smuggled})
    # A name may be written in many ways.
    escaped = body.replace("kv_transfer", "kv\\u005ftransfer").encode()
    headers = {"content-type": media_type} if media_type else {}
    assert proxy.client.post("/inference/v1/generate", content=escaped, headers=headers).is_success
    (call,) = decode.calls
    assert b"elsewhere" not in call.raw
    assert call.body["input"] == "Hi"
    if "sampling_params" in smuggled:
        assert call.body["sampling_params"] == {"temperature": 0.5, "extra_args": {"mine": 1}}


@pytest.mark.parametrize("path", ["/v1/completions", "/inference/v1/generate"])
def test_parameters_that_are_no_text_end_in_no_failure(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine, path: str
) -> None:
    hidden = b'{"\xff": 1, "lamina_push": {"id": "x", "prefill": "elsewhere:1"}}'
    body = b'{"model": "model", "prompt": "a", "kv_transfer_params": %s}' % hidden
    assert proxy.client.post(path, content=body).is_success
    assert b"elsewhere" not in b"".join(call.raw for call in (*prefill.calls, *decode.calls))


def test_what_is_worth_keeping_may_be_said_everywhere(proxy: Proxy, decode: FakeEngine) -> None:
    asked = {"input": "Hi", "kv_transfer_params": {"lamina": {"keep": False}, "host": "elsewhere"}}
    assert proxy.post("/inference/v1/generate", asked).is_success
    assert decode.calls[0].body["kv_transfer_params"] == {"lamina": {"keep": False}}


@pytest.mark.parametrize(
    "body",
    [b'{"kv_transfer_params": NaN}', '{"kv_transfer_params": {}}'.encode("utf-16"), b"{'a': 1}"],
)
def test_json_that_an_engine_might_read_otherwise_is_refused(
    proxy: Proxy, decode: FakeEngine, body: bytes
) -> None:
    headers = {"content-type": "application/json"}
    answer = proxy.client.post("/inference/v1/generate", content=body, headers=headers)
    assert answer.status_code == 400
    assert "not JSON" in answer.json()["error"]["message"]
    assert not decode.calls


@pytest.mark.parametrize(
    "path", ["/sleep", "/pause?mode=x", "/v1/load_lora_adapter", "/%73leep/", "/update_weights"]
)
def test_what_changes_one_engine_is_not_for_clients(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine, path: str
) -> None:
    answer = proxy.client.post(path, json={})
    assert answer.status_code == 403
    assert "ask each engine itself" in answer.json()["error"]["message"]
    assert not decode.calls
    assert not prefill.calls


@pytest.mark.parametrize(
    "path",
    ["/v1/../sleep", "/./sleep", "/v1/%2e%2E/sleep", "/v1/.%2e/sleep", "/v1/models/..", "/sleep/."],
)
def test_a_path_that_leads_to_another_one_is_refused(
    proxy: Proxy, decode: FakeEngine, path: str
) -> None:
    """Clients resolve it mostly, so that this one is sent by hand."""
    with socket.create_connection(("127.0.0.1", proxy.running.port)) as client:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
        client.sendall(head.encode() + b"{}")
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")
    assert proxy.post("/v1/.../..a", {}).is_success
    assert [call.target for call in decode.calls] == ["/v1/.../..a"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin"),
        ("GET", "/admin/engine"),
        ("GET", "/admin/drain"),
        ("POST", "/admin/engines"),
        ("POST", "/%61dmin/drain/?engine=x"),
    ],
)
def test_no_engine_is_asked_what_operators_ask(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine, method: str, path: str
) -> None:
    """A mistyped path would show it the admin token."""
    answer = proxy.client.request(method, path, headers={"authorization": "Bearer admin"})
    assert answer.status_code == 404
    assert "/admin" in answer.json()["error"]["message"]
    assert not decode.calls
    assert not prefill.calls


# -- headers -----------------------------------------------------------------------------------

MINE = {
    "accept": "text/event-stream",
    "baggage": "user=7",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "openai-organization": "org",
    "openai-project": "project",
    "x-api-key": "client",
    "x-session-id": "conversation-7",
    "user-agent": "openai-python",
    "x-odd": "caf\xc3\xa9",
}
"""As bytes in Latin-1."""


def test_headers_of_clients_reach_both_engines(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine
) -> None:
    sent = {name: value.encode("latin-1") for name, value in MINE.items()}
    no_utf8 = {"x-old": b"caf\xe9"}
    one_connection = {"connection": "keep-alive, x-mine", "x-mine": "1", "te": "trailers"}
    kept = {"x-request-id": "id-1", "accept-encoding": "gzip"}
    assert proxy.post(
        "/v1/completions", COMPLETION, headers={**sent, **no_utf8, **one_connection, **kept}
    ).is_success
    for call in (*decode.asked(1), *prefill.asked(1)):
        got = {name: call.headers.get(name) for name in MINE}
        assert got == MINE
        assert call.headers["x-old"] == MINE["x-odd"]
        assert not {"x-mine", "te"} & call.headers.keys()
        assert call.headers["x-request-id"] == "id-1"
        assert call.headers["accept-encoding"] == "identity"
        assert int(call.headers["content-length"]) == len(call.raw)
        assert call.headers["host"] in (prefill.url + decode.url)


def test_headers_of_answers_reach_the_client(proxy: Proxy, decode: FakeEngine) -> None:
    async def answer(call: Call) -> None:
        headers = [
            (b"content-type", b"application/json"),
            (b"openai-processing-ms", b"12"),
            (b"set-cookie", b"a=1"),
            (b"set-cookie", b"b=2"),
            (b"x-ratelimit-remaining", b"3"),
            (b"x-request-id", b"of the engine"),
            (b"server", b"engine"),
            (b"date", b"long ago"),
            (b"keep-alive", b"timeout=5"),
            (b"content-length", b"2"),
        ]
        await call.send({"type": "http.response.start", "status": 200, "headers": headers})
        await call.end(b"{}")

    decode.script = answer
    for path, body in (("/v1/completions", COMPLETION), ("/v1/embeddings", {"input": "a"})):
        got = proxy.post(path, body, headers={"x-request-id": "id-2"})
        assert got.headers["openai-processing-ms"] == "12"
        assert got.headers["x-ratelimit-remaining"] == "3"
        assert got.headers.get_list("set-cookie") == ["a=1", "b=2"]
        assert got.headers.get_list("x-request-id") == ["id-2"]
        assert len(got.headers.get_list("date")) == 1
        assert got.headers["date"] != "long ago"
        assert "engine" not in got.headers.get("server", "")
        assert "keep-alive" not in got.headers


def test_a_cookie_is_one_clients(proxy: Proxy, decode: FakeEngine) -> None:
    async def set_one(call: Call) -> None:
        await call.begin(200, "application/json", set_cookie="session=of-the-first; Path=/")
        await call.end(b"{}")

    decode.script = set_one
    for headers in ({}, {}, {"cookie": "session=of-the-last"}):
        with httpx.Client(base_url=proxy.url, trust_env=False, timeout=PATIENCE) as client:
            assert client.get("/v1/models", headers=headers).cookies["session"] == "of-the-first"
    shown = [call.headers.get("cookie") for call in decode.calls]
    assert shown == [None, None, "session=of-the-last"]


def test_a_rank_that_a_client_names_is_one_of_the_decode_engine(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine
) -> None:
    headers = {"X-data-parallel-rank": "3"}
    proxy.post("/v1/completions", COMPLETION, headers=headers)
    assert decode.asked(1)[0].headers["x-data-parallel-rank"] == "3"
    assert prefill.asked(1)[0].headers["x-data-parallel-rank"] == "0"


@pytest.mark.parametrize(
    "shown", [{"x-api-key": "sesame"}, {"authorization": "Bearer sesame", "x-api-key": "other"}]
)
def test_a_key_may_be_shown_as_anthropics_clients_do(
    prefill: FakeEngine, decode: FakeEngine, shown: dict[str, str]
) -> None:
    decode.script = echo
    with proxied([prefill], [decode], token="sesame") as proxy:
        assert proxy.post("/v1/messages", {}, headers={"x-api-key": "wrong"}).status_code == 401
        assert proxy.post("/v1/completions", COMPLETION, headers=shown).is_success
        preflight = proxy.client.options("/v1/completions", headers={"origin": "http://a"})
        assert preflight.status_code == 200
    for call in (*prefill.asked(1), decode.asked(1)[0]):
        assert not {"x-api-key", "authorization"} & call.headers.keys()


def test_a_stranger_may_ask_what_is_allowed_and_nothing_with_it(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    """A browser's preflight has no body, and no engine needs a key for it."""
    decode.script = echo
    with proxied([prefill], [decode], token="sesame", engine_key="inner") as proxy:
        for content in (b"{}", iter([b"{}"])):
            answer = proxy.client.request("OPTIONS", "/v1/completions", content=content)
            assert answer.status_code == 400
        assert not decode.calls
        shown = {"origin": "http://a", "content-length": "0", "authorization": "Bearer sesame"}
        assert proxy.client.options("/v1/completions", headers=shown).is_success
    (call,) = decode.calls
    assert call.headers["origin"] == "http://a"
    assert not {"x-api-key", "authorization"} & call.headers.keys()


# -- grammars ----------------------------------------------------------------------------------


def test_no_grammar_is_compiled_where_nobody_needs_it(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine
) -> None:
    restricted = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
        "structured_outputs": {"regex": "a+"},
    }
    rendered = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "none",
    }
    proxy.post("/v1/chat/completions", CHAT | restricted | rendered)
    (told,), (asked,) = prefill.asked(1), decode.asked(1)
    assert not restricted.keys() & told.body.keys()
    assert {name: told.body[name] for name in rendered} == rendered, "templates show them"
    assert {name: asked.body[name] for name in restricted} == restricted


def test_the_grammar_of_a_response_is_not_compiled_for_nothing_either(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine
) -> None:
    schema = {"type": "json_schema", "name": "a", "schema": {"type": "object"}}
    asked = {"model": "model", "input": "Hello", "text": {"format": schema}}
    proxy.post("/v1/responses", asked)
    assert "text" not in prefill.asked(1)[0].body
    assert decode.asked(1)[0].body["text"] == asked["text"]


# -- usage -------------------------------------------------------------------------------------


def usage(cached: int) -> dict[str, object]:
    details = {"cached_tokens": cached}
    return {"usage": {"prompt_tokens": 1000, "prompt_tokens_details": details}}


@pytest.mark.parametrize(
    ("prefilled", "right"),
    [
        (usage(640), 640),
        ({"usage": {"prompt_tokens": 1000, "prompt_tokens_details": None}}, 0),
        ({"choices": [{"finish_reason": "abort"}], **usage(640)}, 999),
        ({"choices": "?"}, 0),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_pushed_prompt_is_not_called_cached(
    proxy: Proxy,
    prefill: FakeEngine,
    decode: FakeEngine,
    prefilled: dict[str, object],
    right: int,
    stream: bool,
) -> None:
    text = {"choices": [{"text": '"cached_tokens": 999'}]}

    async def answer(call: Call) -> None:
        if not stream:
            await call.answer(200, {**text, **usage(999)})
            return
        await call.begin(200, "text/event-stream")
        await call.piece(b"data: %s\n\n" % json.dumps(text).encode())
        await call.piece(b"data: %s\n\n" % json.dumps(usage(999)).encode())
        await call.end(EVENTS[-1])

    async def answer_late(call: Call) -> None:
        await decode.is_asked(1)
        await call.answer(200, prefilled)

    decode.script, prefill.script = answer, answer_late
    got = proxy.post("/v1/completions", COMPLETION | {"stream": stream})
    events = got.content.split(b"\n\n")[:2] if stream else [got.content] * 2
    said = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert said[0]["choices"] == text["choices"]
    assert said[1]["usage"] == usage(right)["usage"]


def test_a_response_that_needed_no_push_had_cached_what_its_engine_says(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine
) -> None:
    """The prefill that was aborted is known by the tokens that it does not have."""

    def counted(cached: int, output: int) -> dict[str, object]:
        details = {"cached_tokens": cached}
        return {
            "usage": {
                "input_tokens": 1000,
                "input_tokens_details": details,
                "output_tokens": output,
            }
        }

    async def answer(call: Call) -> None:
        await call.answer(200, {"output": [], **counted(999, 7)})

    decode.script = answer
    for output, right in ((0, 999), (1, 640)):
        prefill.script = says(200, {"status": "completed", "output": [], **counted(640, output)})
        got = proxy.post("/v1/responses", {"model": "model", "input": "Hello"}).json()
        assert got["usage"] == counted(right, 7)["usage"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_responses_say_of_their_prompts_is_learnt(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine, stream: bool
) -> None:
    def found() -> list[float]:
        roles = ("prefill", "decode")
        return [proxy.metric("hit_tokens_total", role=role, kind="found") for role in roles]

    def counted(cached: int, output: int) -> dict[str, object]:
        details = {"cached_tokens": cached}
        return {
            "input_tokens": 1000,
            "input_tokens_details": details,
            "output_tokens": output,
        }

    async def answer(call: Call) -> None:
        said = {"output": [], "usage": counted(999, 7)}
        if not stream:
            await call.answer(200, said)
            return
        await say_early(call)
        event = json.dumps({"type": "response.completed", "response": said})
        await call.end(b"event: response.completed\ndata: %s\n\n" % event.encode())

    async def answer_first(call: Call) -> None:
        await call.answer(200, {"output": [], "usage": counted(640, 1)})

    before = found()
    prefill.script, decode.script = answer_first, answer
    asked = {"model": "model", "input": "Hello", "stream": stream}
    assert proxy.post("/v1/responses", asked).is_success
    until(lambda: found() == [before[0] + 640, before[1]])
    assert proxy.post("/v1/responses", asked | {"truncation": "auto"}).is_success
    until(lambda: found() == [before[0] + 640, before[1] + 999])


def test_what_a_decode_engine_computes_itself_is_as_it_says(
    proxy: Proxy, decode: FakeEngine
) -> None:
    async def answer(call: Call) -> None:
        await call.answer(200, usage(999))

    decode.script = answer
    assert proxy.post("/v1/completions", COMPLETION | {"n": 2}).json() == usage(999)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_had_fewer_tokens_than_none_is_passed_on(
    proxy: Proxy, decode: FakeEngine, stream: bool
) -> None:
    said = json.dumps(usage(-5)).encode()

    async def answer(call: Call) -> None:
        if stream:
            await call.begin(200, "text/event-stream")
            await call.piece(b"data: %s\n\n" % said)
            await call.end(EVENTS[-1])
        else:
            await call.answer(200, usage(-5))

    decode.script = answer
    got = proxy.post("/v1/completions", COMPLETION | {"n": 2, "stream": stream})
    assert got.content == (b"data: %s\n\n" % said + EVENTS[-1] if stream else said)


# -- the access log ----------------------------------------------------------------------------


def test_each_request_has_a_line_in_the_access_log(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, ACCESS)
    decode.script = obey
    proxy.post("/v1/completions?key=secret", COMPLETION, headers={"x-request-id": "id-3"})
    proxy.post("/sleep", {}, headers={"x-request-id": "id-4"})
    proxy.client.get("/v1/a%20b", headers={"x-request-id": "id-5"})
    until(lambda: len([r for r in caplog.records if r.name == ACCESS]) == 3)
    lines = sorted(record.getMessage() for record in caplog.records if record.name == ACCESS)
    numbers = re.compile(r"ms=\d+")
    assert [numbers.sub("ms=N", line) for line in lines] == [
        "request=id-3 method=POST path=/v1/completions status=200 ms=N first_byte_ms=N "
        f"prefill={prefill.url} decode={decode.url}",
        "request=id-4 method=POST path=/sleep status=403 ms=N first_byte_ms=- prefill=- decode=-",
        "request=id-5 method=GET path=/v1/a%20b status=200 ms=N first_byte_ms=N prefill=- "
        f"decode={decode.url}",
    ]


def test_a_path_that_nobody_knows_is_no_series_of_its_own(proxy: Proxy) -> None:
    before = proxy.metric("requests_total", route="other")
    for index in range(3):
        proxy.client.get(f"/v1/things/{index}")
    until(lambda: proxy.metric("requests_total", route="other") == before + 3)


# -- large answers and bodies ------------------------------------------------------------------


def test_a_large_body_passes_whole(proxy: Proxy, prefill: FakeEngine, decode: FakeEngine) -> None:
    picture = "A" * (8 << 20)
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}]
    chat = {"model": "model", "messages": [{"role": "user", "content": content}]}
    assert proxy.post("/v1/chat/completions", chat).is_success
    for call in (*prefill.asked(1), *decode.asked(1)):
        assert call.body["messages"] == chat["messages"]


def test_an_answer_without_a_body_has_none(proxy: Proxy, decode: FakeEngine) -> None:
    async def nothing(call: Call) -> None:
        await call.send({"type": "http.response.start", "status": 204, "headers": []})
        await call.end()

    decode.script = nothing
    answer: httpx.Response = proxy.client.request("DELETE", "/v1/files/1")
    assert (answer.status_code, answer.content) == (204, b"")
    answer = proxy.client.head("/v1/models")
    assert (answer.status_code, answer.content) == (204, b"")


def test_events_that_are_no_chunks_of_ours_pass(proxy: Proxy, decode: FakeEngine) -> None:
    """Those of the responses API have names."""
    events = (b"event: response.created\ndata: {}\n\n", b"event: response.done\ndata: {}\n\n")

    async def answer(call: Call) -> None:
        await call.begin(200, "text/event-stream")
        for event in events:
            await call.piece(event)
            await asyncio.sleep(0)
        await call.end()

    decode.script = answer
    assert proxy.post("/v1/responses", {"input": "a"}).content == b"".join(events)


# -- events that come before anything is computed ----------------------------------------------

EARLY = (
    b'event: response.created\ndata: {"type": "response.created"}\n\n',
    b'event: response.in_progress\ndata: {"type": "response.in_progress"}\n\n',
)
LATER = (
    b'event: response.output_text.delta\ndata: {"delta": "one"}\n\n',
    b'event: response.completed\ndata: {"type": "response.completed"}\n\n',
)
RESPONSE = {"model": "model", "input": "Hello", "stream": True}


async def say_early(call: Call) -> None:
    await call.begin(200, "text/event-stream; charset=utf-8")
    for event in EARLY:
        await call.piece(event)


def test_the_first_byte_of_a_response_is_what_was_computed(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    """Until then the engine has ``first_byte_timeout``."""

    async def compute(call: Call) -> None:
        await say_early(call)
        await asyncio.sleep(2.0)
        for event in LATER:
            await call.piece(event)
        await call.end()

    decode.script = compute
    with proxied([prefill], [decode], stall_timeout=1.0) as proxy:
        assert proxy.post("/v1/responses", RESPONSE).content == b"".join((*EARLY, *LATER))
        assert proxy.metric("first_byte_seconds_sum") > 1.9


def test_a_response_whose_prefill_fails_is_computed_by_the_decode_engine(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine
) -> None:
    async def fail(call: Call) -> None:
        await decode.is_asked(1)
        await asyncio.sleep(0.2)  # its first events are on their way
        await call.answer(500, {})

    async def wait_for_a_push(call: Call) -> None:
        await say_early(call)
        if call.push is not None:
            await asyncio.Event().wait()
        for event in LATER:
            await call.piece(event)
        await call.end()

    prefill.script, decode.script = fail, wait_for_a_push
    answer = proxy.post("/v1/responses", RESPONSE)
    assert answer.content == b"".join((*EARLY, *LATER))
    assert [call.push is not None for call in decode.calls] == [True, False]


def test_a_response_that_ends_before_anything_was_computed_passes(
    proxy: Proxy, decode: FakeEngine
) -> None:
    async def end(call: Call) -> None:
        await say_early(call)
        await call.end()

    decode.script = end
    assert proxy.post("/v1/responses", RESPONSE).content == b"".join(EARLY)
