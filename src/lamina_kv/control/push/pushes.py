"""Both halves of pushes, as one part of the planner: to other engines and from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf
from typing import TypeVar

from lamina_kv.config import PushConfig
from lamina_kv.control.books import Books
from lamina_kv.control.cost import Costs
from lamina_kv.control.offers import ASK_AGAIN, Offer
from lamina_kv.control.push.inbound import Unpushed
from lamina_kv.control.push.open_prompts import RanksChannel
from lamina_kv.control.push.source import PushSource
from lamina_kv.control.push.target import CANCELLED, PushTarget
from lamina_kv.control.requests import BoundaryState, PushParameters, RequestRecord
from lamina_kv.control.transfers import Kind, Transfer
from lamina_kv.plan import NO_PUSH, LoadMode, PushPlan
from lamina_kv.push.cards import EngineCard
from lamina_kv.push.letters import Letter, News
from lamina_kv.push.messages import Announce, Goodbye

T = TypeVar("T")


class Pushes:
    """See the module.

    Args:
        config: the ``push`` section.
        books: what the parts of the planner share.
        card: this engine as other engines see it.
        cost: what computing takes.
        channel: a way to the ranks beside plans; None if there is none.
    """

    def __init__(
        self,
        config: PushConfig,
        books: Books,
        card: EngineCard,
        cost: Costs,
        *,
        channel: RanksChannel | None = None,
    ) -> None:
        self._clock = books.clock
        self._source = PushSource(config, books, card, cost, channel=channel)
        self._target = PushTarget(config, books, card, cost)

    # -- requests ----------------------------------------------------------------------------

    def arrived(self, record: RequestRecord, *, loads: bool) -> None:
        """A request waits for its blocks: another engine is to keep what it computes for it.

        Args:
            record: the request.
            loads: whether anything may be brought to it.
        """
        if record.view.push is not None:
            self._clock.tick()
            self._source.arrived(record)
            if loads:
                self._target.arrived(record)

    def waits(self, record: RequestRecord, floor: int) -> bool:
        """Whether a request need not be looked at, because its destination may be said in a moment,
        or there is no room yet for what it would hold of a push, here or on the way to another
        engine."""
        if record.view.push is None:
            return False
        return self._source.waits(record, floor) or self._target.waits(record)

    def extend(self, record: RequestRecord, offer: Offer) -> Offer:
        """An offer, and what a prefill engine will push behind it."""
        start = offer.floor + offer.loaded
        pushed = self._target.weigh(record, offer.floor, start)
        if pushed.ask_again:
            return ASK_AGAIN
        if not pushed.end:
            return replace(offer, unpushed=pushed.reason)
        return replace(offer, pushed=pushed.end - start, mode=LoadMode.PARKED)

    def admitted(self, record: RequestRecord, taken: Offer) -> None:
        """A request has its blocks.

        Args:
            record: the request.
            taken: what of its offer the engine takes.
        """
        self._source.admitted(record, taken.floor + taken.tokens)
        if record.view.push is not None and not taken.pushed:
            self._target.decline(record, taken.unpushed or Unpushed.NOT_NEEDED)

    def order(self, record: RequestRecord) -> None:
        """Have pushed what was offered, into the request's blocks."""
        offer = record.offer
        start = offer.floor + offer.loaded
        self._target.order(record, offer.floor, start, start + offer.pushed)

    def progress(self, record: RequestRecord, start: int, end: int) -> None:
        """A step computes tokens ``start..end`` of a request."""
        self._source.progress(record, start, end)

    def state(self, record: RequestRecord, state: BoundaryState) -> None:
        """A block holds a recurrent state when the step is over."""
        self._source.state(record, state)

    def finished(
        self,
        request_id: str,
        record: RequestRecord | None,
        computed: int,
        blocks: Sequence[Sequence[int]],
        push: PushParameters | None,
    ) -> None:
        """A request has ended, see :meth:`~lamina_kv.control.planner.Planner.finished`."""
        if push is not None:
            self._source.abandoned(push, request_id)
        self._target.abandoned(request_id)
        if record is None:
            return
        self._source.finished(record, computed, blocks)
        if record.receive is not None:
            self._target.give_up(record.receive, CANCELLED)

    def bar(self, record: RequestRecord) -> None:
        """What a request holds was computed by several weights, or adapters: push none of it."""
        self._source.bar(record)

    def distrust(self, step: int) -> None:
        """What was computed from ``step`` on is not to be believed."""
        self._source.distrust(step)

    # -- the step ----------------------------------------------------------------------------

    def plan(self) -> PushPlan:
        """What goes to other engines and comes from them with the next plan."""
        source, target = self._source, self._target
        target.tick()
        source.plan()
        plan = PushPlan(
            peers=_taken(source.peers),
            gone=_taken(source.gone),
            stops=_taken(source.stops),
            orders=_taken(source.orders),
            gathers=_taken(source.gathers),
            bindings=_taken(source.bindings),
            drops=_taken(source.drops),
            receives=_taken(target.orders),
            senders=_taken(target.senders),
            give_ups=_taken(target.give_ups),
        )
        return NO_PUSH if plan.is_empty else plan

    def settle(self, transfer: Transfer, record: RequestRecord | None) -> None:
        """Take in a push that has ended on every rank, to here or from here."""
        if transfer.kind is Kind.PUSH:
            self._source.settle(transfer)
        else:
            self._target.settle(transfer, record)

    # -- other engines -----------------------------------------------------------------------

    def take_news(self, news: Iterable[News]) -> None:
        """Take in what other engines have to say."""
        self._clock.tick()
        self._source.receive(news)
        self._target.receive(news)

    def take_announcement(self, peer: str, announce: Announce) -> bool:
        """An announcement has come: send at once what waits for it. Called by the link's thread.

        Args:
            peer: incarnation of the decode engine; the planner knows of this connection.
            announce: the announcement.

        Returns:
            Whether it is sent. The planner knows of the announcement then.
        """
        return self._source.take(peer, announce)

    def withdraw(self, push: str, request_id: str) -> None:
        """A router says that no decode engine will ask for what is computed here.

        Args:
            push: the router's name for it.
            request_id: the request by which it says so: nothing need come of it.
        """
        self._clock.tick()
        self._source.withdraw(push, request_id)

    def drain_letters(self) -> list[Letter]:
        """Messages for other engines since the last call."""
        return [*_taken(self._source.letters), *_taken(self._target.letters)]

    def drain_unwanted(self) -> list[str]:
        """Requests since the last call whose prompts another engine computes itself: nobody will
        look at what comes of them here."""
        return [*_taken(self._source.unwanted)]

    def end(self, *, at_once: bool) -> None:
        """The engine ends.

        Args:
            at_once: whether nothing more will be sent; else what is under way still is.
        """
        self._source.end(at_once=at_once)

    def goodbye(self, peer: str) -> Goodbye:
        """The last word to a decode engine, when pushes have ended at once. Any thread may ask for
        it, while the planner does nothing else.

        Args:
            peer: the decode engine's incarnation.
        """
        return self._source.goodbye(peer)

    @property
    def pending(self) -> bool:
        """Whether a push waits for something that no receipt will say."""
        return self._source.pending or self._target.pending

    @property
    def wait(self) -> float:
        """Seconds after which a step changes something although nobody has said anything; infinite
        if none does."""
        clock = self._clock
        # What is longer than a step counts as less, see the clock.
        wait = min(self._source.due, self._target.due) - clock.now
        return wait if wait == inf else max(0.0, min(wait, clock.longest))

    def gauges(self) -> None:
        """Write the present state to the meter."""
        self._source.gauges()
        self._target.gauges()


def _taken(queue: list[T]) -> tuple[T, ...]:
    """What a part has ready, which is handed on now."""
    taken = tuple(queue)
    queue.clear()
    return taken
