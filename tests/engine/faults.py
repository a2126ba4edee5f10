"""What can be wrong with the machine that an engine runs on. Each is called in the child, with a
number, before the engine starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable


def slow_loads(seconds: float) -> None:
    """Every row of every load takes that much longer, before it touches the engine's memory."""
    from lamina_kv.data.movers.cpu import CpuMover

    delay(CpuMover, "await_near", seconds)


def slow_saves(seconds: float) -> None:
    """Every row of every save takes that much longer."""
    from lamina_kv.data.movers.cpu import CpuMover

    delay(CpuMover, "save", seconds)


def slow_reads(seconds: float) -> None:
    """Every batch that is read from disk takes that much longer."""
    from lamina_kv.tiers.disk.store import DiskStore

    delay(DiskStore, "read", seconds)


def delay(kind: type, method: str, seconds: float) -> None:
    """Every call of a method begins that much later."""
    call: Callable[..., object] = getattr(kind, method)

    def slowly(self: object, *arguments: object, **others: object) -> object:
        time.sleep(seconds)
        return call(self, *arguments, **others)

    setattr(kind, method, slowly)


def least_quarantine(seconds: float) -> None:
    """Of ``push.quarantine`` so little is allowed, because nobody waits for longer in a test."""
    from lamina_kv.config import tree

    tree.least_quarantine = lambda deadline, silence: seconds


def network(number: float) -> None:
    """It is in another network namespace, that of :func:`namespace`."""
    from lamina_kv.bench.network import join_network

    join_network(namespace(int(number)))


def namespace(number: int) -> str:
    """The name of a network namespace for tests."""
    return f"lamina-test-{number}"
