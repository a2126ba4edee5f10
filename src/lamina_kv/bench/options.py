"""Options that benches have in common, and how a bench is run from a command line. Imports nothing
that measures."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import typer

from lamina_kv.bench.shapes import SHAPES, Dtype, Model

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lamina_kv.bench.faulty_store import StoreFaults
    from lamina_kv.bench.progress import Progress

S = TypeVar("S")
N = TypeVar("N", int, float)

TEMPORARY = Path(tempfile.gettempdir())
MODEL_PANEL, STORE_PANEL, OUTPUT_PANEL = "Model", "Far tier", "Output"
FLEET_PANEL = "A fleet with one store"
Layers = Annotated[int, typer.Option(help="Layers.", rich_help_panel=MODEL_PANEL)]
Hidden = Annotated[int, typer.Option(help="Width.", rich_help_panel=MODEL_PANEL)]
KvHeads = Annotated[int, typer.Option(help="KV heads.", rich_help_panel=MODEL_PANEL)]
HeadDim = Annotated[int, typer.Option(help="Numbers in one head.", rich_help_panel=MODEL_PANEL)]
BlockSize = Annotated[
    int, typer.Option(help="Tokens in one block of the engine.", rich_help_panel=MODEL_PANEL)
]
ModelDtype = Annotated[
    Dtype, typer.Option(help="Of weights and KV cache.", rich_help_panel=MODEL_PANEL)
]
Repeat = Annotated[int, typer.Option(help="Repetitions of each measurement.")]
Directory = Annotated[
    Path, typer.Option(metavar="DIR", help="Where the disk tier is put, and removed afterwards.")
]
StoreLatencyMs = Annotated[
    float,
    typer.Option(
        help="Make half of the tier's calls take so much longer.", rich_help_panel=STORE_PANEL
    ),
]
StoreTailMs = Annotated[
    float,
    typer.Option(
        help="Make 1 call in 100 take so much longer at least. Default: all take as long.",
        show_default=False,
        rich_help_panel=STORE_PANEL,
    ),
]
StoreGbPerSecond = Annotated[
    float | None,
    typer.Option(help="Bandwidth of the tier, each way.", rich_help_panel=STORE_PANEL),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Write every number.", rich_help_panel=OUTPUT_PANEL
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Draw it (.png, .svg).", rich_help_panel=OUTPUT_PANEL),
]


def sizes(help_text: str, name: str) -> Any:
    """An option whose default depends on the model."""
    usual = getattr(SHAPES[Model.LLAMA], name)
    others = [
        f"{model.value}: {size}"
        for model, shape in SHAPES.items()
        if (size := getattr(shape, name)) != usual
    ]
    shown = "; ".join([str(usual), *others])
    return typer.Option(help=help_text, rich_help_panel=MODEL_PANEL, show_default=shown)


def numbers(option: str, text: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    """The numbers of a list with commas.

    Raises:
        ValueError: names the option.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between, got {text!r}") from None


def store_faults(
    latency_ms: float, tail_ms: float, gb_per_second: float | None
) -> StoreFaults | None:
    """How slow a far tier is made; None if it is left as it is.

    Raises:
        ValueError: names the option.
    """
    from lamina_kv.bench.faulty_store import StoreFaults

    if latency_ms < 0:
        raise ValueError(f"--store-latency-ms must not be negative, got {latency_ms:g}")
    if tail_ms and not tail_ms >= latency_ms > 0:
        raise ValueError(
            f"--store-tail-ms must be at least --store-latency-ms, and that above 0, got "
            f"{tail_ms:g} and {latency_ms:g}"
        )
    if gb_per_second is not None and not gb_per_second > 0:
        raise ValueError(f"--store-gb-per-second must be positive, got {gb_per_second:g}")
    if not latency_ms and gb_per_second is None:
        return None
    bandwidth = inf if gb_per_second is None else gb_per_second * 1e9
    return StoreFaults(latency=latency_ms / 1e3, tail=tail_ms / 1e3, bandwidth=bandwidth)


def made(make: Callable[[], S]) -> S:
    """Settings, or the usage error that says what is wrong with them."""
    try:
        return make()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def check_outputs(json: Path | None, *pictures: Path | None) -> None:
    """Refuse, before minutes are spent, what could not be written in the end."""
    from lamina_kv.bench.plots import require_drawable

    for path in (json, *pictures):
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no directory {path.absolute().parent}")
    for picture in pictures:
        if picture is not None:
            made(lambda picture=picture: require_drawable(picture))  # type: ignore[misc]


class Printable(Protocol):
    """What a bench finds."""

    def as_table(self) -> RenderableType:
        """For a person."""

    def as_json(self) -> str:
        """For a program."""


R = TypeVar("R", bound=Printable)


def measured(measure: Callable[[Progress], R], json: Path | None) -> R:
    """What a bench finds, shown as a table and written down."""
    from rich.console import Console

    report = run_measurement(measure)
    Console().print(report.as_table())
    if json is not None:
        json.write_text(report.as_json())
    return report


def run_measurement(measure: Callable[[Progress], S]) -> S:
    """What a bench finds, or the error that it ends with."""
    from rich.console import Console

    from lamina_kv.bench.engine import BenchError
    from lamina_kv.bench.progress import Progress

    try:
        with Progress(Console(stderr=True)) as progress:
            return measure(progress)
    except BenchError as error:
        typer.echo(f"lamina-kv bench: {error}", err=True)
        raise typer.Exit(1) from None
