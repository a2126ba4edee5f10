"""What is published before anything has happened: how Lamina is set up, and counters at 0.

Prometheus computes increases between two scrapes. A series that appears with its first event has no
earlier value, so that an alert would miss the first failure of every kind. Here is every series
whose labels are known at the start. Only failures of a kind that has no word of its own (the name
of an exception) appear later.
"""

from __future__ import annotations

from collections.abc import Iterator

from lamina_kv import __version__
from lamina_kv.config import Config
from lamina_kv.control.catalog import Catalog, Far
from lamina_kv.control.lanes import Unwritten
from lamina_kv.control.offers import Unloaded
from lamina_kv.control.push.inbound import GiveUp, Unpushed
from lamina_kv.control.reporting.misses import Reason
from lamina_kv.control.saving import Unsaved
from lamina_kv.control.transfers import Kind
from lamina_kv.observe.metrics import Meter
from lamina_kv.plan import ENGINE, LOAD_FAILED, NEAR, OTHER, PUSHED, TIMED_OUT, TORN, TierName
from lamina_kv.tiers.contract import Fate

OVERDUE = "overdue"

_UNPUSHED = (*Unpushed, GiveUp.ABSENT, GiveUp.UNANSWERED, GiveUp.FAILED, GiveUp.LOST)
_PUSHES = ("sent", "stopped", "received", "given_up")
_UNANSWERED = (Fate.LATE, Fate.REFUSED, Fate.DOWN, OVERDUE)
_FAILURES = {
    Kind.MOVE_IN: (Fate.GONE, Fate.CORRUPT, *_UNANSWERED),
    Kind.MOVE_OUT: _UNANSWERED,
    Kind.ASK: _UNANSWERED,
    Kind.LOAD: (TIMED_OUT, OVERDUE),
    Kind.SAVE: (LOAD_FAILED, OVERDUE),
    Kind.PUSH: (TORN, OVERDUE),
}


def begin(
    meter: Meter,
    config: Config,
    catalog: Catalog,
    chunk_tokens: int,
    *,
    loads: bool,
    saves: bool,
    pushes: bool,
) -> None:
    """Publish it.

    Args:
        meter: where figures go.
        config: the whole tree.
        catalog: every tier.
        chunk_tokens: tokens of one chunk.
        loads: whether anything is loaded from a tier.
        saves: whether anything is saved to one.
        pushes: whether the engine takes part in pushes.
    """
    meter.gauge(
        "config_info",
        1,
        version=__version__,
        tiers=",".join((NEAR, *catalog.far)),
        chunk_tokens=str(chunk_tokens),
        load_when=config.load.when,
        load_mode=config.load.mode,
        loads=_word(loads),
        saves=_word(saves),
        push=_word(pushes),
    )
    for source in (ENGINE, NEAR, *catalog.far, *([PUSHED] if pushes else []), OTHER):
        meter.begin("hit_tokens", tier=source)
        meter.begin("saved_seconds", tier=source)
    for unloaded in Unloaded:
        meter.begin("loads_skipped", reason=unloaded)
    for miss in Reason:
        meter.begin("misses", reason=miss)
    for unsaved in Unsaved:
        meter.begin("saves_held_back", reason=unsaved)
    meter.begin("eviction_age_seconds", tier=NEAR)
    _begin_failures(meter, NEAR, Kind.LOAD, Kind.SAVE)
    for far in catalog.far.values():
        _begin_far(meter, far)
    if pushes:
        for name, label, values in _of_pushes():
            for value in values:
                meter.begin(name, **{label: value})
        _begin_failures(meter, PUSHED, Kind.PUSH)


def _word(yes: bool) -> str:
    return "yes" if yes else "no"


def _begin_far(meter: Meter, far: Far) -> None:
    for name in ("write_bytes", "fetch_bytes", "write_seconds", "fetch_seconds"):
        meter.begin(name, tier=far.name)
    for unwritten in Unwritten:
        meter.begin("writes_skipped", tier=far.name, reason=unwritten)
    _begin_failures(meter, far.name, Kind.MOVE_IN, Kind.MOVE_OUT)
    if far.index.capacity:
        meter.begin("eviction_age_seconds", tier=far.name)
        return
    _begin_failures(meter, far.name, Kind.ASK)
    for answer in ("here", "absent", "none"):
        meter.begin("asked", tier=far.name, answer=answer)


def _begin_failures(meter: Meter, tier: TierName, *kinds: Kind) -> None:
    for kind in kinds:
        for reason in _FAILURES[kind]:
            meter.begin("failures", tier=tier, kind=f"{kind.value}_{reason}")


def _of_pushes() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Name, label and values of what is counted of pushes."""
    yield "pushes", "outcome", _PUSHES
    yield "pushes_given_up", "reason", tuple(GiveUp)
    yield "pushes_skipped", "reason", _UNPUSHED
