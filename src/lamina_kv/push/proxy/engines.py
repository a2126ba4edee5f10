"""One engine as the proxy sees it: a pool of connections, its health and its breaker, and what it
says of itself. What its ranks are doing is in :mod:`lamina_kv.push.proxy.routing.ranks`."""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from lamina_kv.push.addresses import normalise
from lamina_kv.push.proxy.breaker import BreakerState, CircuitBreaker
from lamina_kv.push.proxy.exchanges import ExchangeError, Exchanges, Reply
from lamina_kv.push.proxy.reports import EngineReport, read_report
from lamina_kv.push.proxy.routing.ranks import Rank, Visit, Work
from lamina_kv.push.proxy.settings import Settings

log = logging.getLogger("lamina_kv.push.proxy")

MISSES = 2
"""Health checks in a row that an engine fails before it is taken for dead."""

_JITTER = 0.2
_CHECK_SECONDS = 1.0
"""What a health check may take at least, however often there is one."""
_ITSELF = {"user-agent": "lamina-push-proxy"}
"""Tells the proxy's own questions from those of its clients."""
_TOKENIZE_SECONDS = 1.0
"""What an engine may take to say which tokens a prompt has; a request waits for it."""
PROBE_SECONDS = 10.0
"""How often a decode engine that leaves a prefill engine alone is sent a push from there all the
same: it does not try again by itself."""


class Role(StrEnum):
    """What an engine is asked for."""

    PREFILL = "prefill"
    DECODE = "decode"


class EngineError(Exception):
    """An engine could not be reached, or has not answered in time, or in full. Says why."""


class EngineBusy(EngineError):
    """An engine has not answered in time, and others meanwhile: it has too much to do, and that is
    no failure of its own."""


