"""The proxy as an application: its routes, and what lives as long as it does.

=====================================  ==============================================
``POST /v1/completions``               to a prefill and a decode engine
``POST /v1/chat/completions``          the same
``GET /health``                        200 if a decode engine is usable; needs no token
``GET /metrics``                       for Prometheus; needs no token
``GET`` anything else                  to a decode engine
=====================================  ==============================================
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST

from lamina_kv.push.proxy.balancing import Balancer, LeastLoaded
from lamina_kv.push.proxy.dispatcher import Dispatcher
from lamina_kv.push.proxy.engines import Engine, Role
from lamina_kv.push.proxy.errors import Refusal
from lamina_kv.push.proxy.metrics import Metrics
from lamina_kv.push.proxy.relay import Relay
from lamina_kv.push.proxy.roster import Roster
from lamina_kv.push.proxy.settings import Settings

_FIRST_CHECKS = 3.0
"""Seconds that engines have to answer before the proxy lets requests in."""
_LAST_WORDS = 5.0
"""Seconds that requests have to end once the server has cancelled them."""


def create_app(settings: Settings, balancer: Balancer | None = None) -> FastAPI:
    """The application, for an ASGI server. Everything of it lives in the server's event loop.

    Args:
        settings: checked already.
        balancer: chooses engines; by default :class:`LeastLoaded`.
    """
    engines = [
        *(Engine(Role.PREFILL, place.url, place.push, settings) for place in settings.prefill),
        *(Engine(Role.DECODE, url, "", settings) for url in settings.decode),
    ]
    roster = Roster(engines)
    metrics = Metrics(engines)
    dispatcher = Dispatcher(settings, engines, balancer or LeastLoaded(), metrics)
    relay = Relay(settings, dispatcher, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watches = [asyncio.create_task(engine.watch(roster.changed)) for engine in engines]
        # Whoever finds the proxy listening must not find it without engines that are there.
        checks = [asyncio.create_task(engine.checked.wait()) for engine in engines]
        await asyncio.wait(checks, timeout=_FIRST_CHECKS)
        for check in checks:
            check.cancel()
        yield
        if relay.tasks:
            await asyncio.wait(relay.tasks, timeout=_LAST_WORDS)
        for watch in watches:
            watch.cancel()
        await asyncio.wait(watches)
        for engine in engines:
            await engine.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.get("/health")
    async def health() -> Response:
        if any(engine.usable for engine in engines if engine.role is Role.DECODE):
            return Response()
        refusal = Refusal(503, "no decode engine can be used")
        return Response(refusal.body, refusal.status, refusal.headers)

    @app.get("/metrics")
    async def publish() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    app.add_route("/v1/completions", relay, methods=["POST"])  # type: ignore[arg-type]
    app.add_route("/v1/chat/completions", relay, methods=["POST"])  # type: ignore[arg-type]
    app.add_route("/{path:path}", relay, methods=["GET"])  # type: ignore[arg-type]
    return app
