"""Between one client and the dispatcher: who is let in, the request's body, the answer's bytes, and
what happens if the client leaves."""

from __future__ import annotations

import asyncio
import hmac
import re
import string
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from lamina_kv.push.proxy.dispatcher import Dispatcher
from lamina_kv.push.proxy.errors import Refusal
from lamina_kv.push.proxy.headers import CREDENTIALS, Pairs, of_request, raw, shown_keys
from lamina_kv.push.proxy.journal import Entry
from lamina_kv.push.proxy.memory import COPIES, Memory, Share
from lamina_kv.push.proxy.metrics import Metrics
from lamina_kv.push.proxy.requests import ApiRequest, harmless, parse_fields, split_of
from lamina_kv.push.proxy.settings import Settings
from lamina_kv.push.proxy.splits import SPLITS

_CLIENT_LEFT = 499
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

_ROUTES: Final = {
    *SPLITS,
    "/v1/embeddings",
    "/v1/models",
    "/v1/score",
    "/v1/rerank",
    "/tokenize",
    "/detokenize",
}
"""Paths that metrics tell apart. A client can ask for any path, and each would be a series."""

_FOR_ONE_ENGINE: Final = frozenset(
    {
        "/abort_requests",
        "/collective_rpc",
        "/fault_tolerance/apply",
        "/finish_weight_update",
        "/init_weight_transfer_engine",
        "/pause",
        "/release_kv_cache_memory",
        "/reset_encoder_cache",
        "/reset_mm_cache",
        "/reset_prefix_cache",
        "/resume",
        "/scale_elastic_ep",
        "/shutdown_weight_transfer_engine",
        "/sleep",
        "/start_draft_weight_update",
        "/start_profile",
        "/start_weight_update",
        "/stop_profile",
        "/update_weight_version",
        "/update_weights",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/wake_up",
        "/weight_checker",
    }
)
"""What changes an engine, of vLLM 0.33. Through the proxy it would change any one of them, and be
there for every client."""


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
        self._named = False

    async def begin(self, status: int, headers: Pairs, *, events: bool = False) -> None:
        """Status and headers."""
        self.status = status
        self._events = events
        pairs = raw((*headers, ("x-request-id", self._request_id)))
        await self._write({"type": "http.response.start", "status": status, "headers": pairs})

    async def piece(self, body: bytes) -> None:
        """A part of the body, of events whole ones; waits while the client is slow."""
        self._named = body.startswith(b"event:")
        await self._write({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        """The last part of the body."""
        await self._write({"type": "http.response.body", "body": body, "more_body": False})
        self.complete = True

    async def refuse(self, refusal: Refusal) -> None:
        """The proxy's own answer, or end of one. What is neither can only be broken off, which the
        server does if it is not completed."""
        if self.status == _CLIENT_LEFT:
            await self.begin(refusal.status, (*refusal.headers.items(),))
            await self.end(refusal.body)
        elif self._events and not self.complete:
            await self.end(refusal.event(named=self._named))

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
        self._memory = Memory(settings.max_held_bytes, metrics.held_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id", ""))
        client = _Client(send, request_id, self._settings.stall_timeout)
        path = quote(scope["raw_path"], safe=string.punctuation)
        entry = Entry(request_id, scope["method"], path)
        try:
            self._check(scope, headers)
            with self._let_in(), self._memory.share() as share:
                await self._serve(scope, receive, headers, entry, share, client)
        except Refusal as refusal:
            await client.refuse(refusal)
        except _ClientLeft:
            pass
        except asyncio.CancelledError:
            # The server is ending, and nobody waits for this task: the client is to know why.
            await client.refuse(Refusal(503, "the proxy is shutting down: ask another one"))
        finally:
            route = scope["path"] if scope["path"] in _ROUTES else "other"
            self._metrics.requests.labels(route, str(int(client.status))).inc()
            self._metrics.seconds.observe(entry.seconds)
            entry.write(client.status)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Whether a client may ask this.

        Raises:
            Refusal: if it may not.
        """
        if not {".", ".."}.isdisjoint(scope["path"].split("/")):
            # Whoever resolves it asks the engine for another path than this.
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                "the path has a segment . or ..: ask for the path it leads to",
            )
        if scope["path"] == "/admin" or scope["path"].startswith("/admin/"):
            # With a key that is none of the engines' business.
            raise Refusal(404, "the proxy answers no such request at /admin itself")
        if scope["method"] == "OPTIONS":
            # A browser asks without a key whether it may ask with one. It has nothing else to say.
            if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
                raise Refusal(400, "OPTIONS has no body here: ask without one")
        elif self._settings.token is not None:
            token = self._settings.token.encode()
            if not any(hmac.compare_digest(key.encode(), token) for key in shown_keys(headers)):
                raise Refusal(
                    HTTPStatus.UNAUTHORIZED, "show the proxy's token: Authorization: Bearer"
                )
        if scope["method"] != "GET" and scope["path"].rstrip("/") in _FOR_ONE_ENGINE:
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                "this changes one engine, and the proxy has several: ask each engine itself",
            )

    @contextmanager
    def _let_in(self) -> Iterator[None]:
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
        self,
        scope: Scope,
        receive: Receive,
        headers: Headers,
        entry: Entry,
        share: Share,
        client: _Client,
    ) -> None:
        seconds = self._settings.total_timeout
        try:
            async with asyncio.timeout(seconds):
                request = await self._read(scope, receive, headers, entry, share)
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
        began = request.entry.seconds
        async with self._dispatcher.answer(request) as answer:
            self._metrics.first_byte_seconds.observe(request.entry.seconds - began)
            request.entry.first_byte()
            await client.begin(answer.status, answer.headers, events=answer.events)
            async for piece in answer.pieces:
                await client.piece(piece)
            await client.end()

    # -- the request ---------------------------------------------------------------------------

    async def _read(
        self, scope: Scope, receive: Receive, headers: Headers, entry: Entry, share: Share
    ) -> ApiRequest:
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        # As it came; only what may not stand in a URL at all is escaped.
        target = quote(scope["raw_path"] + query, safe=string.punctuation).encode()
        if not target.startswith(b"/"):
            raise Refusal(400, "a request is for a path: it begins with /, without scheme and host")
        passed = {**of_request(headers), "x-request-id": entry.id}
        self._show(passed, scope["method"])
        split = split_of(scope["method"], scope["path"])
        body = await self._read_body(receive, headers, share, copies=COPIES if split else 1)
        if split is not None:
            passed["content-type"] = "application/json"
            fields, rest = parse_fields(body), b""
        else:
            fields, rest = None, harmless(body, headers.get("content-type", ""))
        return ApiRequest(entry.id, scope["method"], target, passed, fields, len(body), rest, entry)

    def _show(self, passed: dict[str, str], method: str) -> None:
        """Put the keys right that engines are shown: the proxy's own token is none of theirs, and
        theirs is not for OPTIONS, which anybody may ask."""
        key = self._settings.engine_key
        if key is None and self._settings.token is None:
            return
        for name in CREDENTIALS:
            passed.pop(name, None)
        if key is not None and method != "OPTIONS":
            passed["authorization"] = f"Bearer {key}"

    async def _read_body(
        self, receive: Receive, headers: Headers, share: Share, *, copies: int
    ) -> bytes:
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
            share.grow(copies * len(part))
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)


def _request_id(given: str) -> str:
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


async def _left(receive: Receive) -> None:
    """Returns when the client has left, or has its answer."""
    while (await receive())["type"] != "http.disconnect":
        pass
