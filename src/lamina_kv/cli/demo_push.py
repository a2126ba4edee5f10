"""``lamina-kv demo-push``: one engine prefills, another decodes, and when each row left."""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lamina_kv.bench.ports import free_port
from lamina_kv.cli import demo
from lamina_kv.cli.demo_server import (
    TOO_SLOW,
    Answer,
    Server,
    ServerError,
    lamina_arguments,
    vllm_server,
)
from lamina_kv.control.push.inbound import GiveUp
from lamina_kv.observe.timeline import Lane, Span, Timeline, read_trace
from lamina_kv.push.messages import TOO_LATE

_PUSHES, _GIVEN_UP = "lamina_pushes_total", "lamina_pushes_given_up_total"
_SKIPPED, _UNPUSHED = "lamina_pushes_skipped_total", "lamina_proxy_unpushed_total"

_FATES = (
    (_GIVEN_UP, "The decode engine gave the push up"),
    (_SKIPPED, "The decode engine asked for no push"),
    (_UNPUSHED, "The proxy asked the decode engine alone"),
)
"""What it means that a metric counts a prompt; its reason follows."""

_OF_SLOW_MACHINES = frozenset({GiveUp.ABSENT, GiveUp.UNANSWERED})
"""Reasons that mean here that the prefill engine is in a step of many seconds: it is there, and
answers between steps."""

_FAILED = re.compile(r"the push from \S+ has failed \((.*)\); the prompt is computed here")

