"""Which tests have passed on which engine and Python, and the table of it in
``docs/compatibility.md``.

``pytest --record-versions`` writes what it has run into ``versions.json``, in place of what ran
there before. ``python tests/versions.py`` prints the table; a test compares it with the page.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pytest

RECORD = Path(__file__).with_name("versions.json")

NO_ENGINE = "no engine"
_OF_A_RUNNER = re.compile(r"test_compat\.py::.*\[(?:.*-)?(?P<version>\d+\.\d+)-(?P<runner>V\d)\b")


@dataclass(frozen=True, order=True)
class Run:
    """What became of some tests on one engine and one Python.

    Attributes:
        engine: its name and version, and of vLLM the model runner; or :data:`NO_ENGINE`.
        tests: which of the suite.
        python: version.
        passed: tests.
        failed: tests, those included that could not begin or end.
        skipped: tests.
        date: of the run, ISO.
        commit: that was checked out.
    """

    engine: str
    tests: str
    python: str
    passed: int
    failed: int
    skipped: int
    date: str
    commit: str


def load() -> list[Run]:
    """What is recorded."""
    return [Run(**run) for run in json.loads(RECORD.read_text())] if RECORD.exists() else []


def save(runs: Iterable[Run]) -> None:
    """Put runs in the place of those of the same tests, engine and Python."""
    by_place = {(run.engine, run.tests, run.python): run for run in (*load(), *runs)}
    records = [asdict(run) for run in sorted(by_place.values())]
    RECORD.write_text(json.dumps(records, indent=1) + "\n")


def table(runs: Iterable[Run]) -> str:
    """What ``docs/compatibility.md`` has."""
    rows = [
        f"| {run.engine} | {run.tests} | {run.python} | {run.passed:,} | {run.failed} | "
        f"{run.skipped} | {run.date} | {run.commit} |"
        for run in sorted(runs)
    ]
    head = ["| engine | tests | Python | passed | failed | skipped | date | commit |"]
    return "\n".join([*head, "| --- | --- | --- | ---: | ---: | ---: | --- | --- |", *rows]) + "\n"


def place_of(node_id: str, vllm: str, transformers: str) -> tuple[str, str]:
    """On what a test runs, and to which of the suite it belongs.

    Args:
        node_id: of the test.
        vllm: its version here.
        transformers: likewise.
    """
    if named := _OF_A_RUNNER.search(node_id):
        return f"vLLM {named['version']}, {named['runner']}", "`test_compat.py`"
    file = node_id.partition("::")[0]
    if "test_transformers" in file:
        return f"transformers {transformers}", "`test_transformers*.py`"
    if "/engine/" in file or "test_engine" in file:
        return f"vLLM {vllm}", "other tests of an engine"
    return NO_ENGINE, "all others"


def _installed_vllm() -> str:
    """Without importing it; of a version that is laid over another one, its own."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return "none"
    text = Path(spec.origin).with_name("_version.py").read_text()
    found = re.search(r"^__version__ = version = '(\d+\.\d+)", text, re.MULTILINE)
    return found[1] if found else "unknown"


def _installed_transformers() -> str:
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return "none"


class Recorder:
    """Notes what becomes of tests, in the process that reports."""

    def __init__(self) -> None:
        self._outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        before = self._outcomes.get(report.nodeid, "passed")
        if before == "passed":
            self._outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        save(runs_of(self._outcomes, _installed_vllm(), _installed_transformers()))


def runs_of(outcomes: Mapping[str, str], vllm: str, transformers: str) -> list[Run]:
    """What has been run, by engine.

    Args:
        outcomes: ``passed``, ``failed`` or ``skipped`` by node id.
        vllm: its version here.
        transformers: likewise.
    """
    places: dict[tuple[str, str], Counter[str]] = {}
    for node_id, outcome in outcomes.items():
        places.setdefault(place_of(node_id, vllm, transformers), Counter())[outcome] += 1
    git = ["git", "-C", str(RECORD.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    date = datetime.now(UTC).date().isoformat()
    return [
        Run(
            engine,
            tests,
            platform.python_version(),
            count["passed"],
            count["failed"],
            count["skipped"],
            date,
            commit,
        )
        for (engine, tests), count in places.items()
        if count["passed"] or count["failed"]
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-versions",
        action="store_true",
        help="write what ran on which engine into tests/versions.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("record_versions") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())


if __name__ == "__main__":
    print(table(load()), end="")
