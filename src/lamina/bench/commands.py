"""The command line of ``lamina bench``. Imports nothing that measures."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lamina.bench.peers.settings import Scenario
from lamina.bench.peers.systems import System
from lamina.bench.shapes import SHAPES, Dtype, LlamaShape, Model

if TYPE_CHECKING:
    from lamina.bench.peers.results import PeersReport
    from lamina.bench.progress import Progress
    from lamina.bench.report import Report

app = typer.Typer(
    name="bench",
    help="Measure what Lamina costs and gains on this machine. Needs vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

S = TypeVar("S")
N = TypeVar("N", int, float)

_TEMPORARY = Path(tempfile.gettempdir())
_MODEL, _OUTPUT, _MIXED = "Model", "Output", "Mixed load"
Layers = Annotated[int, typer.Option(help="Layers.", rich_help_panel=_MODEL)]
Hidden = Annotated[int, typer.Option(help="Width.", rich_help_panel=_MODEL)]
KvHeads = Annotated[int, typer.Option(help="KV heads.", rich_help_panel=_MODEL)]
HeadDim = Annotated[int, typer.Option(help="Numbers in one head.", rich_help_panel=_MODEL)]
BlockSize = Annotated[
    int, typer.Option(help="Tokens in one block of the engine.", rich_help_panel=_MODEL)
]
ModelDtype = Annotated[Dtype, typer.Option(help="Of weights and KV cache.", rich_help_panel=_MODEL)]
Repeat = Annotated[int, typer.Option(help="Repetitions of each measurement.")]
Directory = Annotated[
    Path, typer.Option(metavar="DIR", help="Where the disk tier is put, and removed afterwards.")
]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write every number.", rich_help_panel=_OUTPUT),
]
Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Draw it (.png, .svg).", rich_help_panel=_OUTPUT),
]


def _sizes(help_text: str, name: str) -> Any:
    """An option whose default depends on the model."""
    usual = getattr(SHAPES[Model.LLAMA], name)
    others = [
        f"{model.value}: {size}"
        for model, shape in SHAPES.items()
        if (size := getattr(shape, name)) != usual
    ]
    shown = "; ".join([str(usual), *others])
    return typer.Option(help=help_text, rich_help_panel=_MODEL, show_default=shown)


@app.callback()
def _root() -> None:
    pass


@app.command()
def ttft(
    layers: Layers = 16,
    hidden: Hidden = 1024,
    kv_heads: KvHeads = 8,
    head_dim: HeadDim = 128,
    block_size: BlockSize = 128,
    dtype: ModelDtype = Dtype.BFLOAT16,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt that can be hit.")] = 8192,
    repeat: Repeat = 5,
    directory: Directory = _TEMPORARY,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Time to first token: recompute, and hits in the engine, in host memory and on disk.

    The hit on disk comes after a restart of the engine's process. Hits are held against the plain
    movement of their bytes: one memory copy and one step; the larger of plain reads and one step.
    """
    from lamina.bench.plots import draw_ttft
    from lamina.bench.ttft import TtftSettings, measure

    shape = _made(lambda: LlamaShape(layers, hidden, kv_heads, head_dim, block_size, dtype))
    settings = _made(lambda: TtftSettings(shape, tokens, repeat, directory.absolute()))
    _check_outputs(json, plot)
    report = _measured(lambda progress: measure(settings, progress), json)
    if plot is not None:
        draw_ttft(report, plot)


