"""Taking a tier out of use while it keeps failing, and using it again when it works.

::

                             ┌─────────── a probe goes well ───────────┐
                             │                                         ▼
    CLOSED ── failures ──▶ OPEN ── pause ──▶ one try ── works ──▶ CLOSED, on probation
       ▲       in a row     ▲  ▲                │                  │           │
       │                    │  └───── fails ────┘                  │           │
       │                    └───────── the next failure ───────────┘           │
       └──────────────────────── a chunk is read, or written ──────────────────┘

A far tier has two breakers, by its name in the configuration: one for reads and one for writes. So
a tier that is full still serves what it holds, and one that cannot be read is still written to.
While either is open the tier is probed (:mod:`lamina_kv.control.probes`). Near has one breaker, for
saves: a load from near says nothing about any tier. Neither near nor a peer of a push is probed.

A store may answer probes and questions and still not deliver. So only a chunk that has moved proves
that it works. Each time that a tier fails on probation it takes more good probes in a row until it
is believed again, and the pause doubles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from enum import Enum
from math import inf

from lamina_kv.config import BreakerConfig
from lamina_kv.control.probes import Probe
from lamina_kv.control.transfers import Kind, State, Transfer
from lamina_kv.observe.metrics import Meter
from lamina_kv.plan import LOAD_FAILED, NEAR, TierName
from lamina_kv.tiers.contract import Fate

log = logging.getLogger("lamina_kv.control")

MAX_PAUSE = 300.0
"""Seconds that the doubled pause does not exceed, unless ``breaker.pause`` itself does."""

DOUBT, MOST_PROBES = 8, 300
"""After each failure on probation it takes so many times as many good probes in a row, and at most
so many: about as many seconds."""

_READS = (Kind.MOVE_IN, Kind.ASK)
_FILLS = (Kind.SAVE, Kind.MOVE_OUT)


class BreakerState(Enum):
    """What a breaker lets pass."""

    CLOSED = "closed"
    """Everything."""
    OPEN = "open"
    """Nothing until a probe goes well; or one try when the pause is over."""
    TRYING = "trying"
    """Nothing: a try is on its way."""


class CircuitBreaker:
    """One direction of one tier.

    Args:
        name: for messages.
        config: how many failures, how long a pause.
        clock: monotonic seconds.

    Attributes:
        refusals: how often it began to refuse; what was found before may be out of reach since.
    """

    def __init__(self, name: str, config: BreakerConfig, clock: Callable[[], float]) -> None:
        self.refusals = 0
        self._name = name
        self._config = config
        self._clock = clock
        self._state = BreakerState.CLOSED
        self._failures = 0
        self._needs_proof = False  # a chunk has to move before failures are forgotten
        self._proved = True  # a chunk has moved since it was open last
        self._pause = config.pause  # of the next time that it opens
        # While it is open:
        self._until = 0.0
        self._needed = 1  # good probes in a row until it is believed
        self._good = 0  # of these, how many there were
        self._unwell = False  # the last probe has failed

    @property
    def closed(self) -> bool:
        """Whether the tier is in use as usual."""
        return self._state is BreakerState.CLOSED

    @property
    def open(self) -> bool:
        """Whether it is out of use, and nothing is on its way that tries it."""
        return self._state is BreakerState.OPEN

    @property
    def allows(self) -> bool:
        """Whether something may be ordered now."""
        return self._state is BreakerState.CLOSED or self.pause_left <= 0

    @property
    def pause_left(self) -> float:
        """Seconds until a try is allowed; infinite while it is no pause that is waited for."""
        if self._state is not BreakerState.OPEN or self._unwell:
            return inf
        return max(0.0, self._until - self._clock())

    def cut_short(self) -> None:
        """Allow the one try now, because there will be no later."""
        self._until = min(self._until, self._clock())
        self._unwell = False

    def ordered(self) -> bool:
        """Something is ordered. Returns whether it is the one try, which must be judged as such."""
        if not (self._state is BreakerState.OPEN and self.allows):
            return False
        self._state = BreakerState.TRYING
        self.refusals += 1
        return True

    def judge(
        self, good: bool, reason: str = "", *, trying: bool = False, proof: bool = True
    ) -> None:
        """Something that was ordered has worked, or failed, or not ended in time.

        Args:
            good: whether it has worked.
            reason: why not.
            trying: whether it was the one try. While the tier is out of use nothing else counts:
                it was ordered before.
            proof: whether a chunk moved, or was to. A question moves none.
        """
        if self._state is BreakerState.CLOSED:
            if good:
                self._worked(proof)
                return
            self._failures += 1
            self._needs_proof |= proof
            if self._failures >= self._config.failures:
                self.refusals += 1
                self._open()
                log.warning(
                    "%s are stopped after %d failures in a row, the last one: %s. Serving goes on "
                    "without, and they are used again when they work",
                    self._name,
                    self._failures,
                    reason,
                )
        elif trying and good:
            self._close()
            self._worked(proof)
        elif trying:
            self._open()
            log.info("%s still fail (%s)", self._name, reason)

    def try_again(self) -> None:
        """The one try has ended without saying anything about the tier."""
        self._state = BreakerState.OPEN

    def probed(self, well: bool) -> bool:
        """The tier was probed. Changes nothing unless it is out of use.

        Returns:
            Whether it is in use again because of that.
        """
        if self._state is not BreakerState.OPEN:
            return False
        self._unwell, self._good = not well, self._good + 1 if well else 0
        if self._good < self._needed:
            return False
        self._close()
        return True

    def _worked(self, proof: bool) -> None:
        if proof:
            self._proved, self._needs_proof, self._failures = True, False, 0
            self._pause = self._config.pause
        elif not self._needs_proof:
            self._failures = 0

    def _close(self) -> None:
        """In use, on probation."""
        self._state, self._needs_proof = BreakerState.CLOSED, True
        self._failures = self._config.failures - 1
        log.warning("%s work again", self._name)

    def _open(self) -> None:
        self._state = BreakerState.OPEN
        self._until = self._clock() + self._pause
        self._pause = min(2 * self._pause, max(MAX_PAUSE, self._config.pause))
        self._needed = 1 if self._proved else min(DOUBT * self._needed, MOST_PROBES)
        self._proved, self._unwell, self._good = False, False, 0


class Breakers:
    """The breakers of every tier.

    Args:
        config: how many failures, how long a pause.
        clock: monotonic seconds.
        far: names of the far tiers.
    """

    def __init__(
        self, config: BreakerConfig, clock: Callable[[], float], far: Iterable[TierName]
    ) -> None:
        names = tuple(far)
        self._reads = {
            tier: CircuitBreaker(f"reads from tier {tier}", config, clock) for tier in names
        }
        self._fills = {
            NEAR: CircuitBreaker(f"saves to tier {NEAR}", config, clock),
            **{tier: CircuitBreaker(f"writes to tier {tier}", config, clock) for tier in names},
        }
        self._probes = {tier: Probe(clock) for tier in names}

    def reads(self, tier: TierName) -> CircuitBreaker:
        """For chunks that are read from a far tier, and for questions to it."""
        return self._reads[tier]

    def fills(self, tier: TierName) -> CircuitBreaker:
        """For what is saved to near, or written to a far tier."""
        return self._fills[tier]

    def order(self, kind: Kind, tier: TierName) -> bool:
        """A save, move or question is ordered. Returns whether it is the one try of its tier."""
        breaker = self._of(kind, tier)
        return breaker is not None and breaker.ordered()

    def readable(self, tier: TierName) -> bool:
        """Whether a read from a far tier may be ordered now."""
        return self._reads[tier].allows

    def judge(self, ended: Iterable[Transfer]) -> None:
        """Draw conclusions from transfers that have ended, or are overdue, at the same time. What
        failed together is one failure, and none where something else worked. That a question was
        answered says nothing of chunks that did not move."""
        failures: dict[CircuitBreaker, tuple[str, bool]] = {}
        successes: dict[CircuitBreaker, bool] = {}
        for transfer in ended:
            breaker = self._of(transfer.kind, transfer.tier)
            if breaker is None:
                continue
            verdict, reason = _verdict(transfer), transfer.reason or "overdue"
            proof = transfer.kind is not Kind.ASK
            if transfer.trying:
                if verdict is None:
                    breaker.try_again()
                else:
                    breaker.judge(verdict, reason, trying=True, proof=proof)
            elif verdict:
                successes[breaker] = proof or successes.get(breaker, False)
            elif verdict is False:
                first, moved = failures.get(breaker, (reason, False))
                failures[breaker] = first, moved or proof
        for breaker, proof in successes.items():
            breaker.judge(good=True, proof=proof)
        for breaker, (reason, proof) in failures.items():
            worked = successes.get(breaker)
            if worked is None or (proof and not worked):
                breaker.judge(good=False, reason=reason, proof=proof)

    def _of(self, kind: Kind, tier: TierName) -> CircuitBreaker | None:
        if kind in _READS:
            return self._reads[tier]
        return self._fills[tier] if kind in _FILLS else None

    @property
    def refusals(self) -> int:
        """Changes whenever chunks that were found may be out of reach since."""
        return sum(breaker.refusals for breaker in self._reads.values())

    # -- probes ------------------------------------------------------------------------------

    def probe(self, tier: TierName) -> Probe | None:
        """The probes of a far tier that is out of use one way or both; None if it is in use."""
        probe = self._probes[tier]
        if self._reads[tier].closed and self._fills[tier].closed:
            if not probe.is_under_way:
                probe.reset()
            return None
        return probe

    def probed(self, tier: TierName, well: bool) -> bool:
        """A far tier was probed.

        Args:
            tier: the tier.
            well: whether it works, as far as a probe can tell.

        Returns:
            Whether it is read again because of that.
        """
        self._probes[tier].ended()
        self._fills[tier].probed(well)
        return self._reads[tier].probed(well)

    def is_news_due(self, tier: TierName) -> bool:
        """Whether a far tier is not read, and it may be known in a moment that it can be."""
        breaker = self._reads[tier]
        return not breaker.closed and not breaker.allows and self._probes[tier].is_news_due

    def gauges(self, meter: Meter, tier: TierName) -> None:
        """Write to the meter whether a tier is in use, each way."""
        fill = Kind.SAVE if tier == NEAR else Kind.MOVE_OUT
        for kind, breaker in ((Kind.MOVE_IN, self._reads.get(tier)), (fill, self._fills[tier])):
            if breaker is not None:
                meter.gauge("tier_in_use", int(breaker.closed), tier=tier, direction=kind.value)


def _verdict(transfer: Transfer) -> bool | None:
    """Whether a tier has worked in a transfer; None if that cannot be told."""
    if transfer.state is State.PLANNED:  # overdue
        return False
    if not transfer.failed:
        return True
    # A load that failed is no fault of the tier that is saved to. A tier that says that a chunk is
    # gone answers, and may still be unable to read.
    return None if transfer.reason in (LOAD_FAILED, Fate.GONE) else False
