"""A server that hung or died is used again soon after it is back, whatever the breaker's pause is.
The engine is simulated, its planner, data room and store are real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from servers.valkey import ValkeyServer
from soak.busy import TIER, Busy

PAUSE = 3600.0
"""Seconds of the breaker's pause: no test waits for it."""

MOST = 3000
"""Requests until something that must happen has happened."""


class Served(Busy):
    """A busy engine that says how its store is used."""

    @property
    def is_out_of_use(self) -> bool:
        """Whether its store is not read."""
        return not self._planner._books.breakers.reads(TIER).closed

    @property
    def fetched(self) -> float:
        """Bytes that have come from its store."""
        return self._watch._meter._counters.get(("fetch_bytes", (TIER,)), 0)

    def serve_until(self, *, out_of_use: bool) -> None:
        """Serve requests until the store is used, or is not."""
        for _ in range(MOST):
            if self.is_out_of_use == out_of_use:
                return
            self.serve(1)
        raise AssertionError(f"{MOST} requests were not enough")


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    with ValkeyServer(tcp=True) as server:
        yield server


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_it_is_used_again_long_before_the_pause_is_over(
    server: ValkeyServer, how: str, tmp_path: Path
) -> None:
    entry = {"kind": "valkey", "url": f"valkey://127.0.0.1:{server.port}"}
    with Served(1, entry, tmp_path, pause=PAUSE) as engine:
        engine.serve(60)
        assert engine.fetched > 0
        server.stop() if how == "stopped" else server.kill()
        engine.serve_until(out_of_use=True)
        engine.serve(20)
        assert engine.is_out_of_use, "as long as it is away"
        server.resume() if how == "stopped" else server.start()
        engine.serve_until(out_of_use=False)
        before = engine.fetched
        for _ in range(MOST):
            if engine.fetched > before:
                break
            engine.serve(1)
        assert engine.fetched > before
        engine.drain()


def test_an_engine_comes_to_its_end_while_its_server_is_away(
    server: ValkeyServer, tmp_path: Path
) -> None:
    """Probes keep nobody stepping, and what waits to be written is given up."""
    entry = {"kind": "valkey", "url": f"valkey://127.0.0.1:{server.port}"}
    with Served(1, entry, tmp_path, pause=PAUSE) as engine:
        engine.serve(20)
        server.kill()
        engine.serve_until(out_of_use=True)
        engine.drain()
        assert engine.is_out_of_use
        assert not engine._planner.has_work
