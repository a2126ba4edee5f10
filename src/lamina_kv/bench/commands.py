"""The command line of ``lamina-kv bench``. Imports nothing that measures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamina_kv.bench.options import (
    FLEET_PANEL,
    MODEL_PANEL,
    OUTPUT_PANEL,
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
    StoreGbPerSecond,
    StoreLatencyMs,
    StoreTailMs,
    check_outputs,
    made,
    measured,
    numbers,
    sizes,
    store_faults,
)
from lamina_kv.bench.shapes import SHAPES, Dtype, LlamaShape, Model

app = typer.Typer(
    name="bench",
    help="Measure what Lamina costs and gains on this machine. Needs vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    directory: Directory = TEMPORARY,
    store_latency_ms: StoreLatencyMs = 0.0,
    store_tail_ms: StoreTailMs = 0.0,
    store_gb_per_second: StoreGbPerSecond = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Time to first token: recompute, and hits in the engine, in host memory and on disk.

    The hit on disk comes after a restart of the engine's process. Hits are held against the plain
    movement of their bytes: one memory copy and one step; the larger of plain reads and one step.
    """
    from lamina_kv.bench.plots import draw_ttft
    from lamina_kv.bench.ttft import TtftSettings, measure

    shape = made(lambda: LlamaShape(layers, hidden, kv_heads, head_dim, block_size, dtype))
    faults = made(lambda: store_faults(store_latency_ms, store_tail_ms, store_gb_per_second))
    settings = made(lambda: TtftSettings(shape, tokens, repeat, directory.absolute(), faults))
    check_outputs(json, plot)
    report = measured(lambda progress: measure(settings, progress), json)
    if plot is not None:
        draw_ttft(report, plot)


