"""A real vLLM server in processes of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from engine.driver import Ask, EngineSpec, Metrics, Sample, child_environment, enter_child, fork
from lamina_kv.bench.ports import free_port

START_SECONDS = 400.0
CALL_SECONDS = 180.0

MODEL = "model"
"""What servers call their model, unless they are told otherwise."""

_UNREACHABLE = (urllib.error.URLError, ConnectionError, TimeoutError)


class ServerEnded(Exception):
    """The server has exited; the message is its log.

    Attributes:
        code: its exit status.
    """

    def __init__(self, code: int, log: str) -> None:
        super().__init__(log)
        self.code = code


@dataclass(frozen=True)
class Held:
    """What an engine holds, as its server publishes it.

    Attributes:
        usage: share of its blocks that are not free.
        leased: blocks that Lamina holds.
        transfers: of Lamina, not ended.
        running: requests that run.
        waiting: requests that wait, those whose prompt is being pushed among them.
    """

    usage: float = 0.0
    leased: int = 0
    transfers: int = 0
    running: int = 0
    waiting: int = 0


class Server:
    """One server on a free port of this machine, while the ``with`` block runs.

    Args:
        spec: how to start its engine.
        log: file that receives what it says; started again, it goes on there.
        name: what it calls its model.
        forked: from a process that has imported vLLM, which takes a fifth of the time.

    Attributes:
        spec: how its engine is started.
        url: where it answers.

    Raises:
        ServerEnded: if it does not start.
        TimeoutError: if it hangs.
    """

    def __init__(
        self, spec: EngineSpec, log: Path, *, name: str = MODEL, forked: bool = False
    ) -> None:
        self.spec = spec
        self._log = log
        self._forked = forked
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._arguments = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
        self._arguments.append("--disable-uvicorn-access-log")
        for option, value in spec.arguments().items():
            flag = f"--{option.replace('_', '-')}"
            if isinstance(value, bool):
                self._arguments += [flag] if value else []
            else:
                self._arguments += [flag, str(value)]
        if (transfer := spec.transfer_config()) is not None:
            self._arguments += ["--kv-transfer-config", json.dumps(transfer)]
        self._environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache
            **spec.environment,
        }
        self._process: subprocess.Popen[bytes] | BaseProcess | None = None

    def start(self) -> None:
        """Start it, if it does not run; returns at once."""
        if self._process is not None:
            return
        if self._forked:
            self._process = fork(
                _serve, self._arguments, self._environment, self.spec.asynchronous, self._log
            )
            return
        with child_environment(self._environment), self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it serves.

        Raises:
            ServerEnded: if it does not.
            TimeoutError: if it hangs.
        """
        self.wait_until(self.is_healthy, START_SECONDS)

    def __enter__(self) -> Server:
        self.start()
        try:
            self.wait()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    # -- requests ----------------------------------------------------------------------------

    def complete(
        self, tokens: tuple[int, ...], max_tokens: int = 8, **headers: str
    ) -> tuple[int, ...]:
        """The greedy answer to a prompt, as tokens."""
        answer = self._post("/v1/completions", completion(Ask(tokens, max_tokens)), headers)
        return tuple(answer["choices"][0]["token_ids"])

    def forget(self) -> None:
        """Empty vLLM's own prefix cache, as soon as no block is held any more."""
        self.wait_until(lambda: self._post("/reset_prefix_cache", {})["success"], CALL_SECONDS)

    def metrics(self) -> Metrics:
        """What the server publishes now."""
        text = self._open("/metrics").decode()
        return Metrics(
            [
                Sample(sample.name, sample.labels, sample.value)
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            ]
        )

    def held(self) -> Held:
        """What its engine holds now."""
        metrics = self.metrics()
        return Held(
            metrics.total("vllm:kv_cache_usage_perc"),
            int(metrics.total("lamina_leased_blocks")),
            int(metrics.total("lamina_transfers")),
            int(metrics.total("vllm:num_requests_running")),
            int(metrics.total("vllm:num_requests_waiting")),
        )

    def wait_until_empty(self, seconds: float) -> None:
        """Until its engine holds nothing; nobody asks it anything meanwhile.

        Raises:
            TimeoutError: after ``seconds``, with what it holds.
        """
        try:
            self.wait_until(lambda: self.held() == Held(), seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{self.url} holds {self.held()}; {error}") from None

    def log(self) -> str:
        """What the server has said so far."""
        return self._log.read_text(errors="replace")

    def is_healthy(self) -> bool:
        """Whether it answers."""
        try:
            self._open("/health")
        except _UNREACHABLE:
            return False
        return True

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Ask until ``condition`` holds.

        Raises:
            ServerEnded: if the server ends first.
            TimeoutError: after ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if (code := self._exit_status()) is not None:
                raise ServerEnded(code, self.log())
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s:\n{self.log()[-4000:]}")
            time.sleep(0.1)

    # -- ends --------------------------------------------------------------------------------

    def stop(self) -> int:
        """Ask the server to end, as ``kill`` does; returns its exit status."""
        assert self._process is not None
        self._process.terminate()
        if isinstance(self._process, subprocess.Popen):
            return self._process.wait(CALL_SECONDS)
        self._process.join(CALL_SECONDS)
        assert self._process.exitcode is not None
        return self._process.exitcode

    def kill(self) -> None:
        """End all of its processes at once."""
        if self._process is None:
            return
        self.signal(signal.SIGKILL)
        if isinstance(self._process, subprocess.Popen):
            self._process.wait()
        else:
            self._process.kill()  # which had perhaps no group yet
            self._process.join()
        self._process = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _exit_status(self) -> int | None:
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return None if self._process is None else self._process.exitcode

    def _post(self, path: str, body: object, headers: Mapping[str, str] | None = None) -> dict:
        return json.loads(self._open(path, json.dumps(body).encode(), headers))

    def _open(
        self, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        headers = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, body, headers)
        with urllib.request.urlopen(request, timeout=CALL_SECONDS) as response:
            return response.read()


def completion(ask: Ask) -> dict[str, object]:
    """The body of a request, greedily answered."""
    body: dict[str, object] = {
        "model": MODEL,
        "prompt": list(ask.tokens),
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if ask.transfer_params is not None:
        body["kv_transfer_params"] = ask.transfer_params
    return body


def _serve(
    arguments: list[str], environment: dict[str, str], asynchronous: bool, log: Path
) -> None:
    """A forked child's first function: the program ``vllm serve``, which finds itself imported."""
    import torch._dynamo
    from vllm.entrypoints.launchers.api_server.entry import main

    from engine.child import plan_a_step_ahead

    enter_child(log)
    os.environ.update(environment)
    # vLLM compiles parts of its sampler even where the model is not to be compiled.
    torch._dynamo.config.disable = "--enforce-eager" in arguments
    if asynchronous:
        plan_a_step_ahead()
    sys.argv = ["vllm", *arguments]
    main()
