"""Routing as the dispatcher uses it: where a request goes, and what is learnt of how it went."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from lamina_kv.push.proxy.engines import Engine
from lamina_kv.push.proxy.metrics import Metrics
from lamina_kv.push.proxy.requests import ApiRequest
from lamina_kv.push.proxy.routing.events.tokens import Tokens
from lamina_kv.push.proxy.routing.placement import Placement
from lamina_kv.push.proxy.routing.prompt import Prompt, read_prompt
from lamina_kv.push.proxy.routing.ranks import Work
from lamina_kv.push.proxy.routing.sessions import Sessions
from lamina_kv.push.proxy.routing.words import Candidate, Disaggregate, Route, RoutingPolicy, Why
from lamina_kv.push.proxy.usage import MAX_BYTES, Usage, read_usage

BYTES_PER_TOKEN = 4.0
"""Of text, until engines have said how many tokens their prompts have."""
_LEARNT_FROM = 400
"""Bytes of text from which a prompt says something about that: of a short one, most tokens are the
chat template's."""


@dataclass(slots=True)
class Trip:
    """One try of a request, on its way.

    Attributes:
        prompt: the request's.
        route: where it goes.
        begun: monotonic seconds at which it was sent.
        at_decode: what it means for the decode engine.
        at_prefill: what it means for the prefill engine, if there is one.
        prefill_seconds: that the prefill engine took; None until it has said that it is done.
    """

    prompt: Prompt
    route: Route
    begun: float
    at_decode: Work
    at_prefill: Work
    prefill_seconds: float | None = None

    @property
    def pushed(self) -> bool:
        """Whether a prefill engine takes part."""
        return self.route.prefill is not None


