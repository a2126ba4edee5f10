"""One engine as the proxy sees it: a pool of connections, its health, its breaker and its load."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from enum import StrEnum

import httpx

from lamina.push.proxy.breaker import BreakerState, CircuitBreaker
from lamina.push.proxy.settings import Settings

log = logging.getLogger("lamina.push.proxy")

MISSES = 2
"""Health checks in a row that an engine fails before it is taken for dead."""

_JITTER = 0.2
_CHECK_SECONDS = 1.0
"""What a health check may take at least, however often there is one."""
_KEEP_ALIVE = 3.0
"""Seconds that an idle connection is kept: fewer than vLLM's five, so that none is used that the
engine is just closing."""


class Role(StrEnum):
    """What an engine is asked for."""

    PREFILL = "prefill"
    DECODE = "decode"


class EngineError(Exception):
    """An engine could not be reached, or has not answered in time, or in full. Says why."""


class Engine:
    """See the module. Belongs to one event loop.

    Args:
        role: what it is asked for.
        url: of its OpenAI server.
        push: address at which decode engines reach it; empty for a decode engine.
        settings: timeouts, and how much failure is borne.
        clock: monotonic seconds.

    Attributes:
        load: of the requests outstanding there, the sum of their weights.
        visits: requests sent there so far.
        healthy: whether its last health checks went well; False until the first one has.
    """

    def __init__(
        self,
        role: Role,
        url: str,
        push: str,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.role = role
        self.url = url
        self.push = push
        self.load = 0
        self.visits = 0
        self.healthy = False
        self._settings = settings
        self._breaker = CircuitBreaker(settings.breaker_failures, settings.breaker_pause, clock)
        self._on_probation = False
        self._waiting: set[asyncio.Timeout] = set()
        self._base = httpx.URL(url)
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=settings.connect_timeout),
            # Requests are counted where they are let in; one more for health checks.
            limits=httpx.Limits(
                max_connections=settings.max_outstanding + 1,
                max_keepalive_connections=64,
                keepalive_expiry=_KEEP_ALIVE,
            ),
            headers={"accept-encoding": "identity"},
            trust_env=False,
        )

    def __str__(self) -> str:
        return f"{self.role.value} engine {self.url}"

    @property
    def usable(self) -> bool:
        """Whether a request may be sent there now."""
        if not self.healthy or self._breaker.state is BreakerState.OPEN:
            return False
        return self._breaker.state is BreakerState.CLOSED or not self._on_probation

    @contextmanager
    def visit(self, weight: int) -> Iterator[None]:
        """A request is outstanding there.

        Args:
            weight: what it adds to the load.
        """
        probation = self._breaker.state is BreakerState.PROBATION
        self._on_probation |= probation
        self.load += weight
        self.visits += 1
        try:
            yield
        finally:
            self.load -= weight
            if probation:
                self._on_probation = False

    def succeeded(self) -> None:
        """A request got an answer there."""
        self._breaker.succeeded()

    def failed(self, reason: str) -> None:
        """A request failed, and the engine is to blame.

        Args:
            reason: how.
        """
        if pause := self._breaker.failed():
            log.warning("%s is left alone for %.0f s, as it fails: %s", self, pause, reason)

    @asynccontextmanager
    async def send(
        self, method: str, target: bytes, headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[httpx.Response]:
        """An exchange: entered when the engine has sent its headers, closed when it is left.

        Args:
            method: HTTP's.
            target: path and query.
            headers: besides the engine's own.
            body: may be empty.

        Raises:
            EngineError: if there is no answer within ``first_byte_timeout``.
        """
        # Never joined as URLs are: a path that looks like a host must stay a path.
        path = self._base.raw_path.rstrip(b"/") + target
        request = self._client.build_request(
            method, self._base.copy_with(raw_path=path), headers=dict(headers), content=body
        )
        async with self.patience(self._settings.first_byte_timeout):
            response = await self._client.send(request, stream=True)
        try:
            yield response
        finally:
            await response.aclose()

    @asynccontextmanager
    async def patience(self, seconds: float) -> AsyncIterator[None]:
        """Something is waited for that the engine has to send: so long, or until its health checks
        say that it is dead.

        Raises:
            EngineError: if it did not come.
        """
        try:
            async with asyncio.timeout(seconds) as timeout:
                self._waiting.add(timeout)
                try:
                    yield
                finally:
                    self._waiting.discard(timeout)
        except TimeoutError as error:
            why = f"nothing in {seconds:g} s" if self.healthy else "its health checks fail"
            raise EngineError(why) from error
        except httpx.HTTPError as error:
            raise EngineError(f"{type(error).__name__} {error}".rstrip()) from error

    async def watch(self) -> None:
        """Check its health again and again, until cancelled."""
        misses = 0
        while True:
            good = await self._answers()
            misses = 0 if good else misses + 1
            if good and not self.healthy:
                log.info("%s is there", self)
                self.healthy = True
                self._breaker.reset()
            elif self.healthy and misses >= MISSES:
                log.warning("%s does not answer its health checks any more", self)
                self.healthy = False
                now = asyncio.get_running_loop().time()
                for timeout in self._waiting:
                    if not timeout.expired():
                        timeout.reschedule(now)
            jitter = random.uniform(1 - _JITTER, 1 + _JITTER)
            await asyncio.sleep(self._settings.health_interval * jitter)

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    async def _answers(self) -> bool:
        url = self._base.copy_with(raw_path=self._base.raw_path.rstrip(b"/") + b"/health")
        try:
            async with asyncio.timeout(max(self._settings.health_interval, _CHECK_SECONDS)):
                return (await self._client.get(url)).is_success
        except (httpx.HTTPError, TimeoutError):
            return False
