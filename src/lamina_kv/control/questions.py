"""Requests that wait for a tier's word: whether it has their chunks, or whether it works again.

Stores that find chunks by key are asked for all of a request's at once, when it arrives and again
when its turn has come. A request waits for the answer for as long as that may be worth
(:mod:`lamina_kv.control.answers`), and goes on without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf

from lamina_kv.control.answers import patience_for
from lamina_kv.control.arrivals import Arrival, Patience
from lamina_kv.control.books import Books
from lamina_kv.control.cost import Costs
from lamina_kv.control.lanes import Lane
from lamina_kv.control.probes import MOST_WAITED
from lamina_kv.control.requests import RequestRecord
from lamina_kv.plan import ChunkKey, TierName
from lamina_kv.tiers.contract import Answer

LOOK_PLANS = 2
"""Plans for which a request waits at least for a tier's word: an answer to what one plan asks is
there when the next but one is made, however long a step takes."""


class Questions:
    """See the module. A part of :class:`~lamina_kv.control.moving.MovePlanner`.

    Args:
        books: what the parts of the planner share.
        lanes: the far tiers.
        costs: what computing takes.
    """

    def __init__(self, books: Books, lanes: Mapping[TierName, Lane], costs: Costs) -> None:
        self._books = books
        self._lanes = lanes
        self._costs = costs
        self._always = books.config.load.when == "always"
        self._longest = books.config.load.deadline
        self._asking: dict[str, Arrival] = {}  # in the order in which they asked

    def ask(self, arrival: Arrival) -> None:
        """Ask tiers that find chunks by key for all of a request's at once."""
        near = self._books.catalog.near.visible
        for far in self._books.catalog.readable_far():
            if far.index.capacity:
                continue
            for keys in arrival.record.known_keys():
                for key in keys:
                    if key not in near and far.index.find(key) is Answer.UNKNOWN:
                        arrival.question = key
        if arrival.question is not None:
            self._asking[arrival.request_id] = arrival

    def forget(self, request_id: str) -> None:
        """A request is not searched again when its answer comes."""
        self._asking.pop(request_id, None)

    def answered(self, keys: Iterable[ChunkKey]) -> list[Arrival]:
        """A tier has said of some chunks whether it has them, or has not. Returns requests for
        which that was the last question."""
        told = set(keys)
        over = [arrival for arrival in self._asking.values() if arrival.question in told]
        for arrival in over:
            arrival.question = None
            del self._asking[arrival.request_id]
        return over

    # -- waits -------------------------------------------------------------------------------

    def awaits_answers(self, arrival: Arrival) -> bool:
        """Whether a request whose hit may be longer, as soon as a tier has said so, is to wait for
        the answer."""
        if arrival.asked is None:
            self.ask(arrival)
            arrival.asked = self._patience(self._for_answers(arrival.record))
        return self._lasts(arrival.asked, self._longest)

    def awaits_probes(self, arrival: Arrival) -> bool:
        """Whether a request is to wait a moment for news of a tier that is out of use, which may
        work again."""
        if arrival.probed is None:
            tokens = arrival.record.view.num_tokens
            prefill = inf if self._always else self._costs.prefill_seconds(0, tokens)
            arrival.probed = self._patience(patience_for(MOST_WAITED, prefill))
        return self._lasts(arrival.probed, MOST_WAITED)

    def _patience(self, seconds: float) -> Patience:
        clock = self._books.clock
        return Patience(clock.now, clock.step, seconds)

    def _lasts(self, patience: Patience, most: float) -> bool:
        now, steps = self._books.clock.now, self._books.clock.step - patience.step
        early = steps < LOOK_PLANS and now < patience.since + most
        return early or now < patience.since + patience.seconds

    def _for_answers(self, record: RequestRecord) -> float:
        """Seconds that a request waits for answers. Where every hit is loaded, that is as long as
        the call of a tier takes. An answer that comes later, because the call had to wait for
        others that hang, is for the next request."""
        asked = [far for far in self._books.catalog.readable_far() if not far.index.capacity]
        if self._always:
            calls = (far.longest_call for far in asked)
            return min(self._longest, max(calls, default=0.0))
        prefill = self._costs.prefill_seconds(
            record.hit.floor + record.hit.tokens, record.view.num_tokens
        )
        return max((self._lanes[far.name].answers.patience(prefill) for far in asked), default=0.0)