@dataclass(frozen=True, slots=True)
class WholeReply:
    """An engine's answer, all of it.

    Attributes:
        status: HTTP's.
        body: as it came.
    """

    status: int
    body: bytes

    @property
    def is_success(self) -> bool:
        """Whether the engine did what it was asked."""
        return 200 <= self.status < 300


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class Engine:
    """See the module. Belongs to one event loop.

    Args:
        role: what it is asked for.
        url: of its OpenAI server.
        push: address at which decode engines reach its rank 0, the others at the ports behind it;
            empty for a decode engine.
        settings: timeouts, and how much failure is borne.
        clock: monotonic seconds.
        server_name: whose certificate it shows, if that is not the host of its URL.
        verify: how its certificate is checked; None as usual.

    Attributes:
        outstanding: requests there that have not ended.
        drained: whether it gets no new requests.
        healthy: whether its last health checks went well; False until the first one has.
        checked: set when its first health check is over.
        trouble: while it is not healthy, why.
        models: names of models that it serves; empty if it does not say.
        ranks: its data-parallel ranks, one if it does not say.
    """

    def __init__(
        self,
        role: Role,
        url: str,
        push: str,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        *,
        server_name: str = "",
        verify: ssl.SSLContext | None = None,
    ) -> None:
        self.role = role
        self.url = url
        self.push = push
        self.outstanding = 0
        self.drained = False
        self.healthy = False
        self.checked = asyncio.Event()
        self.trouble = ""
        self.models: frozenset[str] = frozenset()
        self.ranks: tuple[Rank, ...] = ()
        self._clock = clock
        self._away: dict[str, float] = {}
        self._have_ranks([0])
        self._settings = settings
        self._breaker = CircuitBreaker(settings.breaker_failures, settings.breaker_pause, clock)
        self._on_probation = False
        self._waiting: set[asyncio.Timeout] = set()
        self._sent = 0
        self._ended = asyncio.Event()
        self._exchanges = Exchanges(url, settings.connect_timeout, verify, server_name)

    def __str__(self) -> str:
        return f"{self.role.value} engine {self.url}"

    @property
    def usable(self) -> bool:
        """Whether a request may be sent there now."""
        if self.drained or not self.healthy or self._breaker.state is BreakerState.OPEN:
            return False
        return self._breaker.state is BreakerState.CLOSED or not self._on_probation

    @property
    def load(self) -> int:
        """Tokens of the requests outstanding there."""
        return sum(rank.load for rank in self.ranks)

    @property
    def announced(self) -> int:
        """Blocks that it holds, by what it has announced."""
        return sum(len(rank.blocks) for rank in self.ranks if rank.blocks is not None)

    @property
    def visits(self) -> int:
        """Requests sent there so far, since it began."""
        return sum(rank.visits for rank in self.ranks)

    @contextmanager
    def visit(self, rank: Rank, work: Work) -> Iterator[Visit]:
        """A request is outstanding there.

        Args:
            rank: one of its ranks.
            work: what the request means there.
        """
        probation = self._breaker.state is BreakerState.PROBATION
        self._on_probation |= probation
        self.outstanding += 1
        try:
            with rank.visit(work) as visit:
                yield visit
        finally:
            self.outstanding -= 1
            self._ended.set()
            if probation:
                self._on_probation = False

    async def idle(self) -> None:
        """Returns when no request is outstanding there."""
        while self.outstanding:
            self._ended.clear()
            await self._ended.wait()

    def takes_pushes_from(self, push: str) -> bool:
        """Whether a decode engine takes pushes from there, or is to be asked to try.

        Args:
            push: a prefill engine's address.
        """
        return self._clock() >= self._away.get(normalise(push), 0.0)

    def sent_push_from(self, push: str) -> None:
        """A decode engine is sent a request that is pushed from there."""
        if (address := normalise(push)) in self._away:
            self._away[address] = self._clock() + PROBE_SECONDS

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
    ) -> AsyncIterator[Reply]:
        """An exchange that counts as one of the engine's; arguments as those of
        :meth:`~lamina_kv.push.proxy.exchanges.Exchanges.send`.

        Raises:
            EngineError: if there is no answer within ``first_byte_timeout``.
        """
        async with AsyncExitStack() as exchange:
            async with self.patience(self._settings.first_byte_timeout):
                reply = await exchange.enter_async_context(
                    self._exchanges.send(method, target, headers, body)
                )
            self.came()
            yield reply

    async def exchange(
        self, method: str, target: bytes, headers: Mapping[str, str], body: bytes
    ) -> WholeReply:
        """An exchange whose answer is wanted whole; arguments as those of :meth:`send`.

        Raises:
            EngineError: if the answer does not begin within ``first_byte_timeout``, or does not end
                within ``stall_timeout`` after that.
        """
        async with (
            self.send(method, target, headers, body) as reply,
            self.patience(self._settings.stall_timeout),
        ):
            return WholeReply(reply.status, await reply.rest())

    def came(self) -> None:
        """The engine has sent something of an answer."""
        self._sent += 1

    @asynccontextmanager
    async def patience(self, seconds: float) -> AsyncIterator[None]:
        """Something is waited for that the engine has to send: so long, or until its health checks
        say that it is dead.

        Raises:
            EngineBusy: if it did not come, while something else did.
            EngineError: if it did not come.
        """
        sent = self._sent
        try:
            async with asyncio.timeout(seconds) as timeout:
                self._waiting.add(timeout)
                try:
                    yield
                finally:
                    self._waiting.discard(timeout)
        except TimeoutError as error:
            if not self.healthy:
                raise EngineError("its health checks fail") from error
            if self._sent > sent:
                raise EngineBusy(f"it is busy with others for {seconds:g} s") from error
            raise EngineError(f"nothing in {seconds:g} s") from error
        except ExchangeError as error:
            raise EngineError(str(error)) from error

    async def watch(self, changed: Callable[[Engine], None]) -> None:
        """Check its health again and again, until cancelled.

        Args:
            changed: called when it is healthy from now on, or is not, or for another reason.
        """
        misses = 0
        while True:
            trouble = await self._check()
            misses = misses + 1 if trouble else 0
            if not trouble and not self.healthy:
                await self._introduce()
                self.healthy, self.trouble = True, ""
                self._breaker.reset()
                changed(self)
            elif trouble and trouble != self.trouble and (misses >= MISSES or not self.healthy):
                if self.healthy:
                    self._give_up()
                self.trouble = trouble
                changed(self)
            elif not trouble:
                self._reported(await self._report())
            self.checked.set()
            jitter = random.uniform(1 - _JITTER, 1 + _JITTER)
            await asyncio.sleep(self._settings.health_interval * jitter)

    async def close(self) -> None:
        """Close every connection."""
        await self._exchanges.close()

    def _give_up(self) -> None:
        self.healthy = False
        now = asyncio.get_running_loop().time()
        for timeout in self._waiting:
            if not timeout.expired():
                timeout.reschedule(now)

    async def _check(self) -> str:
        """Returns what is wrong with it; empty if nothing is. A server may say that it is well and
        serve nothing."""
        try:
            await self._ask(b"/health")
            reply = await self._get(b"/v1/models")
        except EngineBusy:
            return ""  # it answers requests, if not this one
        except EngineError as error:
            return str(error)
        if reply.status >= 500:
            return f"GET {self.url}/v1/models: status {reply.status}"
        try:
            answer = msgspec.json.decode(reply.body, type=_Models)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self.models = frozenset()  # it does not say, which is no mistake
            return ""
        self.models = frozenset(model.id for model in answer.data)
        return "" if self.models else "it serves no model"

    async def _introduce(self) -> None:
        """Ask it on which ranks it serves. What it does not say is not known."""
        report = await self._report()
        if report is None:
            log.info("%s does not say which ranks it has, nor what it is doing", self)
        self._have_ranks(list(report.ranks) if report is not None and report.ranks else [0])
        self._reported(report)

    async def _report(self) -> EngineReport | None:
        """What it is doing; None if it does not say."""
        try:
            return read_report((await self._ask(b"/metrics")).decode(errors="replace"))
        except EngineError:
            return None

    def _reported(self, report: EngineReport | None) -> None:
        for rank in self.ranks:
            rank.reported(None if report is None else report.ranks.get(rank.number))
        if report is not None:
            now = self._clock()
            self._away = {
                address: self._away.get(address, now + PROBE_SECONDS) for address in report.away
            }

    def _have_ranks(self, numbers: list[int]) -> None:
        host, _, port = self.push.rpartition(":")
        self.ranks = tuple(
            Rank(
                self,
                number,
                index,
                f"{host}:{int(port) + number}" if self.push else "",
                self._clock,
            )
            for index, number in enumerate(numbers)
        )

    async def _ask(self, path: bytes) -> bytes:
        """What it answers to a question of the proxy's own.

        Raises:
            EngineError: if that is no success.
        """
        reply = await self._get(path)
        if not reply.is_success:
            raise EngineError(f"GET {self.url}{path.decode()}: status {reply.status}")
        return reply.body

    async def tokenize(self, body: bytes) -> bytes | None:
        """What it answers to ``/tokenize``; None if it does not, or not soon.

        Args:
            body: the question.
        """
        try:
            reply = await self._send("POST", b"/tokenize", body, _TOKENIZE_SECONDS)
        except EngineError as error:
            log.info("%s does not say which tokens a prompt has: %s", self, error)
            return None
        return reply.body if reply.is_success else None

    async def _get(self, path: bytes) -> WholeReply:
        """The same, also if it is no success.

        Raises:
            EngineBusy: if there is no answer in time, and it has answered requests meanwhile.
            EngineError: if there is no answer.
        """
        return await self._send(
            "GET", path, b"", max(self._settings.health_interval, _CHECK_SECONDS)
        )

    async def _send(self, method: str, path: bytes, body: bytes, seconds: float) -> WholeReply:
        url = self.url + path.decode()
        headers = dict(_ITSELF)
        if body:
            headers["content-type"] = "application/json"
        if self._settings.engine_key is not None:
            headers["authorization"] = f"Bearer {self._settings.engine_key}"
        sent = self._sent
        try:
            async with (
                asyncio.timeout(seconds),
                self._exchanges.send(method, path, headers, body) as reply,
            ):
                return WholeReply(reply.status, await reply.rest())
        except TimeoutError as error:
            kind = EngineBusy if self._sent > sent else EngineError
            raise kind(f"{method} {url}: nothing in {seconds:g} s") from error
        except ExchangeError as error:
            raise EngineError(f"{method} {url}: {error}") from error
