"""ASGI applications that run while a ``with`` block does, each in a thread with a loop of its own,
and waiting for what other threads do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from lamina_kv.bench.ports import free_port

PATIENCE = 60.0
"""Seconds after which what has to happen does not. Two cores may have much else to do."""


def until(condition: Callable[[], bool]) -> None:
    """Wait for what has to happen.

    Raises:
        TimeoutError: if it does not.
    """
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it has not happened")
        time.sleep(0.01)


class Running:
    """One application on one port.

    Args:
        app: to be served.
        drain: seconds that requests may go on once it is to end.
        lifespan: whether the application wants to know when it begins and ends.
        port: where; by default any that is free.
        tls: uvicorn's ``ssl_…``; its certificate is one of ``localhost``.
    """

    def __init__(
        self,
        app: Any,
        drain: float = 0.3,
        *,
        lifespan: bool = True,
        port: int | None = None,
        **tls: Any,
    ) -> None:
        self.port = port or free_port()
        self.url = f"https://localhost:{self.port}" if tls else f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            app,
            port=self.port,
            http="h11",  # as the proxy's own command has it
            log_config=None,
            access_log=False,
            lifespan="on" if lifespan else "off",
            timeout_graceful_shutdown=drain,
            **tls,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until(lambda: self._server.started or not self._thread.is_alive())

    def begin_to_stop(self) -> None:
        """As SIGTERM does."""
        self._server.should_exit = True

    def stop(self, *, hard: bool = False) -> None:
        """End it; connections that are open are closed at once if ``hard``."""
        self._server.force_exit = hard
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server hangs"
