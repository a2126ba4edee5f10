"""What operators ask the proxy itself.

====================================  ==========================================================
``GET /admin/engines``                every engine, as the proxy sees it
``POST /admin/drain?engine=URL``      give it no new requests; those under way go on
``POST /admin/undrain?engine=URL``    give it some again
====================================  ==========================================================

All of them want ``--admin-token``, and are refused if there is none. What is drained here is so for
this proxy alone, until it is undrained, not found any more, or the proxy ends.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from functools import wraps

import msgspec
from fastapi import APIRouter, Request, Response

from lamina_kv.push.proxy.engines import Engine
from lamina_kv.push.proxy.errors import Refusal
from lamina_kv.push.proxy.fleet import Fleet
from lamina_kv.push.proxy.headers import shown_keys
from lamina_kv.push.proxy.settings import Settings, server_url

_Handler = Callable[[Request], Awaitable[Response]]


class _Seen(msgspec.Struct):
    role: str
    url: str
    push: str
    healthy: bool
    trouble: str
    drained: bool
    usable: bool
    outstanding: int
    models: list[str]


def admin_routes(settings: Settings, fleet: Fleet) -> APIRouter:
    """See the module."""
    routes = APIRouter(prefix="/admin")

    def guarded(handler: _Handler) -> _Handler:
        @wraps(handler)
        async def checked(request: Request) -> Response:
            try:
                _check(settings, request)
                return await handler(request)
            except Refusal as refusal:
                return Response(refusal.body, refusal.status, refusal.headers)

        return checked

    @routes.get("/engines")
    @guarded
    async def engines(request: Request) -> Response:  # the name that a guarded handler's has
        return _answer(fleet)

    @routes.post("/drain")
    @guarded
    async def drain(request: Request) -> Response:
        return _answer(_drain(fleet, request, drained=True))

    @routes.post("/undrain")
    @guarded
    async def undrain(request: Request) -> Response:
        return _answer(_drain(fleet, request, drained=False))

    return routes


def _check(settings: Settings, request: Request) -> None:
    if settings.admin_token is None:
        raise Refusal(403, "the proxy was started without --admin-token")
    token = settings.admin_token.encode()
    if not any(hmac.compare_digest(key.encode(), token) for key in shown_keys(request.headers)):
        raise Refusal(401, "show the admin token: Authorization: Bearer")


def _drain(fleet: Fleet, request: Request, *, drained: bool) -> list[Engine]:
    url = server_url(request.query_params.get("engine", ""))
    if not (engines := fleet.drain(url, drained=drained)):
        raise Refusal(404, f"there is no engine {url!r}: GET /admin/engines lists them")
    return engines


def _answer(engines: Fleet | list[Engine]) -> Response:
    seen = [
        _Seen(
            engine.role.value,
            engine.url,
            engine.push,
            engine.healthy,
            engine.trouble,
            engine.drained,
            engine.usable,
            engine.outstanding,
            sorted(engine.models),
        )
        for engine in engines
    ]
    return Response(msgspec.json.encode({"engines": seen}), media_type="application/json")
