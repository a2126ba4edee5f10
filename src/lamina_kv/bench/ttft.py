"""``lamina-kv bench ttft``: what a hit is worth, from each place that it can be in."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina_kv.bench.engine import Engine
from lamina_kv.bench.plain_read import PlainFile, drop_page_cache
from lamina_kv.bench.progress import Progress
from lamina_kv.bench.report import Machine, Report, duration
from lamina_kv.bench.room import require_room
from lamina_kv.bench.samples import Samples, Target, Unit, paired, ratio
from lamina_kv.bench.serving import Serving
from lamina_kv.bench.settings import (
    Connector,
    EngineSpec,
    PromptSource,
    TokenIds,
    require_whole,
    store_options,
)
from lamina_kv.bench.shapes import ModelShape, require_positive

if TYPE_CHECKING:
    from lamina_kv.bench.faulty_store import StoreFaults

FLOOR_LIMIT = 1.25
"""A hit may take this much longer than the plain movement of its bytes and one step."""

_STEP_TOKENS = 2048

_OBJECTS = 1.2
"""Room that a chunk takes beyond its bytes, at most: headers and padding of small objects."""


@dataclass(frozen=True, slots=True)
class TtftSettings:
    """Options of the bench.

    Attributes:
        shape: the model.
        tokens: tokens of the prompt that can be hit; it has one more.
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
        require_whole("--tokens", self.tokens, self.shape.chunk_tokens)

    @property
    def prompts(self) -> int:
        """Prompts that are saved: one for each hit on disk, the first one included."""
        return self.repeat + 1

    @property
    def hit_bytes(self) -> int:
        """Bytes of KV cache that a hit moves."""
        return self.shape.kv_bytes(self.tokens)


@dataclass(slots=True)
class _Measured:
    """Repetitions as they come in, seconds."""

    recompute: list[float] = field(default_factory=list)
    engine: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    read_by: str = ""
    cold: float = 0.0
    direct: bool = True


def measure(settings: TtftSettings, progress: Progress) -> Report:
    """Run the bench.

    Raises:
        BenchError: if an engine fails, a hit is not where it should be, or there is no room.
    """
    machine = Machine.here()
    shape, size = settings.shape, settings.hit_bytes
    require_room(
        memory=2 * shape.weight_bytes + (6 + settings.prompts) * size,
        disk=(3 + settings.prompts) * size,
        directory=settings.directory,
    )
    measured = _Measured()
    with tempfile.TemporaryDirectory(dir=settings.directory, prefix="lamina-bench-") as name:
        work = Path(name)
        shape.write_config(work)
        source = PromptSource()
        prompts = [[*source.prompt(settings.tokens), 1] for _ in range(settings.prompts)]
        _before_restart(settings, work, prompts, measured, progress)
        _after_restart(settings, work, prompts, measured, progress)
    return _report(settings, machine, measured)


def _before_restart(
    settings: TtftSettings,
    work: Path,
    prompts: list[TokenIds],
    measured: _Measured,
    progress: Progress,
) -> None:
    """Recompute against hits in the engine and in host memory, in turns; leaves the prompts on
    disk."""
    with ExitStack() as stack:
        plain = stack.enter_context(Engine(_spec(settings, work, "recompute", None), work))
        lamina = stack.enter_context(
            Engine(
                _spec(settings, work, "saving", _config(settings, work, settings.prompts + 1)), work
            )
        )
        progress.say("starting two engines, one without Lamina")
        plain.ready()
        lamina.ready()
        for prompt in prompts:
            progress.say("computing and saving a prompt")
            lamina.first_token(prompt, hit=0)
            lamina.call(Serving.drain)
        for i in range(settings.repeat):
            turn = f"{i + 1} of {settings.repeat}"
            progress.say(f"recompute, {turn}")
            plain.call(Serving.forget)
            measured.recompute.append(plain.first_token(prompts[0], hit=0).seconds)
            progress.say(f"hits in host memory and in the engine, {turn}")
            lamina.call(Serving.forget)
            for place, times in (("host", measured.host), ("engine", measured.engine)):
                token = lamina.first_token(prompts[0], hit=settings.tokens, place=place)
                times.append(token.seconds)
            measured.copy.append(lamina.call(Serving.copy_memory, settings.hit_bytes))
        progress.say("shutting down: what is not yet on disk is written")


