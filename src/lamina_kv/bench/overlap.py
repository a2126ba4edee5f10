"""``lamina-kv bench overlap``: how much of a load disappears behind the model's own work.

One prompt has a beginning that is kept outside and a long new end. While the model computes the
end, the beginning comes through a link whose pace is set such that a row takes as long to load as
to compute (or is given). Layer by layer the step should then take hardly longer than the larger of
the two; in bulk it takes their sum.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina_kv.bench.engine import BenchError, Engine
from lamina_kv.bench.picture import Panel, draw_timeline
from lamina_kv.bench.progress import Progress
from lamina_kv.bench.report import Machine, Report
from lamina_kv.bench.room import require_room
from lamina_kv.bench.samples import Samples, Target, Unit, paired, ratio
from lamina_kv.bench.serving import FirstToken, Serving
from lamina_kv.bench.settings import (
    Connector,
    EngineSpec,
    PromptSource,
    require_whole,
)
from lamina_kv.bench.shapes import ModelShape, require_positive
from lamina_kv.observe.timeline import read_trace

OVERLAP_LIMIT = 1.10
"""A layerwise step may take this much longer than max(load, compute) and its first row."""

_BULK = "bulk"
_LOADS: dict[str, dict[str, Any]] = {
    "1": {"mode": "layerwise", "load_ahead": 1},
    "2": {"mode": "layerwise", "load_ahead": 2},
    "4": {"mode": "layerwise", "load_ahead": 4},
    "auto": {"mode": "layerwise", "load_ahead": "auto"},
    _BULK: {"mode": "parked", "load_ahead": 2},
}
"""What is compared: the ``load`` section of each engine's configuration."""

_PICTURED = "2"


@dataclass(frozen=True, slots=True)
class OverlapSettings:
    """Options of the bench.

    Attributes:
        shape: the model.
        tokens: tokens of the prompt that are loaded.
        new_tokens: tokens of the prompt that are computed in the same step.
        repeat: repetitions of each measurement.
        latency: of the link, seconds.
        bandwidth: of the link, bytes per second; None paces it to the model.

    Raises:
        ValueError: if an option makes no sense; the message names it.
    """

    shape: ModelShape
    tokens: int
    new_tokens: int
    repeat: int
    latency: float
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        require_positive("--repeat", self.repeat)
        self.shape.require_step(self.new_tokens)
        if not self.latency >= 0:
            raise ValueError(f"--latency-ms must not be negative, got {self.latency * 1e3}")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ValueError(f"--gb-per-second must be positive, got {self.bandwidth / 1e9}")
        require_whole("--tokens", self.tokens, self.shape.chunk_tokens)


@dataclass(slots=True)
class _Turns:
    """Repetitions of one engine: what its step took, and what it is held against."""

    compute: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    first_row: list[float] = field(default_factory=list)
    step: list[FirstToken] = field(default_factory=list)


def measure(settings: OverlapSettings, progress: Progress, picture: Path | None = None) -> Report:
    """Run the bench.

    Args:
        settings: its options.
        progress: where it says what it is doing.
        picture: where to draw one layerwise step above one in bulk, if anywhere.

    Raises:
        BenchError: if an engine fails, a hit is not where it should be, or there is no room.
    """
    machine = Machine.here()
    engine_bytes = settings.shape.weight_bytes + settings.shape.kv_bytes(
        3 * settings.tokens + 6 * settings.new_tokens, prompts=10
    )
    require_room(memory=len(_LOADS) * engine_bytes, disk=0, directory=Path.cwd())
    turns = {name: _Turns() for name in _LOADS}
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as directory:
        work = Path(directory)
        settings.shape.write_config(work)
        with ExitStack() as stack:
            progress.say(f"starting {len(_LOADS)} engines")
            engines = {
                name: stack.enter_context(Engine(_spec(settings, work, name), work))
                for name in _LOADS
            }
            for engine in engines.values():
                engine.ready()
            prompts = PromptSource()
            prefix = prompts.prompt(settings.tokens)
            for name, engine in engines.items():
                progress.say(f"load_ahead {name}: computing and saving the prompt")
                engine.first_token([*prefix, 1], hit=0)
                _turn(settings, engine, prefix, prompts, _Turns())
            for i in range(settings.repeat):
                for name, engine in engines.items():
                    progress.say(f"load_ahead {name}: {i + 1} of {settings.repeat}")
                    _turn(settings, engine, prefix, prompts, turns[name])
            progress.say("shutting down")
        if picture is not None:
            draw_timeline(
                [
                    _panel(work, turns, _PICTURED, f"layer by layer, load_ahead = {_PICTURED}"),
                    _panel(work, turns, _BULK, "in bulk"),
                ],
                picture,
                settings.shape.rows_are,
            )
    return _report(settings, machine, turns)


