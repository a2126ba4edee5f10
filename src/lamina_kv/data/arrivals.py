"""Who waits for what comes into the engine: parked requests, and slots of loads that are over but
for the device.

A request may wait for several things, say a load and a push. It goes on when all have ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lamina_kv.data.load_pipeline import LoadRun, LoadStuck
from lamina_kv.plan import TIMED_OUT, TransferReceipt


@dataclass(frozen=True, slots=True)
class Arrived:
    """Requests of which something has ended.

    Attributes:
        arrived: those that wait for nothing any more.
        failed: those of which a load failed, in a step or between steps.
        rejected: those of ``arrived`` of which a push failed.
    """

    arrived: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    rejected: frozenset[str] = frozenset()


class Arrivals:
    """See the module.

    Args:
        report: called with the receipts of loads that are over.
    """

    def __init__(self, report: Callable[[Iterable[TransferReceipt]], None]) -> None:
        self._report = report
        self._parked: list[LoadRun] = []
        # Of a step that is over, with the requests that it was said of that their load has failed.
        self._landing: list[tuple[LoadRun, frozenset[str]]] = []
        self._awaited: Counter[str] = Counter()
        self._arrived: set[str] = set()
        self._failed: set[str] = set()
        self._rejected: set[str] = set()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to wait for, and nothing to say."""
        return not (self._parked or self._landing or self._arrived or self._failed)

    def park(self, run: LoadRun) -> None:
        """Requests wait for loads between steps."""
        self._parked.append(run)
        self._awaited.update(load.order.request_id for load in run.loads)

    def expect(self, request_id: str) -> None:
        """A request waits for a push."""
        self._awaited[request_id] += 1

    def pushed(self, request_id: str, *, failed: bool) -> None:
        """A push has ended that a request waited for."""
        if failed:
            self._rejected.add(request_id)
        self._one_ended(request_id)

    def finished(self, run: LoadRun) -> None:
        """Every row of a step's loads has arrived or is launched, or never will be. That a load has
        failed is said at once; slots are used until a device that runs behind has read them."""
        landed = run.landed
        self._failed.update(_failed(run))
        if landed:
            self._report(run.receipts())
        else:
            self._landing.append((run, _failed(run)))

    def collect(self) -> Arrived:
        """What has ended since the last call.

        Raises:
            LoadStuck: if a load that is late cannot be given up, or the device has failed in a load
                whose rows the model may have read. The engine has to stop.
        """
        for run in self._parked:
            if run.expired and not run.landed:
                run.give_up(TIMED_OUT)
            run.check()
        for run in [run for run in self._parked if run.landed]:
            self._parked.remove(run)
            self._report(run.receipts())
            self._failed.update(_failed(run))
            for load in run.loads:
                self._one_ended(load.order.request_id)
        for run, said in [(run, said) for run, said in self._landing if run.landed]:
            self._landing.remove((run, said))
            self._report(run.receipts())
            if late := _failed(run) - said:
                raise LoadStuck(
                    f"the device has failed while it copied rows for {', '.join(sorted(late))}, "
                    "and the model may have read them. Nothing of it can be taken back, so the "
                    "engine stops: look at the device, and restart the engine"
                )
        # Of a parked request that waits for something else, too, nothing is said yet.
        now = Arrived(
            frozenset(self._arrived),
            frozenset(request for request in self._failed if request not in self._awaited),
            frozenset(self._rejected & self._arrived),
        )
        self._arrived.clear()
        self._failed -= now.failed
        self._rejected -= now.rejected
        return now

    def give_up(self, reason: str, patience: Callable[[], float | None] = lambda: None) -> None:
        """Give up all parked loads, and wait until nobody writes for them any more.

        Args:
            reason: a word for logs and metrics.
            patience: seconds that copies which have begun have to end, asked before each load; see
                :meth:`~lamina_kv.data.load_pipeline.LoadRun.land`.

        Raises:
            LoadStuck: if one has not ended.
        """
        stuck: LoadStuck | None = None
        for run in self._parked:
            run.give_up(reason)
        for run in self._parked:
            try:
                run.land(patience())
            except LoadStuck as error:
                stuck = error
        if stuck is not None:
            raise stuck

    def land(self, patience: Callable[[], float | None] = lambda: None) -> None:
        """Wait for the device to carry out the loads of steps that are over.

        Args:
            patience: seconds that it has, asked before each load; see :meth:`give_up`.

        Raises:
            LoadStuck: if it has not carried out one.
        """
        for run, _ in self._landing:
            run.land(patience())

    def _one_ended(self, request_id: str) -> None:
        self._awaited[request_id] -= 1
        if self._awaited[request_id] <= 0:
            del self._awaited[request_id]
            self._arrived.add(request_id)


def _failed(run: LoadRun) -> frozenset[str]:
    """Requests whose load has failed."""
    return frozenset(load.order.request_id for load in run.loads if load.reason)
