"""Moves between near and far: what is saved goes outward, what waiting requests need comes inward.

A request waits without blocks while chunks come near. Those that are near by then, or arrive for
it, are pinned until it has its blocks or ends. Whatever goes wrong with a move makes the request's
hit shorter, and no wait outlasts its timeout.

Requests further back in the queue are searched ahead of their turn, first come first served, a
bounded number of chunks a plan. So a queue of any length costs a plan the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from enum import Enum
from itertools import chain, islice
from math import inf

from lamina_kv.control.arrivals import Arrival, Phase
from lamina_kv.control.books import Books
from lamina_kv.control.cost import Costs
from lamina_kv.control.fetches import Fetches
from lamina_kv.control.hits import HitFinder
from lamina_kv.control.lanes import Lane
from lamina_kv.control.offers import Offer
from lamina_kv.control.pins import Pins
from lamina_kv.control.questions import LOOK_PLANS, Questions
from lamina_kv.control.requests import RequestRecord
from lamina_kv.control.transfers import Kind, State, Transfer
from lamina_kv.plan import ChunkKey, TierName, TierOrders
from lamina_kv.tiers.contract import Answer
from lamina_kv.tiers.reuse import Standing

LARGEST_SHARE = 2
"""Chunks pinned for several requests that wait take at most the near slots divided by this. The
rest is for what is saved meanwhile."""

SPARE_SHARE = 16
"""One request for which all of that waits may take more, but for the near slots divided by this:
what it does not find near it computes, which takes longer than what is not saved is worth."""

LOOKS = 256
"""Chunks of waiting requests that are looked at for one plan: up to half a millisecond, and more
where looks order moves, see ``bench control``."""

LOOKS_OF_A_MOVE = 7
"""To find what is to be moved, and to order the move, takes as long as so many looks."""

LOOKS_OF_A_SEARCH = 16
"""To begin and to end the search for one request takes as long as so many looks."""


class _Next(Enum):
    """What became of a chunk that was to come near."""

    DONE = "done"
    """It is near, or on its way, or no tier has it."""
    TIER_BUSY = "tier busy"
    """As much is on its way from its tier as may be."""
    NEAR_FULL = "near full"
    """There is no slot for it."""


class MovePlanner:
    """See the module. A part of the planner.

    Args:
        books: what the parts of the planner share.
        hits: finds what a request needs.
        costs: what moves take; measured here.
    """

    def __init__(self, books: Books, hits: HitFinder, costs: Costs) -> None:
        self._books = books
        self._hits = hits
        self._costs = costs
        self._lanes = {name: Lane(books, far, costs) for name, far in books.catalog.far.items()}
        self._questions = Questions(books, self._lanes, costs)
        self._fetches = Fetches(books)
        near = books.catalog.near
        near.lost_spared = self._lost
        self._pins = Pins(near, LARGEST_SHARE, SPARE_SHARE)
        self._turns = 0
        self._looks = 0  # that are left for the next plan
        self._arrivals: dict[str, Arrival] = {}
        self._waiting: set[str] = set()  # of these, whose offer was made
        # Likewise, in the order in which they came: who wants chunks, who has some and may be made
        # to give them up, who is still to be searched, and who is searched no further while a tier
        # is busy. A plan looks at no others.
        self._wanting: dict[str, Arrival] = {}
        self._holding: dict[str, Arrival] = {}
        self._searched: dict[str, Arrival] = {}
        self._aside: dict[TierName, dict[str, Arrival]] = {name: {} for name in self._lanes}
        self._broken: set[TierName] = set()  # tiers that were not read when the last plan was made

    @property
    def backlog(self) -> int:
        """Chunks that wait to be written to a far tier."""
        return sum(lane.backlog for lane in self._lanes.values())

    @property
    def waiting(self) -> int:
        """Requests that wait for what comes near for them."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether the next plan carries moves, however idle the engine is."""
        return bool(self._wanting) or any(lane.has_work for lane in self._lanes.values())

    @property
    def write_wait(self) -> float:
        """Seconds after which :attr:`has_work` becomes true by itself; infinite if it does not."""
        return min((lane.write_wait for lane in self._lanes.values()), default=inf)

    def hurry(self) -> None:
        """The engine ends: see :meth:`Lane.hurry`."""
        for lane in self._lanes.values():
            lane.hurry()

    # -- requests that wait ------------------------------------------------------------------

    def expect(self, record: RequestRecord) -> None:
        """A request waits for its blocks: look what it will need."""
        if self._lanes:
            self.forget(record.view.request_id)
            if record.chain.epoch.lasting:
                arrival = self._arrival(record)
                self._questions.ask(arrival)
                self._search(arrival)

    def look_again(self, record: RequestRecord) -> None:
        """What a waiting request will need is something else from now on."""
        if record.view.request_id in self._arrivals:
            self.expect(record)

    def forget(self, request_id: str) -> None:
        """A request has its blocks, or has ended: no more comes near for it."""
        arrival = self._arrivals.pop(request_id, None)
        if arrival is None:
            return
        self._stop(arrival)
        self._waiting.discard(request_id)
        for key in arrival.claimed:
            self._pins.remove(key)

    def bring(self, record: RequestRecord, offer: Offer) -> int:
        """Have everything near that an offer takes, and keep it there; see :meth:`awaits`.

        Args:
            record: the request, which has no blocks.
            offer: what was decided.

        Returns:
            How many chunks that are.
        """
        arrival, floor = self._arrival(record), offer.floor
        self._stop(arrival)
        self._take_arrived(arrival, all_of_it=True)  # what failed may be had from another tier
        self._turns += 1
        arrival.turn, arrival.phase = self._turns, Phase.WAITS
        self._waiting.add(record.view.request_id)
        arrival.began, arrival.step = self._books.clock.now, self._books.clock.step
        arrival.due, arrival.stall = arrival.began + offer.timeout, offer.stall
        end = self._hits.fitting(record, floor, floor + offer.loaded, self._pins.most_of_one)
        arrival.floor, arrival.end = floor, end
        arrival.wanted = deque(self._hits.needs(record, floor, end))
        arrival.sources = {k: name for k, name in arrival.sources.items() if k in self._fetches}
        for key in arrival.wanted:
            if not self._books.catalog.near.holds(key) and key not in self._fetches:
                name = self._books.catalog.locate(key)
                if name is not None:
                    arrival.sources[key] = name
                    self._fetches.expect(key, name)
        self._want(arrival)
        if arrival.claimed:
            self._holding[record.view.request_id] = arrival
        return len(arrival.wanted)

    def is_waiting(self, record: RequestRecord) -> bool:
        """Whether a request was told to wait for what comes near for it, and may wait still."""
        return record.view.request_id in self._waiting

    def awaits(self, record: RequestRecord, floor: int) -> bool:
        """Whether a request is still to wait for what comes near for it. Asked about every waiting
        request in every step.

        Args:
            record: the request.
            floor: tokens at its beginning that the engine has by now: nobody waits for those.
        """
        arrival = self._arrivals.get(record.view.request_id)
        if arrival is None or not arrival.waits:
            return False
        if floor > arrival.floor:
            self._leave_out(arrival, floor)
        self._take_arrived(arrival)
        late, now = bool(arrival.wanted or arrival.awaited), self._books.clock.now
        if late and now < arrival.due:
            broken = bool(self._broken) and self._is_broken(arrival)
            if not (broken or self._has_stalled(arrival)):
                return True
            arrival.due = now
        self._end(arrival, late=late)
        return False

    def _is_broken(self, arrival: Arrival) -> bool:
        """Whether the tier is out of use by now from which the next chunk is to come."""
        fetch = self._fetches.get(arrival.awaited[0]) if arrival.awaited else None
        return fetch is not None and fetch.transfer.tier in self._broken

    def _has_stalled(self, arrival: Arrival) -> bool:
        """Whether the tier that the next chunk is to come from is at work, and has brought nothing
        to anybody for so long that there is no hope: no call of it takes longer."""
        if arrival.awaited and (fetch := self._fetches.get(arrival.awaited[0])) is not None:
            name = fetch.transfer.tier
        elif arrival.wanted and arrival.wanted[0] in arrival.sources:
            name = arrival.sources[arrival.wanted[0]]
        else:
            return False
        lane, clock = self._lanes[name], self._books.clock
        since = max(self._waits_since(arrival, lane), lane.brought)
        stalled = clock.now >= since + min(arrival.stall, lane.far.longest_call)
        # What was ordered since is perhaps not begun: a plan may be carried out a step later.
        plans = clock.step - max(arrival.step, lane.brought_step)
        return stalled and plans >= LOOK_PLANS and lane.is_reading

    def _waits_since(self, arrival: Arrival, lane: Lane) -> float:
        """Control's clock since which a request has waited for a tier: for its chunks, and before
        that in vain for its answer."""
        asked = arrival.asked
        return arrival.began if asked is None or lane.silent < asked.since else asked.since

    def awaits_probes(self, record: RequestRecord) -> bool:
        """Whether a request is to wait a moment for news of a tier that is out of use. Where the
        engine was idle for a while the tier may work again, and nobody has asked."""
        due = any(self._books.breakers.is_news_due(name) for name in self._broken)
        return due and self._questions.awaits_probes(self._arrival(record))

    def awaits_answers(self, record: RequestRecord) -> bool:
        """Whether a request whose hit may be longer, as soon as a tier has said so, is to wait for
        the answer."""
        return self._questions.awaits_answers(self._arrival(record))

    def waited(self, record: RequestRecord) -> float:
        """Seconds that a request has waited for moves."""
        arrival = self._arrivals.get(record.view.request_id)
        return (
            arrival.ended - arrival.began
            if arrival is not None and arrival.phase is Phase.OVER
            else 0.0
        )

    def credit(self, record: RequestRecord, offer: Offer) -> Offer:
        """An offer whose parts say which tier had what has come near for it."""
        arrival = self._arrivals.get(record.view.request_id)
        if arrival is None or not arrival.came or not offer.parts:
            return offer
        if arrival.credited[0] is not offer.parts:
            end = offer.floor + offer.found_tokens
            # A chunk whose move failed may have been saved since.
            moves = [fetch.transfer for fetch in arrival.came.values()]
            came = {move.keys[0]: move.tier for move in moves if move.state is State.DONE}
            parts = self._hits.parts(record, offer.floor, end, came)
            arrival.credited = offer.parts, parts
        return replace(offer, parts=arrival.credited[1])

    def bytes_ahead(self, record: RequestRecord) -> Mapping[TierName, int]:
        """Bytes, by the tier that they come from, that come near before what a request needs, and
        are not its own."""
        return self._fetches.bytes_without(record.known_keys()) if record.hit.has_far else {}

    def _arrival(self, record: RequestRecord) -> Arrival:
        arrival = self._arrivals.get(record.view.request_id)
        if arrival is None:
            arrival = self._arrivals[record.view.request_id] = Arrival(record)
        return arrival

    def _search(self, arrival: Arrival) -> None:
        """Look ahead for what a request will need."""
        self._call_back(arrival)
        arrival.search = self._hits.search(arrival.record)
        self._searched[arrival.request_id] = arrival

    def _want(self, arrival: Arrival) -> None:
        """Look for what a request wants when the next plan is made."""
        if arrival.phase is not Phase.AHEAD:
            self._wanting.setdefault(arrival.request_id, arrival)
        elif arrival.behind is None:
            self._searched.setdefault(arrival.request_id, arrival)

    def _stop(self, arrival: Arrival) -> None:
        """Order no more for a request. What is pinned for it stays so."""
        for queue in (self._wanting, self._holding, self._searched):
            queue.pop(arrival.request_id, None)
        self._questions.forget(arrival.request_id)
        self._call_back(arrival)
        for key in arrival.wanted:
            if key not in self._fetches:
                self._fetches.unexpect(key)
        arrival.wanted.clear()

    def _leave_out(self, arrival: Arrival, floor: int) -> None:
        """The engine has computed more of what a request waits for: that much need not come."""
        arrival.floor = floor
        needs = self._hits.needs(arrival.record, floor, arrival.end) if floor < arrival.end else ()
        needed = set(needs)
        for key in arrival.wanted:
            if key not in needed and key not in self._fetches:
                self._fetches.unexpect(key)
        for key in [key for key in arrival.claimed if key not in needed]:
            del arrival.claimed[key]
            self._pins.remove(key)
        arrival.wanted = deque(key for key in arrival.wanted if key in needed)
        arrival.awaited = deque(key for key in arrival.awaited if key in needed)

    def _end(self, arrival: Arrival, *, late: bool) -> None:
        """A wait is over; ``late`` if not all has come."""
        missing = arrival.sources.keys() & {*arrival.wanted, *arrival.awaited}
        self._stop(arrival)
        for key in arrival.awaited:
            del arrival.claimed[key]
            self._pins.remove(key)
        arrival.awaited.clear()
        arrival.phase = Phase.OVER
        self._waiting.discard(arrival.request_id)
        # The engine may have asked long after the last move: that time is not the tier's.
        moves = arrival.came.values()
        last = max((fetch.ended for fetch in moves), default=arrival.began)
        arrival.ended = arrival.due if late else max(arrival.began, last)
        self._books.meter.observe("fetch_wait_seconds", arrival.ended - arrival.began)
        if arrival.held_up:  # near had no room: that says nothing of a tier
            return
        near = self._books.catalog.near.visible
        hung = {f.transfer.tier for f in moves if f.transfer.overdue and f.ended > arrival.began}
        for name in hung | ({arrival.sources[key] for key in missing} if late else set()):
            came = sum(key in near for key, source in arrival.sources.items() if source == name)
            size = self._books.moved_bytes
            seconds = arrival.ended - self._waits_since(arrival, self._lanes[name])
            self._costs.given_up(name, came * size, seconds, least=size)

    def _take_arrived(self, arrival: Arrival, *, all_of_it: bool = False) -> None:
        """Pin what has come near, and leave out what has not. Without ``all_of_it`` nothing is
        looked at that was ordered behind a chunk which is still on its way."""
        awaited, near = arrival.awaited, self._books.catalog.near
        for _ in range(len(awaited)):
            if near.fills(awaited[0]):
                if not all_of_it:
                    break
                awaited.rotate(-1)
                continue
            key = awaited.popleft()
            self._pins.arrived(key)
            if near.slot(key) is None:
                del arrival.claimed[key]
                self._pins.remove(key)

    # -- chunks that were saved --------------------------------------------------------------

    @property
    def sharing(self) -> tuple[Lane, ...]:
        """Tiers that are offered what is used again: those that keep only that, and stores of
        others, which may have given up since what near still has."""
        lanes = self._lanes.values()
        return tuple(
            lane
            for lane in lanes
            if lane.far.keep == "shared" or (lane.far.keep == "all" and not lane.far.index.capacity)
        )

    def saved(self, key: ChunkKey, standing: Standing) -> None:
        """A chunk has been saved: every far tier is to have it that keeps such chunks."""
        for lane in self._lanes.values():
            lane.saved(key, standing)

    def _lost(self, key: ChunkKey) -> None:
        """Near had to give up a chunk that waits to be written."""
        for lane in self._lanes.values():
            lane.lost(key)

    # -- orders ------------------------------------------------------------------------------

    def order_writes(self) -> None:
        """With the next plan, move outward what was saved, as far as there is room on the way."""
        for lane in self._lanes.values():
            lane.order_writes()

    def step(self) -> tuple[TierOrders, ...]:
        """What far tiers are to do with the next plan."""
        if not self._lanes:
            return ()
        self._looks = LOOKS
        breakers = self._books.breakers
        self._broken = {name for name in self._lanes if breakers.reads(name).open}
        self._order_wanted()
        self._search_ahead()
        return tuple(orders for lane in self._lanes.values() if (orders := lane.drain()))

    def _order_wanted(self) -> None:
        """Moves for requests that wait for them, in the order in which they began to wait."""
        full = False
        for arrival in list(islice(self._wanting.values(), LOOKS)):
            if self._looks <= 0:
                return
            became = _Next.DONE
            while arrival.wanted and became is _Next.DONE and self._looks > 0:
                # If one that came before finds no room there is none, but with others' chunks.
                became = self._bring_next(arrival, arrival.wanted[0], makes_way=not full)
                if became is _Next.DONE:
                    arrival.wanted.popleft()
            full |= became is _Next.NEAR_FULL
            arrival.held_up |= became is _Next.NEAR_FULL
            if became is _Next.NEAR_FULL and self._has_all(arrival):
                self._stop(arrival)  # the request is served in part
            elif not arrival.wanted:
                del self._wanting[arrival.request_id]

    def _bring_next(self, arrival: Arrival, key: ChunkKey, *, makes_way: bool = False) -> _Next:
        """Have a chunk near, or on its way, and pinned for a request. What no tier has any more is
        left out, and so is what hangs on its way.

        Args:
            arrival: the request.
            key: the chunk.
            makes_way: whether requests that can wait longer give up for it what they have near.
        """
        self._looks -= 1
        near = self._books.catalog.near
        if key in arrival.claimed:
            return _Next.DONE
        name = None
        if not near.holds(key):
            name = self._source(arrival, key)
            if name is None:
                self._fetches.unexpect(key)
                return _Next.DONE
        elif key not in self._fetches:
            self._fetches.unexpect(key)  # it was saved meanwhile
        if not self._has_room(arrival, key) and not (makes_way and self._make_way(arrival, key)):
            return _Next.NEAR_FULL
        if name is not None:
            lane = self._lanes[name]
            if not lane.may_read:
                return _Next.TIER_BUSY
            self._looks -= LOOKS_OF_A_MOVE
            if self._fetches.order(lane, arrival.request_id, key, arrival.record.known_use) is None:
                return _Next.NEAR_FULL
            arrival.sources[key] = name
        if name is not None or near.fills(key):
            if (fetch := self._fetches.get(key)) is not None:
                arrival.came[key] = fetch
            arrival.awaited.append(key)
        arrival.claimed[key] = None
        self._pins.add(key)
        self._holding.setdefault(arrival.request_id, arrival)
        return _Next.DONE

    def _source(self, arrival: Arrival, key: ChunkKey) -> TierName | None:
        """The tier to bring a chunk from that is not near; None if none has it, or if it hangs on
        its way. A tier that had it when the wait began, and does not know any more, is read: that
        tells as much as a question would."""
        if key in self._fetches:
            return None
        catalog, name = self._books.catalog, self._books.catalog.locate(key)
        if name is None and (had := arrival.sources.get(key)) is not None:
            unknown = catalog.far[had].index.find(key) is Answer.UNKNOWN
            name = had if unknown and self._books.breakers.readable(had) else None
        return name

    def _has_all(self, arrival: Arrival) -> bool:
        """Whether a request alone has at least what several may have, and all of it is near."""
        self._take_arrived(arrival)
        enough = self._is_alone(arrival) and len(self._pins) >= self._pins.most
        return enough and not arrival.awaited

    def _is_alone(self, arrival: Arrival) -> bool:
        """Whether all that is pinned is pinned for this request."""
        return len(arrival.claimed) == len(self._pins)

    def _make_way(self, arrival: Arrival, key: ChunkKey) -> bool:
        """Take what is pinned from the last request that can wait longer than this one, so that of
        several that need more than there is room for the first is served.

        Returns:
            Whether there is room for a chunk now.
        """
        looks = LOOKS
        holders = [*islice(reversed(self._holding.values()), looks)]
        for early in (True, False):
            for other in holders:
                if looks <= 0:
                    return False
                looks -= 1
                ahead = other.phase is Phase.AHEAD
                if ahead is not early or not (ahead or other.turn > arrival.turn):
                    continue
                looks -= len(other.claimed)
                if any(self._pins.is_wanted_once(each) for each in other.claimed):
                    self._take_back(other)
                    if self._has_room(arrival, key):
                        return True
        return False

    def _has_room(self, arrival: Arrival, key: ChunkKey) -> bool:
        """Whether a chunk may be pinned for a request. Only whose turn has come may take more than
        the share of all."""
        alone = arrival.phase is not Phase.AHEAD and self._is_alone(arrival)
        return self._pins.has_room(key, alone=alone)

    def _take_back(self, arrival: Arrival) -> None:
        """What has come near for a request is not pinned any more, and is wanted again."""
        self._take_arrived(arrival)
        coming = set(arrival.awaited)
        given = [key for key in arrival.claimed if key not in coming]
        for key in given:
            del arrival.claimed[key]
            self._pins.remove(key)
        arrival.wanted.extendleft(reversed(given))
        self._want(arrival)
        if not coming:
            del self._holding[arrival.request_id]

    def _search_ahead(self) -> None:
        """Moves for requests whose turn has not come, the first come first. Who is held up by a
        busy tier makes room for those behind it that need another one."""
        for name, aside in self._aside.items():
            busy = self._lanes[name].is_busy and self._books.breakers.readable(name)
            if not busy and not self._search_queue(aside):
                return
        self._search_queue(self._searched)

    def _search_queue(self, queue: dict[str, Arrival]) -> bool:
        """Search for a queue of requests; whether there is room near for what others need."""
        while self._looks > 0 and queue:
            request_id, arrival = next(iter(queue.items()))
            self._looks -= LOOKS_OF_A_SEARCH
            for found in chain(_popped(arrival.wanted), arrival.search):
                if isinstance(found, int):
                    self._looks -= found
                elif (became := self._bring_next(arrival, found)) is not _Next.DONE:
                    arrival.wanted.appendleft(found)
                    if became is _Next.NEAR_FULL:
                        return False
                    name = self._source(arrival, found)
                    if name is None or name == arrival.behind:
                        return True  # those behind it wait for the same tier
                    self._put_aside(arrival, name)
                    break
                if self._looks <= 0:
                    return True
            else:
                del queue[request_id]
                arrival.behind = None
        return True

    def _put_aside(self, arrival: Arrival, name: TierName) -> None:
        """A request is searched no further before a tier has room on the way."""
        queue = self._searched if arrival.behind is None else self._aside[arrival.behind]
        request_id = arrival.request_id
        self._aside[name][request_id] = queue.pop(request_id)
        arrival.behind = name

    def _call_back(self, arrival: Arrival) -> None:
        """A request is not aside any more: it stands in one queue at most, which it leaves when it
        is over."""
        if arrival.behind is not None:
            del self._aside[arrival.behind][arrival.request_id]
            arrival.behind = None

    # -- outcomes ----------------------------------------------------------------------------

    def settle(self, transfer: Transfer) -> None:
        """Take in a move, an answer or a probe that has ended on every rank."""
        self._books.transfers.close(transfer)
        lane = self._lanes[transfer.tier]
        if transfer.kind is Kind.ASK:
            lane.answered(transfer)
            for arrival in self._questions.answered(transfer.keys):
                self._search(arrival)
        elif transfer.kind is Kind.PROBE:
            lane.probed(transfer)
        elif transfer.kind is Kind.MOVE_OUT:
            lane.written(transfer)
        else:
            self._fetches.ended(lane, transfer)
            # At once: what was published and is not pinned may be given up for the next chunk.
            self._pins.arrived(transfer.keys[0])

    def overdue(self, transfer: Transfer) -> None:
        """A move near has not ended in time: its chunk can be saved, and nobody waits for it. It is
        not ordered again before the move has ended."""
        self._fetches.overdue(self._lanes[transfer.tier], transfer)


def _popped(queue: deque[ChunkKey]) -> Iterator[ChunkKey]:
    while queue:
        yield queue.popleft()
