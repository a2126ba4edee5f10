"""Guards the proxy where engines fail: a request is answered by other engines or ends with a
reason, and who fails is left alone, and tried again."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from lamina_kv.push.proxy import dispatcher
from lamina_kv.push.proxy.engines import MISSES
from push_proxy.engines import (
    ANSWER,
    EVENTS,
    Call,
    FakeEngine,
    Script,
    begin_and_hang,
    die,
    errors,
    hang,
    obey,
    says,
    stream_and_hang,
)
from push_proxy.proxies import COMPLETION, ask, proxied
from push_proxy.running import PATIENCE, until

STREAM = COMPLETION | {"stream": True}
BROKEN = says(500, {"error": {"message": "out of order", "code": 500}})
NOWHERE = "http://127.0.0.1:9"


# -- decode engines that fail ------------------------------------------------------------------


@pytest.mark.parametrize("failing", [die, BROKEN, says(503, {})])
def test_another_decode_engine_answers_and_only_its_own_push_goes_on(
    prefill: FakeEngine, decode: FakeEngine, other: FakeEngine, failing: Script
) -> None:
    failed: list[Call] = []

    async def hang_once(call: Call) -> None:
        await (hang(call) if len(prefill.calls) == 1 else obey(call))

    async def fail_once(call: Call) -> None:
        await prefill.is_asked(1)
        if not failed:
            failed.append(call)
            await failing(call)
        while not prefill.calls[0].gone.is_set():
            await asyncio.sleep(0.01)
        await obey(call)

    prefill.script = hang_once
    decode.script = other.script = fail_once
    with proxied([prefill], [decode, other]) as proxy:
        answer = proxy.post("/v1/completions", COMPLETION)
        assert (answer.status_code, answer.json()) == (200, ANSWER)
        assert proxy.metric("retries_total") == 1
    (one,), (two,) = decode.calls, other.calls
    assert one.push["id"] != two.push["id"]
    assert {call.push["id"] for call in prefill.calls} == {one.push["id"], two.push["id"]}


def test_a_decode_engine_that_is_busy_is_passed_by_while_another_is_idle(
    prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    """And it is not at fault. If all are busy, the client is told what the last one says."""
    busy: Script = says(429, {"error": {"message": "too many requests", "code": 429}})
    decode.script = busy
    with proxied([prefill], [decode, other], backoff=PATIENCE, breaker_failures=1) as proxy:
        for _ in range(4):
            answer = proxy.post("/v1/completions", COMPLETION)
            assert (answer.status_code, answer.json()) == (200, ANSWER)
        assert decode.calls
        assert proxy.metric("engine_usable") == 3
        other.script = busy
        before = len(decode.calls) + len(other.calls)
        answer = proxy.post("/v1/completions", STREAM)
        assert answer.status_code == 429
        assert answer.json()["error"]["message"] == "too many requests"
        assert len(decode.calls) + len(other.calls) == before + 2
        assert proxy.metric("engine_usable") == 3


def test_another_try_goes_where_the_model_is(
    prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    """An engine of another model would answer that there is none, and a client would believe it."""
    other.models = ["another"]
    other.script = says(404, {"error": {"message": "no such model", "code": 404}})
    prefill.script = hang
    with proxied([prefill], [decode, other], breaker_failures=9) as proxy:
        decode.script = BROKEN
        assert proxy.post("/v1/completions", COMPLETION).status_code == 500
        assert len(decode.calls) == 3
        decode.script = says(429, {"error": {"message": "too many requests", "code": 429}})
        assert proxy.post("/v1/completions", COMPLETION).status_code == 429
        assert len(decode.calls) == 4, "none is left to try"
        decode.healthy = False
        proxy.wait_usable(2)
        assert proxy.post("/v1/completions", COMPLETION).status_code == 503
    assert not other.calls


def test_the_last_answer_passes_if_no_decode_engine_has_a_better_one(
    prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    decode.script = other.script = BROKEN
    with proxied([prefill], [decode, other], tries=3) as proxy:
        answer = proxy.post("/v1/completions", STREAM)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "out of order"
        assert len(decode.calls) + len(other.calls) == 3


def test_a_decode_engine_that_only_closes_connections_is_told_of(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    decode.script = die
    with proxied([prefill], [decode], tries=2) as proxy:
        answer = proxy.post("/v1/completions", COMPLETION)
        assert (answer.status_code, len(decode.calls)) == (502, 2)
        assert "did not answer" in answer.json()["error"]["message"]


def test_without_a_decode_engine_everybody_is_turned_away(prefill: FakeEngine) -> None:
    with proxied([prefill], [NOWHERE]) as proxy:
        for answer in (
            proxy.client.get("/health"),
            proxy.client.get("/v1/models"),
            proxy.post("/v1/completions", COMPLETION),
        ):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert not prefill.calls


def test_an_engine_that_says_that_it_is_ill_is_not_used_until_it_is_well(
    prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    with proxied([prefill], [decode, other]) as proxy:
        decode.healthy = False
        proxy.wait_usable(2)
        for _ in range(4):
            assert proxy.post("/v1/completions", COMPLETION).is_success
        assert not decode.calls
        decode.healthy, other.healthy = True, False
        until(lambda: proxy.metric("engine_usable", engine=other.url) == 0)
        proxy.wait_usable(2)
        assert proxy.post("/v1/completions", COMPLETION).is_success
        assert len(decode.calls) == 1


def test_a_request_that_no_engine_bears_takes_none_out_of_use(
    prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    prefill.script = decode.script = other.script = BROKEN
    with proxied([prefill], [decode, other], breaker_failures=1, breaker_pause=300) as proxy:
        assert proxy.post("/v1/completions", COMPLETION).status_code == 500
        assert proxy.metric("engine_usable") == 3
        prefill.script = decode.script = other.script = obey
        assert proxy.post("/v1/completions", COMPLETION).is_success


def test_an_engine_that_fails_where_another_does_not_is_left_alone(
    prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    decode.script = BROKEN
    with proxied([prefill], [decode, other], breaker_failures=2, breaker_pause=300) as proxy:
        for _ in range(6):
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert len(decode.calls) == 2
        assert proxy.metric("engine_usable", engine=decode.url) == 0


def test_an_engine_that_never_begins_to_answer_is_given_up(
    prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    decode.script = hang
    settings = {"first_byte_timeout": 2.0, "breaker_failures": 1, "breaker_pause": 300}
    with proxied([prefill], [decode, other], **settings) as proxy:
        for _ in range(3):
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert len(decode.calls) == 1
        until(decode.calls[0].gone.is_set)


def test_a_decode_engine_that_failed_is_tried_again_only_if_there_is_no_other(
    prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    with proxied([prefill], [decode, other], tries=2) as proxy:
        decode.script = other.script = hang
        large = ask(proxy, {"prompt": "x" * 10_000})
        until(lambda: decode.calls or other.calls)
        busy, idle = (decode, other) if decode.calls else (other, decode)
        busy.script, idle.script = obey, die
        assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert (len(busy.calls), len(idle.calls)) == (2, 1)
        large.close()


def test_an_engine_that_fails_now_and_then_stays_in_use(
    prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    async def fail_every_second_time(call: Call) -> None:
        await (die(call) if len(decode.calls) % 2 else obey(call))

    decode.script = fail_every_second_time
    with proxied([prefill], [decode, other], breaker_failures=2, breaker_pause=300) as proxy:
        for _ in range(8):
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert len(decode.calls) > 2
        assert proxy.metric("engine_usable") == 3


# -- in the middle of an answer ----------------------------------------------------------------


async def _die_after_one_and_a_half(call: Call) -> None:
    await call.begin(200, "text/event-stream")
    await call.piece(EVENTS[0])
    await call.piece(EVENTS[1][:20])
    raise ConnectionError


def test_a_stream_that_breaks_off_ends_with_an_error_after_whole_events(
    prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    decode.script = other.script = _die_after_one_and_a_half
    with proxied([prefill], [decode, other]) as proxy:
        answer = proxy.post("/v1/completions", STREAM)
        assert answer.status_code == 200
        assert answer.content.startswith(EVENTS[0] + b'data: {"error"')
        (error,) = errors(answer.content)
        assert error["code"] == 502
        assert "interrupted" in str(error["message"])
        assert b"[DONE]" not in answer.content
        assert len(decode.calls) + len(other.calls) == 1
        assert proxy.metric("exchanges_total", outcome="interrupted") == 1


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_streams_whose_events_have_names_end_with_an_error_of_that_name(
    prefill: FakeEngine, decode: FakeEngine, path: str
) -> None:
    """Anthropic's client looks at no other, OpenAI's at both."""
    begun = b"event: message_start\ndata: {}\n\n"

    async def break_off(call: Call) -> None:
        await call.begin(200, "text/event-stream")
        await call.piece(begun)
        raise ConnectionError

    decode.script = break_off
    with proxied([prefill], [decode]) as proxy:
        answer = proxy.post(path, {"model": "model", "messages": [], "stream": True})
    assert answer.content.startswith(begun)
    name, _, data = answer.content.removeprefix(begun).partition(b"\n")
    assert name == b"event: error"
    assert data.endswith(b"\n\n")
    said = json.loads(data.removeprefix(b"data: "))
    assert said["type"] == "error"
    assert said["error"]["code"] == 502
    assert "was interrupted" in said["error"]["message"]


def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    async def half(call: Call) -> None:
        await call.begin(200, "application/json", content_length="100")
        await call.piece(b'{"choices": [')
        raise ConnectionError

    decode.script = half
    with proxied([prefill], [decode]) as proxy, pytest.raises(httpx.RemoteProtocolError):
        proxy.post("/v1/completions", COMPLETION)


def test_a_stream_that_stalls_ends_with_an_error(prefill: FakeEngine, decode: FakeEngine) -> None:
    decode.script = stream_and_hang
    with proxied([prefill], [decode], stall_timeout=1.0) as proxy:
        answer = proxy.post("/v1/completions", STREAM)
        assert answer.content.startswith(EVENTS[0])
        assert [error["code"] for error in errors(answer.content)] == [502]
        until(decode.calls[0].gone.is_set)


@pytest.mark.parametrize(("script", "status"), [(hang, 504), (stream_and_hang, 200)])
def test_no_request_takes_longer_than_it_may(
    prefill: FakeEngine, decode: FakeEngine, script: Script, status: int
) -> None:
    prefill.script, decode.script = hang, script
    with proxied([prefill], [decode], total_timeout=2.0) as proxy:
        answer = proxy.post("/v1/completions", STREAM)
        assert answer.status_code == status
        assert b"not done within 2 s" in answer.content
        until(lambda: decode.calls[0].gone.is_set() and prefill.calls[0].gone.is_set())


async def waits_for_a_push(call: Call) -> None:
    """As an engine does whose push never comes."""
    await (obey if call.push is None else hang)(call)


# -- prefill engines that fail -----------------------------------------------------------------


@pytest.mark.parametrize("failing", [die, BROKEN])
def test_the_decode_engine_answers_if_the_prefill_engine_fails(
    prefill: FakeEngine, decode: FakeEngine, failing: Script
) -> None:
    async def fail(call: Call) -> None:
        # Of two engines that are asked at once, the other may be the one that is slower to hear.
        await decode.is_asked(2 * len(prefill.calls) - 1)
        await failing(call)

    prefill.script, decode.script = fail, waits_for_a_push
    with proxied([prefill], [decode], breaker_failures=2, breaker_pause=300) as proxy:
        for count in range(1, 5):
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
            until(lambda: proxy.metric("engine_load") == 0)
            assert len(prefill.calls) == min(count, 2)
        pushed = [call.push is not None for call in decode.calls]
        assert pushed == [True, False, True, False, False, False]
        until(lambda: all(call.gone.is_set() for call in decode.calls if call.push is not None))
        assert proxy.metric("unpushed_total", reason="prefill_failed") == 2
        assert proxy.metric("unpushed_total", reason="no_prefill_engine") == 2
        assert proxy.metric("exchanges_total", role="prefill", outcome="failed") == 2
        assert proxy.client.get("/health").is_success


@pytest.mark.parametrize("status", [400, 429, 503])
def test_what_was_computed_for_nobody_is_not_held(
    prefill: FakeEngine, decode: FakeEngine, other: FakeEngine, status: int
) -> None:
    """A prefill engine cannot see that its decode engine's server has turned the request away."""

    async def refuse_late(call: Call) -> None:
        if decode.calls and other.calls:
            await obey(call)
            return
        while not await asyncio.to_thread(prefilled):
            await asyncio.sleep(0.01)
        await says(status, {"error": {"message": "no", "code": status}})(call)

    def prefilled() -> float:
        return proxy.metric("exchanges_total", role="prefill", outcome="answered")

    decode.script = other.script = refuse_late
    with proxied([prefill], [decode, other]) as proxy:
        answer = proxy.post("/v1/completions", COMPLETION)
        assert answer.status_code == (400 if status == 400 else 200)
        until(lambda: prefill.withdrawn == [prefill.calls[0].push["id"]])
        until(lambda: proxy.metric("engine_load") == 0)
        assert len(prefill.withdrawn) == 1


