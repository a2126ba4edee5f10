"""Prefill engines are told of prompts for which no decode engine will ask. They hold what they have
computed for a destination, and cannot see that an engine's server has refused the request."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack

from lamina_kv.push.proxy.engines import EngineError
from lamina_kv.push.proxy.headers import RANK
from lamina_kv.push.proxy.requests import ApiRequest
from lamina_kv.push.proxy.routing.ranks import Rank, Work

log = logging.getLogger("lamina_kv.push.proxy")

_TARGET = b"/v1/completions"
"""Whatever the client's API is: every engine that generates text has this one."""


class Withdrawals:
    """See the module. Belongs to one event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, request: ApiRequest, rank: Rank, push_id: str) -> None:
        """Have a prefill engine let go of a push; nobody waits for that.

        Args:
            request: the client's.
            rank: has computed its prompt.
            push_id: names the push.
        """
        # The engine may be leaving, and is not gone before this is over.
        visit = ExitStack()
        visit.enter_context(rank.engine.visit(rank, Work(1, 1)))
        task = asyncio.create_task(_send(request, rank, push_id))
        task.add_done_callback(lambda _: visit.close())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Tell nobody anything any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _send(request: ApiRequest, rank: Rank, push_id: str) -> None:
    headers = {**request.headers, RANK: str(rank.index)}
    body = request.for_withdrawal(push_id)
    try:
        reply = await rank.engine.exchange("POST", _TARGET, headers, body)
        failed = f"HTTP {reply.status}" if reply.status >= 400 else ""
    except EngineError as error:
        failed = str(error)
    if failed:
        log.info("request %s: %s holds its prompt for a while: %s", request.id, rank.engine, failed)
