"""``lamina-kv bench decode`` and ``lamina-kv bench save``: what Lamina costs while it brings
nothing.

The same work is done by engines without a connector and with one, in turns.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lamina_kv.bench.engine import Engine
from lamina_kv.bench.progress import Progress
from lamina_kv.bench.report import Machine, Report
from lamina_kv.bench.room import require_room
from lamina_kv.bench.samples import Samples, Target, Unit, paired
from lamina_kv.bench.serving import Serving
from lamina_kv.bench.settings import (
    Connector,
    EngineSpec,
    PromptSource,
    require_whole,
    store_options,
)
from lamina_kv.bench.shapes import ModelShape, require_positive

if TYPE_CHECKING:
    from lamina_kv.bench.faulty_store import StoreFaults

DECODE_LIMIT = 50e-6
"""Seconds that a decode step with nothing to move may take longer."""
SAVE_LIMIT = 0.97
"""Prefill throughput with saving on, as a multiple of that without a connector."""

_PLAIN, _HOST, _DISK = "no connector", "host tier", "host and disk tier"
_IDLE = "a connector that does nothing"
_DECODE_PROMPT = 8
_BURST, _COLD = 10, 2
_STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class OverheadSettings:
    """Options of both benches.

    Attributes:
        shape: the model.
        tokens: tokens of a prompt (``save``) or of an answer (``decode``).
        repeat: repetitions of each measurement.
        directory: where the disk tier is put.
        faults: how slow that is made; None: not at all.

    Raises:
        ValueError: if an option makes no sense; the message names it.
    """

    shape: ModelShape
    tokens: int
    repeat: int
    directory: Path
    faults: StoreFaults | None = None

    def __post_init__(self) -> None:
        require_positive("--repeat", self.repeat)


class DecodeSettings(OverheadSettings):
    """Options of ``decode``: no answer may fill a chunk, which would be saved."""

    def __post_init__(self) -> None:
        OverheadSettings.__post_init__(self)
        limit = self.shape.chunk_tokens - _DECODE_PROMPT - 1
        if not _BURST <= self.tokens <= limit or self.tokens % _BURST:
            raise ValueError(
                f"--tokens must be a multiple of {_BURST} up to {limit}, so that no chunk is "
                f"filled and saved, got {self.tokens}"
            )


class SaveSettings(OverheadSettings):
    """Options of ``save``: every token of a prompt is saved."""

    def __post_init__(self) -> None:
        OverheadSettings.__post_init__(self)
        require_whole("--tokens", self.tokens, self.shape.chunk_tokens)


def measure_decode(settings: DecodeSettings, progress: Progress) -> Report:
    """Decode steps that have nothing to load and nothing to save: the answers end before the
    first chunk is full.

    Raises:
        BenchError: if an engine fails, or there is no room.
    """
    machine = Machine.here()
    with _engines(settings, progress, idle=True) as engines:
        steps = _in_bursts(engines, settings, progress)
    plain = steps.pop(_PLAIN)
    return Report(
        bench="decode",
        title=f"One decode step with nothing to move, {settings.shape.layers} layers",
        machine=machine,
        settings=_options(settings),
        samples=tuple(_medians(name, times) for name, times in {_PLAIN: plain, **steps}.items()),
        compared=f"Longer than with {_PLAIN}",
        targets=tuple(
            Target(
                _medians(name, np.subtract(times, plain)),
                Unit.SECONDS,
                None if name == _IDLE else DECODE_LIMIT,
            )
            for name, times in steps.items()
        ),
        notes=(
            f"The engines take turns after {_BURST} steps, of which the first {_COLD} do not "
            "count. Each repetition is the median of all other steps, or of their differences.",
            f"What vLLM does for any connector is seen with {_IDLE}.",
        ),
    )


def _in_bursts(
    engines: list[Engine], settings: DecodeSettings, progress: Progress
) -> dict[str, npt.NDArray[np.float64]]:
    """Per engine the seconds of its steps, shape ``(repeat, steps)``. The engines take turns after
    a few steps, so that what slows the machine down slows all of them down; those that warm the
    processor's caches again do not count."""
    prompts = PromptSource()
    times: dict[str, list[list[float]]] = {engine.spec.name: [] for engine in engines}
    for i in range(-1, settings.repeat):
        progress.say(f"{i + 1} of {settings.repeat}" if i >= 0 else "once to warm up")
        prompt = prompts.prompt(_DECODE_PROMPT)
        steps: dict[str, list[float]] = {engine.spec.name: [] for engine in engines}
        for engine in engines:
            engine.call(Serving.begin_decode, prompt, settings.tokens)
        for burst in range(settings.tokens // _BURST):
            first = burst % len(engines)
            for engine in engines[first:] + engines[:first]:
                steps[engine.spec.name] += engine.call(Serving.decode_steps, _BURST)[_COLD:]
        for engine in engines:
            engine.call(Serving.drain)
        if i >= 0:
            for name, row in steps.items():
                times[name].append(row)
    return {name: np.array(rows) for name, rows in times.items()}


def _medians(name: str, times: npt.NDArray[np.float64]) -> Samples:
    return Samples(name, tuple(np.median(times, axis=1).tolist()))


def measure_save(settings: SaveSettings, progress: Progress) -> Report:
    """Prefill with and without saving what it computes.

    Raises:
        BenchError: if an engine fails, or there is no room.
    """
    machine = Machine.here()
    prompts = PromptSource()
    drained: dict[str, list[float]] = {}

    def turn(engine: Engine) -> float:
        seconds = engine.first_token(prompts.prompt(settings.tokens), hit=0).seconds
        drained.setdefault(engine.spec.name, []).append(engine.call(Serving.drain))
        return seconds

    with _engines(settings, progress) as engines:
        measured = _in_turns(engines, turn, settings.repeat, progress)
    plain = measured[_PLAIN]
    tails = ", ".join(
        f"{name} {statistics.median(drained[name]):.2f} s" for name in measured if name != _PLAIN
    )
    return Report(
        bench="save",
        title=f"Prefill of {settings.tokens} tokens, nothing of them known",
        machine=machine,
        settings=_options(settings),
        samples=tuple(measured.values()),
        compared=f"Throughput, as a multiple of that with {_PLAIN}",
        targets=tuple(
            Target(
                paired(name, lambda a, b: b / a, samples, plain),
                Unit.RATIO,
                SAVE_LIMIT,
                at_most=False,
            )
            for name, samples in measured.items()
            if name != _PLAIN
        ),
        notes=(f"Saves and writes that were left when the first token was there took: {tails}.",),
    )


@contextmanager
def _engines(
    settings: OverheadSettings, progress: Progress, *, idle: bool = False
) -> Iterator[list[Engine]]:
    shape = settings.shape
    size = shape.kv_bytes(settings.tokens + _STEP_TOKENS)
    require_room(
        memory=3 * (shape.weight_bytes + 2 * size) + 4 * size,
        disk=2 * size,
        directory=settings.directory,
    )
    host = {"capacity": 2 * size}
    with (
        tempfile.TemporaryDirectory(dir=settings.directory, prefix="lamina-bench-") as directory,
        ExitStack() as stack,
    ):
        work = Path(directory)
        shape.write_config(work)
        disk = {"kind": "disk", "path": str(work / "store"), "capacity": 2 * size}
        kinds: dict[str, tuple[Connector | None, Mapping[str, Any]]] = {
            _PLAIN: (None, {}),
            _HOST: (Connector.LAMINA, {"host": host}),
            _DISK: (Connector.LAMINA, {"host": host, "tiers": [disk]}),
        }
        if idle:
            kinds[_IDLE] = (Connector.IDLE, {})
        progress.say(f"starting {len(kinds)} engines")
        engines = [
            stack.enter_context(
                Engine(
                    EngineSpec(
                        name=name,
                        shape=shape,
                        model=work,
                        tokens=settings.tokens + 2 * shape.block_size,
                        step_tokens=_STEP_TOKENS,
                        connector=connector,
                        lamina=lamina,
                        faults=settings.faults,
                    ),
                    work,
                )
            )
            for name, (connector, lamina) in kinds.items()
        ]
        for engine in engines:
            engine.ready()
        yield engines
        progress.say("shutting down")


def _in_turns(
    engines: list[Engine],
    turn: Callable[[Engine], float],
    repeat: int,
    progress: Progress,
) -> dict[str, Samples]:
    """Let every engine do its turn, ``repeat`` times and once before that does not count; each
    time another one begins."""
    values: dict[str, list[float]] = {engine.spec.name: [] for engine in engines}
    for i in range(-1, repeat):
        first = i % len(engines)
        for engine in engines[first:] + engines[:first]:
            what = f"{i + 1} of {repeat}" if i >= 0 else "once to warm up"
            progress.say(f"{engine.spec.name}, {what}")
            seconds = turn(engine)
            if i >= 0:
                values[engine.spec.name].append(seconds)
    return {name: Samples(name, tuple(times)) for name, times in values.items()}


def _options(settings: OverheadSettings) -> dict[str, str | int | float]:
    return {
        **settings.shape.options(),
        "tokens": settings.tokens,
        "repeat": settings.repeat,
        **store_options(settings.faults),
    }
