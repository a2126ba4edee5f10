"""``python bench/peers``: the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a folder, it finds itself

from lamina_kv.bench.options import (
    TEMPORARY,
    BlockSize,
    Directory,
    HeadDim,
    Hidden,
    Json,
    KvHeads,
    Layers,
    ModelDtype,
    Plot,
    Repeat,
    check_outputs,
    made,
    numbers,
    run_measurement,
)
from lamina_kv.bench.shapes import Dtype, LlamaShape
from peers.settings import Scenario
from peers.systems import System

if TYPE_CHECKING:
    from peers.results import PeersReport

MIXED_PANEL = "Mixed load"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def main(
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
    directory: Directory = TEMPORARY,
    environments: Annotated[
        Path, typer.Option(metavar="DIR", help="Where systems are installed, and kept.")
    ] = Path("build/peers"),
    mixed_tokens: Annotated[
        int, typer.Option(help="Tokens of a document.", rich_help_panel=MIXED_PANEL)
    ] = 2048,
    mixed_new_tokens: Annotated[
        int, typer.Option(help="Tokens of a question about it.", rich_help_panel=MIXED_PANEL)
    ] = 128,
    mixed_generate: Annotated[
        int, typer.Option(help="Tokens of an answer.", rich_help_panel=MIXED_PANEL)
    ] = 16,
    documents: Annotated[int, typer.Option(help="Documents.", rich_help_panel=MIXED_PANEL)] = 8,
    cached: Annotated[
        int,
        typer.Option(
            help="Prompts that the engine's own cache holds.", rich_help_panel=MIXED_PANEL
        ),
    ] = 4,
    memory: Annotated[
        float,
        typer.Option(
            help="Host memory, as a multiple of what the documents take.",
            rich_help_panel=MIXED_PANEL,
        ),
    ] = 1.5,
    rates: Annotated[
        str, typer.Option(metavar="R,R,...", help="Requests a second.", rich_help_panel=MIXED_PANEL)
    ] = "0.25,0.5,1",
    shares: Annotated[
        str,
        typer.Option(
            metavar="S,S,...",
            help="Of requests, those about a document.",
            rich_help_panel=MIXED_PANEL,
        ),
    ] = "0,0.5,0.8",
    requests: Annotated[
        int, typer.Option(help="Requests of one measurement.", rich_help_panel=MIXED_PANEL)
    ] = 32,
    first_within: Annotated[
        float,
        typer.Option(
            help="Seconds to the first token that a good request takes at most.",
            rich_help_panel=MIXED_PANEL,
        ),
    ] = 4.0,
    token_within: Annotated[
        float,
        typer.Option(
            help="Seconds from token to token that it takes at most.", rich_help_panel=MIXED_PANEL
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

    Stores that engines share are servers of this machine, started and ended by the bench. Peers are
    installed in environments of their own, which needs uv and a C compiler.
    """
    from peers.measure import measure as measure_peers
    from peers.plot import draw_peers
    from peers.settings import MixedSettings, PeersSettings

    def settings() -> PeersSettings:
        mixed = MixedSettings(
            tokens=mixed_tokens,
            new_tokens=mixed_new_tokens,
            generated=mixed_generate,
            documents=documents,
            cached=cached,
            memory=memory,
            rates=numbers("--rates", rates, float),
            shares=numbers("--shares", shares, float),
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

    chosen = made(settings)
    check_outputs(json, plot)

    def keep(report: PeersReport) -> None:
        if json is not None:
            json.write_text(report.as_json())

    report = run_measurement(lambda progress: measure_peers(chosen, progress, keep))
    typer.echo(report.as_markdown())
    if plot is not None:
        draw_peers(report, plot)


if __name__ == "__main__":
    app(prog_name="python bench/peers")
