"""Two network namespaces of this machine with a wire of a given rate between them."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMG])bit")
_SCALE = {"K": 1e3, "M": 1e6, "G": 1e9}
_BURST = 256 << 10
"""Bytes that may leave at once. With 64 KiB, the largest segment, the wire is slower than said."""
_QUEUE_SECONDS = 0.05

_NEW_NETWORK, _NEW_MOUNTS = 0x40000000, 0x00020000
_RECURSIVE_SLAVE = 0x4000 | 0x80000

DEVICE = "lamina0"
"""The end of the wire in either namespace."""


class NetworkError(Exception):
    """The namespaces cannot be made or joined; says why and what to do."""


def bits_per_second(rate: str) -> float:
    """The rate that ``tc`` calls ``rate``: a number and ``Kbit``, ``Mbit`` or ``Gbit``.

    Raises:
        ValueError: if it is none.
    """
    found = _RATE.fullmatch(rate)
    if found is None or not float(found[1]) > 0:
        raise ValueError(f'--link must be a rate such as "1Gbit" or "400Mbit", got {rate!r}')
    return float(found[1]) * _SCALE[found[2]]


class PacedNetwork:
    """Two namespaces, as long as it is entered. What leaves either one does so at the rate.

    Args:
        rate: bits per second.

    Raises:
        NetworkError: on entering, if this process may not make them or cannot.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self.names = tuple(f"lamina-bench-{os.getpid()}-{end}" for end in "pd")
        self.addresses = ("192.0.2.1", "192.0.2.2")

    def __enter__(self) -> PacedNetwork:
        if os.geteuid() != 0:
            raise NetworkError("--link makes network namespaces, which takes root")
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise NetworkError(f"--link needs the command {tool!r}, of the package iproute2")
        try:
            self._make()
        except NetworkError:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._remove()

    def _make(self) -> None:
        first, second = self.names
        for name in self.names:
            _run("ip", "netns", "add", name)
        peer = ("peer", "name", DEVICE, "netns", second)
        _run("ip", "-n", first, "link", "add", DEVICE, "type", "veth", *peer)
        shape = ("tbf", "rate", f"{self._rate:.0f}", "burst", f"{_BURST}")
        for name, address in zip(self.names, self.addresses, strict=True):
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "address", "add", f"{address}/30", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", DEVICE, "up")
            latency = ("latency", f"{_QUEUE_SECONDS * 1e3:.0f}ms")
            _run("tc", "-n", name, "qdisc", "add", "dev", DEVICE, "root", *shape, *latency)

    def _remove(self) -> None:
        for name in self.names:
            subprocess.run(("ip", "netns", "delete", name), check=False, capture_output=True)


def join_network(name: str) -> None:
    """Put this process, which must have one thread, into a namespace, and give it that one's
    ``/sys``, where libraries look for network devices.

    Raises:
        NetworkError: if that fails.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", name).open() as namespace:
        _require(libc.setns(namespace.fileno(), _NEW_NETWORK))
    _require(libc.unshare(_NEW_MOUNTS))
    _require(libc.mount(b"none", b"/", None, _RECURSIVE_SLAVE, None))
    _require(libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None))


def _require(outcome: int) -> None:
    if outcome:
        raise NetworkError(f"cannot join a namespace: {os.strerror(ctypes.get_errno())}")


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
