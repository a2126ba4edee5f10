"""The hand-off: between a scheduler that knows nothing of loads, and the loads.

Some engines' schedulers have states for a request whose cache is outside. One that has none asks
here who may run, from where, and when::

    WAITING ── admit ──▶ PARKED ── its load ends, well or not ──▶ READY ── take_ready ──▶ RUNNING
       │                    │                                                              ▲  │
       ├── admit, nothing to load, or loaded in the step ────────────────────────────────┘  │
       ◀──────────────────── preempted ──────────────────────────────────────────────────────┤
                            └──────── finished ──▶ DRAINING ── its load ends ──▶ gone ◀──────┘

What is loaded and how is decided by the :class:`~lamina_kv.control.planner.Planner`, here as for
every engine. The engine's side of the contract is in ``docs/engines.md``; what of it can be seen
from here is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from lamina_kv.control.planner import Planner
from lamina_kv.control.requests import BoundaryState, RequestView
from lamina_kv.control.sharing import Sharing
from lamina_kv.plan import LoadMode, Receipt, StepPlan


class Phase(Enum):
    """Where a request is."""

    WAITING = "waiting"
    """It has no blocks."""
    PARKED = "parked"
    """It has all its blocks, and does not run before its load has ended on every rank."""
    READY = "ready"
    """Its load has ended, well or not, and the engine has not taken it up yet."""
    RUNNING = "running"
    """It runs, for all that is known here."""
    DRAINING = "draining"
    """It is over, and something is still being loaded into blocks that were its own."""


class HandOffError(RuntimeError):
    """The engine has done what it must not; the message says what, and what would be right."""


@dataclass(frozen=True, slots=True)
class Admission:
    """How a request that was given its blocks goes on.

    Attributes:
        phase: ``PARKED``, or ``RUNNING`` if it may run in this step.
        start: tokens that it has when it runs: the first one that it computes.
        until: if not 0, it computes to here and no further, and then :meth:`HandOff.reached` is
            called: a load begins there.
    """

    phase: Phase
    start: int
    until: int = 0


@dataclass(frozen=True, slots=True)
class Resumption:
    """How a request goes on whose load has ended. It keeps its blocks: nothing is matched and
    nothing is allocated anew.

    Attributes:
        request_id: the request.
        start: tokens that it has: the first one that it computes.
        floor: tokens that it had before. What lies between was loaded and is complete; the engine
            should let other requests find it.
    """

    request_id: str
    start: int
    floor: int


@dataclass(slots=True)
class _Entry:
    """What is known of a request that has blocks, or had when it ended.

    Attributes:
        number: its place in the order of admission.
        floor: tokens that it had before its load.
        start: tokens that it has with its load.
        until: see :class:`Admission`.
        loading: whether its load has not ended.
        void: whether what that brings does not count any more, because of a reset.
        begun: whether it has run since.
    """

    view: RequestView
    number: int
    phase: Phase
    floor: int
    start: int
    until: int = 0
    loading: bool = False
    void: bool = False
    begun: bool = False


class HandOff:
    """See the module. Called from one thread, the engine's.

    Args:
        planner: what decides; made with ``leases_loads``, so that blocks of a request that ends or
            is preempted while it is loaded are not reused too early.
        boundary: tokens; the engine can load from any multiple of this on. A whole number of
            blocks; one, if it can do so anywhere.
        limit: requests that may have blocks at the same time.
        shares: whether the engine lets other requests find what was loaded for one: when that is
            out of :meth:`take_ready`, or the step is over in which it was loaded.

    Raises:
        ValueError: if a bound is not positive.
    """

    def __init__(
        self, planner: Planner, *, boundary: int, limit: int, shares: bool = False
    ) -> None:
        if boundary < 1 or limit < 1:
            raise ValueError(f"boundary and limit must be positive, got {boundary} and {limit}")
        self._planner = planner
        self._boundary = boundary
        self._limit = limit
        self._shares = shares
        self._entries: dict[str, _Entry] = {}
        self._cut: list[Resumption] = []
        self._admitted = 0
        self._expected: set[str] = set()

    # -- who may run -------------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        """Whether the engine's limit allows for one more request. Parked ones count as those that
        run do, from their admission to their end and once."""
        return self.count(Phase.PARKED, Phase.READY, Phase.RUNNING) < self._limit

    def count(self, *phases: Phase) -> int:
        """Requests in one of ``phases``; waiting ones are not known here."""
        return sum(entry.phase in phases for entry in self._entries.values())

    def phase(self, request_id: str) -> Phase:
        """Where a request is."""
        entry = self._entries.get(request_id)
        return Phase.WAITING if entry is None else entry.phase

    def arrived(self, view: RequestView) -> None:
        """A request waits for its blocks: what it will load may come near meanwhile. An engine need
        not say so."""
        self._must_wait(view.request_id)
        self._expected.add(view.request_id)
        self._planner.arrived(view)

    def look(self, view: RequestView, floor: int, *, declined: str = "") -> int | None:
        """Tokens that would be loaded for a waiting request if it had ``floor`` of its own. None if
        the request should go on waiting: what it needs comes from far tiers or, in an engine that
        shares, with another's load. Ask again in the next step; the wait has an end.

        It may be called in every step. It orders moves from far tiers and nothing else, and
        :meth:`admit` decides again. A request for which there is something should get blocks for
        all its tokens at once, or wait: in blocks for a part of them it would compute what could be
        loaded.

        Args:
            view: the request.
            floor: tokens that the engine's prefix cache has of it.
            declined: why nothing may be loaded for it; a word for logs and metrics.
        """
        self._must_wait(view.request_id)
        floor = self._round_up(floor)
        if floor >= view.num_tokens:
            return 0
        sharing = Sharing.ALL if self._shares else Sharing.NOTHING
        offer = self._planner.lookup(view, floor, declined=declined, sharing=sharing)
        return None if offer.ask_again else offer.tokens

    def admit(self, view: RequestView, floor: int, *, declined: str = "") -> Admission:
        """A waiting request has been given its blocks: decide, and order the load in the next plan.

        Args:
            view: the request; its blocks are those that it has now.
            floor: tokens at its beginning that are in them.
            declined: why nothing may be loaded for it; empty if it has blocks for all its tokens.

        Raises:
            HandOffError: if it has been admitted already.
        """
        self._must_wait(view.request_id)
        self._expected.discard(view.request_id)
        self._admitted += 1
        entry = _Entry(view, self._admitted, Phase.RUNNING, floor, floor)
        self._entries[view.request_id] = entry
        boundary = self._round_up(floor)
        if boundary == floor:
            return self._decide(entry, declined, floor)
        if boundary < view.num_tokens:
            if self._planner.lookup(view, boundary, declined=declined, may_wait=False).tokens:
                entry.until = boundary
                return Admission(Phase.RUNNING, floor, boundary)
        else:
            self._planner.lookup(view, boundary - self._boundary, declined="unaligned")
        self._planner.admitted(view.request_id, 0, floor=floor)
        return Admission(Phase.RUNNING, floor)

    def reached(self, request_id: str) -> Admission:
        """A request has computed to where it was told to stop: decide again, with what is known by
        now. If it is parked, it leaves the engine's running requests and keeps its blocks.

        Raises:
            HandOffError: if it was not told to stop.
        """
        entry = self._entries.get(request_id)
        if entry is None or not entry.until:
            raise HandOffError(f"{request_id} was not told to stop anywhere: go on with it")
        had, entry.floor = entry.floor, entry.until
        entry.start, entry.until, entry.begun = entry.floor, 0, False
        return self._decide(entry, "", had)

    def take_ready(self) -> list[Resumption]:
        """Requests whose load has ended since the last call, the first admitted first. They run
        before anybody is admitted: they hold blocks that others may wait for."""
        ready = [entry for entry in self._entries.values() if entry.phase is Phase.READY]
        for entry in ready:
            entry.phase = Phase.RUNNING
        return [
            Resumption(entry.view.request_id, entry.start, entry.floor)
            for entry in sorted(ready, key=lambda entry: entry.number)
        ]

    def take_cut(self) -> list[Resumption]:
        """Running requests under whose step a copy has failed, since the last call. Nothing that
        they have computed in that step or later counts, nor what was sampled behind it. No tier can
        cause this; an engine that cannot take the step back has to stop."""
        cut, self._cut = self._cut, []
        return cut

    # -- the step ----------------------------------------------------------------------------

    def plan(
        self,
        progress: Sequence[tuple[str, int, int]],
        *,
        forward: bool,
        states: Iterable[BoundaryState] = (),
    ) -> StepPlan:
        """The plan of the step that the engine has just scheduled; see
        :meth:`~lamina_kv.control.planner.Planner.plan_step`.

        Raises:
            HandOffError: if it runs a request that may not run, or not from where it has tokens.
        """
        for request_id, start, end in progress:
            entry = self._entries.get(request_id)
            if entry is None or entry.phase is not Phase.RUNNING:
                raise HandOffError(
                    f"{request_id} is scheduled, but it is {self.phase(request_id).value}: run "
                    "only what was admitted as running, or came out of take_ready"
                )
            if not entry.begun and start != entry.start:
                raise HandOffError(
                    f"{request_id} begins with token {start}, but it has {entry.start}: compute "
                    "from there, or tokens are lost or read that nobody wrote"
                )
            if entry.until and end > entry.until:
                raise HandOffError(
                    f"{request_id} computes to token {end}, but a load begins at {entry.until}: "
                    "stop there and call reached"
                )
            entry.begun = True
        return self._planner.plan_step(progress, forward=forward, states=states)

    def receive(self, receipts: Iterable[Receipt]) -> None:
        """Take in what the ranks report. A load has ended when every rank has said so; until then
        its request is parked, whatever some of them say: others may still write."""
        for end in self._planner.receive(receipts):
            entry = self._entries.get(end.request_id)
            if entry is None or not entry.loading:
                continue
            entry.loading = False
            if end.failed or entry.void:
                entry.start = entry.floor
            if entry.phase is Phase.DRAINING:
                del self._entries[end.request_id]
            elif entry.phase is Phase.PARKED:
                entry.phase = Phase.READY
            elif end.failed:
                entry.begun = False
                self._cut.append(Resumption(end.request_id, entry.floor, entry.floor))

    def preempted(self, request_id: str) -> None:
        """The engine takes a request's blocks back; it waits again, with all tokens it has by now.
        What is being loaded into them keeps them from being reused."""
        self._entries.pop(request_id, None)
        self._planner.preempted(request_id)

    def finished(
        self, request_id: str, computed: int, blocks: Sequence[Sequence[int]] = ()
    ) -> None:
        """A request is over: complete, aborted or failed. Its blocks may be freed after this call.

        Args:
            request_id: the request, in whatever phase; one that was never seen is no mistake.
            computed: tokens of it that have been computed and are right; 0 if that is not sure.
            blocks: per group, its block ids in token order; none if ``computed`` is 0.
        """
        self._expected.discard(request_id)
        entry = self._entries.get(request_id)
        if entry is not None and entry.loading:
            entry.phase = Phase.DRAINING
        else:
            self._entries.pop(request_id, None)
        self._planner.finished(request_id, computed, blocks)

    def abandon_all(self) -> list[str]:
        """No request is known to the engine any more; returns those that were. Their blocks may be
        freed after this call."""
        known = [name for name, e in self._entries.items() if e.phase is not Phase.DRAINING]
        known += sorted(self._expected.difference(known))
        for request_id in known:
            self.finished(request_id, 0)
        return known

    def reset(self) -> None:
        """The engine's weights have changed, or may have: no chunk of the old ones is found any
        more, and what is on its way to a request does not count."""
        self._planner.reset()
        for entry in self._entries.values():
            entry.void = entry.loading

    @property
    def has_work(self) -> bool:
        """Whether the engine must keep stepping although it may have nothing to run."""
        return self._planner.has_work or self.count(Phase.PARKED, Phase.READY) > 0

    # -- inside ------------------------------------------------------------------------------

    def _decide(self, entry: _Entry, declined: str, had: int) -> Admission:
        """Whether and how a request that has ``entry.floor`` tokens, of which the engine had some
        and it has computed the others, is loaded, and order it."""
        # It has its blocks: there is no time to wait for far tiers.
        offer = self._planner.lookup(entry.view, entry.floor, declined=declined, may_wait=False)
        floor = None if offer.tokens else had  # what is loaded behind it others had from there on
        self._planner.admitted(entry.view.request_id, offer.tokens, floor=floor)
        if offer.tokens:
            entry.start = entry.floor + offer.tokens
            entry.loading = True
            if offer.mode is LoadMode.PARKED:
                entry.phase = Phase.PARKED
        return Admission(entry.phase, entry.start)

    def _must_wait(self, request_id: str) -> None:
        phase = self.phase(request_id)
        if phase not in (Phase.WAITING, Phase.DRAINING):
            raise HandOffError(
                f"{request_id} is {phase.value} and has its blocks: say preempted or finished "
                "before it is admitted again"
            )

    def _round_up(self, floor: int) -> int:
        return -(-floor // self._boundary) * self._boundary
