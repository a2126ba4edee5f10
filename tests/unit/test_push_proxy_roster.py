"""Guards what the proxy knows of its engines and says of them: what they serve, on which ranks, and
why one of them is not asked."""

from __future__ import annotations

import logging
from collections import Counter

import pytest

from lamina_kv.bench.ports import free_port
from lamina_kv.push.proxy.exchanges import read_url
from lamina_kv.push.proxy.settings import PrefillAddress, Settings, server_url
from push_proxy.engines import ANSWER, Call, FakeEngine, hang
from push_proxy.proxies import COMPLETION, QUICK, ask, proxied
from push_proxy.running import until

RANK = "x-data-parallel-rank"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the proxy's own logger says."""
    caplog.set_level(logging.INFO, "lamina_kv.push.proxy")
    return caplog


def warnings(said: pytest.LogCaptureFixture, *words: str) -> list[str]:
    """Those that have all of these words: on a busy machine there are others."""
    return [
        record.message
        for record in said.records
        if record.levelno == logging.WARNING and all(word in record.message for word in words)
    ]


# -- data parallelism --------------------------------------------------------------------------


def test_both_engines_are_told_of_one_rank(prefill: FakeEngine, decode: FakeEngine) -> None:
    prefill.ranks = [0, 1, 2]
    decode.ranks = [0, 1]
    with proxied([prefill], [decode]) as proxy:
        for _ in range(6):
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
            until(lambda: proxy.metric("engine_load") == 0)
    told = {call.push["id"]: call.headers[RANK] for call in prefill.calls}
    for call in decode.calls:
        assert call.push["prefill"] == f"10.0.0.1:{7000 + int(told[call.push['id']])}"
    assert Counter(told.values()) == {"0": 2, "1": 2, "2": 2}
    assert Counter(call.headers[RANK] for call in decode.calls) == {"0": 3, "1": 3}


def test_ranks_of_one_machine_of_several(prefill: FakeEngine, decode: FakeEngine) -> None:
    """A server asks its ranks by their place; each listens at its number in the deployment."""
    prefill.ranks = [3, 2]
    with proxied([prefill], [decode]) as proxy:
        for _ in range(2):
            proxy.post("/v1/completions", COMPLETION)
            until(lambda: proxy.metric("engine_load") == 0)
    told = {call.push["id"]: call.headers[RANK] for call in prefill.calls}
    found = {(told[call.push["id"]], call.push["prefill"]) for call in decode.calls}
    assert found == {("0", "10.0.0.1:7002"), ("1", "10.0.0.1:7003")}


@pytest.mark.parametrize("ranks", [[0], None])
def test_of_an_engine_that_does_not_say_the_first_rank_is_used(
    prefill: FakeEngine, decode: FakeEngine, ranks: list[int] | None
) -> None:
    prefill.ranks = ranks
    with proxied([prefill], [decode]) as proxy:
        proxy.post("/v1/completions", COMPLETION, headers={RANK: "7"})
    (asked,), (told,) = decode.asked(1), prefill.asked(1)
    assert (told.headers[RANK], asked.push["prefill"]) == ("0", "10.0.0.1:7000")
    assert asked.headers[RANK] == "7", "a client's rank is one of the decode engine"


