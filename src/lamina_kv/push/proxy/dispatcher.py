"""What becomes of one request: a prefill and a decode engine, both at once, and others if the
decode engine cannot answer.

A prefill engine that fails is not replaced: the decode engine, which may be waiting for it, is
asked again to compute the prompt itself, and the next request goes to another one.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

from lamina_kv.push.proxy.blame import Blame
from lamina_kv.push.proxy.engines import Engine, EngineBusy, EngineError, Role
from lamina_kv.push.proxy.errors import EngineAnswer, Refusal
from lamina_kv.push.proxy.exchanges import Reply
from lamina_kv.push.proxy.headers import RANK, Pairs, of_answer
from lamina_kv.push.proxy.metrics import Metrics, Outcome, Unpushed
from lamina_kv.push.proxy.requests import ApiRequest
from lamina_kv.push.proxy.routing.ranks import Rank
from lamina_kv.push.proxy.routing.router import Router, Trip, serving
from lamina_kv.push.proxy.routing.words import Why
from lamina_kv.push.proxy.settings import Settings
from lamina_kv.push.proxy.usage import cached_by, corrected
from lamina_kv.push.proxy.withdrawals import Withdrawals

log = logging.getLogger("lamina_kv.push.proxy")

PREFILL_GRACE = 1.0
"""Seconds that a prefill engine has to say that it is done once the decode engine's answer has
ended; after that the answer was computed without it."""

REFUSAL_GRACE = 2.0
"""Seconds that a decode engine has to refuse a request that a prefill engine has refused: a mistake
of the client's, which both find before they compute anything. More than a busy server takes to look
at a request; a decode engine that needs no push computes meanwhile, as nobody prefills."""

BUSY = 429
"""The status of an engine that has too much to do, while another one may have nothing."""

EARLY = (b"event: response.created\n", b"event: response.in_progress\n")
"""How events begin that vLLM sends before it computes anything. They are held back until something
else comes: they are no first byte, and another engine could not answer once a client has them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A decode engine's, of which the first bytes are there.

    Attributes:
        status: HTTP's, below 500.
        headers: those that concern the client.
        events: whether it is a stream of server-sent events.
        pieces: its bytes; of events, whole ones only. Raises :class:`EngineError` where it breaks
            off.
    """

    status: int
    headers: Pairs
    events: bool
    pieces: AsyncIterator[bytes]


_UNPUSHED = {
    Why.REQUEST: Unpushed.REQUEST,
    Why.NO_PREFILL_ENGINE: Unpushed.NO_PREFILL_ENGINE,
}


class _End(Enum):
    """How the prefill engine's part has ended."""

    DONE = "done"
    REFUSED = "refused"
    """It says that the request is wrong."""
    BUSY = "busy"
    """It has too much to do."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class _Prefilled:
    """What a prefill engine has done.

    Attributes:
        end: how its part has ended.
        cached: see :func:`cached_by`.
    """

    end: _End
    cached: int | None = 0


_WHY_LOST = {
    _End.REFUSED: Unpushed.PREFILL_REFUSED,
    _End.BUSY: Unpushed.PREFILL_BUSY,
    _End.FAILED: Unpushed.PREFILL_FAILED,
}


class _PrefillLost(Exception):
    """The decode engine waits for a push that will not come.

    Attributes:
        why: for the metrics.
    """

    def __init__(self, why: Unpushed) -> None:
        super().__init__(why.value)
        self.why = why


class _Busy(Refusal):
    """The decode engine has not begun in time, as it is busy with others. The next one would
    compute the prompt once more, and the client has waited long enough."""


async def _unless_lost(prefilling: asyncio.Task[_Prefilled], decoding: Awaitable[Answer]) -> Answer:
    """The decode engine's answer.

    Raises:
        _PrefillLost: if the prefill failed before there was one, or was refused and the decode
            engine does not refuse it, too; the decode engine is not asked any more then.
    """
    waiting, why = True, Unpushed.PREFILL_FAILED
    try:
        async with asyncio.timeout(None) as patience:

            def ended(task: asyncio.Task[_Prefilled]) -> None:
                nonlocal why
                if not waiting or task.cancelled() or task.result().end is _End.DONE:
                    return
                why = _WHY_LOST[task.result().end]
                grace = REFUSAL_GRACE if task.result().end is _End.REFUSED else 0.0
                patience.reschedule(asyncio.get_running_loop().time() + grace)

            prefilling.add_done_callback(ended)
            try:
                return await decoding
            finally:
                waiting = False
    except TimeoutError as error:
        raise _PrefillLost(why) from error


class Dispatcher:
    """See the module.

    Args:
        settings: timeouts and tries.
        engines: all there are at the moment, of both roles.
        router: chooses among them.
        metrics: is told what happens.
        withdrawals: tells prefill engines what was computed for nobody.
    """

    def __init__(
        self,
        settings: Settings,
        engines: Iterable[Engine],
        router: Router,
        metrics: Metrics,
        withdrawals: Withdrawals,
    ) -> None:
        self._settings = settings
        self._withdrawals = withdrawals
        self._engines = engines
        self._router = router
        self._metrics = metrics

    @asynccontextmanager
    async def answer(self, request: ApiRequest) -> AsyncIterator[Answer]:
        """The answer to a request. Leaving it before its end cancels the request on both engines.

        Raises:
            Refusal: if no decode engine has one, or if it breaks off.
        """
        async with AsyncExitStack() as stack:
            yield await self._first_answer(request, stack)

    async def _first_answer(self, request: ApiRequest, stack: AsyncExitStack) -> Answer:
        failure = Refusal(503, "no decode engine can be used at the moment: ask again")
        tried: set[Engine] = set()
        blame = Blame(request)
        prompt = await self._router.read(request, self._all(Role.DECODE))
        for attempt in range(self._settings.tries):
            if attempt and failure.status != BUSY:
                pause = self._settings.backoff * 2 ** (attempt - 1)
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            usable = serving(prompt.model, self._all(Role.DECODE))
            decode = [engine for engine in usable if engine not in tried] or usable
            if not decode:
                break
            prefill = [engine for engine in self._all(Role.PREFILL) if engine.usable]
            trip = self._router.begin(prompt, prefill, decode)
            if attempt:
                self._metrics.retries.inc()
            tried.add(trip.route.decode.rank.engine)
            last = attempt == self._settings.tries - 1 or tried.issuperset(usable)
            try:
                return await self._attempt(request, trip, blame, stack, last=last)
            except _Busy:
                raise
            except Refusal as refusal:
                failure = refusal
        raise failure

    def _all(self, role: Role) -> list[Engine]:
        return [engine for engine in self._engines if engine.role is role]

    # -- one attempt ---------------------------------------------------------------------------

    async def _attempt(
        self,
        request: ApiRequest,
        trip: Trip,
        blame: Blame,
        stack: AsyncExitStack,
        *,
        last: bool,
    ) -> Answer:
        """One decode engine, with a push if there can be one.

        Args:
            request: the request.
            trip: where it goes.
            blame: collects what engines answer.
            stack: closes the exchange.
            last: whether no other engine is left to try, so that a busy one's answer is passed on.
        """
        refused = False
        if request.fields is not None and trip.route.why in _UNPUSHED:
            self._metrics.unpushed(_UNPUSHED[trip.route.why])
        if trip.pushed:
            try:
                return await stack.enter_async_context(
                    self._pushed(request, trip, blame, last=last)
                )
            except _PrefillLost as lost:
                refused = lost.why is Unpushed.PREFILL_REFUSED
                if not refused:
                    self._metrics.unpushed(lost.why)
            trip = self._router.unpushed(trip)
        plain = self._decode(trip, request, request.for_decode(), blame, last=last)
        answer = await stack.enter_async_context(plain)
        if refused and answer.status < 400:  # or else it was the client's mistake
            self._metrics.unpushed(Unpushed.PREFILL_REFUSED)
        return answer

    @asynccontextmanager
    async def _pushed(
        self, request: ApiRequest, trip: Trip, blame: Blame, *, last: bool
    ) -> AsyncIterator[Answer]:
        """Both engines, and a push between them.

        Raises:
            _PrefillLost: if the prefill engine failed before the decode engine's first byte, or has
                refused what the decode engine does not.
        """
        push_id = uuid.uuid4().hex
        # Before anybody else chooses, and until the end, even if the task never begins.
        visit = ExitStack()
        assert trip.route.prefill is not None
        rank = trip.route.prefill.rank
        visit.enter_context(rank.engine.visit(rank, trip.at_prefill))
        prefilling = asyncio.create_task(self._prefill(trip, rank, request, push_id, blame))
        prefilling.add_done_callback(lambda _: visit.close())
        accepted = False
        try:
            async with AsyncExitStack() as exchange:
                body = request.for_decode(push_id, rank.push)
                decoding = self._decode(trip, request, body, blame, last=last)
                answer = await _unless_lost(prefilling, exchange.enter_async_context(decoding))
                accepted = answer.status < 400
                cached = partial(_cached, prefilling)
                yield replace(answer, pieces=corrected(answer.pieces, cached, events=answer.events))
            if accepted:
                await asyncio.wait({prefilling}, timeout=PREFILL_GRACE)
        finally:
            prefilling.cancel()
            await asyncio.wait({prefilling})
            if not accepted and _may_hold(prefilling):
                self._withdrawals.send(request, rank, push_id)

    async def _prefill(
        self, trip: Trip, rank: Rank, request: ApiRequest, push_id: str, blame: Blame
    ) -> _Prefilled:
        engine = rank.engine
        outcome = Outcome.CANCELLED
        request.entry.prefill.append(engine.url)
        body = request.for_prefill(push_id)
        # Or else its server chooses one, and the decode engine waits at another's address.
        headers = {**request.headers, RANK: str(rank.index)}
        try:
            reply = await engine.exchange(request.method, request.target, headers, body)
            text = reply.body
            outcome = _outcome(reply.status)
            if outcome is Outcome.ANSWERED or reply.status == BUSY:
                engine.succeeded()
            else:
                blame.suspect(engine, reply.status, text)
        except EngineError as error:
            outcome = Outcome.FAILED
            if not isinstance(error, EngineBusy):
                engine.failed(str(error))
            log.warning(
                "request %s: %s failed: %s; the decode engine computes the prompt",
                request.id,
                engine,
                error,
            )
        finally:
            self._metrics.exchange(engine, outcome)
        if outcome is Outcome.ANSWERED:
            cached = cached_by(text)
            if cached is not None:
                self._router.prefilled(trip, text)
            return _Prefilled(_End.DONE, cached)
        if outcome is Outcome.FAILED:
            return _Prefilled(_End.FAILED)
        return _Prefilled(_End.BUSY if reply.status == BUSY else _End.REFUSED)

    @asynccontextmanager
    async def _decode(
        self, trip: Trip, request: ApiRequest, body: bytes, blame: Blame, *, last: bool
    ) -> AsyncIterator[Answer]:
        rank = trip.route.decode.rank
        engine = rank.engine
        headers = dict(request.headers)
        if len(engine.ranks) > 1:
            headers.setdefault(RANK, str(rank.index))
        outcome = Outcome.CANCELLED
        begun = False
        request.entry.decode.append(engine.url)
        try:
            with engine.visit(rank, trip.at_decode) as visit:
                async with engine.send(request.method, request.target, headers, body) as reply:
                    if reply.status >= 500:
                        outcome = Outcome.FAILED
                        raise await self._failure(engine, request, reply, blame)
                    if reply.status == BUSY and not last:
                        outcome = Outcome.REFUSED
                        engine.succeeded()
                        raise Refusal(BUSY, "every decode engine has too much to do: ask again")
                    events = reply.media_type.startswith("text/event-stream")
                    pieces = self._pieces(engine, reply, events)
                    first = await anext(pieces, b"")
                    begun = True
                    visit.computed()
                    engine.succeeded()
                    if reply.status < 400:
                        blame.answered()
                        pieces = self._router.answers(trip, _chain(first, pieces), events=events)
                    else:
                        pieces = _chain(first, pieces)
                    yield Answer(reply.status, of_answer(reply.headers), events, pieces)
                    outcome = _outcome(reply.status)
        except EngineError as error:
            outcome = Outcome.INTERRUPTED if begun else Outcome.FAILED
            if not isinstance(error, EngineBusy):
                engine.failed(str(error))
            log.warning("request %s: %s %s: %s", request.id, engine, outcome.value, error)
            what = "was interrupted" if begun else "did not answer"
            message = f"the decode engine {what}: {error}"
            if isinstance(error, EngineBusy):
                raise _Busy(504, message) from error
            raise Refusal(502, message) from error
        finally:
            self._metrics.exchange(engine, outcome)

    async def _failure(
        self, engine: Engine, request: ApiRequest, reply: Reply, blame: Blame
    ) -> Refusal:
        async with engine.patience(self._settings.stall_timeout):
            text = await reply.rest()
        blame.suspect(engine, reply.status, text)
        media_type = reply.media_type or "application/octet-stream"
        return Refusal(reply.status, "", EngineAnswer(media_type, text))

    async def _pieces(self, engine: Engine, reply: Reply, events: bool) -> AsyncIterator[bytes]:
        seconds = self._settings.first_byte_timeout
        held = b""
        begun = False
        while True:
            async with engine.patience(seconds):
                piece = await reply.piece()
            if not piece:
                break
            engine.came()
            if events:
                # Half an event could not be followed by one that says what happened.
                whole, end, held = (held + piece).rpartition(b"\n\n")
                piece = whole + end
                if not begun and _are_early(piece):
                    held, piece = piece + held, b""
            if piece:
                begun = True
                seconds = self._settings.stall_timeout
                yield piece
        if held:
            yield held


def _may_hold(prefilling: asyncio.Task[_Prefilled]) -> bool:
    """Whether the prefill engine may have computed the prompt; the task has ended. If it was
    cancelled, the engine may have been done before it saw that nobody waits for it."""
    if prefilling.cancelled():
        return True
    return prefilling.exception() is None and prefilling.result().end is _End.DONE


async def _cached(prefilling: asyncio.Task[_Prefilled]) -> int | None:
    """See :func:`cached_by`. The decode engine's answer may end before that of the prefill engine
    has come."""
    await asyncio.wait({prefilling}, timeout=PREFILL_GRACE)
    if not prefilling.done() or prefilling.cancelled():
        return 0
    return prefilling.result().cached


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


def _are_early(events: bytes) -> bool:
    """Whether these events, all of them whole, say only that a request has come."""
    return all(event.startswith(EARLY) for event in events.split(b"\n\n") if event)


def _outcome(status: int) -> Outcome:
    if status >= 500:
        return Outcome.FAILED
    return Outcome.REFUSED if status >= 400 else Outcome.ANSWERED