@app.command()
def overlap(
    model: Annotated[
        Model,
        typer.Option(
            help="llama: every layer keeps KV cache. hybrid: shaped like Qwen3-Next, three gated "
            "delta nets to one full attention, and these four share a row.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = Model.LLAMA,
    layers: Annotated[int | None, sizes("Layers.", "layers")] = None,
    hidden: Annotated[int | None, sizes("Width.", "hidden")] = None,
    kv_heads: Annotated[int | None, sizes("KV heads.", "kv_heads")] = None,
    head_dim: Annotated[int | None, sizes("Numbers in one head.", "head_dim")] = None,
    block_size: Annotated[
        int | None, sizes("Tokens in one block of the engine.", "block_size")
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
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
) -> None:
    """How much of a load disappears behind the model's own work, for several windows and in bulk.

    The host tier is put behind a link of a given pace, so that this can be seen on any machine.
    """
    from lamina_kv.bench.overlap import OverlapSettings, measure
    from lamina_kv.bench.plots import draw_overlap

    shape = made(
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
    settings = made(
        lambda: OverlapSettings(shape, tokens, computed, repeat, latency_ms / 1e3, bandwidth)
    )
    check_outputs(json, plot, timeline)
    report = measured(lambda progress: measure(settings, progress, timeline), json)
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
    directory: Directory = TEMPORARY,
    json: Json = None,
) -> None:
    """What a decode step that has nothing to move takes longer than without a connector."""
    from lamina_kv.bench.overhead import DecodeSettings, measure_decode

    shape = made(lambda: LlamaShape(layers, hidden, kv_heads, head_dim, block_size, dtype))
    settings = made(lambda: DecodeSettings(shape, tokens, repeat, directory.absolute()))
    check_outputs(json)
    measured(lambda progress: measure_decode(settings, progress), json)


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
    directory: Directory = TEMPORARY,
    store_latency_ms: StoreLatencyMs = 0.0,
    store_tail_ms: StoreTailMs = 0.0,
    store_gb_per_second: StoreGbPerSecond = None,
    json: Json = None,
) -> None:
    """Prefill throughput while everything is saved, against prefill without a connector."""
    from lamina_kv.bench.overhead import SaveSettings, measure_save

    shape = made(lambda: LlamaShape(layers, hidden, kv_heads, head_dim, block_size, dtype))
    faults = made(lambda: store_faults(store_latency_ms, store_tail_ms, store_gb_per_second))
    settings = made(lambda: SaveSettings(shape, tokens, repeat, directory.absolute(), faults))
    check_outputs(json)
    measured(lambda progress: measure_save(settings, progress), json)


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
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
) -> None:
    """From a prefill to a decode engine: time to first token, and what the prefill leaves to send.

    A push row by row against one with one write at the end, vLLM's NixlConnector, which pulls, and
    one engine alone. Needs NIXL.
    """
    from lamina_kv.bench.network import bits_per_second
    from lamina_kv.bench.push import PushSettings, measure

    shape = made(lambda: LlamaShape(layers, hidden, kv_heads, head_dim, block_size, dtype))
    rate = None if link is None else made(lambda: bits_per_second(link))
    lengths = made(lambda: numbers("--tokens", tokens, int))
    settings = made(lambda: PushSettings(shape, lengths, step_tokens, repeat, rate))
    check_outputs(json, plot, timeline)
    measured(lambda progress: measure(settings, progress, plot, timeline), json)


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
    from lamina_kv.bench.control import ControlSettings, measure

    settings = made(
        lambda: ControlSettings(
            chunks, chunk_tokens, tokens, requests, waiting, waiting_tokens, repeat
        )
    )
    check_outputs(json)
    measured(lambda progress: measure(settings, progress), json)


@app.command()
def step(
    rows: Annotated[
        str, typer.Option(metavar="N,N,...", help="Rows of the cache, one for each layer.")
    ] = "16,64,128",
    chunks: Annotated[int, typer.Option(help="Chunks that a step saves or loads.")] = 4,
    repeat: Repeat = 5,
    json: Json = None,
) -> None:
    """What a step costs the engine beside the bytes: its own thread, the interpreter lock, calls.

    A step with nothing to move, a decode step that completes chunks, a step with a layerwise load;
    with a CPU's memory, and with a device that does nothing but count. Needs no engine.
    """
    from lamina_kv.bench.step import StepSettings, measure

    numbers_of_rows = made(lambda: numbers("--rows", rows, int))
    settings = made(lambda: StepSettings(numbers_of_rows, chunks, repeat))
    check_outputs(json)
    measured(lambda progress: measure(settings, progress), json)


@app.command()
def trace(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Requests: what `observe.trace` has written, or a published trace in that form.",
        ),
    ],
    host: Annotated[
        str,
        typer.Option(
            metavar="SIZE,SIZE,...",
            help="Capacities of host memory: blocks (5000), a share of the trace's different "
            "blocks (3%), or bytes (64GiB).",
        ),
    ] = "1%,3%,10%,30%",
    far: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE,SIZE,...",
            help="Likewise of a far tier: one capacity, or as many as --host has. May be repeated, "
            "the preferred tier first.",
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Likewise of the engine's own prefix cache, which is asked before any tier. In "
            "blocks: vLLM's 'GPU KV cache size' divided by the tokens of a block of the trace. 0: "
            "none.",
        ),
    ] = "0",
    one_after_another: Annotated[
        bool,
        typer.Option(
            "--one-after-another", help="No two requests at once, however close they come."
        ),
    ] = False,
    prefill: Annotated[
        float | None,
        typer.Option(
            help="Tokens of prompts computed a second; by default what the server that recorded "
            "the trace has measured, or 50,000 where it does not say."
        ),
    ] = None,
    decode: Annotated[
        float, typer.Option(help="Tokens of an answer that each request computes a second.")
    ] = 50,
    running: Annotated[int, typer.Option(help="Requests that run at once, at most.")] = 256,
    block_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Bytes of a block over all ranks, where the trace does not say."
        ),
    ] = None,
    engines: Annotated[
        int | None,
        typer.Option(
            help="Spread the requests over so many engines, and see what one store that they "
            "share is worth. --host is what each has.",
            rich_help_panel=FLEET_PANEL,
        ),
    ] = None,
    store_gb_per_second: Annotated[
        str,
        typer.Option(
            metavar="N,N,...",
            help="Bandwidth of the store, both directions together: one, or as many as --host has; "
            "inf for no limit.",
            rich_help_panel=FLEET_PANEL,
        ),
    ] = "inf",
    store_latency_ms: Annotated[
        float, typer.Option(help="Latency of each of its calls.", rich_help_panel=FLEET_PANEL)
    ] = 2.0,
    store_capacity: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="Its capacity, as --host has it.", rich_help_panel=FLEET_PANEL
        ),
    ] = "100%",
    keep: Annotated[
        str,
        typer.Option(
            metavar="WORD,WORD,...",
            help="What goes to it. nothing: there is none.",
            rich_help_panel=FLEET_PANEL,
        ),
    ] = "nothing,shared,all",
    routing: Annotated[
        str,
        typer.Option(
            metavar="WORD,WORD,...",
            help="Which engine gets a request: the next one, or the one that served the longest "
            "beginning of its prompt last.",
            rich_help_panel=FLEET_PANEL,
        ),
    ] = "round-robin,sessions",
    json: Json = None,
    plot: Plot = None,
) -> None:
    """What tiers of several sizes would be worth to the requests of a trace.

    Through Lamina's own planner and eviction, beside LRU, ARC, S3-FIFO and Belady's optimum. Needs
    no engine. With --engines: what a store would be worth that a fleet shares, which takes a minute
    for each row of the table.
    """
    from lamina_kv.bench import sharing
    from lamina_kv.bench.fleet import Keep, Routing
    from lamina_kv.bench.replay import PRESUMED, Pace
    from lamina_kv.bench.trace import TraceSettings, draw, measure, parse_size

    at_once = 1 if one_after_another else running
    pace = Pace(PRESUMED if prefill is None else prefill, decode, at_once, prefill is None)
    size = made(lambda: 0 if block_size is None else parse_size("--block-size", block_size))
    hosts = tuple(host.split(","))
    settings = made(
        lambda: TraceSettings(
            file, hosts, tuple(tuple(sizes.split(",")) for sizes in far or ()), pace, size, engine
        )
    )
    if engines is None:
        check_outputs(json, plot)
        report = measured(lambda progress: measure(settings, progress), json)
        if plot is not None:
            draw(report, plot)
        return
    if far:
        raise typer.BadParameter(
            "--far cannot be given with --engines: their far tier is the store"
        )
    if settings.has_engine:
        raise typer.BadParameter(
            "--engine cannot be given with --engines: those have no caches of their own"
        )
    fleet = made(
        lambda: sharing.SharingSettings(
            file,
            engines,
            hosts,
            numbers("--store-gb-per-second", store_gb_per_second, float),
            store_capacity,
            store_latency_ms / 1e3,
            sharing.words("--keep", keep, Keep),
            sharing.words("--routing", routing, Routing),
            pace,
            size,
        )
    )
    check_outputs(json, plot)
    shared = measured(lambda progress: sharing.measure(fleet, progress), json)
    if plot is not None:
        sharing.draw(shared, plot)
