"""``lamina bench peers``: the scenarios, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lamina.bench.peers.arena import Arena, Contender
from lamina.bench.peers.environments import Environments
from lamina.bench.peers.hits import Hits
from lamina.bench.peers.loads import Loads
from lamina.bench.peers.results import Outcome, PeersReport
from lamina.bench.peers.settings import PeersSettings, Scenario
from lamina.bench.peers.sweep import sweep
from lamina.bench.progress import Progress
from lamina.bench.report import Machine

_IN_MEMORY = (Scenario.HOST, Scenario.SUFFIX)
_LOADS = (Scenario.MISS, Scenario.MIXED)
_BEHIND_LINK = (Scenario.SLOW, Scenario.SLOWER)


def measure(settings: PeersSettings, progress: Progress) -> PeersReport:
    """Run the bench.

    Raises:
        BenchError: if a system cannot be installed or fails, a hit is not where it should be, or
            there is no room.
    """
    machine = Machine.here()
    environments = Environments(settings.environments, progress)
    if not settings.sweep:
        environments.make({system.environment for system in settings.systems})
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(dir=settings.directory, prefix="lamina-bench-") as name:
        work = Path(name)
        settings.shape.write_config(work)
        arena = Arena(settings, environments, work, progress)
        if settings.sweep:
            outcomes += sweep(settings, arena, work, progress)
            return _report(settings, machine, outcomes)
        contenders = [Contender.of(system) for system in settings.systems]
        hits = Hits(settings, arena, contenders, progress)
        if wanted := [each for each in settings.scenarios if each in _IN_MEMORY]:
            outcomes += hits.in_memory(wanted)
        if Scenario.DISK in settings.scenarios:
            stores = work / "stores"
            stores.mkdir()
            outcomes.append(hits.on_disk(stores))
        if wanted := [each for each in settings.scenarios if each in _BEHIND_LINK]:
            outcomes += hits.behind_link(wanted)
        if wanted := [each for each in settings.scenarios if each in _LOADS]:
            outcomes += Loads(settings, arena, contenders, progress).play(wanted)
    return _report(settings, machine, outcomes)


def _report(settings: PeersSettings, machine: Machine, outcomes: Sequence[Outcome]) -> PeersReport:
    options = {**settings.shape.options(), **asdict(settings)}
    del options["shape"]
    return PeersReport(machine, options, tuple(outcomes))
