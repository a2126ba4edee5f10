"""``lamina-kv demo``: one long question, three times, and where the KV cache came from each
time."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lamina_kv.cli import demo_model
from lamina_kv.cli.demo_model import ModelError
from lamina_kv.cli.demo_server import Answer, Server, ServerError, lamina_arguments, vllm_server

QUESTION = "What are the names of the four kittens?"
MAX_TOKENS = 48
# Share no chunk with the document, nor with each other: each server computes its own, and so knows
# what computing takes.
WARM_UPS = tuple(" ".join(map(str, range(first, first + 200))) for first in (0, 500))
ARGUMENTS = (
    # In bf16 a prefill that is resumed rounds differently from a whole one, with or without
    # Lamina, and the text can change; in fp32 the answers can be compared.
    *("--dtype", "float32"),
    *("--max-model-len", "4096"),
    "--enforce-eager",
)
_PLACES = {"engine": "the engine itself", "host": "host memory", "disk": "disk"}


@dataclass(frozen=True, slots=True)
class Run:
    """One time that the question was asked.

    Attributes:
        title: what was special about it.
        answer: what came back.
        hits: tokens found, by where they were.
    """

    title: str
    answer: Answer
    hits: dict[str, int]


def run(model_dir: Path | None) -> int:
    """Show it; answers the exit code, 0 if there were two hits and three equal answers.

    Args:
        model_dir: where the model is prepared and kept.
    """
    console = Console(highlight=False)
    with (
        prepared(console, model_dir, ServerError) as model,
        tempfile.TemporaryDirectory(prefix="lamina-demo-") as scratch,
    ):
        runs = _ask_three_times(console, model, Path(scratch))
    return _report(console, runs)


@contextmanager
def prepared(
    console: Console, model_dir: Path | None, *failures: type[Exception]
) -> Iterator[Path]:
    """The demos' model, prepared if it is not there yet. In the block SIGTERM does what Ctrl-C
    does, and what goes wrong is told.

    Args:
        console: where it is told.
        model_dir: where the model is prepared and kept; None for the user's cache.
        failures: errors that are told in one line, beside those of the model and of the system.

    Raises:
        typer.Exit: with what the command is to return, after an error that was told, or an
            interrupt.
    """
    directory = model_dir or demo_model.default_directory()
    told: tuple[type[Exception], ...] = (ModelError, OSError, *failures)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        model = demo_model.find(directory)
        if model is None:
            with step(console, f"Preparing the model {demo_model.NAME}, once, in {directory}"):
                model = demo_model.prepare(directory)
        yield model
    except told as error:
        console.print(f"[bold red]The demo failed:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("Stopped; nothing is left running.")
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def long_question() -> str:
    """A document and a question about it."""
    document = resources.files("lamina_kv.cli").joinpath("demo_document.txt").read_text()
    return f"{document}\n\n{QUESTION}"


def environment(scratch: Path) -> dict[str, str]:
    """Variables for a vLLM server that leaves nothing outside ``scratch``."""
    return {
        "VLLM_SERVER_DEV_MODE": "1",  # for resetting the engine's own cache
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TMPDIR": str(scratch),  # for the sockets that vLLM leaves behind
    }


def _ask_three_times(console: Console, model: Path, scratch: Path) -> list[Run]:
    question = long_question()

    def ask(server: Server, title: str) -> Run:
        before = server.hits()
        with step(console, f"Asking about a long document: {title}"):
            answer = server.ask(question, MAX_TOKENS)
        found = {tier: tokens - before.get(tier, 0) for tier, tokens in server.hits().items()}
        return Run(title, answer, {tier: tokens for tier, tokens in found.items() if tokens})

    title = "Starting a vLLM server with Lamina"
    with _served(console, title, model, scratch, WARM_UPS[0]) as server:
        first = ask(server, "the first time")
        server.reset_engine_cache()
        second = ask(server, "again, engine's cache emptied")
        with step(console, "Stopping the server"):
            server.stop()
    with _served(console, "Restarting the server", model, scratch, WARM_UPS[1]) as server:
        third = ask(server, "again, server restarted")
    return [first, second, third]


@contextmanager
def _served(
    console: Console, title: str, model: Path, scratch: Path, warm_up: str
) -> Iterator[Server]:
    """A server that has started and has answered a short, different question once."""
    settings = {
        "host": {"capacity": "512MiB"},
        "tiers": [{"kind": "disk", "path": str(scratch / "store"), "capacity": "512MiB"}],
    }
    arguments = [*ARGUMENTS, *lamina_arguments(settings)]
    with ExitStack() as stack:
        with step(console, title):
            server = stack.enter_context(
                vllm_server(model, arguments, environment(scratch), scratch / "server.log")
            )
            server.await_start()
        with step(console, "Warming it up with another question, so that no run pays for that"):
            server.ask(warm_up, max_tokens=4)
        yield server


def _report(console: Console, runs: list[Run]) -> int:
    first = runs[0].answer
    table = Table("the question", "KV cache from", "tokens found", "first token", "faster")
    for column in table.columns[2:]:
        column.justify = "right"
    for one in runs:
        places = [_PLACES.get(tier, tier) for tier in one.hits] or ["nowhere: computed"]
        table.add_row(
            one.title,
            " and ".join(places),
            f"{sum(one.hits.values())} of {one.answer.prompt_tokens}",
            f"{one.answer.first_token:.3f} s",
            f"{first.first_token / one.answer.first_token:.1f}x",
        )
    console.print(table)
    console.print(f"[bold]{QUESTION}[/]\n{escape(first.text)}\n")
    same = all(one.answer.text == first.text for one in runs)
    if same:
        console.print("[green]The three answers are the same text.[/]")
    else:
        console.print("[bold red]The answers differ:[/]")
        for one in runs:
            console.print(f"- {one.title}: {escape(repr(one.answer.text))}")
    hit = all("host" in one.hits or "disk" in one.hits for one in runs[1:])
    if not hit:
        console.print("[bold red]A question that was asked before was not found.[/]")
    console.print("Nothing is left running, and the store is gone.")
    return 0 if same and hit else 1


@contextmanager
def step(console: Console, title: str) -> Iterator[None]:
    """Show that something is going on, and in the end how long it took."""
    title = escape(title)
    began = time.monotonic()
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description} ..."), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            progress.add_task(title)
            yield
    else:
        console.print(f"{title} ...", soft_wrap=True)
        yield
    console.print(f"{title}: {time.monotonic() - began:.1f} s", soft_wrap=True)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A signal handler that ends a demo as Ctrl-C does."""
    raise KeyboardInterrupt
