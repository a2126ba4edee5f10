"""Fixtures for tests that run a real engine: checkpoints, shared engines, logs.

Nothing here starts anything until a test asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import models
from engine.driver import Engine, EngineSpec, Fleet

LIVE_ENGINES = 4
"""Engines kept alive at a time: each holds a few hundred MiB."""


Start = Callable[..., Engine]
"""Starts an engine that only the asking test uses: ``start(spec, fresh=False)``."""


class Checkpoints:
    """Models and adapters, made when they are first asked for and the same for the session.

    Args:
        folder: where they go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def model(self, name: str, seed: int = 0) -> Path:
        """See :func:`engine.models.make_model`."""
        path = self._folder / f"{name}-{seed}"
        return path if path.exists() else models.make_model(name, path, seed)

    def adapter(self, model: Path, seed: int = 0) -> Path:
        """See :func:`engine.models.make_adapter`."""
        path = self._folder / f"{model.name}-adapter-{seed}"
        return path if path.exists() else models.make_adapter(model, path, seed)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def llama(checkpoints: Checkpoints) -> Path:
    """The model that most tests use: uniform, grouped queries, float32."""
    return checkpoints.model("llama")


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
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
