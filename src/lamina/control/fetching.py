"""What a waiting request will need moves from disk to host memory while it queues.

It then comes back at the speed of memory, and in the step itself if that is best. Fetches have the
lowest priority: a rank does one at a time, behind every load, and few are ordered ahead. A request
that gets its blocks, or ends, is not fetched for any more; what is on its way arrives all the same.

A queue of any length costs a plan the same: each request is searched once, first come first served,
a bounded number of chunks a plan, and one that needs nothing is not looked at again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lamina.config import Config
from lamina.control.breakers import Breakers
from lamina.control.catalog import Catalog, Location
from lamina.control.requests import RequestRecord
from lamina.control.transfers import Kind, State, Transfer, TransferTable
from lamina.observe.metrics import Meter
from lamina.plan import FetchOrder, TierName

LARGEST_SHARE = 2
"""What was fetched for requests that still wait takes at most the host's slots divided by this, so
that those who come last do not push out what was fetched for the first."""


LOOKS = 256
"""Chunks of waiting requests that are looked at for one plan: up to a quarter of a millisecond."""

LOOKS_OF_A_SEARCH = 16
"""To begin and to end the search for one request takes as long as so many looks."""

Search = Iterator[Location | None]


class FetchPlanner:
    """Plans fetches, and settles them. A part of the planner.

    Args:
        config: the whole tree.
        catalog: where chunks are.
        transfers: all transfers of the engine.
        breakers: which tiers are in use.
        meter: where figures go.
        search: looks for what a request must get from below host memory, chunk by chunk.
        chunk_bytes: bytes of one chunk, all ranks that keep it.
        ranks: how many those are; the bound of the configuration is for each.
    """

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        transfers: TransferTable,
        breakers: Breakers,
        meter: Meter,
        search: Callable[[RequestRecord], Search],
        *,
        chunk_bytes: int,
        ranks: int,
    ) -> None:
        bound = config.disk.fetch_ahead if config.disk is not None else None
        self._bound = (bound or 0) * ranks
        self._patience = config.load.deadline
        self._catalog = catalog
        self._transfers = transfers
        self._breakers = breakers
        self._meter = meter
        self._search = search
        self._chunk_bytes = chunk_bytes
        self._searches: dict[str, Search] = {}
        # Slots of the host that were filled for each request that waits, and for all of them.
        self._fetched: dict[str, int] = {}
        self._in_use = 0
        self._asked: list[tuple[str, Location]] = []

    @property
    def enabled(self) -> bool:
        """Whether anything is ever fetched. Where a chunk is larger than the bound, it is one at a
        time."""
        return self._bound > 0

    def expect(self, record: RequestRecord) -> None:
        """A request waits for its blocks."""
        if self.enabled:
            self._fetched.setdefault(record.view.request_id, 0)
            self._searches[record.view.request_id] = self._search(record)

    def look_again(self, record: RequestRecord) -> None:
        """What a waiting request will load is something else from now on."""
        if record.view.request_id in self._fetched:
            self._searches[record.view.request_id] = self._search(record)

    def forget(self, request_id: str) -> None:
        """A request has its blocks, or has ended: no more is fetched for it."""
        self._searches.pop(request_id, None)
        self._in_use -= self._fetched.pop(request_id, 0)

    def ask(self, request_id: str, place: Location) -> None:
        """Fetch one chunk with the next plan, whoever waits, if there is room for it then."""
        if self.enabled:
            self._asked.append((request_id, place))

    @property
    def has_orders(self) -> bool:
        """Whether the next plan carries a fetch that was asked for."""
        return bool(self._asked)

    def order(self, *, step: int, now: float) -> tuple[FetchOrder, ...]:
        """What was asked for, and fetches for those that wait, the first come first, as far as
        there is room.

        Args:
            step: the step whose plan will carry the orders.
            now: control's clock.
        """
        asked = self._asked.copy()
        self._asked.clear()
        if not (self._searches or asked) or not self._breakers.loads(TierName.DISK).closed:
            return ()
        orders: list[FetchOrder] = []
        for request_id, wanted in asked:
            order = self._fetch(request_id, wanted, step, now) if self._may_fetch else None
            if order is not None:
                orders.append(order)
        host, looks = self._catalog.host, LOOKS
        room = host.slots // LARGEST_SHARE
        # A search does not come back to what it has passed: it goes on when there is room for what
        # it finds.
        while (
            looks > 0
            and self._searches
            and self._in_use < room
            and self._may_fetch
            and host.has_room
        ):
            request_id, search = next(iter(self._searches.items()))
            for place in search:
                looks -= 1
                if place is not None or looks <= 0:
                    break
            else:  # all of it was looked at
                del self._searches[request_id]
                looks -= LOOKS_OF_A_SEARCH
                continue
            order = self._fetch(request_id, place, step, now) if place is not None else None
            if order is not None:
                self._fetched[request_id] += 1
                self._in_use += 1
                orders.append(order)
        return tuple(orders)

    @property
    def _may_fetch(self) -> bool:
        in_flight = self._transfers.bytes_in_flight(Kind.FETCH)
        return not in_flight or in_flight + self._chunk_bytes <= self._bound

    def _fetch(self, request_id: str, place: Location, step: int, now: float) -> FetchOrder | None:
        host, disk = self._catalog.host, self._catalog.disk
        assert disk is not None
        if host.holds(place.key) or not self._catalog.held(place):
            return None
        if disk.is_leased(place.slot):
            return None  # a load reads it, and the host gets it from the engine afterwards
        slot = host.reserve(place.key)
        if slot is None:
            return None
        disk.lease(place.slot)
        transfer = self._transfers.open(
            Kind.FETCH,
            request_id,
            step=step,
            expires=now + self._patience,
            size=self._chunk_bytes,
            chunks=(place, Location(place.key, TierName.HOST, slot)),
        )
        return FetchOrder(transfer.id, place.key, place.slot, slot)

    def settle(self, transfer: Transfer) -> None:
        """Take in a fetch that has ended."""
        self._transfers.close(transfer)
        source, target = transfer.chunks
        disk = self._catalog.disk
        assert disk is not None
        disk.release(source.slot)
        if transfer.state is State.DONE:
            self._catalog.publish(target)
            self._meter.count("fetch_bytes", transfer.moved_bytes)
            return
        if self._fetched.get(transfer.request_id):
            self._fetched[transfer.request_id] -= 1
            self._in_use -= 1
        self._catalog.give_back(target, poisoned=transfer.poisoned)
        self._catalog.drop_bad(transfer.chunks, transfer.bad_chunks)
        self._meter.count("failures", 1, kind=f"fetch_{transfer.reason or 'poisoned'}")