_SHOWN_ROWS = 10
_BAR_WIDTH = 30


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo has seen.

    Attributes:
        pushed: the answer of the two engines.
        alone: the answer of one.
        unreceived: why the decode engine computed the prompt; empty if it came by a push.
        spans: what the prefill engine did since the question was asked, row by row. What it did
            before is not shown: the first push waits until the engines are connected.
    """

    pushed: Answer
    alone: Answer
    unreceived: str
    spans: list[Span]


def run(model_dir: Path | None, picture: Path | None) -> int:
    """Show it; answers the exit code, 0 if the prompt was pushed and the answers are equal.

    Args:
        model_dir: where the model is prepared and kept.
        picture: where the timeline is drawn to, if it is.
    """
    console = Console(highlight=False)
    with (
        demo.prepared(console, model_dir, ServerError) as model,
        tempfile.TemporaryDirectory(prefix="lamina-demo-") as scratch,
    ):
        outcome = _ask(console, model, Path(scratch))
    if picture is not None and not outcome.unreceived:
        _draw(outcome, picture)
    return _report(console, outcome)


def _ask(console: Console, model: Path, scratch: Path) -> Outcome:
    trace, address, peers = scratch / "prefill.json", f"127.0.0.1:{free_port()}", ["127.0.0.1"]
    with ExitStack() as stack:
        with demo.step(console, "Starting two vLLM servers: one prefills, one decodes"):
            prefill = stack.enter_context(
                _engine(
                    model,
                    {
                        "push": {"listen": address, "peers": peers},
                        "observe": {"timeline": str(trace)},
                    },
                    scratch / "prefill.log",
                )
            )
            # On one machine: vLLM's processes spin on each other while a request is parked, and
            # would take from the prefill's cores what they do not need.
            decode = stack.enter_context(
                _engine(model, {"push": {"peers": peers}}, scratch / "decode.log", polite=True)
            )
            prefill.await_start()
            decode.await_start()
        with demo.step(console, "Starting the proxy that brings them together"):
            proxy = stack.enter_context(_proxy(prefill, address, decode, scratch / "proxy.log"))
            proxy.await_start()
        with demo.step(console, "Warming them up with another question"):
            proxy.ask(demo.WARM_UPS[0], max_tokens=4)
        question = demo.long_question()
        before, asked = _pushes(decode, proxy), Timeline.now()
        with demo.step(console, "Asking about a long document, through the proxy"):
            pushed = proxy.ask(question, demo.MAX_TOKENS)
        unreceived = _unreceived(_pushes(decode, proxy) - before, decode.said(_FAILED))
        decode.reset_engine_cache(external=True)
        with demo.step(console, "Asking one engine alone"):
            alone = decode.ask(question, demo.MAX_TOKENS)
        with demo.step(console, "Stopping the servers"):
            prefill.stop()
    return Outcome(pushed, alone, unreceived, _since(asked, read_trace(trace)))


def _engine(model: Path, config: dict[str, Any], log: Path, *, polite: bool = False) -> Server:
    settings = {"host": {"capacity": "64MiB"}, **config}
    arguments = [*demo.ARGUMENTS, *lamina_arguments(settings)]
    return vllm_server(model, arguments, demo.environment(log.parent), log, polite=polite)


def _proxy(prefill: Server, address: str, decode: Server, log: Path) -> Server:
    port = free_port()
    command = [
        *(sys.executable, "-c", "from lamina_kv.cli.main import main; main()", "push-proxy"),
        *("--prefill", f"{prefill.url},{address}", "--decode", decode.url),
        *("--host", "127.0.0.1", "--port", str(port), "--disaggregate", "always"),
    ]
    return Server(command, port, {}, log)


def _pushes(decode: Server, proxy: Server) -> Counter[tuple[str, str]]:
    """What has become of prompts so far: by metric, and outcome or reason."""
    metrics = (
        (decode, _PUSHES, "outcome"),
        (decode, _GIVEN_UP, "reason"),
        (decode, _SKIPPED, "reason"),
        (proxy, _UNPUSHED, "reason"),
    )
    return Counter(
        {
            (name, value): count
            for server, name, label in metrics
            for value, count in server.by(name, label).items()
        }
    )


def _unreceived(counts: Counter[tuple[str, str]], failure: str) -> str:
    """Why the decode engine computed the prompt; empty if it came by a push.

    Args:
        counts: what was counted meanwhile.
        failure: why a push has failed, as the decode engine's log has it.
    """
    if counts[_PUSHES, "received"]:
        return ""
    if counts[_GIVEN_UP, GiveUp.DEADLINE] or failure == TOO_LATE:
        return f"The push came too late. {TOO_SLOW}."
    for name, words in _FATES:
        if reasons := [reason for found, reason in counts if found == name]:
            told = failure if name == _GIVEN_UP and failure else ", ".join(reasons)
            slow = f" {TOO_SLOW}." if _OF_SLOW_MACHINES.intersection(reasons) else ""
            return f"{words}: {told}.{slow}"
    return "No engine says what became of the push."


def _since(moment: float, spans: list[Span]) -> list[Span]:
    """What an engine of this machine began later: its clock is ours."""
    return [span for span in spans if span.start >= moment]


def _last_prefill(spans: list[Span]) -> list[Span]:
    """The spans of the last step that pushed rows which it computed itself."""
    computed = {span.step for span in spans if span.lane is Lane.COMPUTE}
    step = max((s.step for s in spans if s.lane is Lane.PUSH and s.step in computed), default=-1)
    return [span for span in spans if span.step == step]


def _show_timeline(console: Console, spans: list[Span]) -> None:
    compute = {s.row: s for s in spans if s.lane is Lane.COMPUTE}
    # In the same step may leave what was computed before the destination was known.
    pushes = {
        s.row: s
        for s in spans
        if s.lane is Lane.PUSH and s.row in compute and s.start >= compute[s.row].start
    }
    if not pushes:
        console.print("No row of the prompt left in the step that computed it.")
        return
    began = min(span.start for span in spans)
    finished = max(span.end for span in compute.values())
    whole = max(finished, *(span.end for span in pushes.values())) - began
    table = Table("row", "█ computed, ms", "▒ on the wire, ms", "")
    for row in sorted(pushes)[:: max(1, len(pushes) // _SHOWN_ROWS)]:
        left, right = compute[row], pushes[row]
        bar = _bar(left, right, began, whole)
        table.add_row(str(row), _times(left, began), _times(right, began), bar)
    console.print("The last step of the prefill, seen from the prefill engine:")
    console.print(table)
    early = sum(span.end < finished for span in pushes.values())
    tail = max(span.end for span in pushes.values()) - finished
    console.print(
        f"{early} of {len(pushes)} writes had arrived before the last layer was computed; "
        f"{max(0.0, tail) * 1e3:.0f} ms were left when it was."
    )


def _report(console: Console, outcome: Outcome) -> int:
    _show_timeline(console, _last_prefill(outcome.spans))
    console.print(
        f"First token: {outcome.pushed.first_token:.2f} s through the two engines, "
        f"{outcome.alone.first_token:.2f} s with one alone; prompt {outcome.pushed.prompt_tokens} "
        f"tokens.\n\n[bold]{demo.QUESTION}[/]\n{escape(outcome.pushed.text)}\n"
    )
    same = outcome.pushed.text == outcome.alone.text
    if same:
        console.print("[green]The two engines together answer as one alone does.[/]")
    else:
        console.print(f"[bold red]One engine alone says:[/] {escape(repr(outcome.alone.text))}")
    if outcome.unreceived:
        console.print(
            f"[bold red]The decode engine computed the prompt.[/] {escape(outcome.unreceived)}"
        )
    console.print("Nothing is left running.")
    return 0 if same and not outcome.unreceived else 1


def _times(span: Span, began: float) -> str:
    return f"{(span.start - began) * 1e3:6.0f} to {(span.end - began) * 1e3:6.0f}"


def _bar(computed: Span, wire: Span, began: float, whole: float) -> str:
    def place(moment: float) -> int:
        return min(_BAR_WIDTH - 1, int((moment - began) / whole * _BAR_WIDTH))

    cells = [" "] * _BAR_WIDTH
    for span, mark in ((computed, "█"), (wire, "▒")):
        first, last = place(span.start), place(span.end)
        cells[first : last + 1] = mark * (last + 1 - first)
    return "".join(cells)


def _draw(outcome: Outcome, picture: Path) -> None:
    from lamina_kv.bench.picture import Panel, draw_timeline

    spans = _last_prefill(outcome.spans)
    if not spans:  # no row left in the step that had computed it
        return
    finished = max(span.end for span in spans if span.lane is Lane.COMPUTE)
    ended = max(span.end for span in spans if span.lane is Lane.PUSH)
    panel = Panel(
        "the last step of a prefill, pushed",
        tuple(spans),
        min(span.start for span in spans),
        finished,
        max(ended, finished),
    )
    draw_timeline([panel], picture)
