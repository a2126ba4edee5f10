"""Prefill servers, decode servers and ``lamina-kv push-proxy``, each a program as users start it,
and clients that ask them over HTTP. Nothing else reaches into them, and nobody wakes an idle
engine.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from engine.driver import SMALL, Ask, EngineSpec, child_environment
from engine.server import Server, completion
from engine.workload import Tokens
from lamina_kv.bench.ports import free_port

PROGRAM = "from lamina_kv.cli.main import main; main()"

START_SECONDS = 240.0
"""Until the proxy answers, and knows all engines."""

ANSWERED, LEFT = "answered", "left"
"""What became of a request, if it was not an error's name."""


def prefill_spec(
    model: Path, options: Mapping[str, Any] | None = None, push: Mapping[str, Any] | None = None
) -> EngineSpec:
    """A prefill engine, which listens at a port of its own.

    Args:
        model: the checkpoint.
        options: of the engine.
        push: more of the ``push`` section.
    """
    listen = f"127.0.0.1:{free_port()}"
    return EngineSpec(model, {**SMALL, "push": {"listen": listen, **(push or {})}}, options or {})


def decode_spec(
    model: Path, options: Mapping[str, Any] | None = None, push: Mapping[str, Any] | None = None
) -> EngineSpec:
    """A decode engine; see :func:`prefill_spec`."""
    return EngineSpec(model, {**SMALL, "push": push or {}}, options or {})


class Proxy:
    """``lamina-kv push-proxy`` in a process of its own.

    Args:
        prefill: servers that push.
        decode: servers that are pushed to.
        log: what it says.
        options: more of its command line. Unless it says otherwise, every prompt is pushed.

    Attributes:
        url: where it answers.
    """

    def __init__(
        self, prefill: Sequence[Server], decode: Sequence[Server], log: Path, *options: str
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._engines = len(prefill) + len(decode)
        self._arguments = [
            *(f"--prefill={server.url},{listen_address(server)}" for server in prefill),
            *(f"--decode={server.url}" for server in decode),
            f"--port={port}",
            *("--disaggregate=always", "--policy=least_loaded"),
            *options,
        ]

    def start(self) -> None:
        """Start it; returns when it answers.

        Raises:
            TimeoutError: if it does not.
        """
        with child_environment({}), self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, "push-proxy", *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"the proxy does not start:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.05)

    def wait_for_engines(self) -> None:
        """Until it uses every engine.

        Raises:
            TimeoutError: if it does not.
        """
        deadline = time.monotonic() + START_SECONDS
        while self.total("lamina_proxy_engine_usable") < self._engines:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the proxy lacks engines:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def total(self, name: str, label: str = "") -> float:
        """Sum of what it publishes under a name, of samples in which ``label`` stands."""
        text = httpx.get(f"{self.url}/metrics", trust_env=False, timeout=10).text
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith(f"{name}{{") and label in line
        )

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(f"{self.url}/health", trust_env=False, timeout=2)
            return True
        return False


class Deployment:
    """All of them, while the ``with`` block runs.

    Args:
        prefill: servers that push.
        decode: servers that are pushed to.
        log: what the proxy says.
        options: more of the proxy's command line.
    """

    def __init__(
        self, prefill: Sequence[Server], decode: Sequence[Server], log: Path, *options: str
    ) -> None:
        self.prefill = list(prefill)
        self.decode = list(decode)
        self.proxy = Proxy(prefill, decode, log, *options)

    def __enter__(self) -> Deployment:
        with ExitStack() as stack:
            for server in self.servers:
                stack.callback(server.kill)
                server.start()
            for server in self.servers:
                server.wait()
            stack.callback(self.proxy.kill)
            self.proxy.start()
            self.proxy.wait_for_engines()
            self._running = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    @property
    def servers(self) -> list[Server]:
        """Those of vLLM."""
        return [*self.prefill, *self.decode]


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
        kind: :data:`ANSWERED`, :data:`LEFT` if the client's patience was over, ``status 503`` and
            the like, or the name of the error that a connection had.
        tokens: the answer's.
        began: monotonic seconds at which it was asked.
        seconds: that it took.
    """

    kind: str
    tokens: Tokens = ()
    began: float = 0.0
    seconds: float = 0.0


def complete(url: str, patience: float, ask: Ask) -> Outcome:
    """One client's request.

    Args:
        url: of a server, or of the proxy.
        patience: seconds after which it leaves.
        ask: what it asks.
    """
    began = time.monotonic()

    def outcome(kind: str, tokens: Tokens = ()) -> Outcome:
        return Outcome(kind, tokens, began, time.monotonic() - began)

    body = completion(ask)
    try:
        with httpx.Client(trust_env=False, timeout=httpx.Timeout(patience)) as client:
            response = client.post(f"{url}/v1/completions", json=body)
        if response.status_code != 200:
            assert response.json()["error"]["message"]
            return outcome(f"status {response.status_code}")
        return outcome(ANSWERED, tuple(response.json()["choices"][0]["token_ids"]))
    except httpx.TimeoutException:
        return outcome(LEFT)
    except httpx.HTTPError as error:
        return outcome(type(error).__name__)


def route(prefill: Server, decode: Server, ask: Ask, patience: float) -> Outcome:
    """What another router than Lamina's does, of which the decode engine's answer is waited for
    whatever the prefill engine says.

    Args:
        prefill: the server that is to push.
        decode: the server that is to be pushed to.
        ask: what is asked.
        patience: seconds after which the decode engine is left.
    """
    push = {"id": uuid.uuid4().hex}
    part = replace(ask, max_tokens=1, push=push)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(complete, prefill.url, patience, part)
        part = replace(ask, push={**push, "prefill": listen_address(prefill)})
        return complete(decode.url, patience, part)


def ask_all(asks: Sequence[Ask], one: Callable[[Ask], Outcome], *, clients: int) -> list[Outcome]:
    """What becomes of requests that so many clients share; they stop asking when one has had to
    leave.

    Args:
        asks: what they ask.
        one: asks it.
        clients: requests at a time.
    """
    hangs = threading.Event()

    def unless_hanging(ask: Ask) -> Outcome:
        if hangs.is_set():
            return Outcome("not asked")
        outcome = one(ask)
        if outcome.kind == LEFT:
            hangs.set()
        return outcome

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(unless_hanging, asks))


def wrong(outcomes: Sequence[Outcome], expected: Sequence[Tokens]) -> list[str]:
    """One line for each request that does not have the right answer."""
    return [
        f"{index}: {outcome} instead of {right}"
        for index, (outcome, right) in enumerate(zip(outcomes, expected, strict=True))
        if (outcome.kind, outcome.tokens) != (ANSWERED, right)
    ]


def listen_address(server: Server) -> str:
    """Where decode engines reach a prefill engine."""
    assert server.spec.lamina is not None
    push = server.spec.lamina["push"]
    assert isinstance(push, Mapping)
    return str(push["listen"])