@app.command()
def overlap(
    model: Annotated[
        Model,
        typer.Option(
            help="llama: every layer keeps KV cache. hybrid: shaped like Qwen3-Next, three gated "
            "delta nets to one full attention, and these four share a row.",
            rich_help_panel=_MODEL,
        ),
    ] = Model.LLAMA,
    layers: Annotated[int | None, _sizes("Layers.", "layers")] = None,
    hidden: Annotated[int | None, _sizes("Width.", "hidden")] = None,
    kv_heads: Annotated[int | None, _sizes("KV heads.", "kv_heads")] = None,
    head_dim: Annotated[int | None, _sizes("Numbers in one head.", "head_dim")] = None,
    block_size: Annotated[
        int | None, _sizes("Tokens in one block of the engine.", "block_size")
    ] = None,
    dtype: ModelDtype = Dtype.BFLOAT16,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt that are loaded.")] = 2048,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the prompt that are computed in the same step.",
            show_default=f"{SHAPES[Model.LLAMA].step_tokens}; hybrid: one block",
        ),
    ] = None,
    latency_ms: Annotated[float, typer.Option(help="Latency of the link.")] = 2.0,
    gb_per_second: Annotated[
        float | None,
        typer.Option(
            help="Bandwidth of the link. Default: such that loading a row takes as long as "
            "computing it."
        ),
    ] = None,
    repeat: Repeat = 5,
    json: Json = None,
    plot: Plot = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw one step, row by row (.png, .svg).",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
) -> None:
    """How much of a load disappears behind the model's own work, for several windows and in bulk.

    The host tier is put behind a link of a given pace, so that this can be seen on any machine.
    """
    from lamina.bench.overlap import OverlapSettings, measure
    from lamina.bench.plots import draw_overlap

    shape = _made(
        lambda: SHAPES[model].but(
            layers=layers,
            hidden=hidden,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
        )
    )
    computed = shape.step_tokens if new_tokens is None else new_tokens
    bandwidth = None if gb_per_second is None else gb_per_second * 1e9
    settings = _made(
        lambda: OverlapSettings(shape, tokens, computed, repeat, latency_ms / 1e3, bandwidth)
    )
    _check_outputs(json, plot, timeline)
    report = _measured(lambda progress: measure(settings, progress, timeline), json)
    if plot is not None:
        draw_overlap(report, plot)


@app.command()
def decode(
    layers: Layers = 16,
    hidden: Hidden = 256,
    kv_heads: KvHeads = 2,
    head_dim: HeadDim = 64,
    block_size: BlockSize = 128,
    dtype: ModelDtype = Dtype.BFLOAT16,
    tokens: Annotated[int, typer.Option(help="Decode steps in each repetition.")] = 100,
    repeat: Repeat = 40,
    directory: Directory = _TEMPORARY,
    json: Json = None,
) -> None:
    """What a decode step that has nothing to move takes longer than without a connector."""
    from lamina.bench.overhead import DecodeSettings, measure_decode

    shape = _made(lambda: LlamaShape(layers, hidden, kv_heads, head_dim, block_size, dtype))
    settings = _made(lambda: DecodeSettings(shape, tokens, repeat, directory.absolute()))
    _check_outputs(json)
    _measured(lambda progress: measure_decode(settings, progress), json)


@app.command()
def save(
    layers: Layers = 16,
    hidden: Hidden = 1024,
    kv_heads: KvHeads = 8,
    head_dim: HeadDim = 128,
    block_size: BlockSize = 128,
    dtype: ModelDtype = Dtype.BFLOAT16,
    tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 8192,
    repeat: Repeat = 5,
    directory: Directory = _TEMPORARY,
    json: Json = None,
) -> None:
    """Prefill throughput while everything is saved, against prefill without a connector."""
    from lamina.bench.overhead import SaveSettings, measure_save

    shape = _made(lambda: LlamaShape(layers, hidden, kv_heads, head_dim, block_size, dtype))
    settings = _made(lambda: SaveSettings(shape, tokens, repeat, directory.absolute()))
    _check_outputs(json)
    _measured(lambda progress: measure_save(settings, progress), json)


