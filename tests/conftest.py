"""Fixtures for tests that run a real engine: checkpoints, shared engines, logs.

Nothing here starts anything until a test asks for it.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.driver import Engine, EngineSpec, Fleet, Start
from engine.models import Checkpoints

pytest_plugins = ["durations", "versions", "push_proxy.fixtures", "servers.fixtures"]

LIVE_ENGINES = 4
"""Engines kept alive at a time: each holds a few hundred MiB."""


ENDING = 30.0
"""Seconds that threads of Lamina have to end after the last test of a file."""


def pytest_collection_finish() -> None:
    """Keep what was imported out of collections. It is never garbage, and a child that is forked
    would have to copy all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def threads_end() -> Iterator[None]:
    """What a file leaves behind is its own fault, and not that of the next file that counts."""
    before = set(threading.enumerate())
    yield
    due = time.monotonic() + ENDING
    while left := [
        thread.name
        for thread in threading.enumerate()
        if thread.name.startswith("lamina-") and thread not in before
    ]:
        assert time.monotonic() < due, f"nobody has closed what these belong to: {sorted(left)}"
        gc.collect()  # an engine that has failed stands in its own error
        time.sleep(0.1)


@pytest.fixture(scope="session")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Checkpoints:
    """One folder for all workers of a session."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(pytestconfig, "workerinput"):
        folder = folder.parent
    folder /= "checkpoints"
    folder.mkdir(exist_ok=True)
    return Checkpoints(folder)


@pytest.fixture(scope="session")
def llama(checkpoints: Checkpoints) -> Path:
    """The model that most tests use: uniform, grouped queries, float32."""
    return checkpoints.model("llama")


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Shared engines. Lamina's own cache is not the user's; vLLM's is: to
    look into a model for the first time takes it ten seconds."""
    usual = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", os.environ.get("VLLM_CACHE_ROOT", str(usual / "vllm")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        fleet = Fleet(tmp_path_factory.mktemp("engines"), LIVE_ENGINES)
        yield fleet
        fleet.close()


@pytest.fixture
def start(fleet: Fleet) -> Iterator[Start]:
    """See :data:`Start`; the engines are gone when the test ends."""
    engines: list[Engine] = []

    def start(spec: EngineSpec, *, fresh: bool = False) -> Engine:
        engines.append(Engine(spec, fleet.next_log(), fresh=fresh))
        return engines[-1]

    yield start
    for engine in engines:
        engine.kill()
