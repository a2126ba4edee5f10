"""The engines that the proxy knows, which come, are drained and go while it serves.

::

    found ──▶ in use ◀──▶ drained            no new requests; those under way go on
                 └──────┬─────┘
                   not found ──▶ leaving ──▶ gone     when its last request has ended
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterable, Iterator

from lamina_kv.push.proxy.discovery.places import Place
from lamina_kv.push.proxy.engines import Engine
from lamina_kv.push.proxy.settings import Settings

log = logging.getLogger("lamina_kv.push.proxy")

Told = Callable[[Engine], None]


class Fleet:
    """See the module. Iterating gives the engines of now, of both roles, those that leave among
    them. Belongs to one event loop.

    Args:
        settings: of every engine.
        verify: how engines' certificates are checked; None as usual.
    """

    def __init__(self, settings: Settings, verify: ssl.SSLContext | None = None) -> None:
        self._settings = settings
        self._verify = verify
        self._engines: dict[Place, Engine] = {}
        self._watches: dict[Place, asyncio.Task[None]] = {}
        self._leaving: dict[Place, asyncio.Task[None]] = {}
        self._by_hand: set[str] = set()
        self._unusable: set[Place] = set()
        self._changed: Told = lambda _: None
        self._gone: Told = lambda _: None

    def __iter__(self) -> Iterator[Engine]:
        return iter([*self._engines.values()])

    def tell(self, changed: Told, gone: Told) -> None:
        """Whom to tell.

        Args:
            changed: see :meth:`Engine.watch`.
            gone: called when an engine is not known any more.
        """
        self._changed, self._gone = changed, gone

    def update(self, places: Iterable[Place]) -> None:
        """These are all engines there are.

        Args:
            places: whatever stands in none of them leaves.
        """
        wanted = {place: place.drain for place in places}
        self._unusable &= wanted.keys()
        for place, drain in wanted.items():
            if (leaving := self._leaving.pop(place, None)) is not None:
                leaving.cancel()
            engine = self._engines.get(place) or self._add(place)
            if engine is not None:
                self._set(engine, drained=drain or engine.url in self._by_hand)
        for place in self._engines.keys() - wanted.keys() - self._leaving.keys():
            engine = self._engines[place]
            self._set(engine, drained=True)
            self._leaving[place] = asyncio.create_task(self._leave(place, engine))

    def drain(self, url: str, *, drained: bool) -> list[Engine]:
        """Give an engine no new requests, or give it some again, whatever was found.

        Args:
            url: of the engine.
            drained: which.

        Returns:
            the engines at this URL; none if it is not known.
        """
        engines = [engine for engine in self if engine.url == url]
        if engines and drained:
            self._by_hand.add(url)
        else:
            self._by_hand.discard(url)
        for place, engine in self._engines.items():
            if engine in engines and place not in self._leaving:
                self._set(engine, drained=drained)
        return engines

    async def close(self) -> None:
        """Let all of them go at once."""
        for task in (*self._leaving.values(), *self._watches.values()):
            task.cancel()
        await asyncio.gather(
            *self._leaving.values(), *self._watches.values(), return_exceptions=True
        )
        for engine in self:
            await engine.close()

    def _add(self, place: Place) -> Engine | None:
        """None, which is said once, if nothing can connect to such a place. Others are used."""
        try:
            engine = Engine(
                place.role,
                place.url,
                place.push,
                self._settings,
                server_name=place.server_name,
                verify=self._verify,
            )
        except ValueError as error:
            if place not in self._unusable:
                log.warning("%s engine %s is not used: %s", place.role.value, place.url, error)
            self._unusable.add(place)
            return None
        self._engines[place] = engine
        self._watches[place] = asyncio.create_task(engine.watch(self._changed))
        return engine

    def _set(self, engine: Engine, *, drained: bool) -> None:
        if drained and not engine.drained:
            log.info("%s is drained: it gets no new requests", engine)
        elif engine.drained and not drained:
            log.info("%s is drained no more", engine)
        engine.drained = drained

    async def _leave(self, place: Place, engine: Engine) -> None:
        log.info("%s is to go: %d requests are under way there", engine, engine.outstanding)
        await engine.idle()
        del self._engines[place], self._leaving[place]
        watch = self._watches.pop(place)
        watch.cancel()
        await asyncio.wait({watch})
        await engine.close()
        log.info("%s is gone", engine)
        if not any(other.url == engine.url for other in self):
            self._by_hand.discard(engine.url)
        self._gone(engine)