@app.command()
def push(
    layers: Layers = 16,
    hidden: Hidden = 1024,
    kv_heads: KvHeads = 8,
    head_dim: HeadDim = 128,
    block_size: BlockSize = 128,
    dtype: ModelDtype = Dtype.BFLOAT16,
    tokens: Annotated[
        str, typer.Option(metavar="N,N,...", help="Tokens of each prompt.")
    ] = "256,1024,4096,8192,16384",
    step_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens that one step computes at most. With the longest prompt or more, every "
            "prompt is computed in one."
        ),
    ] = 2048,
    link: Annotated[
        str | None,
        typer.Option(
            metavar="RATE",
            help="Put the engines into two network namespaces with so much between them, such as "
            "1Gbit. Needs root and iproute2.",
        ),
    ] = None,
    repeat: Repeat = 5,
    json: Json = None,
    plot: Plot = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the longest prompt, row by row (.png, .svg).",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
) -> None:
    """From a prefill to a decode engine: time to first token, and what the prefill leaves to send.

    A push row by row against one with one write at the end, vLLM's NixlConnector, which pulls, and
    one engine alone. Needs NIXL.
    """
    from lamina.bench.network import bits_per_second
    from lamina.bench.push import PushSettings, measure

    shape = _made(lambda: LlamaShape(layers, hidden, kv_heads, head_dim, block_size, dtype))
    rate = None if link is None else _made(lambda: bits_per_second(link))
    lengths = _made(lambda: _numbers("--tokens", tokens, int))
    settings = _made(lambda: PushSettings(shape, lengths, step_tokens, repeat, rate))
    _check_outputs(json, plot, timeline)
    _measured(lambda progress: measure(settings, progress, plot, timeline), json)


@app.command()
def control(
    chunks: Annotated[int, typer.Option(help="Chunks in the catalog.")] = 1_000_000,
    chunk_tokens: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt that is looked up.")] = 131_072,
    requests: Annotated[int, typer.Option(help="Requests that run at once.")] = 256,
    waiting: Annotated[int, typer.Option(help="Requests that wait at once.")] = 2000,
    waiting_tokens: Annotated[int, typer.Option(help="Tokens of each of those.")] = 8192,
    repeat: Repeat = 5,
    json: Json = None,
) -> None:
    """What the scheduler pays: lookups in a large catalog, plans for many requests that run or
    wait, ends of long ones, memory.

    Needs no engine.
    """
    from lamina.bench.control import ControlSettings, measure

    settings = _made(
        lambda: ControlSettings(
            chunks, chunk_tokens, tokens, requests, waiting, waiting_tokens, repeat
        )
    )
    _check_outputs(json)
    _measured(lambda progress: measure(settings, progress), json)


