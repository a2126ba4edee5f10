"""Guards the proxy while its engines change under load: added, drained, killed, replaced and
upgraded. No request fails but those whose stream had begun on the engine that was killed."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from push_proxy.engines import Call, FakeEngine, Script, errors
from push_proxy.proxies import CHAT, COMPLETION, Proxy, listed, write_engines
from push_proxy.running import PATIENCE, until

CLIENTS = 8
PIECES = 6


def serving(name: str, beat: float = 0.01) -> Script:
    """An engine that says who it is, in whole answers and in streams that take their time."""

    async def script(call: Call) -> None:
        if not call.body.get("stream"):
            await asyncio.sleep(beat)
            await call.answer(200, {"by": name, "complete": True})
            return
        await call.begin(200, "text/event-stream")
        for index in range(PIECES):
            await asyncio.sleep(beat)
            await call.piece(b"data: %s\n\n" % json.dumps({"by": name, "i": index}).encode())
        await call.end(b"data: [DONE]\n\n")

    return script


@dataclass
class Result:
    """What one request came to.

    Attributes:
        by: engines that have said something in it.
        failure: why it failed; empty if it did not.
    """

    by: set[str]
    failure: str = ""


@dataclass
class Load:
    """Requests all the time.

    Attributes:
        results: of those that have ended.
    """

    results: list[Result] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def go_on(self, more: int = 3 * CLIENTS) -> None:
        """Until so many more have ended."""
        wanted = len(self.results) + more
        until(lambda: len(self.results) >= wanted)

    def client(self, url: str, number: int) -> None:
        with httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as client:
            while not self._stop.is_set():
                number += 1
                self.results.append(self._ask(client, number))

    def stop(self) -> None:
        self._stop.set()

    def _ask(self, client: httpx.Client, number: int) -> Result:
        path, body = (
            ("/v1/completions", COMPLETION),
            ("/v1/chat/completions", CHAT),
            ("/v1/responses", {"input": "Hello"}),
        )[number % 3]
        stream = bool(number % 2)
        answer = client.post(path, json=body | {"stream": stream})
        if answer.status_code != 200:
            return Result(set(), f"status {answer.status_code}: {answer.text}")
        if not stream:
            return Result({answer.json()["by"]})
        events = answer.content.split(b"\n\n")[:-1]
        said = [json.loads(e.removeprefix(b"data: ")) for e in events if e != b"data: [DONE]"]
        by = {event["by"] for event in said if "by" in event}
        if broken := errors(answer.content.replace(b"data: [DONE]\n\n", b"")):
            return Result(by, str(broken))
        whole = [event["i"] for event in said] == [*range(PIECES)]
        return Result(by, "" if whole and events[-1] == b"data: [DONE]" else "it is not whole")


@contextmanager
def load(proxy: Proxy) -> Iterator[Load]:
    """Clients that ask while the ``with`` block runs."""
    asking = Load()
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(asking.client, proxy.url, number) for number in range(CLIENTS)]
        try:
            asking.go_on()
            yield asking
            asking.go_on()
        finally:
            asking.stop()
        for client in clients:
            client.result()


@dataclass
class Pools:
    """Engines, and the file that names them."""

    file: Path
    prefill: list[FakeEngine]
    decode: list[FakeEngine]

    def write(self, drained: Sequence[FakeEngine] = ()) -> None:
        write_engines(self.file, self.prefill, self.decode, drained)


@pytest.fixture
def start() -> Iterator[Callable[..., FakeEngine]]:
    """Starts an engine by its name."""
    with ExitStack() as engines:
        yield lambda name, port=None: engines.enter_context(FakeEngine(serving(name), port))


@pytest.fixture
def pools(tmp_path: Path, start: Callable[..., FakeEngine]) -> Pools:
    engines = Pools(
        tmp_path / "engines.yaml",
        [start("p0"), start("p1")],
        [start("d0"), start("d1"), start("d2")],
    )
    engines.write()
    return engines


def gone(proxy: Proxy, engine: FakeEngine) -> Callable[[], bool]:
    """Whether the proxy does not know it any more."""
    return lambda: engine.url not in proxy.client.get("/metrics").text


def test_engines_are_added_drained_and_replaced_and_nothing_fails(
    pools: Pools, start: Callable[..., FakeEngine]
) -> None:
    with listed(pools.file, usable=5) as proxy, load(proxy) as asking:
        pools.decode.append(start("d3"))
        pools.write()
        proxy.wait_usable(6)
        asking.go_on()
        old = pools.decode.pop(0)
        pools.write()
        until(gone(proxy, old))
        old.stop()
        asking.go_on()
        old = pools.prefill.pop(0)
        pools.prefill.append(start("p2"))
        pools.write()
        until(gone(proxy, old))
        old.stop()
        asking.go_on()
    assert not [result for result in asking.results if result.failure]
    assert {"d0", "d1", "d2", "d3"} == {name for result in asking.results for name in result.by}


def test_both_pools_are_upgraded_one_engine_after_the_other_and_nothing_fails(
    pools: Pools, start: Callable[..., FakeEngine]
) -> None:
    """Each is drained, ends, and another version of it is there at the same address."""
    with listed(pools.file, usable=5) as proxy, load(proxy) as asking:
        for pool in (pools.prefill, pools.decode):
            for index, old in enumerate(pool):
                pools.write(drained=[old])
                until(lambda old=old: proxy.metric("engine_usable", engine=old.url) == 0)
                until(lambda old=old: all(call.ended.is_set() for call in old.calls))
                old.stop()
                pool[index] = start("new", old.port)
                pools.write()
                proxy.wait_usable(5)
                asking.go_on(CLIENTS)
    assert not [result for result in asking.results if result.failure]
    assert "new" in {name for result in asking.results for name in result.by}


def test_of_an_engine_that_is_killed_only_streams_fail_that_had_begun(
    pools: Pools, start: Callable[..., FakeEngine]
) -> None:
    """And nobody notices a prefill engine that is."""
    with listed(pools.file, usable=5) as proxy, load(proxy) as asking:
        killed = pools.decode[0]
        killed.stop()
        asking.go_on()
        pools.decode[0] = start("d3")
        pools.write()
        until(gone(proxy, killed))
        asking.go_on()
        pools.prefill.pop(0).stop()
        asking.go_on()
        pools.write()
        asking.go_on()
    failed = [result for result in asking.results if result.failure]
    assert {*map(str, (result.by for result in failed))} <= {"{'d0'}"}, failed
    assert len(failed) <= CLIENTS
    assert "d3" in {name for result in asking.results for name in result.by}
