"""A port that was given to one is given to nobody else, and is nobody's else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lamina_kv.bench import ports
from lamina_kv.bench.ports import free_port

PROCESS = """
import sys
from lamina_kv.bench import ports
ports._USUAL = range(*map(int, sys.argv[1:]))
ports._LEAST = 1
print(*(ports.free_port() for _ in range(4)), flush=True)
sys.stdin.read()
"""


def narrow(monkeypatch: pytest.MonkeyPatch, numbers: Sequence[int]) -> None:
    """There are no other ports."""
    monkeypatch.setattr(ports, "_USUAL", numbers)
    monkeypatch.setattr(ports, "_LEAST", 1)


def test_connections_are_given_others() -> None:
    low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert not set(range(int(low), int(high) + 1)) & {free_port() for _ in range(20)}


def test_a_machine_that_gives_all_to_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_ephemeral", lambda: range(1 << 16))
    assert free_port() in ports._USUAL


def test_who_was_given_it_can_listen_there() -> None:
    with socket.create_server(("127.0.0.1", free_port())):
        pass


def test_it_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, [free_port() for _ in range(3)])
    with pytest.raises(OSError, match="in use"):
        free_port()


def test_where_somebody_listens_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        narrow(monkeypatch, [server.getsockname()[1]])
        monkeypatch.setattr(ports, "_ephemeral", lambda: range(0))
        with pytest.raises(OSError, match="in use"):
            free_port()


def test_other_processes_are_given_others() -> None:
    first = free_port() & ~31
    command = [sys.executable, "-c", PROCESS, str(first), str(first + 32)]
    source = str(Path(ports.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source}
    programs = [
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    given: list[str] = []
    for program in programs:
        assert program.stdout
        given += program.stdout.readline().split()
    for program in programs:
        program.communicate()
    assert len(given) == len(set(given)) == 12
