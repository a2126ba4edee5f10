"""Guards the proxy where everything works: what each engine is sent, that answers pass unchanged,
who is let in, where requests go, what is published."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator, Sequence

import pytest

from lamina_kv.push.proxy.dispatcher import Dispatcher
from lamina_kv.push.proxy.engines import Engine, Role
from lamina_kv.push.proxy.errors import Refusal
from lamina_kv.push.proxy.memory import COPIES, REQUEST_BYTES
from lamina_kv.push.proxy.metrics import Metrics
from lamina_kv.push.proxy.requests import ApiRequest, parse_fields
from lamina_kv.push.proxy.routing.least_loaded import LeastLoaded
from lamina_kv.push.proxy.routing.prompt import Prompt
from lamina_kv.push.proxy.routing.ranks import Rank
from lamina_kv.push.proxy.routing.router import Router
from lamina_kv.push.proxy.routing.words import Candidate, Choice, Disaggregate, Reason
from lamina_kv.push.proxy.settings import PrefillAddress, Settings
from lamina_kv.push.proxy.withdrawals import Withdrawals
from push_proxy.engines import ANSWER, EVENTS, Call, FakeEngine, hang, obey, says
from push_proxy.proxies import CHAT, COMPLETION, Proxy, ask, proxied, push_address
from push_proxy.running import until


@pytest.fixture
def proxy(shared_proxy: Proxy, prefill: FakeEngine, decode: FakeEngine) -> Iterator[Proxy]:
    yield shared_proxy
    until(lambda: shared_proxy.metric("engine_load") == 0)


# -- what the engines are sent -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", COMPLETION),
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", {"model": "model", "input": "Hello"}),
        ("/v1/messages", CHAT | {"max_tokens": 7}),
    ],
)
def test_both_engines_are_told_of_one_push(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine, path: str, body: dict[str, object]
) -> None:
    answer = proxy.post(path, body | {"temperature": 0.5})
    assert (answer.status_code, answer.json()) == (200, ANSWER)
    (asked,), (told,) = decode.asked(1), prefill.asked(1)
    push = asked.push
    assert push == {"id": push["id"], "prefill": push_address(0)}
    assert len(push["id"]) == 32
    assert told.push == {"id": push["id"]}
    assert asked.target == told.target == path
    without = {name: value for name, value in asked.body.items() if name != "kv_transfer_params"}
    assert without == body | {"temperature": 0.5}
    limit = "max_output_tokens" if "input" in body else "max_tokens"
    assert (told.body["stream"], told.body[limit]) == (False, 1)
    assert told.body["temperature"] == 0.5


def test_every_request_has_a_push_of_its_own(proxy: Proxy, decode: FakeEngine) -> None:
    for _ in range(3):
        proxy.post("/v1/completions", COMPLETION, headers={"x-request-id": "always-the-same"})
    assert len({call.push["id"] for call in decode.calls}) == 3


def test_a_request_that_cannot_be_pushed_goes_to_the_decode_engine_alone(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine
) -> None:
    before = proxy.metric("unpushed_total", reason="request")
    assert proxy.post("/v1/completions", COMPLETION | {"prompt": ["a", "b"]}).json() == ANSWER
    assert proxy.metric("unpushed_total", reason="request") == before + 1
    assert decode.calls[0].body == COMPLETION | {"prompt": ["a", "b"]}
    assert not prefill.calls


def test_what_a_client_says_of_transfers_never_reaches_an_engine(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine
) -> None:
    own = {"kv_transfer_params": {"lamina_push": {"id": "x", "prefill": "elsewhere:1"}}}
    proxy.post("/v1/completions", COMPLETION | own)
    proxy.post("/v1/completions", COMPLETION | own | {"n": 2})
    assert decode.calls[0].push["prefill"] == push_address(0)
    assert "kv_transfer_params" not in decode.calls[1].body
    calls = (*prefill.asked(1), *decode.asked(2))
    assert b"elsewhere" not in b"".join(call.raw for call in calls)


def test_the_request_id_is_passed_on_and_returned(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine
) -> None:
    answer = proxy.post("/v1/completions", COMPLETION, headers={"X-Request-Id": "mine-1"})
    calls = (*prefill.asked(1), *decode.asked(1))
    ids = {call.headers["x-request-id"] for call in calls}
    assert ids == {"mine-1"} == {answer.headers["x-request-id"]}


@pytest.mark.parametrize("given", [{}, {"X-Request-Id": "two words"}, {"X-Request-Id": "x" * 200}])
def test_a_request_id_that_is_none_is_made_anew(
    proxy: Proxy, decode: FakeEngine, given: dict[str, str]
) -> None:
    answer = proxy.post("/v1/completions", COMPLETION, headers=given)
    assert len(answer.headers["x-request-id"]) == 32
    assert decode.calls[0].headers["x-request-id"] == answer.headers["x-request-id"]


# -- answers -----------------------------------------------------------------------------------


def test_a_stream_passes_byte_for_byte(proxy: Proxy, prefill: FakeEngine) -> None:
    answer = proxy.post("/v1/chat/completions", CHAT | {"stream": True})
    assert answer.content == b"".join(EVENTS)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert prefill.asked(1)[0].body["stream"] is False


def test_a_stream_passes_while_it_is_made(proxy: Proxy, decode: FakeEngine) -> None:
    came: list[bytes] = []

    async def one_by_one(call: Call) -> None:
        await call.begin(200, "text/event-stream")
        for count, event in enumerate(EVENTS):
            await call.piece(event)
            while len(came) <= count:  # the next is made only when this one has arrived
                await asyncio.sleep(0.01)
        await call.end()

    decode.script = one_by_one
    with proxy.client.stream("POST", "/v1/completions", json=COMPLETION | {"stream": True}) as got:
        came.extend(got.iter_raw())
    assert came == [*EVENTS]


def test_events_that_come_in_bits_pass_whole(proxy: Proxy, decode: FakeEngine) -> None:
    async def in_bits(call: Call) -> None:
        await call.begin(200, "text/event-stream")
        for byte in b"".join(EVENTS) + b": no end":
            await call.piece(bytes([byte]))
        await call.end()

    decode.script = in_bits
    answer = proxy.post("/v1/completions", COMPLETION | {"stream": True})
    assert answer.content == b"".join(EVENTS) + b": no end"


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429])
def test_a_refusal_passes_unchanged_and_ends_the_prefill(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine, status: int
) -> None:
    refusal = {"error": {"message": "not so", "code": status}}

    async def refuse(call: Call) -> None:
        await prefill.is_asked(1)
        await call.answer(status, refusal)

    prefill.script, decode.script = hang, refuse
    answer = proxy.post("/v1/completions", COMPLETION)
    assert answer.status_code == status
    assert answer.json() == refusal
    assert len(decode.calls) == 1
    until(prefill.calls[0].gone.is_set)


def test_a_get_is_passed_to_a_decode_engine(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine
) -> None:
    answer = proxy.client.get("/v1/models?limit=a%20b&x=%C3%BC")
    assert answer.json() == {"data": [{"id": "model"}]}
    assert decode.calls[0].target == "/v1/models?limit=a%20b&x=%C3%BC"
    assert not prefill.calls


def test_a_path_that_looks_like_a_host_stays_a_path(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine
) -> None:
    host = prefill.url.removeprefix("http:")
    with socket.create_connection(("127.0.0.1", proxy.running.port)) as client:
        client.sendall(f"GET {host}/v1/models HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        client.recv(100)
    assert [call.target for call in decode.calls] == [f"{host}/v1/models"]
    assert not prefill.calls


@pytest.mark.parametrize("target", ["*", "http://elsewhere/v1/models"])
def test_what_is_no_path_is_for_no_engine(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine, target: str
) -> None:
    with socket.create_connection(("127.0.0.1", proxy.running.port)) as client:
        client.sendall(f"OPTIONS {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 40")
    assert not prefill.calls
    assert not decode.calls


# -- who is let in -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"text"', b'{"prompt": "a"} x', b"\xff\xfe", b'{"a":' + b"[" * 9999],
)
def test_a_body_that_is_no_json_object_is_refused(
    proxy: Proxy, prefill: FakeEngine, decode: FakeEngine, body: bytes
) -> None:
    answer = proxy.client.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == 400
    assert not prefill.calls
    assert not decode.calls


def test_a_body_that_is_too_large_is_refused(prefill: FakeEngine, decode: FakeEngine) -> None:
    with proxied([prefill], [decode], max_body_bytes=1000) as proxy:
        assert proxy.post("/v1/completions", COMPLETION | {"prompt": "x" * 900}).is_success
        with socket.create_connection(("127.0.0.1", proxy.running.port)) as client:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
            client.sendall(head.encode())
            assert client.recv(100).startswith(b"HTTP/1.1 413 ")
        with socket.create_connection(("127.0.0.1", proxy.running.port)) as client:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            client.sendall(head.encode() + b"3e9\r\n" + b" " * 1001 + b"\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 413 ")
        assert len(decode.calls) == 1
        assert proxy.metric("requests_total", status="413") == 2


def test_only_who_has_the_token_is_let_in_and_no_engine_sees_it(
    prefill: FakeEngine, decode: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with proxied([prefill], [decode], token="open-sesame", engine_key="inner") as proxy:
        for wrong in ("", "open-sesame", "Basic open-sesame", "Bearer open-sesam", "Bearer \xfc"):
            headers = {"authorization": wrong.encode("latin-1")}
            answer = proxy.post("/v1/completions", COMPLETION, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert proxy.client.get("/v1/models", headers=headers).status_code == 401
        assert not decode.calls
        right = {"authorization": "bearer open-sesame"}
        assert proxy.post("/v1/completions", COMPLETION, headers=right).is_success
        assert proxy.client.get("/health").is_success
    for call in (*prefill.calls, *decode.calls):
        assert call.headers["authorization"] == "Bearer inner"
    assert "open-sesame" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, "Bearer client"),
        ({"engine_key": "inner"}, "Bearer inner"),
        ({"token": "client"}, None),
    ],
)
def test_what_the_engines_are_shown(
    prefill: FakeEngine, decode: FakeEngine, settings: dict[str, str], shown: str | None
) -> None:
    with proxied([prefill], [decode], **settings) as proxy:
        headers = {"authorization": "Bearer client"}
        assert proxy.post("/v1/completions", COMPLETION, headers=headers).is_success
    (asked,), (told,) = decode.calls, prefill.calls
    assert asked.headers.get("authorization") == told.headers.get("authorization") == shown


def test_more_requests_than_there_is_memory_for_are_turned_away(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    decode.script = prefill.script = hang
    room = 2 * REQUEST_BYTES + 2 * COPIES * 20_000
    with proxied([prefill], [decode], max_held_bytes=room) as proxy:
        connections = [ask(proxy, {"prompt": "x" * 15_000}) for _ in range(2)]
        until(lambda: len(decode.calls) == 2)
        assert room - REQUEST_BYTES < proxy.metric("held_bytes") <= room
        answer = proxy.post("/v1/completions", COMPLETION)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        for connection in connections:
            connection.close()
        until(lambda: proxy.metric("outstanding") == 0)
        until(lambda: proxy.metric("held_bytes") == 0)
        decode.script = prefill.script = obey
        assert proxy.post("/v1/completions", COMPLETION).is_success
        # Few requests with large bodies are as much.
        answer = proxy.post("/v1/completions", COMPLETION | {"prompt": "x" * 80_000})
        assert answer.status_code == 503
        until(lambda: proxy.metric("held_bytes") == 0)


# -- where requests go -------------------------------------------------------------------------


def test_a_request_goes_to_the_least_loaded_engines() -> None:
    with (
        FakeEngine() as p0, FakeEngine() as p1, FakeEngine(hang) as d0, FakeEngine(hang) as d1,
        proxied([p0, p1], [d0, d1]) as proxy,
    ):  # fmt: skip
        large = ask(proxy, {"prompt": "x" * 8000})
        until(lambda: len(d0.calls) + len(d1.calls) == 1)
        busy, idle = (d0, d1) if d0.calls else (d1, d0)
        small = [ask(proxy) for _ in range(3)]  # together less than the large one
        until(lambda: len(idle.calls) == 3)
        assert len(busy.calls) == 1
        for connection in (large, *small):
            connection.close()
        until(lambda: proxy.metric("engine_load") == 0)


def test_a_policy_of_ones_own_chooses_both_engines() -> None:
    class ByLength:
        def choose(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Choice:
            there = sorted(candidates, key=lambda candidate: candidate.rank.engine.url)
            return Choice(there[prompt.tokens > 100], Reason.LOAD)

    with FakeEngine() as p0, FakeEngine() as p1, FakeEngine() as d0, FakeEngine() as d1:
        prefill = sorted([p0, p1], key=lambda engine: engine.url)
        decode = sorted([d0, d1], key=lambda engine: engine.url)
        with proxied(prefill, decode, chooses=ByLength()) as proxy:
            for length in (1, 1000, 2000):
                answer = proxy.post("/v1/completions", COMPLETION | {"prompt": "x" * length})
                assert answer.is_success
        assert [len(engine.calls) for engine in (*prefill, *decode)] == [1, 2, 1, 2]
        assert [call.push["prefill"] for call in decode[1].calls] == [push_address(1)] * 2


class NoWithdrawals(Withdrawals):
    """Engines that are not there need not be told that nobody wants anything."""

    def send(self, request: ApiRequest, rank: Rank, push_id: str) -> None:
        """Say nothing."""


def test_requests_that_come_at_the_same_time_go_to_different_engines() -> None:
    async def scenario() -> list[int]:
        places = tuple(PrefillAddress(f"http://127.0.0.1:{n}", f"p:{n}") for n in (1, 2))
        decode = ("http://127.0.0.1:3", "http://127.0.0.1:4")
        settings = Settings(prefill=places, decode=decode, tries=1)
        engines = [Engine(Role.PREFILL, place.url, place.push, settings) for place in places]
        engines += [Engine(Role.DECODE, url, "", settings) for url in decode]
        metrics = Metrics(engines)
        router = Router(LeastLoaded(), Disaggregate.ALWAYS, metrics)
        dispatcher = Dispatcher(settings, engines, router, metrics, NoWithdrawals())

        async def ask() -> None:
            request = ApiRequest("id", "POST", b"/v1/completions", {}, parse_fields(b"{}"))
            with pytest.raises(Refusal, match="did not answer"):
                async with dispatcher.answer(request):
                    pass

        for engine in engines:
            engine.healthy = True
        await asyncio.gather(ask(), ask())
        for engine in engines:
            assert engine.load == 0
            await engine.close()
        return [engine.visits for engine in engines]

    assert asyncio.run(scenario()) == [1, 1, 1, 1]


# -- what is published -------------------------------------------------------------------------


def test_metrics_tell_what_was_done(prefill: FakeEngine, decode: FakeEngine) -> None:
    with proxied([prefill], [decode]) as proxy:
        proxy.post("/v1/completions", COMPLETION)
        proxy.post("/v1/completions", COMPLETION | {"stream": True})
        decode.script = says(404, {})
        proxy.post("/v1/chat/completions", CHAT)
        until(lambda: proxy.metric("exchanges_total") == 6)
        assert proxy.metric("requests_total", route="/v1/completions", status="200") == 2
        assert proxy.metric("requests_total", route="/v1/chat/completions", status="404") == 1
        there = {"role": "decode", "engine": decode.url}
        assert proxy.metric("exchanges_total", outcome="answered", **there) == 2
        assert proxy.metric("exchanges_total", outcome="refused", **there) == 1
        assert proxy.metric("exchanges_total", role="prefill", engine=prefill.url) == 3
        assert proxy.metric("first_byte_seconds_count") == 3
        assert proxy.metric("request_seconds_count") == 3
        assert proxy.metric("engine_usable", engine=decode.url) == 1
        assert proxy.metric("engine_load") == proxy.metric("outstanding") == 0
        assert proxy.metric("retries_total") == proxy.metric("unpushed_total") == 0