class Router:
    """See the module. Belongs to one event loop.

    Args:
        policy: chooses among engines.
        mode: which prompts are pushed.
        metrics: is told what was decided, and how right it was.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        policy: RoutingPolicy,
        mode: Disaggregate,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._metrics = metrics
        self._clock = clock
        self._placement = Placement(mode, clock)
        self._sessions = Sessions(clock)
        self._tokens = Tokens(clock)
        self._bytes_per_token: dict[str, float] = {}
        metrics.pace("prefill", lambda: self._placement.prefill.tokens_per_second)
        metrics.pace("decode", lambda: self._placement.local.tokens_per_second)

    async def read(self, request: ApiRequest, engines: Sequence[Engine]) -> Prompt:
        """What is known of a request before it is sent anywhere.

        Args:
            request: the client's.
            engines: decode engines. If some of them announce what they hold, one is asked for the
                prompt's tokens.
        """
        blocks = (rank.blocks for engine in engines for rank in engine.ranks)
        told = any(each is not None and each.told for each in blocks)
        prompt = read_prompt(
            request, lambda model: self._bytes_per_token.get(model, BYTES_PER_TOKEN), ids=told
        )
        if not told or prompt.ids:
            return prompt
        ids = await self._tokens.of(request, prompt, serving(prompt.model, engines))
        return replace(prompt, ids=ids, tokens=len(ids)) if ids else prompt

    def begin(self, prompt: Prompt, prefill: Sequence[Engine], decode: Sequence[Engine]) -> Trip:
        """Where one try goes; the engines are believed to hold the prompt from now on.

        Args:
            prompt: the request's.
            prefill: usable prefill engines.
            decode: usable decode engines that serve its model, at least one; see :func:`serving`.
        """
        answered = self._sessions.rank(prompt.session) if prompt.session else None
        ranks = [rank for engine in decode for rank in engine.ranks]
        if prompt.rank is not None:
            ranks = [rank for rank in ranks if rank.index == prompt.rank] or ranks
        choice = self._policy.choose(
            prompt,
            [rank.candidate(prompt, sticky=rank is answered, decodes=True) for rank in ranks],
        )
        there = choice.candidate
        source = self._choose_prefill(prompt, prefill, there)
        why = self._placement.place(prompt, there, source)
        if why is not Why.PUSHED:
            source = None
        self._sessions.answered(prompt.session, there.rank)
        there.rank.prefixes.add(prompt.marks)
        if source is not None:
            source.rank.prefixes.add(prompt.marks)
            there.rank.engine.sent_push_from(source.rank.push)
        if prompt.tokens:
            self._metrics.routed(why, choice.reason)
        return Trip(
            prompt,
            Route(there, source, why, choice.reason),
            self._clock(),
            self._at_decode(prompt, there, source),
            Work(prompt.tokens - source.hit if source else 0, prompt.tokens),
        )

    def unpushed(self, trip: Trip) -> Trip:
        """The same try once more, after its push has failed: the decode engine computes it."""
        return replace(
            trip,
            route=replace(trip.route, prefill=None),
            begun=self._clock(),
            at_decode=self._at_decode(trip.prompt, trip.route.decode, None),
        )

    def prefilled(self, trip: Trip, answer: bytes) -> None:
        """The prefill engine has computed the prompt.

        Args:
            trip: the try.
            answer: what it has answered.
        """
        source = trip.route.prefill
        usage = read_usage(answer)
        if source is None or usage is None:
            return
        self._learn_tokens(trip.prompt, usage)
        self._learn_hit("prefill", source, usage)
        trip.prefill_seconds = self._clock() - trip.begun
        cached = source.hit if usage.cached is None else usage.cached
        tokens = source.queued + max(0, usage.prompt - cached)
        source.rank.pace.learn(tokens, trip.prefill_seconds)
        self._placement.prefill.learn(tokens, trip.prefill_seconds)

    def answers(
        self, trip: Trip, pieces: AsyncIterator[bytes], *, events: bool
    ) -> AsyncIterator[bytes]:
        """A decode engine begins to answer. Returns the same pieces, having learnt from them.

        Args:
            trip: the try.
            pieces: its answer.
            events: whether it is a stream, whose first byte comes when the prompt is computed; of
                others it comes with the last one.
        """
        if events and trip.prompt.tokens:
            self._learn_seconds(trip)
        return self._read_along(trip, pieces, events=events)

    # -- parts ---------------------------------------------------------------------------------

    def _choose_prefill(
        self, prompt: Prompt, engines: Sequence[Engine], there: Candidate
    ) -> Candidate | None:
        if not prompt.pushable:
            return None
        candidates = [
            rank.candidate(prompt, sticky=False, decodes=False)
            for engine in engines
            if not _lacks(engine, prompt.model, there.rank.engine)
            for rank in engine.ranks
            if there.rank.engine.takes_pushes_from(rank.push)
        ]
        return self._policy.choose(prompt, candidates).candidate if candidates else None

    def _at_decode(self, prompt: Prompt, there: Candidate, source: Candidate | None) -> Work:
        """What a try means for its decode engine."""
        seconds = None
        if not prompt.streams:
            seconds = (
                self._placement.local_seconds(prompt, there)
                if source is None
                else self._placement.pushed_seconds(prompt, source)
            )
        compute = 0 if source else prompt.tokens - there.hit
        return Work(compute, prompt.tokens + prompt.answer, decodes=True, seconds=seconds)

    def _learn_seconds(self, trip: Trip) -> None:
        seconds = self._clock() - trip.begun
        there = trip.route.decode
        if trip.pushed:
            if trip.prefill_seconds is not None:
                self._placement.pushed(seconds, trip.prefill_seconds)
            return
        tokens = there.queued + trip.prompt.tokens - there.hit
        there.rank.pace.learn(tokens, seconds)
        self._placement.local.learn(tokens, seconds)

    async def _read_along(
        self, trip: Trip, pieces: AsyncIterator[bytes], *, events: bool
    ) -> AsyncIterator[bytes]:
        usage: Usage | None = None
        read = b""
        async for piece in pieces:
            if events:
                usage = read_usage(piece) or usage
            elif len(read) <= MAX_BYTES:
                read += piece
            yield piece
        usage = usage or read_usage(read)
        if usage is not None:
            self._learn_tokens(trip.prompt, usage)
            if not trip.pushed:  # of a pushed prompt it says that all was there
                self._learn_hit("decode", trip.route.decode, usage)

    def _learn_tokens(self, prompt: Prompt, usage: Usage) -> None:
        if prompt.ids or prompt.text < _LEARNT_FROM or usage.prompt <= 0:
            return
        old = self._bytes_per_token.get(prompt.model, BYTES_PER_TOKEN)
        # What is no text was counted at a flat rate, and is taken off again.
        other = prompt.tokens - round(prompt.text / old)
        seen = prompt.text / max(1, usage.prompt - other)
        self._bytes_per_token[prompt.model] = old + 0.1 * (min(max(seen, 0.5), 16.0) - old)

    def _learn_hit(self, role: str, where: Candidate, usage: Usage) -> None:
        if usage.cached is not None:
            where.rank.found(where.hit, usage.cached)
            self._metrics.hit(role, where.hit, usage.cached)


def serving(model: str, engines: Sequence[Engine]) -> list[Engine]:
    """The usable engines that serve a model, or may, as they do not say. If no engine serves it,
    usable or not, all that are usable: one of them tells the client."""
    usable = [engine for engine in engines if engine.usable]
    able = [engine for engine in usable if not engine.models or model in engine.models]
    if able or any(model in engine.models for engine in engines):
        return able
    return usable


def _lacks(engine: Engine, model: str, other: Engine) -> bool:
    """Whether an engine does not serve a model, by what it says, that another one serves."""
    return bool(engine.models) and model not in engine.models and model in other.models
