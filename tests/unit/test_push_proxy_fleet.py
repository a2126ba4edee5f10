"""Guards engines that come and go: those that are found are used, those that are drained get no new
requests and end their own, and operators can ask for either."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from lamina_kv.push.proxy.discovery.places import Place
from lamina_kv.push.proxy.engines import Role
from lamina_kv.push.proxy.fleet import Fleet
from lamina_kv.push.proxy.settings import PrefillAddress, Settings
from push_proxy.engines import ANSWER, EVENTS, Call, FakeEngine, says
from push_proxy.proxies import (
    COMPLETION,
    Proxy,
    ask,
    listed,
    proxied,
    push_address,
    write_engines,
)
from push_proxy.running import until

STREAM = COMPLETION | {"stream": True}
ADMIN = {"authorization": "Bearer operator"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "engines.yaml"


class Gate:
    """A script of an engine that streams until it may end."""

    def __init__(self) -> None:
        self.open = False

    async def __call__(self, call: Call) -> None:
        await call.begin(200, "text/event-stream")
        await call.piece(EVENTS[0])
        while not self.open:
            await asyncio.sleep(0.01)
        await call.end(EVENTS[-1])


def outstanding(proxy: Proxy, engine: FakeEngine) -> int | None:
    """Requests under way there; None if it is not known."""
    seen = proxy.client.get("/admin/engines", headers=ADMIN).json()["engines"]
    return next((each["outstanding"] for each in seen if each["url"] == engine.url), None)


# -- the file ----------------------------------------------------------------------------------


def test_an_engine_that_is_added_is_used(
    file: Path, prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    write_engines(file, [], [decode])
    with listed(file, usable=1) as proxy:
        assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        write_engines(file, [prefill], [decode, other])
        proxy.wait_usable(3)
        for _ in range(2):
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
            until(lambda: proxy.metric("engine_load") == 0)
    assert other.calls
    assert decode.calls[-1].push
    assert prefill.calls


def test_an_engine_that_is_left_out_ends_its_requests_and_is_gone(
    file: Path, prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    gate = Gate()
    decode.script = gate
    write_engines(file, [prefill], [decode])
    with (
        listed(file, usable=2, admin_token="operator") as proxy,
        proxy.client.stream("POST", "/v1/completions", json=STREAM) as answer,
    ):
        pieces = answer.iter_raw()
        came = next(pieces)
        write_engines(file, [prefill], [other])
        until(lambda: proxy.metric("engine_usable", engine=decode.url) == 0)
        until(lambda: proxy.metric("engine_usable", engine=other.url) == 1)
        for _ in range(3):
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert (len(decode.calls), len(other.calls)) == (1, 3)
        assert outstanding(proxy, decode) == 1
        gate.open = True
        assert came + b"".join(pieces) == EVENTS[0] + EVENTS[-1]
        until(lambda: outstanding(proxy, decode) is None)
        until(lambda: decode.url not in proxy.client.get("/metrics").text)
        assert other.url in proxy.client.get("/metrics").text


def test_an_engine_that_is_marked_is_drained_and_can_come_back(
    file: Path, prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    write_engines(file, [prefill], [decode, other], drained=[prefill, decode])
    with listed(file, usable=1, admin_token="operator") as proxy:
        for _ in range(3):
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert not prefill.calls
        assert not decode.calls
        assert outstanding(proxy, decode) == 0
        write_engines(file, [prefill], [decode, other], drained=[other])
        until(lambda: proxy.metric("engine_usable", engine=other.url) == 0)
        proxy.wait_usable(2)
        assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert len(other.calls) == 3
        assert len(decode.calls) == 1


def test_an_engine_that_is_left_out_and_named_again_meanwhile_stays(
    file: Path, prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    gate = Gate()
    decode.script = gate
    write_engines(file, [prefill], [decode])
    with (
        listed(file, usable=2) as proxy,
        proxy.client.stream("POST", "/v1/completions", json=STREAM) as answer,
    ):
        pieces = answer.iter_raw()
        next(pieces)
        write_engines(file, [prefill], [other])
        until(lambda: proxy.metric("engine_usable", engine=decode.url) == 0)
        write_engines(file, [prefill], [decode])
        until(lambda: proxy.metric("engine_usable", engine=decode.url) == 1)
        gate.open = True
        assert b"".join(pieces) == EVENTS[-1]
        assert proxy.post("/v1/completions", STREAM).content == EVENTS[0] + EVENTS[-1]


def test_a_place_where_nothing_can_connect_costs_no_other_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        settings = Settings(prefill=(PrefillAddress("http://p:1", "p:2"),), decode=("http://d:1",))
        fleet = Fleet(settings)
        urls = ("http://10.0.0.300:1", "http://127.0.0.1:9")
        for _ in range(2):
            fleet.update(Place(Role.DECODE, url) for url in urls)
        assert [engine.url for engine in fleet] == [urls[1]]
        await fleet.close()

    asyncio.run(scenario())
    assert caplog.text.count("http://10.0.0.300:1 is not used") == 1


# -- operators ---------------------------------------------------------------------------------


def test_an_operator_drains_an_engine(
    prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    with proxied([prefill], [decode, other], admin_token="operator") as proxy:

        def order(verb: str, engine: FakeEngine) -> dict[str, Any]:
            target = {"engine": f"{engine.url}/v1"}
            answer = proxy.client.post(f"/admin/{verb}", params=target, headers=ADMIN)
            (seen,) = answer.json()["engines"]
            return seen

        assert order("drain", decode) == {
            "role": "decode",
            "url": decode.url,
            "push": "",
            "healthy": True,
            "trouble": "",
            "drained": True,
            "usable": False,
            "outstanding": 0,
            "models": ["model"],
        }
        for _ in range(3):
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert not decode.calls
        assert order("undrain", decode)["usable"]
        assert order("drain", other)["drained"]
        assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert len(decode.calls) == 1
        assert proxy.metric("engine_drained") == 1
        assert proxy.metric("engine_drained", engine=other.url) == 1
        lines = proxy.client.get("/metrics").text.splitlines()
        usable = [line for line in lines if line.startswith("lamina_proxy_engine_usable{")]
        assert len(usable) == 2
        assert not any(other.url in line for line in usable), "nobody is woken for what is wanted"
        assert order("drain", prefill)["push"] == push_address(0)
        assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert decode.calls[-1].push is None


def test_what_an_operator_drains_stays_drained_when_the_file_changes(
    file: Path, prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    write_engines(file, [], [decode])
    with listed(file, usable=1, admin_token="operator") as proxy:
        target = {"engine": decode.url}
        proxy.client.post("/admin/drain", params=target, headers=ADMIN)
        assert proxy.client.get("/health").status_code == 503
        write_engines(file, [prefill], [decode, other])
        proxy.wait_usable(2)
        assert proxy.metric("engine_usable", engine=decode.url) == 0


@pytest.mark.parametrize(
    ("settings", "headers", "status"),
    [
        ({}, ADMIN, 403),
        ({"admin_token": "operator"}, {}, 401),
        ({"admin_token": "operator", "token": "client"}, {"authorization": "Bearer client"}, 401),
        ({"admin_token": "operator"}, ADMIN, 404),
    ],
)
def test_only_operators_drain_what_there_is(
    prefill: FakeEngine,
    decode: FakeEngine,
    settings: dict[str, str],
    headers: dict[str, str],
    status: int,
) -> None:
    with proxied([prefill], [decode], **settings) as proxy:
        target = {"engine": "http://nowhere" if status == 404 else decode.url}
        answer: httpx.Response = proxy.client.post("/admin/drain", params=target, headers=headers)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == status
        assert proxy.metric("engine_usable") == 2
        if status != 404:
            assert proxy.client.get("/admin/engines", headers=headers).status_code == status


# -- health ------------------------------------------------------------------------------------


def test_an_engine_that_is_well_and_serves_no_model_is_not_used(
    prefill: FakeEngine, decode: FakeEngine, other: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lamina_kv.push.proxy")
    with proxied([prefill], [decode, other]) as proxy:
        decode.models = []
        proxy.wait_usable(2)
        for _ in range(2):
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert not decode.calls
        decode.models = ["model"]
        proxy.wait_usable(3)
    assert f"{decode.url} does not answer: it serves no model" in caplog.text


def test_an_engine_whose_models_cannot_be_listed_is_not_used(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    ill = FakeEngine()
    ill._introduce = says(503, {})  # type: ignore[method-assign]
    with ill, proxied([prefill], [decode, ill], usable=2) as proxy:
        for _ in range(2):
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert not ill.calls


def test_a_model_that_is_loaded_later_is_known(prefill: FakeEngine, decode: FakeEngine) -> None:
    with proxied([prefill], [decode], admin_token="operator") as proxy:

        def models() -> list[list[str]]:
            seen = proxy.client.get("/admin/engines", headers=ADMIN).json()["engines"]
            return [each["models"] for each in seen]

        decode.models = ["model", "adapter"]
        until(lambda: models() == [["model"], ["adapter", "model"]])


def test_two_requests_at_a_time_of_an_engine_that_leaves_both_end(
    file: Path, prefill: FakeEngine, decode: FakeEngine, other: FakeEngine
) -> None:
    gate = Gate()
    decode.script = gate
    write_engines(file, [], [decode])
    with listed(file, usable=1, admin_token="operator") as proxy:
        clients = [ask(proxy, {"stream": True}) for _ in range(2)]
        decode.asked(2)
        write_engines(file, [], [other])
        until(lambda: proxy.metric("engine_usable", engine=decode.url) == 0)
        assert outstanding(proxy, decode) == 2
        gate.open = True
        for client in clients:
            answer = b""
            while EVENTS[-1] not in answer:
                answer += client.recv(4096)
            client.close()
        until(lambda: outstanding(proxy, decode) is None)
