"""Between one client and the dispatcher: who is let in, the request's body, the answer's bytes, and
what happens if the client leaves."""

from __future__ import annotations

import asyncio
import hmac
import re
import string
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from lamina_kv.push.proxy.dispatcher import Dispatcher
from lamina_kv.push.proxy.errors import Refusal
from lamina_kv.push.proxy.metrics import Metrics
from lamina_kv.push.proxy.requests import ApiRequest, parse_fields
from lamina_kv.push.proxy.settings import Settings

_CLIENT_LEFT = 499
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_PASSED_ON = ("accept", "traceparent", "tracestate")


class _ClientLeft(Exception):
    """Nobody is there who could be answered."""


class _Client:
    """Writes one answer.

    Attributes:
        status: what the client got.
        complete: whether it got all of it.
    """

    def __init__(self, send: Send, request_id: str, patience: float) -> None:
        self.status = _CLIENT_LEFT
        self.complete = False
        self._send = send
        self._request_id = request_id
        self._patience = patience
        self._events = False

    async def begin(self, status: int, headers: Mapping[str, str], *, events: bool = False) -> None:
        """Status and headers."""
        self.status = status
        self._events = events
        pairs = {**headers, "x-request-id": self._request_id}.items()
        await self._write(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(name.encode(), value.encode("latin-1")) for name, value in pairs],
            }
        )

    async def piece(self, body: bytes) -> None:
        """A part of the body; waits while the client is slow."""
        await self._write({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        """The last part of the body."""
        await self._write({"type": "http.response.body", "body": body, "more_body": False})
        self.complete = True

    async def refuse(self, refusal: Refusal) -> None:
        """The proxy's own answer, or end of one. What is neither can only be broken off, which the
        server does if it is not completed."""
        if self.status == _CLIENT_LEFT:
            await self.begin(refusal.status, refusal.headers)
            await self.end(refusal.body)
        elif self._events and not self.complete:
            await self.end(refusal.event)

    async def _write(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await self._send(message)
        except (TimeoutError, OSError) as error:
            raise _ClientLeft from error


class Relay:
    """See the module. An ASGI application.

    Args:
        settings: who may ask, how much, how long.
        dispatcher: has the answers.
        metrics: is told what happens.

    Attributes:
        tasks: one per request that was let in and has not ended.
    """

    def __init__(self, settings: Settings, dispatcher: Dispatcher, metrics: Metrics) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        self._settings = settings
        self._dispatcher = dispatcher
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id", ""))
        client = _Client(send, request_id, self._settings.stall_timeout)
        began = time.perf_counter()
        try:
            self._check_token(headers)
            with self._let_in():
                await self._serve(scope, receive, headers, request_id, client)
        except Refusal as refusal:
            await client.refuse(refusal)
        except _ClientLeft:
            pass
        except asyncio.CancelledError:
            # The server is ending, and nobody waits for this task: the client is to know why.
            await client.refuse(Refusal(503, "the proxy is shutting down: ask another one"))
        finally:
            route = scope["path"] if scope["method"] == "POST" else "other"
            self._metrics.requests.labels(route, str(int(client.status))).inc()
            self._metrics.seconds.observe(time.perf_counter() - began)

    def _check_token(self, headers: Headers) -> None:
        if self._settings.token is None:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(token.strip().encode(), self._settings.token.encode())
        if scheme.lower() != "bearer" or not right:
            raise Refusal(HTTPStatus.UNAUTHORIZED, "show the proxy's token: Authorization: Bearer")

    @contextmanager
    def _let_in(self) -> Iterator[None]:
        if len(self.tasks) >= self._settings.max_outstanding:
            raise Refusal(503, f"{len(self.tasks)} requests are outstanding: ask again later")
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self._metrics.outstanding.inc()
        try:
            yield
        finally:
            self.tasks.discard(task)
            self._metrics.outstanding.dec()

    async def _serve(
        self, scope: Scope, receive: Receive, headers: Headers, request_id: str, client: _Client
    ) -> None:
        seconds = self._settings.total_timeout
        try:
            async with asyncio.timeout(seconds):
                request = await self._read(scope, receive, headers, request_id)
                passing = asyncio.create_task(self._pass(request, client))
                leaving = asyncio.create_task(_left(receive))
                try:
                    await asyncio.wait({passing, leaving}, return_when=asyncio.FIRST_COMPLETED)
                    if client.complete:
                        await asyncio.wait({passing})
                finally:
                    passing.cancel()
                    leaving.cancel()
                    await asyncio.wait({passing, leaving})
                if passing.cancelled():
                    raise _ClientLeft
                passing.result()
        except TimeoutError as error:
            raise Refusal(504, f"not done within {seconds:g} s") from error

    async def _pass(self, request: ApiRequest, client: _Client) -> None:
        began = time.perf_counter()
        async with self._dispatcher.answer(request) as answer:
            self._metrics.first_byte_seconds.observe(time.perf_counter() - began)
            await client.begin(answer.status, answer.headers, events=answer.events)
            async for piece in answer.pieces:
                await client.piece(piece)
            await client.end()

    # -- the request ---------------------------------------------------------------------------

    async def _read(
        self, scope: Scope, receive: Receive, headers: Headers, request_id: str
    ) -> ApiRequest:
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        # As it came; only what may not stand in a URL at all is escaped.
        target = quote(scope["raw_path"] + query, safe=string.punctuation).encode()
        passed = {name: headers[name] for name in _PASSED_ON if name in headers}
        passed["x-request-id"] = request_id
        if self._settings.engine_key is not None:
            passed["authorization"] = f"Bearer {self._settings.engine_key}"
        elif self._settings.token is None and "authorization" in headers:
            passed["authorization"] = headers["authorization"]
        if scope["method"] != "POST":
            return ApiRequest(request_id, scope["method"], target, passed)
        body = await self._read_body(receive, headers)
        passed["content-type"] = "application/json"
        fields = parse_fields(body)
        return ApiRequest(request_id, "POST", target, passed, fields, len(body))

    async def _read_body(self, receive: Receive, headers: Headers) -> bytes:
        limit = self._settings.max_body_bytes
        too_large = Refusal(413, f"the body has more than {limit} bytes")
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            raise too_large
        parts, size = [], 0
        while True:
            try:
                async with asyncio.timeout(self._settings.stall_timeout):
                    message = await receive()
            except TimeoutError as error:
                raise Refusal(408, "the rest of the body did not come") from error
            if message["type"] == "http.disconnect":
                raise _ClientLeft
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)


def _request_id(given: str) -> str:
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


async def _left(receive: Receive) -> None:
    """Returns when the client has left, or has its answer."""
    while (await receive())["type"] != "http.disconnect":
        pass
