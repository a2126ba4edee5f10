"""Lamina against itself: what ``auto`` decides, and every setting that could be fixed instead.

Each fixed setting takes turns with ``auto``, two processes at a time, in every scenario with hits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lamina_kv.bench.progress import Progress
from lamina_kv.bench.samples import Samples, Target, Unit
from peers.arena import Arena, Contender
from peers.hits import Hits
from peers.results import Outcome, Row
from peers.settings import PeersSettings, Scenario
from peers.systems import System

AUTO_LIMIT = 1.05
"""``auto`` may take this much longer than the best fixed setting."""

AUTO = Contender("auto", System.LAMINA)
_ALWAYS = {"when": "always"}
FIXED = (
    *(
        Contender(
            f"layerwise, window {window}",
            System.LAMINA,
            {"load": {"mode": "layerwise", "load_ahead": window, **_ALWAYS}},
        )
        for window in (1, 2, 4, 8, "auto")
    ),
    Contender("parked", System.LAMINA, {"load": {"mode": "parked", **_ALWAYS}}),
    Contender("always loaded", System.LAMINA, {"load": _ALWAYS}),
)
"""What an operator could fix."""

_SCENARIOS = (Scenario.HOST, Scenario.SUFFIX, Scenario.SLOW, Scenario.DISK)


def sweep(settings: PeersSettings, arena: Arena, work: Path, progress: Progress) -> list[Outcome]:
    """Every fixed setting beside ``auto``.

    Args:
        settings: the bench's options; the mixed load, misses and the link that is slower than
            computing are no part of it.
        arena: starts systems.
        work: directory for stores on disk.
        progress: where it says what it is doing.

    Raises:
        BenchError: if an engine fails, or a hit is not where it should be.
    """
    found: dict[Scenario, list[tuple[Contender, Outcome]]] = {}
    for number, fixed in enumerate(FIXED):
        hits = Hits(settings, arena, (AUTO, fixed), progress)
        stores = work / f"stores-{number}"
        for outcome in _played(settings, hits, stores):
            found.setdefault(outcome.scenario, []).append((fixed, outcome))
    return [compared(scenario, pairs) for scenario, pairs in found.items()]


def _played(settings: PeersSettings, hits: Hits, stores: Path) -> list[Outcome]:
    wanted = [each for each in settings.scenarios if each in _SCENARIOS]
    outcomes: list[Outcome] = []
    if in_memory := [each for each in wanted if each in {Scenario.HOST, Scenario.SUFFIX}]:
        outcomes += hits.in_memory(in_memory)
    if Scenario.SLOW in wanted:
        outcomes += hits.behind_link([Scenario.SLOW])
    if Scenario.DISK in wanted:
        stores.mkdir()
        outcomes.append(hits.on_disk(stores))
    return outcomes


def compared(scenario: Scenario, pairs: Sequence[tuple[Contender, Outcome]]) -> Outcome:
    """All that was measured in one scenario; ``auto`` is held against every fixed setting.

    Args:
        scenario: which.
        pairs: each fixed setting, and the outcome in which ``auto`` took turns with it and came
            first.
    """
    rows: list[Row] = []
    targets = []
    for fixed, outcome in pairs:
        auto, other = (row.samples for row in outcome.rows)
        rows.append(Row(Samples(f"auto, beside {fixed.label}", auto.values), is_peer=False))
        rows.append(Row(Samples(fixed.label, other.values), is_peer=False))
        figure = Samples(f"auto ÷ {fixed.label}", (auto.median / other.median,))
        targets.append(Target(figure, Unit.RATIO, AUTO_LIMIT))
    return Outcome(scenario, pairs[0][1].title, tuple(rows), targets=tuple(targets))