@app.command()
def peers(
    layers: Layers = 16,
    hidden: Hidden = 1024,
    kv_heads: KvHeads = 8,
    head_dim: HeadDim = 128,
    block_size: BlockSize = 128,
    dtype: ModelDtype = Dtype.BFLOAT16,
    system: Annotated[
        list[System] | None, typer.Option(help="What is compared. Default: all.")
    ] = None,
    scenario: Annotated[
        list[Scenario] | None, typer.Option(help="What is measured. Default: all.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt that can be hit.")] = 8192,
    new_tokens: Annotated[int, typer.Option(help="Tokens of a long suffix.")] = 2048,
    step_tokens: Annotated[int, typer.Option(help="Tokens that one step computes at most.")] = 2048,
    generate: Annotated[int, typer.Option(help="Tokens that a request generates.")] = 8,
    repeat: Repeat = 3,
    directory: Directory = _TEMPORARY,
    environments: Annotated[
        Path, typer.Option(metavar="DIR", help="Where systems are installed, and kept.")
    ] = Path("build/peers"),
    mixed_tokens: Annotated[
        int, typer.Option(help="Tokens of a document.", rich_help_panel=_MIXED)
    ] = 2048,
    mixed_new_tokens: Annotated[
        int, typer.Option(help="Tokens of a question about it.", rich_help_panel=_MIXED)
    ] = 128,
    mixed_generate: Annotated[
        int, typer.Option(help="Tokens of an answer.", rich_help_panel=_MIXED)
    ] = 16,
    documents: Annotated[int, typer.Option(help="Documents.", rich_help_panel=_MIXED)] = 8,
    cached: Annotated[
        int,
        typer.Option(help="Prompts that the engine's own cache holds.", rich_help_panel=_MIXED),
    ] = 4,
    rates: Annotated[
        str, typer.Option(metavar="R,R,...", help="Requests a second.", rich_help_panel=_MIXED)
    ] = "0.25,0.5,1",
    shares: Annotated[
        str,
        typer.Option(
            metavar="S,S,...", help="Of requests, those about a document.", rich_help_panel=_MIXED
        ),
    ] = "0,0.5,0.8",
    requests: Annotated[
        int, typer.Option(help="Requests of one measurement.", rich_help_panel=_MIXED)
    ] = 32,
    first_within: Annotated[
        float,
        typer.Option(
            help="Seconds to the first token that a good request takes at most.",
            rich_help_panel=_MIXED,
        ),
    ] = 4.0,
    token_within: Annotated[
        float,
        typer.Option(
            help="Seconds from token to token that it takes at most.", rich_help_panel=_MIXED
        ),
    ] = 1.0,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Compare Lamina with itself under fixed settings instead."),
    ] = False,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Lamina beside recomputing, vLLM's two connectors and LMCache, in turns.

    Peers are installed in environments of their own, which needs uv and a C compiler.
    """
    from lamina.bench.peers.measure import measure as measure_peers
    from lamina.bench.peers.plot import draw_peers
    from lamina.bench.peers.settings import MixedSettings, PeersSettings

    def settings() -> PeersSettings:
        mixed = MixedSettings(
            tokens=mixed_tokens,
            new_tokens=mixed_new_tokens,
            generated=mixed_generate,
            documents=documents,
            cached=cached,
            rates=_numbers("--rates", rates, float),
            shares=_numbers("--shares", shares, float),
            requests=requests,
            first_within=first_within,
            token_within=token_within,
        )
        return PeersSettings(
            shape=LlamaShape(layers, hidden, kv_heads, head_dim, block_size, dtype),
            tokens=tokens,
            new_tokens=new_tokens,
            step_tokens=step_tokens,
            generated=generate,
            repeat=repeat,
            directory=directory.absolute(),
            environments=environments.absolute(),
            systems=tuple(each for each in System if system is None or each in system),
            scenarios=tuple(each for each in Scenario if scenario is None or each in scenario),
            mixed=mixed,
            sweep=sweep,
        )

    made = _made(settings)
    _check_outputs(json, plot)

    def keep(report: PeersReport) -> None:
        if json is not None:
            json.write_text(report.as_json())

    report = _run(lambda progress: measure_peers(made, progress, keep))
    typer.echo(report.as_markdown())
    if plot is not None:
        draw_peers(report, plot)


def _numbers(option: str, text: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    """The numbers of a list with commas.

    Raises:
        ValueError: names the option.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between, got {text!r}") from None


def _made(make: Callable[[], S]) -> S:
    """Settings, or the usage error that says what is wrong with them."""
    try:
        return make()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _check_outputs(json: Path | None, *pictures: Path | None) -> None:
    """Refuse, before minutes are spent, what could not be written in the end."""
    from lamina.bench.plots import require_drawable

    for path in (json, *pictures):
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no directory {path.absolute().parent}")
    for picture in pictures:
        if picture is not None:
            _made(lambda picture=picture: require_drawable(picture))  # type: ignore[misc]


def _measured(measure: Callable[[Progress], Report], json: Path | None) -> Report:
    from rich.console import Console

    report = _run(measure)
    Console().print(report.as_table())
    if json is not None:
        json.write_text(report.as_json())
    return report


def _run(measure: Callable[[Progress], S]) -> S:
    """What a bench finds, or the error that it ends with."""
    from rich.console import Console

    from lamina.bench.engine import BenchError
    from lamina.bench.progress import Progress

    try:
        with Progress(Console(stderr=True)) as progress:
            return measure(progress)
    except BenchError as error:
        typer.echo(f"lamina bench: {error}", err=True)
        raise typer.Exit(1) from None
