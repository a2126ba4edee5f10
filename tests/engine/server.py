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
from collections.abc import Callable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from engine.driver import EngineSpec, Metrics, Sample, child_environment
from lamina.bench.ports import free_port

START_SECONDS = 400.0
CALL_SECONDS = 180.0


class ServerEnded(Exception):
    """The server has exited; the message is its log.

    Attributes:
        code: its exit status.
    """

    def __init__(self, code: int, log: str) -> None:
        super().__init__(log)
        self.code = code


class Server:
    """One server on a free port of this machine, while the ``with`` block runs.

    Args:
        spec: how to start its engine.
        log: file that receives what it says.

    Attributes:
        url: where it answers.

    Raises:
        ServerEnded: if it does not start.
        TimeoutError: if it hangs.
    """

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        self._log = log
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        arguments = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
        for name, value in spec.arguments().items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                arguments += [flag] if value else []
            else:
                arguments += [flag, str(value)]
        if (transfer := spec.transfer_config()) is not None:
            arguments += ["--kv-transfer-config", json.dumps(transfer)]
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache
            **spec.environment,
        }
        with child_environment(environment), log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self.wait_until(self._healthy, START_SECONDS)
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def complete(self, tokens: tuple[int, ...], max_tokens: int = 8) -> tuple[int, ...]:
        """The greedy answer to a prompt, as tokens."""
        answer = self._post(
            "/v1/completions",
            {
                "model": "model",
                "prompt": list(tokens),
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            },
        )
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

    def log(self) -> str:
        """What the server has said so far."""
        return self._log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Ask until ``condition`` holds.

        Raises:
            ServerEnded: if the server ends first.
            TimeoutError: after ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if (code := self._process.poll()) is not None:
                raise ServerEnded(code, self.log())
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s:\n{self.log()[-4000:]}")
            time.sleep(0.1)

    def stop(self) -> int:
        """Ask the server to end, as ``kill`` does; returns its exit status."""
        self._process.terminate()
        return self._process.wait(CALL_SECONDS)

    def kill(self) -> None:
        """End all of its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _healthy(self) -> bool:
        try:
            self._open("/health")
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def _post(self, path: str, body: object) -> dict:
        return json.loads(self._open(path, json.dumps(body).encode()))

    def _open(self, path: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, body, headers)
        with urllib.request.urlopen(request, timeout=CALL_SECONDS) as response:
            return response.read()
