"""``lamina-kv demo-standalone``: conversations in transformers' engine, with and without Lamina."""

from __future__ import annotations

import queue
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lamina_kv.cli import demo, demo_model

CONVERSATIONS = 6
HELD = 2
"""Conversations that the engine's cache holds."""

OPENING_TOKENS = 500
MAX_TOKENS = 12
PAGE_TOKENS = 16
QUESTIONS = (
    "What is this text about?",
    "Who is mentioned in it?",
    "What happens next?",
    "Say the first sentence in your own words.",
)
SETTINGS: Mapping[str, object] = {"host": {"capacity": "1GiB"}, "load": {"when": "always"}}

PATIENCE = 120.0
"""Seconds after which an answer that has not come will not."""

_BAR_WIDTH = 23


class DemoError(RuntimeError):
    """The engine has failed; the message says how."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back in one turn of one conversation.

    Attributes:
        tokens: generated.
        prompt: tokens of the whole conversation up to then.
        first_token: seconds from the request to its first token.
    """

    tokens: tuple[int, ...]
    prompt: int
    first_token: float


def run(model_dir: Path | None, picture: Path | None) -> int:
    """Show it; answers the exit code, 0 if all answers are equal and later turns begin sooner.

    Args:
        model_dir: where the model is prepared and kept.
        picture: where the plot is drawn to, if it is.
    """
    console = Console(highlight=False)
    with demo.prepared(console, model_dir, DemoError, ImportError) as path:
        with demo.step(console, f"Loading {demo_model.NAME} into transformers"):
            model, tokenizer = _load(path)
        openings, turns = _conversations(tokenizer)
        title = f"{CONVERSATIONS} conversations of {len(turns)} turns, cache for {HELD} of them"
        with demo.step(console, f"{title}: transformers alone"):
            alone = converse(model, openings, turns, None)
        with demo.step(console, f"{title}: with Lamina"):
            together = converse(model, openings, turns, SETTINGS)
    if picture is not None:
        _draw(alone, together, picture)
        console.print(f"Drawn: {picture}")
    return _report(console, alone, together, tokenizer.decode)


def converse(
    model: Any,
    openings: Sequence[Sequence[int]],
    turns: Sequence[Sequence[int]],
    settings: Mapping[str, object] | None,
) -> list[list[Answer]]:
    """Lead all conversations at once, one turn of each after the other.

    Args:
        model: a causal language model of transformers.
        openings: token ids that each conversation begins with.
        turns: token ids that its user adds in each turn, the same in all.
        settings: Lamina's; None to do without.

    Returns:
        The answers, by turn and conversation.

    Raises:
        DemoError: if a request fails.
    """
    from transformers.generation.configuration_utils import (
        ContinuousBatchingConfig,
        GenerationConfig,
    )

    from lamina_kv.engines.transformers import attach

    longest = max(map(len, openings)) + sum(len(words) + MAX_TOKENS for words in turns)
    batching = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS, num_blocks=HELD * -(-longest // PAGE_TOKENS), max_batch_tokens=512
    )
    if settings is not None:
        batching = attach(batching, settings)
    greedy = GenerationConfig(max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=-1)
    histories = [list(opening) for opening in openings]
    answers: list[list[Answer]] = []
    with model.continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=batching
    ) as manager:
        for words in turns:
            answers.append([])
            for history in histories:
                history.extend(words)
                answers[-1].append(_ask(manager, history))
                history.extend(answers[-1][-1].tokens)
    return answers


def _ask(manager: Any, prompt: Sequence[int]) -> Answer:
    manager.add_request(list(prompt), record_timestamps=True)
    try:
        output = manager.output_router.output_queue.get(timeout=PATIENCE)
    except queue.Empty:
        raise DemoError(f"no answer within {PATIENCE:.0f} s") from None
    if output.error is not None:
        raise DemoError(str(output.error))
    first = output.timestamps[0] - output.created_time
    return Answer(tuple(output.generated_tokens), len(prompt), first)


def _load(path: Path) -> tuple[Any, Any]:
    import logging

    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    # In bf16 a prefill that is resumed rounds differently from a whole one, with or without Lamina.
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(path)


def _conversations(tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Openings, each with a part of the document of its own, and what users say in each turn."""
    text = resources.files("lamina_kv.cli").joinpath("demo_document.txt").read_text()
    document: list[int] = tokenizer.encode(text)
    stride = (len(document) - OPENING_TOKENS) // (CONVERSATIONS - 1)
    begin: list[int] = tokenizer.encode("<|im_start|>user\n")
    openings = [
        begin + document[i * stride : i * stride + OPENING_TOKENS] for i in range(CONVERSATIONS)
    ]
    ask = "{}<|im_end|>\n<|im_start|>assistant\n"
    again = "<|im_end|>\n<|im_start|>user\n"
    turns = [
        tokenizer.encode(("\n\n" if turn == 0 else again) + ask.format(question))
        for turn, question in enumerate(QUESTIONS)
    ]
    return openings, turns


def _report(
    console: Console,
    alone: list[list[Answer]],
    together: list[list[Answer]],
    decode: Callable[[Sequence[int]], str],
) -> int:
    table = Table("turn", "prompt", "alone", "with Lamina", "faster", "first token")
    for column in table.columns[1:5]:
        column.justify = "right"
    longest = max(statistics.median(a.first_token for a in turn) for turn in alone)
    for number, (before, after) in enumerate(zip(alone, together, strict=True), 1):
        slow, fast = (statistics.median(a.first_token for a in turn) for turn in (before, after))
        bars = "\n".join(
            mark * max(1, round(seconds / longest * _BAR_WIDTH))
            for mark, seconds in (("▒", slow), ("█", fast))
        )
        tokens = statistics.mean(a.prompt for a in before)
        table.add_row(
            str(number), f"{tokens:.0f} tokens", f"{slow:.3f} s", f"{fast:.3f} s",
            f"{slow / fast:.1f}x", bars,
        )  # fmt: skip
    console.print(table)
    console.print("Medians over the conversations; ▒ transformers alone, █ with Lamina.")
    text = decode(together[0][0].tokens).strip()
    console.print(f"[bold]{QUESTIONS[0]}[/] {escape(text)} ...")
    pairs = [
        (one.tokens, other.tokens)
        for before, after in zip(alone, together, strict=True)
        for one, other in zip(before, after, strict=True)
    ]
    differ = sum(one != other for one, other in pairs)
    if differ:
        console.print(f"[bold red]{differ} of {len(pairs)} answers differ.[/]")
    else:
        console.print(f"[green]All {len(pairs)} answers are the same, token by token.[/]")
    return 1 if differ else 0


def _draw(alone: list[list[Answer]], together: list[list[Answer]], picture: Path) -> None:
    from lamina_kv.bench.plots import Curve, draw_turns
    from lamina_kv.bench.samples import Samples

    def curve(name: str, turns: list[list[Answer]]) -> Curve:
        points = {
            number: Samples(name, tuple(answer.first_token for answer in answers))
            for number, answers in enumerate(turns, 1)
        }
        return Curve(name, points)

    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_turns([curve("transformers alone", alone), curve("with Lamina", together)], picture)
