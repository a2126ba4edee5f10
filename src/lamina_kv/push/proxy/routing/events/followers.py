"""Who listens to which rank, as engines come and go."""

from __future__ import annotations

import asyncio

from lamina_kv.push.proxy.engines import Engine
from lamina_kv.push.proxy.routing.events.blocks import Blocks
from lamina_kv.push.proxy.routing.events.follow import follow
from lamina_kv.push.proxy.routing.events.places import EventPlaces
from lamina_kv.push.proxy.routing.events.stores import SharedStores
from lamina_kv.push.proxy.routing.ranks import Rank


class Followers:
    """See the module. Belongs to one event loop.

    Args:
        places: where engines publish.
    """

    def __init__(self, places: EventPlaces) -> None:
        self._places = places
        self._stores = SharedStores()
        self._tasks: dict[Rank, asyncio.Task[None]] = {}

    def changed(self, engine: Engine) -> None:
        """An engine is healthy from now on, perhaps with other ranks, or is not."""
        gone = [rank for rank in self._tasks if rank.engine is engine]
        for rank in gone:
            if rank not in engine.ranks or not engine.healthy:
                self._leave(rank)
        if not engine.healthy:
            return
        for rank in engine.ranks:
            endpoint = self._places.endpoint(engine.url, rank.number)
            if endpoint and rank not in self._tasks:
                rank.blocks = Blocks(self._stores)
                self._tasks[rank] = asyncio.create_task(follow(endpoint, rank.blocks))

    def gone(self, engine: Engine) -> None:
        """An engine is not known any more."""
        for rank in [rank for rank in self._tasks if rank.engine is engine]:
            self._leave(rank)

    async def close(self) -> None:
        """Listen to nobody any more."""
        tasks = [*self._tasks.values()]
        for rank in [*self._tasks]:
            self._leave(rank)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _leave(self, rank: Rank) -> None:
        self._tasks.pop(rank).cancel()
        if rank.blocks is not None:
            rank.blocks.forget()
            rank.blocks = None
