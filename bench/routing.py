"""Conversations and short questions, mixed, against two prefill and two decode engines: how many
are served in time, how soon, and how many tokens are computed twice.

    python bench/routing.py --rates 0.2 1 4 --seconds 60

Systems, one after the other on the same machine, with the same requests:

* ``routed``: Lamina's push and its proxy as it comes;
* ``least``: the same with ``--policy least_loaded --disaggregate always``;
* ``alone``: one engine without a connector, which is all there is;
* ``pull``: vLLM's NixlConnector and a router like that of vLLM's examples (``pull_proxy.py``).

A conversation begins with a document, and each turn adds a question; the next turn comes some
seconds after the answer. A token of the model is a byte, so that the text of an answer is what was
computed, and prompts are exactly as long as they are to be. Times are the client's, from when a
request is due. Needs NIXL, a machine that does nothing else, and a core for each engine if their
times are to mean much: on fewer, engines take each other's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import string
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import httpx

from lamina_kv.bench.ports import free_port
from lamina_kv.bench.shapes import VOCABULARY, Dtype, LlamaShape
from lamina_kv.cli.demo_server import Server, vllm_server

LETTERS = string.ascii_lowercase + " "
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
COMPUTED = "vllm:prompt_tokens_by_source_total"
"""What each engine's scheduler has counted. vLLM's histogram of computed tokens counts a prompt
again that a NixlConnector has pulled."""
PATIENCE = 120.0
"""Seconds for the next piece of an answer."""


class System(StrEnum):
    """See the module."""

    ROUTED = "routed"
    LEAST = "least"
    ALONE = "alone"
    PULL = "pull"


# -- what is asked -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Talk:
    """One client.

    Attributes:
        name: of its session.
        at: seconds after the beginning at which it first asks.
        questions: what it says, turn after turn.
    """

    name: str
    at: float
    questions: tuple[str, ...]


@dataclass
class Turn:
    """One answer.

    Attributes:
        turn: its number in the conversation.
        first: seconds from when it was due until its first token; infinite if there was none.
        between: seconds from one token to the next, on average.
        new: tokens of the prompt that nobody had computed before; 0 if it was never asked, as the
            turn before has failed.
    """

    turn: int
    new: int
    first: float = math.inf
    between: float = 0.0


def words(rng: random.Random, length: int) -> str:
    """Text that shares nothing with any other."""
    return "".join(rng.choices(LETTERS, k=length))


def schedule(options: argparse.Namespace, rate: float) -> list[Talk]:
    """Clients that come at random, the same for every system.

    Args:
        options: the command line's.
        rate: clients a second.
    """
    rng = random.Random(f"{options.seed} {rate}")
    talks: list[Talk] = []
    at = 0.0
    while (at := at + rng.expovariate(rate)) < options.seconds:
        name = f"{rate}-{len(talks)}"
        if rng.random() < options.short_share:
            talks.append(Talk(name, at, (words(rng, options.short_tokens),)))
            continue
        document = words(rng, rng.randrange(options.document // 2, 3 * options.document // 2))
        more = [words(rng, options.question) for _ in range(options.turns - 1)]
        talks.append(Talk(name, at, (document, *more)))
    return talks


async def converse(
    client: httpx.AsyncClient, talk: Talk, began: float, options: argparse.Namespace
) -> list[Turn]:
    """All turns of one client, each due some seconds after the answer before."""
    messages: list[dict[str, str]] = []
    turns: list[Turn] = []
    due = began + talk.at
    for number, question in enumerate(talk.questions):
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        messages.append({"role": "user", "content": question})
        turn = Turn(number, len(question) + 2)
        turns.append(turn)
        body = {
            "model": "demo",
            "messages": messages,
            "stream": True,
            "max_tokens": options.answer,
            "min_tokens": options.answer,
            "temperature": 0,
            "allowed_token_ids": [ord(letter) for letter in LETTERS],
        }
        text, times = "", []
        try:
            async with client.stream(
                "POST", "/v1/chat/completions", json=body, headers={"x-session-id": talk.name}
            ) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    for choice in event.get("choices", ()):
                        if content := choice["delta"].get("content"):
                            text += content
                            times.append(time.perf_counter())
        except httpx.HTTPError:
            text = ""
        if len(text) < options.answer:  # it broke off, or was an error from the beginning
            return turns + [Turn(later, 0) for later in range(number + 1, len(talk.questions))]
        turn.first = times[0] - due
        turn.between = (times[-1] - times[0]) / max(1, len(times) - 1)
        messages.append({"role": "assistant", "content": text})
        due = time.perf_counter() + options.think
    return turns


async def ask_all(url: str, talks: Sequence[Talk], options: argparse.Namespace) -> list[Turn]:
    """Everything of a schedule."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=PATIENCE, trust_env=False, limits=limits
    ) as client:
        began = time.perf_counter()
        turns = await asyncio.gather(*(converse(client, talk, began, options) for talk in talks))
    return [turn for talk in turns for turn in talk]


