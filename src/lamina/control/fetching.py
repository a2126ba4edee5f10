"""What a waiting request will need moves from disk to host memory while it queues.

It then comes back at the speed of memory, and in the step itself if that is best. Fetches have the
lowest priority: a rank does one at a time, behind every load, and few are ordered ahead. A request
that gets its blocks, or ends, is not fetched for any more; what is on its way arrives all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

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


@dataclass(slots=True)
class _Waiting:
    """A request that waits for its blocks.

    Attributes:
        record: the request.
        needed: what it will load, as far as that was not looked at; None before the first look.
        fetched: slots of the host that were filled for it.
    """

    record: RequestRecord
    needed: Iterator[Location] | None = None
    fetched: int = 0


class FetchPlanner:
    """Plans fetches, and settles them. A part of the planner.

    Args:
        config: the whole tree.
        catalog: where chunks are.
        transfers: all transfers of the engine.
        breakers: which tiers are in use.
        meter: where figures go.
        needed: gives what a request without any tokens in the engine would load.
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
        needed: Callable[[RequestRecord], Iterable[Location]],
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
        self._needed = needed
        self._chunk_bytes = chunk_bytes
        self._waiting: dict[str, _Waiting] = {}
        self._asked: list[tuple[str, Location]] = []

    @property
    def enabled(self) -> bool:
        """Whether anything is ever fetched. Where a chunk is larger than the bound, it is one at a
        time."""
        return self._bound > 0

    def expect(self, record: RequestRecord) -> None:
        """A request waits for its blocks."""
        if self.enabled:
            self._waiting[record.view.request_id] = _Waiting(record)

    def look_again(self, request_id: str) -> None:
        """What a waiting request will load is something else from now on."""
        if (waiting := self._waiting.get(request_id)) is not None:
            waiting.needed = None

    def forget(self, request_id: str) -> None:
        """A request has its blocks, or has ended: no more is fetched for it."""
        self._waiting.pop(request_id, None)

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
        if not (self._waiting or asked) or not self._breakers.loads(TierName.DISK).closed:
            return ()
        room = self._catalog.host.slots // LARGEST_SHARE
        room -= sum(waiting.fetched for waiting in self._waiting.values())
        orders: list[FetchOrder] = []
        for request_id, wanted in asked:
            order = self._fetch(request_id, wanted, step, now) if self._may_fetch else None
            if order is not None:
                orders.append(order)
        for waiting in self._waiting.values():
            if room <= 0 or not self._may_fetch:
                break
            if waiting.needed is None:
                waiting.needed = iter(self._look(waiting.record))
            while room > 0 and self._may_fetch:
                place = next(waiting.needed, None)
                if place is None:
                    break
                order = self._fetch(waiting.record.view.request_id, place, step, now)
                if order is not None:
                    waiting.fetched += 1
                    room -= 1
                    orders.append(order)
        return tuple(orders)

    @property
    def _may_fetch(self) -> bool:
        in_flight = self._transfers.bytes_in_flight(Kind.FETCH)
        return not in_flight or in_flight + self._chunk_bytes <= self._bound

    def _look(self, record: RequestRecord) -> list[Location]:
        """What must be fetched for a request. What the host has of it is not given up meanwhile,
        if that can be helped."""
        needed = list(self._needed(record))
        self._catalog.host.touch([place.key for place in needed])
        return [place for place in needed if place.tier is TierName.DISK]

    def _fetch(self, request_id: str, place: Location, step: int, now: float) -> FetchOrder | None:
        host, disk = self._catalog.host, self._catalog.disk
        assert disk is not None
        if host.holds(place.key) or not self._catalog.held(place):
            return None
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
        if (waiting := self._waiting.get(transfer.request_id)) is not None:
            waiting.fetched -= 1
        self._catalog.give_back(target, poisoned=transfer.poisoned)
        self._catalog.drop_bad(transfer.chunks, transfer.bad_chunks)
        self._meter.count("failures", 1, kind=f"fetch_{transfer.reason or 'poisoned'}")