def _turn(
    settings: OverlapSettings,
    engine: Engine,
    prefix: list[int],
    prompts: PromptSource,
    turns: _Turns,
) -> None:
    """One repetition: the step with nothing to load, then the same with everything to load."""
    load_bytes = settings.shape.kv_bytes(settings.tokens)
    row_bytes = load_bytes / settings.shape.rows
    engine.call(Serving.drain)
    compute = _step(settings, engine, prefix, prompts, "engine").seconds
    bandwidth = settings.bandwidth or load_bytes / compute
    engine.call(Serving.pace, bandwidth, settings.latency)
    engine.call(Serving.forget)
    turns.step.append(_step(settings, engine, prefix, prompts, "host"))
    if (carried := engine.call(Serving.carried)) != load_bytes:
        raise BenchError(
            f"engine {engine.spec.name!r}: {load_bytes} bytes were to be loaded, {carried} were: "
            "this measurement would not be what it says"
        )
    turns.compute.append(compute)
    turns.load.append(load_bytes / bandwidth)
    turns.first_row.append(row_bytes / bandwidth + settings.latency)


def _step(
    settings: OverlapSettings,
    engine: Engine,
    prefix: list[int],
    prompts: PromptSource,
    place: str,
) -> FirstToken:
    prompt = prefix + prompts.prompt(settings.new_tokens)
    return engine.first_token(prompt, hit=settings.tokens, place=place)


def _spec(settings: OverlapSettings, work: Path, name: str) -> EngineSpec:
    shape, tokens = settings.shape, settings.tokens + settings.new_tokens
    return EngineSpec(
        name=f"ahead-{name}",
        shape=shape,
        model=work,
        tokens=tokens + 2 * shape.block_size,
        step_tokens=tokens,
        connector=Connector.PACED,
        lamina={
            "load": _LOADS[name],
            "host": {"capacity": shape.kv_bytes(tokens + 4 * settings.new_tokens, prompts=6)},
            "observe": {"timeline": str(_trace(work, name))},
        },
    )


def _trace(work: Path, name: str) -> Path:
    return work / f"trace-{name}.json"


def _panel(work: Path, turns: dict[str, _Turns], name: str, title: str) -> Panel:
    """The repetition that took the median time, as it is in the engine's trace."""
    steps = sorted(turns[name].step, key=lambda step: step.seconds)
    step = steps[(len(steps) - 1) // 2]
    spans = read_trace(_trace(work, name))
    ended = step.began + step.seconds
    return Panel(
        title=title,
        spans=tuple(span for span in spans if step.began <= span.start <= ended),
        began=step.began,
        forward_ended=step.forward_ended,
        ended=ended,
    )


def _report(settings: OverlapSettings, machine: Machine, turns: dict[str, _Turns]) -> Report:
    samples, targets = [], []
    for name, turn in turns.items():
        label = f"load_ahead {name}" if name != _BULK else "in bulk"
        step = Samples(f"step, {label}", tuple(token.seconds for token in turn.step))
        floor = paired(
            f"floor, {label}",
            lambda load, compute, first: max(load, compute) + first,
            Samples("load", tuple(turn.load)),
            Samples("compute", tuple(turn.compute)),
            Samples("first row", tuple(turn.first_row)),
        )
        samples.append(step)
        over = ratio(label, step, floor)
        targets.append(Target(over, Unit.RATIO, None if name == _BULK else OVERLAP_LIMIT))
    every = [turns[name] for name in turns]
    compute = Samples("compute alone", tuple(t for turn in every for t in turn.compute))
    load = Samples("load alone", tuple(t for turn in every for t in turn.load))
    first = Samples("first row", tuple(t for turn in every for t in turn.first_row))
    pace = "so that it takes as long as computing" if settings.bandwidth is None else "as given"
    return Report(
        bench="overlap",
        title=(
            f"One step: {settings.tokens} tokens are loaded, {settings.new_tokens} are computed"
        ),
        machine=machine,
        settings={
            **settings.shape.options(),
            "tokens": settings.tokens,
            "new_tokens": settings.new_tokens,
            "repeat": settings.repeat,
            "latency": settings.latency,
            "bandwidth": settings.bandwidth or "paced to the model",
        },
        samples=(compute, load, first, *samples),
        compared="Step ÷ (max(load, compute) + first row)",
        targets=tuple(targets),
        notes=(
            "In bulk everything is loaded before the step begins.",
            f"The link's bandwidth is set anew for every repetition, {pace}; its latency is "
            f"{settings.latency * 1e3:g} ms. Ratios are taken repetition by repetition, each "
            "against the same step without a load, measured right before.",
        ),
    )
