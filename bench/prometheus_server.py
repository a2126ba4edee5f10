"""A real Prometheus for tests and pictures: it scrapes one server and answers queries.

Debian has it as a package. ``requirements/prometheus`` unpacks that into ``build/prometheus``, so
that nothing is installed and no service is started.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lamina_kv.bench.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
UNPACKED = ROOT / "build" / "prometheus" / "usr" / "bin"

_START_SECONDS = 60.0


def program(name: str) -> Path | None:
    """``prometheus`` or ``promtool``; None if this machine has none."""
    found = shutil.which(name) or shutil.which(name, path=str(UNPACKED))
    return None if found is None else Path(found)


class QueryError(RuntimeError):
    """Prometheus does not answer a query; the message is its own."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of an answer.

    Attributes:
        labels: its labels.
        points: moments, in seconds since the epoch, and values.
    """

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]


class Prometheus:
    """A server that runs while the ``with`` block does.

    Args:
        targets: what it scrapes once a second, as ``host:port``.
        folder: for its data; must be there.
        rules: a file of alerts, or None.

    Raises:
        RuntimeError: if there is no Prometheus here, or it does not start.
    """

    def __init__(self, targets: Sequence[str], folder: Path, rules: Path | None = None) -> None:
        self._folder = folder
        self._port = free_port()
        document = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [] if rules is None else [str(rules)],
            "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": [*targets]}]}],
        }
        self._config = folder / "prometheus.yml"
        self._config.write_text(json.dumps(document))  # JSON is YAML

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        binary = program("prometheus")
        if binary is None:
            raise RuntimeError("no Prometheus is here: requirements/prometheus fetches it (Debian)")
        command = [
            str(binary),
            f"--config.file={self._config}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self._port}",
            "--log.level=warn",
        ]
        with (self._folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        due = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > due:
                self._end()
                said = (self._folder / "prometheus.log").read_text()
                raise RuntimeError(f"Prometheus did not start: {said}")
            time.sleep(0.1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def now(self, query: str) -> list[Series]:
        """What a query says now.

        Raises:
            QueryError: if it is wrong.
        """
        found = self.ask("query", query=query)
        return [Series(each["metric"], [_point(each["value"])]) for each in found["result"]]

    def over(self, query: str, start: float, end: float, step: float) -> list[Series]:
        """What a query says at several moments.

        Args:
            query: the query.
            start: the first moment, in seconds since the epoch.
            end: the last one.
            step: seconds between two.

        Raises:
            QueryError: if it is wrong.
        """
        found = self.ask("query_range", query=query, start=start, end=end, step=step)
        return [Series(each["metric"], [*map(_point, each["values"])]) for each in found["result"]]

    def ask(self, path: str, **parameters: str | float) -> Any:
        """The data of an answer of its HTTP API.

        Raises:
            QueryError: if it is an error.
        """
        asked = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{asked}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise QueryError(f"{parameters}: {error.read().decode()}") from None

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
                return True
        except OSError:
            return False

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _point(pair: Sequence[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])
