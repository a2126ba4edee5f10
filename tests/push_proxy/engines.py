"""A stand-in for an engine: an OpenAI server that does what a test tells it and notes what it was
asked. Run as a program it is a process of its own, that can be killed or stopped."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from push_proxy.running import PATIENCE, Running, until

EVENTS = (
    b'data: {"choices": [{"index": 0, "text": "one"}]}\n\n',
    'data: {"choices": [{"index": 0, "text": " \u00fcber\\n"}]}\n\n'.encode(),
    b"data: [DONE]\n\n",
)
ANSWER = {"id": "cmpl-1", "choices": [{"index": 0, "text": "one two"}], "usage": {"total": 3}}


class Died(Exception):
    """The engine's process ends here."""


@dataclass
class Call:
    """One request to an engine.

    Attributes:
        target: path and query.
        gone: set when the caller has left before the answer was complete.
        ended: set when the engine is done with it, whichever way.
    """

    method: str
    target: str
    headers: dict[str, str]
    raw: bytes
    send: Callable[[dict[str, Any]], Awaitable[None]]
    gone: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.raw)

    @property
    def push(self) -> dict[str, str] | None:
        """What it says about a push."""
        return self.body.get("kv_transfer_params", {}).get("lamina_push")

    async def begin(self, status: int, media_type: str, **headers: str) -> None:
        pairs = {"content-type": media_type, **headers}.items()
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in pairs]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})

    async def piece(self, body: bytes) -> None:
        await self.send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        await self.send({"type": "http.response.body", "body": body})

    async def answer(self, status: int, document: object) -> None:
        body = json.dumps(document).encode()
        await self.begin(status, "application/json", content_length=str(len(body)))
        await self.end(body)


Script = Callable[[Call], Awaitable[None]]


async def obey(call: Call) -> None:
    """As an engine does."""
    if call.method == "GET":
        await call.answer(200, {"data": [{"id": "model"}]})
    elif call.body.get("stream"):
        await call.begin(200, "text/event-stream; charset=utf-8")
        for event in EVENTS:
            await call.piece(event)
        await call.end()
    else:
        await call.answer(200, ANSWER)


async def agree(call: Call) -> None:
    await call.answer(200, ANSWER)


async def begin_and_hang(call: Call) -> None:
    await call.begin(200, "application/json")
    await call.piece(b"{")
    await asyncio.sleep(PATIENCE)


async def hang(call: Call) -> None:
    """Never says a word."""
    await asyncio.Event().wait()


async def stream_and_hang(call: Call) -> None:
    """Says one thing."""
    await call.begin(200, "text/event-stream")
    await call.piece(EVENTS[0])
    await asyncio.Event().wait()


async def die(call: Call) -> None:
    """Promises an answer, and closes the connection instead."""
    await call.begin(200, "application/json", content_length="100")
    raise Died


def says(status: int, document: object) -> Script:
    """Always the same answer."""

    async def script(call: Call) -> None:
        await call.answer(status, document)

    return script


def errors(stream: bytes) -> list[dict[str, object]]:
    """The error events of a stream that consists of whole events."""
    assert stream.endswith(b"\n\n")
    events = [json.loads(line.removeprefix(b"data: ")) for line in stream.split(b"\n\n")[:-1]]
    return [event["error"] for event in events if "error" in event]


