"""A stand-in for the API server of Kubernetes, with EndpointSlices of one Service."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from lamina_kv.push.proxy.discovery.kubernetes import Api
from push_proxy.running import Running, until

Slice = dict[str, Any]


def endpoint_slice(name: str, *addresses: str, **conditions: bool | None) -> Slice:
    """One slice, of pods that are all in the same condition."""
    return {
        "metadata": {"name": name, "resourceVersion": "7"},
        "addressType": "IPv4",
        "ports": [{"name": "push", "port": 9300}, {"name": "http", "port": 8000}],
        "endpoints": [
            {"addresses": [address], "conditions": conditions, "nodeName": "n"}
            for address in addresses
        ],
    }


class KubernetesApi:
    """See the module. Serves while the ``with`` block runs.

    Args:
        account: folder for a service account.

    Attributes:
        slices: what there is, by name.
        asked: paths and queries so far.
        tokens: what was shown, in order.
        status: of its answers.
    """

    def __init__(self, account: Path) -> None:
        self.slices: dict[str, Slice] = {}
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        self.tokens: list[str] = []
        self.status = 200
        self._watchers: list[tuple[asyncio.AbstractEventLoop, asyncio.Queue[bytes | None]]] = []
        self._lock = threading.Lock()
        account.mkdir(exist_ok=True)
        (account / "token").write_text("pod-token\n")
        (account / "namespace").write_text("serving")
        self._running = Running(self, lifespan=False)
        self.api = Api(self._running.url, account, rest=0.01)

    def __enter__(self) -> KubernetesApi:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.stop(hard=True)

    def set(self, given: Slice, event: str = "MODIFIED") -> None:
        """A slice is there, or has changed."""
        name = given["metadata"]["name"]
        self.slices[name] = given
        self.send({"type": event, "object": given})

    def delete(self, name: str) -> None:
        """A slice is gone."""
        self.send({"type": "DELETED", "object": self.slices.pop(name)})

    def send(self, event: object) -> None:
        """Tell those who watch."""
        self._tell(json.dumps(event).encode() + b"\n")

    def end_watches(self) -> None:
        """As after ``timeoutSeconds``."""
        self._tell(None)

    def watched(self, times: int = 1) -> None:
        """Wait until there have been so many watches."""
        until(lambda: sum("watch" in query for _, query in self.asked) >= times)

    def _tell(self, line: bytes | None) -> None:
        until(lambda: bool(self._watchers))
        with self._lock:
            for loop, queue in self._watchers:
                loop.call_soon_threadsafe(queue.put_nowait, line)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        query = parse_qs(scope["query_string"].decode())
        headers = dict(scope["headers"])
        self.tokens.append(headers[b"authorization"].decode())
        self.asked.append((scope["path"], query))
        content = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": self.status, "headers": content})
        if self.status != 200 or "watch" not in query:
            found = {"metadata": {"resourceVersion": "7"}, "items": [*self.slices.values()]}
            await send({"type": "http.response.body", "body": json.dumps(found).encode()})
            return
        watcher = (asyncio.get_running_loop(), asyncio.Queue[bytes | None]())
        with self._lock:
            self._watchers.append(watcher)
        try:
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            while (line := await watcher[1].get()) is not None:
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            with self._lock:
                self._watchers.remove(watcher)