def test_what_may_have_been_computed_when_nobody_wanted_it_any_more_is_not_held(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    """A prefill engine may be done before it sees that its answer is not waited for."""

    async def refuse(call: Call) -> None:
        await prefill.is_asked(1)
        await says(400, {})(call)

    prefill.script, decode.script = hang, refuse
    with proxied([prefill], [decode]) as proxy:
        assert proxy.post("/v1/completions", COMPLETION).status_code == 400
        until(lambda: prefill.withdrawn == [prefill.calls[0].push["id"]])
        until(lambda: proxy.metric("engine_load") == 0)


@pytest.mark.parametrize(
    "lets_go", [begin_and_hang, die, says(500, {})], ids=["hangs", "dies", "fails"]
)
def test_an_engine_that_does_not_answer_a_withdrawal_is_not_held_up_by_it(
    prefill: FakeEngine,
    decode: FakeEngine,
    lets_go: Script,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else it could never leave the fleet."""

    async def refuse_late(call: Call) -> None:
        while not await asyncio.to_thread(prefilled):
            await asyncio.sleep(0.01)
        await says(400, {})(call)

    def prefilled() -> float:
        return proxy.metric("exchanges_total", role="prefill", outcome="answered")

    caplog.set_level("INFO", "lamina_kv.push.proxy")
    decode.script, prefill.lets_go = refuse_late, lets_go
    with proxied([prefill], [decode], stall_timeout=0.3) as proxy:
        assert proxy.post("/v1/completions", COMPLETION).status_code == 400
        until(lambda: bool(prefill.withdrawn))
        until(lambda: "holds its prompt for a while" in caplog.text)
        until(lambda: proxy.metric("engine_load") == 0)


def test_what_somebody_asks_for_is_not_withdrawn_nor_what_was_not_computed(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    with proxied([prefill], [decode]) as proxy:
        for script in (obey, REFUSAL, hang):
            prefill.script = script
            assert proxy.post("/v1/completions", COMPLETION).is_success
        refusals = proxy.metric("exchanges_total", role="prefill", outcome="refused")
        prefill.script = decode.script = REFUSAL

        async def later(call: Call) -> None:
            while await asyncio.to_thread(refused) == refusals:
                await asyncio.sleep(0.01)
            await REFUSAL(call)

        def refused() -> float:
            return proxy.metric("exchanges_total", role="prefill", outcome="refused")

        decode.script = later
        assert proxy.post("/v1/completions", COMPLETION).status_code == 400
        until(lambda: proxy.metric("engine_load") == 0)
        assert len(prefill.calls) >= 3
    assert not prefill.withdrawn


def test_a_prefill_engine_that_works_again_is_used_again(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    prefill.script = die
    with proxied([prefill], [decode], breaker_failures=1, breaker_pause=0.2) as proxy:
        assert proxy.post("/v1/completions", COMPLETION).is_success
        until(lambda: proxy.metric("exchanges_total", role="prefill", outcome="failed") == 1)
        prefill.script = obey
        until(lambda: proxy.metric("engine_usable", engine=prefill.url) == 1)
        assert proxy.post("/v1/completions", COMPLETION).is_success
        until(lambda: proxy.metric("exchanges_total", role="prefill", outcome="answered") == 1)


def test_the_next_request_goes_to_another_prefill_engine(
    prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    prefill.script = die
    with proxied([prefill, other], [decode], breaker_failures=1, breaker_pause=300) as proxy:
        for _ in range(5):
            assert proxy.post("/v1/completions", COMPLETION).is_success
            until(lambda: proxy.metric("engine_load") == 0)
        assert (len(prefill.calls), len(other.calls)) == (1, 4)
        assert sum(call.push is not None for call in decode.calls) == 5


def test_a_prefill_engine_that_is_not_there_is_not_waited_for(decode: FakeEngine) -> None:
    with proxied([NOWHERE], [decode]) as proxy:
        assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert decode.calls[0].push is None


async def refuse_without_words(call: Call) -> None:
    await call.begin(400, "text/plain")
    await call.end(b"\xff" * 1000)


@pytest.fixture
def little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode engines that wait for a push for ever are to be asked again soon."""
    monkeypatch.setattr(dispatcher, "REFUSAL_GRACE", 0.2)


@pytest.mark.usefixtures("little_grace")
def test_a_refusal_that_nobody_understands_is_one(
    prefill: FakeEngine, decode: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    prefill.script, decode.script = refuse_without_words, waits_for_a_push
    with proxied([prefill], [decode]) as proxy:
        assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert proxy.metric("unpushed_total", reason="prefill_refused") == 1
    assert "refuses what another engine answers: status 400: \ufffd" in caplog.text
    assert len(caplog.text) < 2000


REFUSAL = says(400, {"error": {"message": "max_tokens is too large", "code": 400}})


def test_a_mistake_of_the_client_is_passed_on_once_and_is_nobodys_failure(
    prefill: FakeEngine,
    decode: FakeEngine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatcher, "REFUSAL_GRACE", PATIENCE)
    refused = {"role": "prefill", "outcome": "refused"}

    async def later(call: Call) -> None:
        while not await asyncio.to_thread(proxy.metric, "exchanges_total", **refused):
            await asyncio.sleep(0.01)
        await REFUSAL(call)

    prefill.script, decode.script = REFUSAL, later
    with proxied([prefill], [decode], breaker_failures=1, breaker_pause=300) as proxy:
        answer = proxy.post("/v1/completions", COMPLETION)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, 400)
        assert (len(prefill.calls), len(decode.calls)) == (1, 1)
        assert proxy.metric("unpushed_total") == 0
        assert proxy.metric("engine_usable") == 2
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.usefixtures("little_grace")
def test_a_prefill_engine_that_refuses_what_others_answer_is_left_alone(
    prefill: FakeEngine, decode: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    prefill.script, decode.script = REFUSAL, waits_for_a_push
    with proxied([prefill], [decode], breaker_failures=2, breaker_pause=300) as proxy:
        for count in range(1, 5):
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
            assert len(prefill.calls) == min(count, 2)
        assert proxy.metric("unpushed_total", reason="prefill_refused") == 2
        assert proxy.metric("exchanges_total", role="prefill", outcome="refused") == 2
        assert proxy.metric("engine_usable", engine=prefill.url) == 0
    assert caplog.text.count("refuses what another engine answers: status 400: max_tokens is") == 2


def test_a_prefill_engine_that_refuses_now_and_then_stays_in_use(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    async def refuse_every_second_time(call: Call) -> None:
        await (REFUSAL if len(prefill.calls) % 2 else obey)(call)

    prefill.script = refuse_every_second_time
    with proxied([prefill], [decode], breaker_failures=2, breaker_pause=300) as proxy:
        for count in range(1, 7):
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
            until(lambda: proxy.metric("engine_load") == 0)
            assert len(prefill.calls) == count


@pytest.mark.usefixtures("little_grace")
def test_a_mistake_that_a_slow_decode_engine_finds_late_is_nobodys_failure(
    prefill: FakeEngine, decode: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked twice, as the first time it may have waited for a push."""

    async def find_it_the_second_time(call: Call) -> None:
        await (hang if call.push else REFUSAL)(call)

    prefill.script, decode.script = REFUSAL, find_it_the_second_time
    with proxied([prefill], [decode], breaker_failures=1, breaker_pause=300) as proxy:
        assert proxy.post("/v1/completions", COMPLETION).status_code == 400
        assert proxy.metric("unpushed_total") == 0
        assert proxy.metric("engine_usable") == 2
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_prefill_engine_that_has_too_much_to_do_is_not_waited_for_nor_at_fault(
    prefill: FakeEngine, decode: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    prefill.script, decode.script = says(429, {"error": {"message": "busy"}}), waits_for_a_push
    with proxied([prefill], [decode], breaker_failures=1, breaker_pause=300) as proxy:
        for _ in range(3):
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert len(prefill.calls) == 3
        assert proxy.metric("unpushed_total", reason="prefill_busy") == 3
        assert proxy.metric("engine_usable") == 2
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


# -- engines that have too much to do ----------------------------------------------------------


def test_an_engine_that_is_busy_with_others_has_not_failed(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    """One request waits in its queue for longer than it may, another one is answered meanwhile. The
    client is told at once."""

    async def serve_streams_first(call: Call) -> None:
        if not call.body.get("stream"):
            await hang(call)
        await call.begin(200, "text/event-stream")
        while not all(other.gone.is_set() for other in decode.calls if other is not call):
            await call.piece(EVENTS[0])
            await asyncio.sleep(0.05)
        await call.end(EVENTS[-1])

    decode.script = serve_streams_first
    settings = {"first_byte_timeout": 2.0, "breaker_failures": 1, "breaker_pause": 300, "tries": 3}
    with proxied([prefill], [decode], **settings) as proxy:
        waiting = ask(proxy)
        decode.asked(1)
        answer = proxy.post("/v1/completions", STREAM)
        assert answer.content.endswith(EVENTS[-1])
        said = waiting.recv(4096)
        waiting.close()
        assert said.startswith(b"HTTP/1.1 504")
        assert b"busy with others" in said
        assert len(decode.calls) == 2, "the prompt is not computed again"
        assert proxy.metric("engine_usable", engine=decode.url) == 1


def test_an_engine_too_busy_to_say_that_it_is_well_is_well(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    """As long as it answers requests."""
    enough = False

    async def answer_until_enough(call: Call) -> None:
        await call.begin(200, "text/event-stream")
        while not enough:
            await call.piece(EVENTS[0])
            await asyncio.sleep(0.05)
        await call.end(EVENTS[-1])

    decode.script = answer_until_enough
    with (
        proxied([prefill], [decode]) as proxy,
        proxy.client.stream("POST", "/v1/completions", json=STREAM) as answer,
    ):
        pieces = answer.iter_raw()
        next(pieces)
        decode.musing = 600.0
        checks = decode.checks
        until(lambda: decode.checks > checks + MISSES + 1)  # the last of them is under way
        assert proxy.metric("engine_usable", engine=decode.url) == 1
        enough = True
        assert b"".join(pieces).endswith(EVENTS[-1])


def test_a_prefill_that_is_not_needed_any_more_is_cancelled(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    async def slowly(call: Call) -> None:
        await prefill.is_asked(1)
        await obey(call)

    prefill.script, decode.script = hang, slowly
    with proxied([prefill], [decode]) as proxy:
        assert proxy.post("/v1/completions", STREAM).content == b"".join(EVENTS)
        until(prefill.calls[0].gone.is_set)
        until(lambda: proxy.metric("exchanges_total", role="prefill", outcome="cancelled") == 1)
        assert proxy.metric("engine_usable") == 2