class FakeEngine:
    """See the module. Serves while the ``with`` block runs.

    Args:
        script: see the attribute.
        port: where it listens; by default any that is free.
        tls: see :class:`Running`.

    Attributes:
        calls: what it was asked, by others than the proxy itself.
        withdrawn: ids of pushes that nobody will ask for.
        script: what it does about it.
        lets_go: what it does where a push is withdrawn.
        healthy: what it says about itself.
        musing: seconds that it thinks before it says so.
        checks: how often it was asked whether it is well.
        models: names of the models that it says that it serves; None if it does not say.
        ranks: numbers of its data-parallel ranks; None if it does not say.
        published: more lines of its metrics.
    """

    def __init__(self, script: Script = obey, port: int | None = None, **tls: Any) -> None:
        self.calls: list[Call] = []
        self.withdrawn: list[str] = []
        self.script = script
        self.lets_go: Script = agree
        self.healthy = True
        self.musing = 0.0
        self.checks = 0
        self.models: list[str] | None = ["model"]
        self.ranks: list[int] | None = [0]
        self.published: list[str] = []
        self._running = Running(self, lifespan=False, port=port, **tls)
        self.url = self._running.url
        self.port = self._running.port

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Its process ends: nobody listens any more, every connection is closed."""
        self._running.stop(hard=True)

    def as_new(self) -> FakeEngine:
        """Forget everything, once it is done with what it was asked, also by those that have
        left: what they sent was there before the two health checks."""
        self.musing = 0.0
        for _ in range(2):
            httpx.get(f"{self.url}/health", trust_env=False, timeout=PATIENCE)
        until(lambda: all(call.ended.is_set() for call in self.calls))
        self.calls.clear()
        self.withdrawn.clear()
        self.script, self.lets_go, self.healthy = obey, agree, True
        self.models, self.ranks, self.published = ["model"], [0], []
        return self

    def asked(self, count: int) -> list[Call]:
        """Its calls, once there are so many."""
        until(lambda: len(self.calls) >= count)
        return self.calls

    async def is_asked(self, count: int) -> None:
        """Wait for as many calls, in another engine's script."""
        while len(self.calls) < count:
            await asyncio.sleep(0.01)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/health":
            self.checks += 1
            await asyncio.sleep(self.musing)
            await Call("GET", "/health", {}, b"", send).answer(200 if self.healthy else 503, {})
            return
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        raw = b""
        while (message := await receive()).get("more_body") or message.get("body"):
            raw += message["body"]
            if not message["more_body"]:
                break
        if headers.get("user-agent") == "lamina-push-proxy":
            await self._introduce(Call(scope["method"], scope["path"], headers, raw, send))
            return
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        target = (scope["raw_path"] + query).decode()
        call = Call(scope["method"], target, headers, raw, send)
        if b'"withdrawn":true' in raw:
            assert (call.target, call.body["prompt"]) == ("/v1/completions", [0])
            assert call.push is not None
            self.withdrawn.append(call.push["id"])
            await self.lets_go(call)
            return
        self.calls.append(call)
        await self._run(call, receive)

    async def _introduce(self, call: Call) -> None:
        """What the proxy asks for itself."""
        if call.target == "/v1/models" and self.models is not None:
            await call.answer(200, {"object": "list", "data": [{"id": m} for m in self.models]})
        elif call.target == "/metrics" and self.ranks is not None:
            await call.begin(200, "text/plain")
            labels = '{engine="%d",model_name="a, {b}"} 0.0\n'
            lines = [f"vllm:num_requests_running{labels}" % rank for rank in self.ranks]
            lines += [f"{line}\n" for line in self.published]
            await call.end(("# HELP vllm:num_requests_running x\n" + "".join(lines)).encode())
        elif call.target == "/tokenize":
            await call.answer(200, {"tokens": [*call.body["prompt"].encode()]})
        else:
            await call.answer(401, {"error": "Unauthorized"})

    async def _run(self, call: Call, receive: Any) -> None:
        script = asyncio.ensure_future(self.script(call))
        leaving = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({script, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if script.done():
                script.result()
            else:
                call.gone.set()
        finally:
            script.cancel()
            leaving.cancel()
            call.ended.set()


class Program(FakeEngine):
    """An engine that is a process's only content, and says whom it has answered."""

    def __init__(self, script: Script) -> None:
        self.calls, self.withdrawn, self.script = [], [], script
        self.lets_go = agree
        self.healthy, self.musing = True, 0.0
        self.checks = 0
        self.models, self.ranks, self.published = ["model"], [0], []


if __name__ == "__main__":
    uvicorn.run(Program(globals()[sys.argv[2]]), port=int(sys.argv[1]), log_config=None)
