"""The proxy as an application: its routes, and what lives as long as it does.

=====================================  ==============================================
``POST`` to a path of ``splits.py``    to a prefill and a decode engine
``GET /health``                        200 if a decode engine is usable; needs no token
``GET /metrics``                       for Prometheus; needs no token
``/admin/…``                           see ``admin.py``; goes to no engine
anything else                          to a decode engine, as it came
=====================================  ==============================================
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST

from lamina_kv.push.proxy.admin import admin_routes
from lamina_kv.push.proxy.discovery.places import Place, place_problems
from lamina_kv.push.proxy.discovery.watch import Discovery
from lamina_kv.push.proxy.dispatcher import Dispatcher
from lamina_kv.push.proxy.engines import Engine, Role
from lamina_kv.push.proxy.errors import Refusal
from lamina_kv.push.proxy.fleet import Fleet
from lamina_kv.push.proxy.metrics import Metrics
from lamina_kv.push.proxy.relay import Relay
from lamina_kv.push.proxy.roster import Roster
from lamina_kv.push.proxy.routing.events.followers import Followers
from lamina_kv.push.proxy.routing.policies import make_policy
from lamina_kv.push.proxy.routing.router import Router
from lamina_kv.push.proxy.routing.words import RoutingPolicy
from lamina_kv.push.proxy.settings import Settings, SettingsError
from lamina_kv.push.proxy.tls import engine_context
from lamina_kv.push.proxy.withdrawals import Withdrawals

_FIRST_CHECKS = 3.0
"""Seconds that engines have to answer before the proxy lets requests in."""
_LAST_WORDS = 5.0
"""Seconds that requests have to end once the server has cancelled them."""


def create_app(settings: Settings, policy: RoutingPolicy | None = None) -> FastAPI:
    """The application, for an ASGI server. Everything of it lives in the server's event loop.

    Args:
        settings: checked already.
        policy: chooses engines; by default the one that ``settings`` names.

    Raises:
        SettingsError: if a file cannot be used that the settings name, or if nothing can connect to
            an engine that they name.
    """
    named = _named(settings)
    fleet = Fleet(settings, engine_context(settings.engine_tls))
    discovery = None
    if settings.engines is not None:
        discovery = Discovery(settings.engines, settings.engines_interval)
    roster = Roster(fleet)
    metrics = Metrics(fleet)
    followers = Followers(settings.kv_events)

    def changed(engine: Engine) -> None:
        roster.changed(engine)
        followers.changed(engine)

    def gone(engine: Engine) -> None:
        metrics.forget(engine)
        followers.gone(engine)

    fleet.tell(changed, gone)
    router = Router(policy or make_policy(settings.policy), settings.disaggregate, metrics)
    withdrawals = Withdrawals()
    dispatcher = Dispatcher(settings, fleet, router, metrics, withdrawals)
    relay = Relay(settings, dispatcher, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        finding = None
        if discovery is None:
            fleet.update(named)
        else:
            finding = asyncio.create_task(discovery.run(fleet.update))
        # Whoever finds the proxy listening must not find it without engines that are there.
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_CHECKS):
                if discovery is not None:
                    await discovery.settled.wait()
                for engine in fleet:
                    await engine.checked.wait()
        yield
        if relay.tasks:
            await asyncio.wait(relay.tasks, timeout=_LAST_WORDS)
        if finding is not None:
            finding.cancel()
            await asyncio.wait({finding})
        await withdrawals.close()
        await fleet.close()
        await followers.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.get("/health")
    async def health() -> Response:
        if any(engine.usable for engine in fleet if engine.role is Role.DECODE):
            return Response()
        refusal = Refusal(503, "no decode engine can be used")
        return Response(refusal.body, refusal.status, refusal.headers)

    @app.get("/metrics")
    async def publish() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    app.include_router(admin_routes(settings, fleet))
    app.add_route("/{path:path}", relay)  # type: ignore[arg-type]
    return app


def _named(settings: Settings) -> list[Place]:
    """The engines of the command line.

    Raises:
        SettingsError: if nothing can connect to one of them.
    """
    places = [Place(Role.PREFILL, each.url, each.push) for each in settings.prefill]
    places += (Place(Role.DECODE, url) for url in settings.decode)
    problems = [
        f"--{place.role.value}: {problem}"
        for place in places
        for problem in place_problems(place.url)
    ]
    if problems:
        raise SettingsError((*problems,))
    return places
