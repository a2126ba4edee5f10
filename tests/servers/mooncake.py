"""Mooncake Store: a master, and processes that donate memory to it.

The wheel needs libraries that PyPI does not have; :func:`require` skips where they are missing.
"""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

START_SECONDS = 60.0
"""How long a server may take to be there, on two cores that others use, too."""


def require() -> None:
    """Skip what needs Mooncake where it cannot be loaded, and say what is missing."""
    try:
        import_module("mooncake.store")
    except ImportError as error:
        pytest.skip(
            f"Mooncake cannot be loaded ({error}). It needs mooncake-transfer-engine-non-cuda and "
            "libraries of the system: apt-get install libibverbs1 libnl-3-200 libnl-route-3-200"
        )


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class _Process:
    """A program of the wheel."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        """End it at once, without a word to anybody."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """It does nothing from now on, and its connections stay."""
        self._signal(signal.SIGSTOP)
        assert self._process is not None
        threads = Path(f"/proc/{self._process.pid}/task")
        while any(") T " not in (each / "stat").read_text() for each in threads.iterdir()):
            time.sleep(0.001)  # a signal takes its time to reach them

    def go_on(self) -> None:
        """The end of :meth:`stop`."""
        self._signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.kill()

    def _run(self, program: str, options: Iterable[str]) -> None:
        found = importlib.util.find_spec("mooncake")
        assert found is not None
        assert found.submodule_search_locations is not None
        path = Path(found.submodule_search_locations[0]) / program
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [path, "--logtostderr", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _started(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"{self._log}: {self._log.read_text()[-2000:]}")
        time.sleep(0.02)


class Master(_Process):
    """A master. Started again after a kill it is empty, and has the same address.

    Args:
        folder: where its log goes.
        client_ttl: seconds without a word after which it forgets a donor.
        lease: milliseconds for which nothing is evicted that was asked for.
        options: more of its options.

    Attributes:
        address: where it answers.
    """

    def __init__(
        self,
        folder: Path,
        *,
        client_ttl: int = 10,
        lease: int = 10_000,
        options: Iterable[str] = (),
    ) -> None:
        super().__init__(folder / "mooncake_master.log")
        port, self._metrics = free_port(), free_port()
        self.address = f"127.0.0.1:{port}"
        self._options = [
            "--rpc_address=127.0.0.1",
            f"--rpc_port={port}",
            "--metrics_host=127.0.0.1",
            f"--metrics_port={self._metrics}",
            f"--client_ttl={client_ttl}",
            f"--default_kv_lease_ttl={lease}",
            *options,
        ]

    def start(self) -> None:
        self._run("mooncake_master", self._options)
        due = time.monotonic() + START_SECONDS
        while self._ask("health") is None:
            self._started()
            assert time.monotonic() < due, "the master does not start"

    def donors(self) -> set[str]:
        """Addresses of the processes whose memory it gives out."""
        return set((self._ask("get_all_segments") or "").split())

    def _ask(self, what: str) -> str | None:
        with suppress(OSError):
            url = f"http://127.0.0.1:{self._metrics}/{what}"
            with urllib.request.urlopen(url, timeout=5) as answer:
                return str(answer.read().decode())
        return None


class Donor(_Process):
    """A process that donates memory.

    Args:
        master: to whom.
        folder: where its log goes.
        size: megabytes.
    """

    def __init__(self, master: Master, folder: Path, *, size: int = 256) -> None:
        super().__init__(folder / "mooncake_client.log")
        self._master = master
        self._size = size

    def start(self) -> None:
        before = self._master.donors()
        options = [
            "--host=127.0.0.1",
            f"--port={free_port()}",
            f"--global_segment_size={self._size}MB",
            f"--master_server_address={self._master.address}",
            "--metadata_server=P2PHANDSHAKE",
            "--start_offload_rpc_server=false",
        ]
        self._run("mooncake_client", options)
        due = time.monotonic() + START_SECONDS
        while self._master.donors() <= before:
            self._started()
            assert time.monotonic() < due, "the donor does not start"
