"""``lamina-kv bench peers``: the scenarios, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from lamina_kv.bench.progress import Progress
from lamina_kv.bench.report import Machine
from peers.arena import Arena, Contender
from peers.environments import Environments
from peers.hits import Hits
from peers.loads import Loads
from peers.results import Outcome, PeersReport
from peers.settings import PeersSettings, Scenario
from peers.shared import SharedHits
from peers.sweep import sweep

_IN_MEMORY = (Scenario.HOST, Scenario.SUFFIX)
_BEHIND_LINK = (Scenario.SLOW, Scenario.SLOWER)
_SHARED = (Scenario.VALKEY, Scenario.DIRECTORY, Scenario.S3)
_LOADS = (Scenario.MISS, Scenario.MIXED)


def measure(
    settings: PeersSettings, progress: Progress, keep: Callable[[PeersReport], None]
) -> PeersReport:
    """Run the bench.

    Args:
        settings: its options.
        progress: where it says what it is doing.
        keep: called with what there is, whenever there is more: the bench may take an hour.

    Raises:
        BenchError: if a system cannot be installed or fails, a hit is not where it should be, or
            there is no room.
    """
    machine = Machine.here()
    environments = Environments(settings.environments, progress)
    if not settings.sweep:
        environments.make({system.environment for system in settings.systems})
    report = PeersReport(machine, _options(settings), ())
    with tempfile.TemporaryDirectory(dir=settings.directory, prefix="lamina-bench-") as name:
        work = Path(name)
        settings.shape.write_config(work)
        arena = Arena(settings, environments, work, progress)
        play = _swept if settings.sweep else _played
        for outcomes in play(settings, arena, work, progress):
            report = PeersReport(machine, report.settings, (*report.outcomes, *outcomes))
            keep(report)
    return report


def _played(
    settings: PeersSettings, arena: Arena, work: Path, progress: Progress
) -> Iterator[Sequence[Outcome]]:
    """The scenarios that are wanted; those that share processes come together."""

    def wanted(scenarios: Sequence[Scenario]) -> list[Scenario]:
        return [each for each in settings.scenarios if each in scenarios]

    contenders = [Contender.of(system) for system in settings.systems]
    hits = Hits(settings, arena, contenders, progress)
    if scenarios := wanted(_IN_MEMORY):
        yield hits.in_memory(scenarios)
    if wanted((Scenario.DISK,)):
        stores = work / "stores"
        stores.mkdir()
        yield [hits.on_disk(stores)]
    if scenarios := wanted(_BEHIND_LINK):
        yield hits.behind_link(scenarios)
    for scenario in wanted(_SHARED):
        yield [SharedHits(settings, arena, contenders, progress).play(scenario, work)]
    if scenarios := wanted(_LOADS):
        yield Loads(settings, arena, contenders, progress).play(scenarios)


def _swept(
    settings: PeersSettings, arena: Arena, work: Path, progress: Progress
) -> Iterator[Sequence[Outcome]]:
    yield sweep(settings, arena, work, progress)


def _options(settings: PeersSettings) -> dict[str, object]:
    options = {**settings.shape.options(), **asdict(settings)}
    del options["shape"]
    return options
