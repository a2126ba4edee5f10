"""Guards the proxy where something ends: a client leaves or stops reading, an engine's process is
killed or stopped, the proxy itself is to end. Nothing is left running anywhere."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from lamina_kv.bench.ports import free_port
from push_proxy.engines import (
    ANSWER,
    EVENTS,
    Call,
    FakeEngine,
    Script,
    errors,
    hang,
    stream_and_hang,
)
from push_proxy.proxies import COMPLETION, ask, proxied
from push_proxy.running import PATIENCE, until

STREAM = COMPLETION | {"stream": True}


# -- clients that leave or are slow ------------------------------------------------------------


@pytest.mark.parametrize("script", [hang, stream_and_hang])
def test_a_client_that_leaves_cancels_both_engines(
    prefill: FakeEngine, decode: FakeEngine, script: Script
) -> None:
    prefill.script, decode.script = hang, script
    with proxied([prefill], [decode]) as proxy:
        client = ask(proxy, {"stream": script is not hang})
        (asked,), (told,) = decode.asked(1), prefill.asked(1)
        if script is not hang:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        assert not asked.gone.is_set()
        client.close()
        until(lambda: asked.gone.is_set() and told.gone.is_set())
        until(lambda: proxy.metric("outstanding") == proxy.metric("engine_load") == 0)
        assert proxy.metric("exchanges_total", outcome="cancelled") == 2
        assert proxy.metric("retries_total") == 0
        assert proxy.metric("engine_usable") == 2


def test_a_client_that_leaves_before_its_body_is_complete_costs_nothing(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    with proxied([prefill], [decode]) as proxy:
        client = ask(proxy)
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        until(lambda: proxy.metric("outstanding") == 1)
        client.close()
        until(lambda: proxy.metric("outstanding") == 0)
        assert len(decode.calls) == 1


def test_a_client_that_does_not_finish_its_body_is_told(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    with (
        proxied([prefill], [decode], stall_timeout=0.2) as proxy,
        socket.create_connection(("127.0.0.1", proxy.running.port)) as client,
    ):
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert client.recv(100).startswith(b"HTTP/1.1 408")
        assert proxy.metric("outstanding") == 0
        assert not decode.calls


def test_a_client_that_does_not_read_holds_no_engine(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    async def much(call: Call) -> None:
        await call.begin(200, "text/event-stream")
        while True:
            await call.piece(EVENTS[0] * 1000)
            await asyncio.sleep(0)

    decode.script = much
    with proxied([prefill], [decode], stall_timeout=1.0) as proxy:
        client = ask(proxy, {"stream": True})
        until(decode.asked(1)[0].gone.is_set)
        until(lambda: proxy.metric("outstanding") == 0)
        client.close()


# -- processes ---------------------------------------------------------------------------------


@contextmanager
def process(arguments: list[str], there: Callable[[], bool]) -> Iterator[subprocess.Popen[bytes]]:
    """A process while the ``with`` block runs; entered when it is ``there``."""
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path}
    ) as program:
        try:
            until(there)
            yield program
        finally:
            program.kill()


def answers(url: str) -> Callable[[], bool]:
    """Whether a server says that it is well."""

    def check() -> bool:
        try:
            return httpx.get(f"{url}/health", trust_env=False, timeout=1).is_success
        except httpx.HTTPError:
            return False

    return check


def listens(port: int) -> bool:
    """Whether connections are taken there."""
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


@contextmanager
def engine_process(script: Script) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ["-m", "push_proxy.engines", str(port), script.__name__]
    with process(arguments, answers(url)) as program:
        yield url, program


def test_headers_without_end_are_refused(prefill: FakeEngine, decode: FakeEngine) -> None:
    """As the proxy is started: by whoever can reach it, with no token."""
    port = free_port()
    command = ["-c", "from lamina_kv.cli.main import main; main()", "push-proxy"]
    options = [f"--port={port}", f"--decode={decode.url}", f"--prefill={prefill.url},127.0.0.1:1"]
    with (
        process([*command, *options], lambda: listens(port)),
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client,
    ):
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Long: ")
        with pytest.raises(ConnectionError):
            client.sendall(b"x" * (64 << 20))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_dies_or_is_stopped_before_it_answers_is_replaced(
    prefill: FakeEngine, other: FakeEngine, end: signal.Signals
) -> None:
    other.healthy = False
    with (
        engine_process(hang) as (url, engine),
        proxied([prefill], [url, other], usable=2) as proxy,
    ):
        client = ask(proxy)
        until(lambda: proxy.metric("engine_load", engine=url) > 0)
        other.healthy = True
        proxy.wait_usable(3)
        engine.send_signal(end)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        client.close()
        assert len(other.calls) == 1
        until(lambda: proxy.metric("engine_usable", engine=url) == 0)


def test_a_killed_engine_ends_its_streams_with_an_error_and_others_take_over(
    prefill: FakeEngine, other: FakeEngine
) -> None:
    other.healthy = False
    with (
        engine_process(stream_and_hang) as (url, engine),
        proxied([prefill], [url, other], usable=2) as proxy,
        proxy.client.stream("POST", "/v1/completions", json=STREAM) as answer,
    ):
        pieces = answer.iter_raw()
        came = next(pieces)
        other.healthy = True
        proxy.wait_usable(3)
        engine.kill()
        came += b"".join(pieces)
        assert came.startswith(EVENTS[0])
        assert [error["code"] for error in errors(came)] == [502]
        assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER


def test_sigterm_lets_requests_end_and_then_ends_the_proxy(
    prefill: FakeEngine, decode: FakeEngine
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    asked_to_end = threading.Event()

    async def until_asked_to_end(call: Call) -> None:
        await call.begin(200, "text/event-stream")
        await call.piece(EVENTS[0])
        while not asked_to_end.is_set():
            await asyncio.sleep(0.01)
        await call.piece(EVENTS[1])
        await call.end(EVENTS[2])

    decode.script = until_asked_to_end
    command = [
        "-c",
        "from lamina_kv.cli.main import main; main()",
        "push-proxy",
        "--port",
        str(port),
    ]
    engines = ["--prefill", f"{prefill.url},10.0.0.1:7000", "--decode", decode.url]
    with (
        process([*command, *engines], answers(url)) as proxy,
        httpx.stream("POST", f"{url}/v1/completions", json=STREAM, trust_env=False) as answer,
    ):
        pieces = answer.iter_raw()
        came = next(pieces)
        proxy.send_signal(signal.SIGTERM)
        until(lambda: not listens(port))
        with pytest.raises(httpx.ConnectError):
            httpx.post(f"{url}/v1/completions", json=STREAM, trust_env=False)
        asked_to_end.set()
        assert came + b"".join(pieces) == b"".join(EVENTS)
        assert proxy.wait(PATIENCE) == -signal.SIGTERM


@pytest.mark.parametrize("script", [hang, stream_and_hang])
def test_requests_that_do_not_end_in_time_are_told_and_cancelled(
    prefill: FakeEngine, decode: FakeEngine, script: Script
) -> None:
    prefill.script, decode.script = hang, script
    with proxied([prefill], [decode]) as proxy:
        client = ask(proxy, {"stream": True})
        until(lambda: decode.calls and prefill.calls)
        came = client.recv(100) if script is stream_and_hang else b""
        proxy.running.begin_to_stop()
        while piece := client.recv(4096):
            came += piece
        client.close()
        assert came.startswith(b"HTTP/1.1 503" if script is hang else b"HTTP/1.1 200")
        assert b"the proxy is shutting down" in came
        until(lambda: decode.calls[0].gone.is_set() and prefill.calls[0].gone.is_set())
