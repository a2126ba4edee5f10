"""Shared stores for engine tests: real ones, each with a server or a directory of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Shared:
    """A store that engines may share.

    Attributes:
        entry: what ``tiers`` holds for it.
        environment: variables that its clients need.
    """

    entry: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The tier's name in metrics."""
        return str(self.entry["kind"])

    def lamina(self, **tier: object) -> dict[str, Any]:
        """Lamina's configuration with it: every chunk of a prompt is given to it.

        Args:
            tier: keys of its entry.
        """
        return {
            "host": {"capacity": "128MiB"},
            "save": {"tokens": "prompt"},
            "load": {"min_tokens": 1},
            "tiers": [{"keep": "all", **self.entry, **tier}],
        }


@contextmanager
def directory(folder: Path) -> Iterator[Shared]:
    """A directory."""
    yield Shared({"kind": "directory", "path": str(folder / "shared")})


@contextmanager
def juicefs(folder: Path) -> Iterator[Shared]:
    """A directory in a file system that machines share."""
    from juicefs import JuiceFS, missing

    if why := missing():
        pytest.skip(why)
    with closing(JuiceFS(folder)) as mount:
        mount.start()
        yield Shared({"kind": "directory", "path": str(mount.path / "shared")})


@contextmanager
def valkey(folder: Path) -> Iterator[Shared]:
    """A Valkey server on a socket."""
    from servers.valkey import ValkeyServer

    with ValkeyServer() as server:
        yield Shared({"kind": "valkey", "url": server.url})


@contextmanager
def s3(folder: Path) -> Iterator[Shared]:
    """A bucket of SeaweedFS."""
    from servers.seaweed import Seaweed

    with Seaweed() as server:
        options = {"endpoint": server.endpoint, "region": "us-east-1"}
        entry = {"kind": "s3", "url": f"s3://{server.bucket('shared')}", "options": options}
        yield Shared(entry, server.environment())


@contextmanager
def mooncake(folder: Path) -> Iterator[Shared]:
    """A Mooncake master and a process that donates memory to it."""
    from servers.mooncake import Donor, Master, require

    require()
    with Master(folder) as master, Donor(master, folder):
        yield Shared({"kind": "mooncake", "master": master.address})


STORES: Mapping[str, Callable[[Path], AbstractContextManager[Shared]]] = {
    "directory": directory,
    "juicefs": juicefs,
    "valkey": valkey,
    "s3": s3,
    "mooncake": mooncake,
}
"""By name: a real store, which takes a folder for what it needs."""

EACH_STORE = [
    "directory",
    "valkey",
    "s3",
    pytest.param("juicefs", marks=pytest.mark.slow),
    pytest.param("mooncake", marks=pytest.mark.slow),
]
"""Parameters of a test that is to run on each."""