def _after_restart(
    settings: TtftSettings,
    work: Path,
    prompts: list[TokenIds],
    measured: _Measured,
    progress: Progress,
) -> None:
    """Hits on disk, against plain reads.

    A hit on disk is kept in host memory from then on, so each prompt is asked for once.
    """
    progress.say("writing a file for plain reads")
    plain = PlainFile(work, settings.hit_bytes)
    measured.direct = plain.direct
    progress.say("restarting the engine")
    spec = _spec(settings, work, "restarted", _config(settings, work, 2))
    with Engine(spec, work) as engine:
        engine.ready()
        for i in range(-1, settings.repeat):
            progress.say(
                f"hit on disk, {i + 1} of {settings.repeat}" if i >= 0 else "first hit on disk"
            )
            prompt = prompts[i + 1]
            engine.call(Serving.forget)
            drop_page_cache(_store(work))
            loaded = engine.first_token(prompt, hit=settings.tokens, place="disk")
            engine.call(Serving.drain)
            step = engine.first_token(prompt, hit=settings.tokens, place="engine")
            if i < 0:
                measured.cold = loaded.seconds
                continue
            measured.disk.append(loaded.seconds)
            measured.step.append(step.seconds)
            progress.say("plain reads of as many bytes")
            plain.read()
        measured.read_by, measured.read = plain.fastest()


def _store(work: Path) -> Path:
    return work / "store"


def _spec(
    settings: TtftSettings, work: Path, name: str, lamina: Mapping[str, Any] | None
) -> EngineSpec:
    return EngineSpec(
        name=name,
        shape=settings.shape,
        model=work,
        tokens=settings.tokens + 2 * settings.shape.block_size,
        step_tokens=min(_STEP_TOKENS, settings.tokens),
        connector=None if lamina is None else Connector.LAMINA,
        lamina=lamina or {},
        faults=settings.faults,
    )


def _config(settings: TtftSettings, work: Path, host_prompts: int) -> dict[str, Any]:
    return {
        "host": {"capacity": int(host_prompts * settings.hit_bytes * _OBJECTS)},
        "tiers": [
            {
                "kind": "disk",
                "path": str(_store(work)),
                "capacity": int((settings.prompts + 1) * settings.hit_bytes * _OBJECTS),
            }
        ],
    }


def _report(settings: TtftSettings, machine: Machine, measured: _Measured) -> Report:
    engine = Samples("hit in the engine", tuple(measured.engine))
    copy = Samples("one memory copy", tuple(measured.copy))
    read = Samples("plain reads", tuple(measured.read))
    step = Samples("hit in the engine, restarted", tuple(measured.step))
    host_floor = paired("copy + step", lambda a, b: a + b, copy, engine)
    disk_floor = paired("max(reads, step)", max, read, step)
    host = Samples("hit in host memory", tuple(measured.host), host_floor.median)
    disk = Samples("hit on disk, restarted", tuple(measured.disk), disk_floor.median)
    how = "direct I/O" if measured.direct else "page cache dropped before each"
    return Report(
        bench="ttft",
        title=f"Time to first token, {settings.tokens} tokens, {settings.hit_bytes / 1e6:.0f} MB",
        machine=machine,
        settings={
            **settings.shape.options(),
            "tokens": settings.tokens,
            "repeat": settings.repeat,
            "disk_reads": how,
            **store_options(settings.faults),
        },
        samples=(
            Samples("recompute", tuple(measured.recompute)),
            engine,
            host,
            disk,
            copy,
            read,
        ),
        compared="Hits against their floors",
        targets=(
            Target(
                ratio("host hit ÷ (copy + step)", host, host_floor),
                Unit.RATIO,
                FLOOR_LIMIT,
            ),
            Target(
                ratio("disk hit ÷ max(reads, step)", disk, disk_floor),
                Unit.RATIO,
                FLOOR_LIMIT if settings.faults is None else None,
            ),
        ),
        speedups=True,
        notes=(
            f"Disk: {how}. Plain reads: the fastest of several ways, {measured.read_by}.",
            "A step: the hit in the engine. The very first hit after the restart, when the "
            f"engine's memory had never been touched, took {duration(measured.cold)}.",
            "Recompute ran without a connector, in a process of its own. Ratios are taken "
            "repetition by repetition.",
        ),
    )