# -- who answers -------------------------------------------------------------------------------


def write_model(directory: Path, options: argparse.Namespace) -> None:
    """A model without weights, and a tokenizer for which a token is a byte."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shape = LlamaShape(options.layers, options.hidden, 4, 64, 32, Dtype.FLOAT32)
    shape.write_config(directory)
    vocabulary = {chr(code): code for code in range(128)}
    vocabulary |= {f"<{code}>": code for code in range(128, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<128>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE)
    fast.save_pretrained(str(directory))


@dataclass
class Deployment:
    """A system that runs.

    Attributes:
        url: whom clients ask.
        engines: what computes.
    """

    url: str
    engines: list[Server] = field(default_factory=list)

    def computed(self) -> float:
        """Tokens of prompts, so far."""
        return sum(engine.by(COMPUTED, "source")["local_compute"] for engine in self.engines)


class Starter:
    """Starts servers that end with the stack.

    Args:
        stack: ends them.
        work: a directory; the model is in it.
        logs: a directory that receives what they say.
        options: the command line's.
    """

    def __init__(
        self, stack: ExitStack, work: Path, logs: Path, options: argparse.Namespace
    ) -> None:
        self._stack = stack
        self._work = work
        self._logs = logs
        self._options = options
        self._count = 0

    def _log(self) -> Path:
        self._count += 1
        self._logs.mkdir(parents=True, exist_ok=True)
        return self._logs / f"{self._count}.log"

    def engine(self, connector: dict[str, Any] | None, **environment: str) -> Server:
        """A vLLM server, which may not answer yet."""
        options = self._options
        arguments = [
            *("--load-format", "dummy", "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", str(options.context), "--block-size", "32"),
            *("--num-gpu-blocks-override", str(options.cache // 32)),
            *("--max-num-batched-tokens", str(options.step_tokens)),
            "--enable-prompt-tokens-details",
        ]
        if connector is not None:
            usual = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
            arguments += ["--kv-transfer-config", json.dumps({**usual, **connector})]
        threads = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(options.threads),
            "VLLM_NO_USAGE_STATS": "1",
        }
        server = vllm_server(self._work, arguments, {**threads, **environment}, self._log())
        return self._stack.enter_context(server)

    def program(self, *command: str) -> Server:
        """A router."""
        port = free_port()
        server = Server([sys.executable, *command, "--port", str(port)], port, {}, self._log())
        self._stack.enter_context(server)
        server.await_start()
        return server

    def start(self, system: System) -> Deployment:
        """All of a system; returns when it answers."""
        if system is System.ALONE:
            engine = self.engine(None)
            engine.await_start()
            return Deployment(engine.url, [engine])
        prefill: list[Server] = []
        decode: list[Server] = []
        addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        for end, engines in ((0, prefill), (1, decode)):
            for index in range(2):
                if system is System.PULL:
                    port = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
                    engines.append(self.engine({"kv_connector": "NixlConnector"}, **port))
                    continue
                push = {} if end else {"listen": addresses[index]}
                extra = {"host": {"capacity": self._options.host}, "push": push}
                connector = {"kv_connector": "LaminaConnector", "kv_connector_extra_config": extra}
                engines.append(self.engine(connector))
        # All at once: an engine of NIXL's that waits keeps a core busy, and the next one waiting.
        for engine in (*prefill, *decode):
            engine.await_start()
        if system is System.PULL:
            router = self.program(
                str(Path(__file__).with_name("pull_proxy.py")),
                *(f"--prefill={engine.url}" for engine in prefill),
                *(f"--decode={engine.url}" for engine in decode),
            )
            return Deployment(router.url, [*prefill, *decode])
        plain = ("--policy=least_loaded", "--disaggregate=always")
        router = self.program(
            *("-c", "from lamina_kv.cli.main import main; main()", "push-proxy"),
            *(f"--prefill={e.url},{a}" for e, a in zip(prefill, addresses, strict=True)),
            *(f"--decode={engine.url}" for engine in decode),
            *(plain if system is System.LEAST else ()),
        )
        return Deployment(router.url, [*prefill, *decode])


# -- how well ----------------------------------------------------------------------------------


Figures = dict[str, float | None]
"""By name; None where nothing was measured."""


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(1, math.ceil(len(ordered) * percent / 100)) - 1] if ordered else None


def judge(turns: Sequence[Turn], computed: float, options: argparse.Namespace) -> Figures:
    """The figures of one schedule."""
    answered = [turn for turn in turns if turn.first < math.inf]
    good = [
        turn
        for turn in answered
        if turn.first <= options.first_within and turn.between <= options.between_within
    ]
    new = sum(turn.new for turn in turns)
    figures: Figures = {
        "requests": len(turns),
        "failed": len(turns) - len(answered),
        "goodput": len(good) / options.seconds,
        "between p50": percentile([turn.between for turn in answered], 50),
        "computed / new": computed / new if new else None,
    }
    for name, some in (
        ("first", answered),
        ("short", [t for t in answered if t.new == options.short_tokens + 2]),
        ("later turns", [t for t in answered if t.turn]),
    ):
        times = [turn.first for turn in some]
        figures |= {f"{name} p50": percentile(times, 50), f"{name} p99": percentile(times, 99)}
    return figures


def table(rate: str, systems: dict[str, Figures]) -> str:
    """The figures of one rate, a column for each system."""
    lines = [f"| {rate} clients/s | {' | '.join(systems)} |", "| --- |" + " --- |" * len(systems)]
    for name in next(iter(systems.values())):
        values = (figures[name] for figures in systems.values())
        shown = " | ".join("none" if value is None else f"{value:.3g}" for value in values)
        lines.append(f"| {name} | {shown} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, and print a table for each rate."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--systems", nargs="+", type=System, default=[*System])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.2, 1.0, 4.0])
    parser.add_argument("--seconds", type=float, default=60.0, help="Clients come for so long.")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--think", type=float, default=1.0, help="Seconds between turns.")
    parser.add_argument("--document", type=int, default=1500, help="Tokens of a first turn.")
    parser.add_argument("--question", type=int, default=60, help="Tokens of a later turn.")
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--short-share", type=float, default=0.5)
    parser.add_argument("--short-tokens", type=int, default=40)
    parser.add_argument("--first-within", type=float, default=2.0, help="Seconds, for goodput.")
    parser.add_argument("--between-within", type=float, default=0.2, help="Seconds, for goodput.")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1, help="Of each engine.")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--cache", type=int, default=65536, help="Tokens of each engine's cache.")
    parser.add_argument("--host", default="256MiB", help="Lamina's host.capacity, each engine.")
    parser.add_argument("--step-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logs", type=Path, help="Keep what servers say in this directory.")
    parser.add_argument("--json", type=Path, help="Write the figures there, too.")
    options = parser.parse_args()
    results: dict[str, dict[str, Figures]] = {}
    for system in options.systems:
        with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
            work = Path(directory)
            write_model(work, options)
            logs = (options.logs or work) / system.value
            deployment = Starter(stack, work, logs, options).start(system)
            # As long as those that count: a router learns what prompts of a length take.
            text = "warm " * options.document
            warm = [Talk(f"warm-{n}", 0.5 * n, (f"{n} {text}", "up " * 20)) for n in range(8)]
            asyncio.run(ask_all(deployment.url, warm, options))
            for rate in options.rates:
                before = deployment.computed()
                turns = asyncio.run(ask_all(deployment.url, schedule(options, rate), options))
                figures = judge(turns, deployment.computed() - before, options)
                results.setdefault(f"{rate:g}", {})[system.value] = figures
                print(f"{system.value} at {rate:g}/s: {figures}", file=sys.stderr, flush=True)
        if options.json is not None:  # what there is, if a later system does not run to its end
            options.json.write_text(json.dumps({"options": repr(options), "results": results}))
    for rate, systems in results.items():
        print(table(rate, systems))


if __name__ == "__main__":
    main()