def test_the_only_rank_of_a_server_is_where_it_listens(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    prefill.ranks = [5]
    with proxied([prefill], [decode]) as proxy:
        proxy.post("/v1/completions", COMPLETION)
    assert decode.asked(1)[0].push["prefill"] == "10.0.0.1:7005"


def test_a_rank_that_is_busy_is_spared(prefill: FakeEngine, decode: FakeEngine) -> None:
    prefill.ranks = [0, 1]
    prefill.script = decode.script = hang
    with proxied([prefill], [decode]) as proxy:
        large = ask(proxy, {"prompt": "x" * 8000})
        busy = prefill.asked(1)[0].headers[RANK]
        small = [ask(proxy) for _ in range(3)]
        idle = {call.headers[RANK] for call in prefill.asked(4)[1:]}
        assert idle == {"0", "1"} - {busy}
        for connection in (large, *small):
            connection.close()
        until(lambda: proxy.metric("engine_load") == 0)


def test_an_engine_of_many_ranks_bears_more(decode: FakeEngine, prefill: FakeEngine) -> None:
    with FakeEngine(hang) as single, FakeEngine(hang) as wide:
        wide.ranks = [0, 1, 2]
        decode.script = hang
        with proxied([single, wide], [decode]) as proxy:
            connections = [ask(proxy) for _ in range(8)]
            until(lambda: len(single.calls) + len(wide.calls) == 8)
            assert (len(single.calls), len(wide.calls)) == (2, 6)
            for connection in connections:
                connection.close()
            until(lambda: proxy.metric("engine_load") == 0)


def test_ranks_are_asked_for_anew_when_an_engine_comes_back(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    with proxied([prefill], [decode]) as proxy:
        prefill.healthy = False
        proxy.wait_usable(1)
        prefill.healthy, prefill.ranks = True, [0, 1]
        proxy.wait_usable(2)
        proxy.post("/v1/completions", COMPLETION)
    assert prefill.asked(1)[0].headers[RANK] == "0"


# -- what is said ------------------------------------------------------------------------------


def test_what_is_served_is_said_at_the_start(
    prefill: FakeEngine, decode: FakeEngine, said: pytest.LogCaptureFixture
) -> None:
    prefill.ranks = [0, 1]
    decode.models = None
    with proxied([prefill], [decode]):
        pass
    lines = [record.message for record in said.records if record.levelno == logging.INFO]
    assert (
        f"prefill engine {prefill.url} serves model on data-parallel ranks 0, 1, "
        "and pushes from 10.0.0.1:7000, 10.0.0.1:7001"
    ) in lines
    assert f"decode engine {decode.url} serves a model without a name" in lines
    assert not warnings(said, "does not serve")


def test_who_finds_the_proxy_listening_finds_its_engines(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    decode.musing = 0.7
    with proxied([prefill], [decode], patient=False, health_interval=5.0) as proxy:
        assert proxy.post("/v1/completions", COMPLETION).is_success


def test_an_engine_that_hangs_does_not_hold_the_proxy(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    prefill.musing = 600.0
    with proxied([prefill], [decode], usable=1, health_interval=600.0) as proxy:
        assert proxy.post("/v1/completions", COMPLETION).is_success


def test_an_engine_that_does_not_answer_is_told_once_with_the_reason(
    prefill: FakeEngine, decode: FakeEngine, said: pytest.LogCaptureFixture
) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    with proxied([nowhere], [decode]) as proxy:
        until(lambda: warnings(said, nowhere, "ClientConnectorError"))
        for _ in range(5):
            assert proxy.post("/v1/completions", COMPLETION).is_success
        for count in (1, 2):
            decode.healthy = False
            until(lambda: len(warnings(said, decode.url, "status 503")) == count)  # noqa: B023
            decode.healthy = True
            proxy.wait_usable(1)
    (line,) = warnings(said, nowhere, "ClientConnectorError")
    assert line.startswith(f"prefill engine {nowhere} does not answer: GET {nowhere}/health: ")


def test_a_reason_that_changes_is_told(prefill: FakeEngine, said: pytest.LogCaptureFixture) -> None:
    decode = FakeEngine()
    decode.healthy = False
    with proxied([prefill], [decode], usable=1):
        until(lambda: warnings(said, decode.url, "status 503"))
        decode.stop()
        until(lambda: warnings(said, decode.url, "ClientConnectorError"))
        assert len(warnings(said, decode.url, "status 503")) == 1


def test_engines_that_serve_other_models_are_told_of(
    prefill: FakeEngine, decode: FakeEngine, said: pytest.LogCaptureFixture
) -> None:
    prefill.models, decode.models = ["base", "more"], ["base", "adapter"]
    with proxied([prefill], [decode]):
        pass
    (line,) = warnings(said, "does not serve")
    assert f"{prefill.url} does not serve adapter, as decode engine {decode.url} does" in line
    assert "--served-model-name" in line


@pytest.mark.parametrize("body", [b'{"data": [{"id": "\xff"}]}', b"", b"[]", b'{"data": [1]}'])
def test_what_nobody_understands_is_not_known(
    decode: FakeEngine, said: pytest.LogCaptureFixture, body: bytes
) -> None:
    async def babble(call: Call) -> None:
        await call.begin(200, "application/json")
        await call.end(body)

    with FakeEngine() as prefill:
        prefill._introduce = babble  # type: ignore[method-assign]
        with proxied([prefill], [decode]) as proxy:
            assert proxy.post("/v1/completions", COMPLETION).is_success
    assert f"prefill engine {prefill.url} serves a model without a name" in said.text


def test_the_proxy_shows_its_engine_key(decode: FakeEngine) -> None:
    async def note(call: Call) -> None:
        keys.append(call.headers.get("authorization"))
        await call.answer(200, {})

    keys: list[str | None] = []
    with FakeEngine() as prefill:
        prefill._introduce = note  # type: ignore[method-assign]
        with proxied([prefill], [decode], engine_key="inner"):
            pass
    assert len(keys) >= 2
    assert {*keys} == {"Bearer inner"}


# -- URLs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", ["", "/", "/v1", "/v1/"])
def test_the_url_of_an_api_is_that_of_its_server(
    prefill: FakeEngine, decode: FakeEngine, more: str
) -> None:
    with proxied([prefill.url + more], [decode.url + more], usable=2) as proxy:
        assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert proxy.metric("engine_usable", engine=prefill.url) == 1
    assert {call.target for call in (*prefill.calls, *decode.calls)} == {"/v1/completions"}


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("http://h:1/base/v1/", "http://h:1/base"),
        ("http://h:1/v1//", "http://h:1"),
        ("http://h:1/v10", "http://h:1/v10"),
        ("http://h:1/base", "http://h:1/base"),
        ("http://v1", "http://v1"),
    ],
)
def test_how_a_url_is_put_right(given: str, right: str) -> None:
    assert server_url(given) == right
    settings = Settings(
        prefill=(PrefillAddress(given, "p:1"),), decode=("http://other/v1",), **QUICK
    )
    assert (settings.prefill[0].url, settings.decode) == (right, ("http://other",))
    assert read_url(right).host
