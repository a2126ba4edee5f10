"""A real engine behind a small HTTP server, in a child that was forked from a process with vLLM in
it: back two seconds after it was killed, where vLLM's own server takes twenty.

It knows what the proxy asks of an engine: ``/health`` and ``/v1/completions`` of one prompt in
tokens, aborted when the client leaves. ``/census`` says what the engine holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx

from engine.driver import Answer, Ask, EngineSpec, enter_child
from push_proxy.running import until

IDLE_SECONDS = 0.005
"""Between two looks for something to do."""


def run(spec: EngineSpec, log: Path, port: int) -> None:
    """The child's first function: serve until it is killed."""
    enter_child(log)
    import uvicorn

    from engine import child

    os.environ.update({**child.ENVIRONMENT, **spec.environment})
    serving = Serving(child.Service(spec))
    server = uvicorn.Server(
        uvicorn.Config(serving, port=port, log_config=None, access_log=False, lifespan="off")
    )
    threading.Thread(target=server.run, daemon=True).start()
    serving.step_forever()


class Serving:
    """An ASGI application in one thread, an engine in another.

    Args:
        service: the engine, a :class:`engine.child.Service`.
    """

    def __init__(self, service: Any) -> None:
        self._service = service
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: dict[str, Callable[[Answer], None]] = {}

    # -- the engine's thread -----------------------------------------------------------------

    def step_forever(self) -> None:
        """Do what is asked, and step while there is something to do."""
        scheduler = self._service._core.scheduler
        while True:
            busy = bool(self._waiting) or scheduler.has_requests()
            with contextlib.suppress(queue.Empty):
                self._commands.get(timeout=0 if busy else IDLE_SECONDS)()
                while True:
                    self._commands.get_nowait()()
            if scheduler.has_requests():
                for answer in self._service.step():
                    if (tell := self._waiting.pop(answer.name, None)) is not None:
                        tell(answer)

    def _census(self) -> dict[str, float]:
        service = self._service
        scheduler = service._core.scheduler
        planner = scheduler.connector._scheduler.planner
        pool = scheduler.kv_cache_manager.block_pool
        totals = {}
        for sample in service.metrics():
            if sample.name in ("lamina_pushes_total", "lamina_failures_total"):
                label = sample.labels.get("outcome") or sample.labels["kind"]
                totals[f"{sample.name} {label}"] = sample.value
        held = {
            "requests": len(scheduler.requests),
            "transfers": len(planner._transfers),
            "leases": planner._leases.leased_blocks,
            "blocks": sum(block.ref_cnt for block in pool.blocks if not block.is_null),
        }
        return totals | {f"held {name}": count for name, count in held.items()}

    # -- the server's thread -----------------------------------------------------------------

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/health":
            await _answer(send, {})
        elif scope["path"] == "/census":
            await _answer(send, await self._in_engine(self._census))
        else:
            await self._complete(receive, send)

    async def _complete(self, receive: Any, send: Any) -> None:
        raw, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            raw, more = raw + message["body"], message["more_body"]
        body = json.loads(raw)
        ask = Ask(
            tuple(body["prompt"]),
            body["max_tokens"],
            push=body.get("kv_transfer_params", {}).get("lamina_push"),
        )
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Answer] = loop.create_future()
        names: list[str] = []

        def tell(answer: Answer) -> None:
            loop.call_soon_threadsafe(
                lambda: None if answered.done() else answered.set_result(answer)
            )

        def submit() -> None:
            names.extend(self._service.submit([ask]))
            self._waiting[names[0]] = tell

        def abort() -> None:
            if self._waiting.pop(names[0], None) is not None:
                self._service.abort(names)

        await self._in_engine(submit)
        leaving = asyncio.ensure_future(receive())
        await asyncio.wait({answered, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not answered.done():
            self._commands.put(abort)
            return
        answer = answered.result()
        await _answer(send, {"choices": [{"index": 0, "token_ids": answer.tokens, "text": ""}]})

    async def _in_engine(self, function: Callable[[], Any]) -> Any:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        self._commands.put(lambda: loop.call_soon_threadsafe(done.set_result, function()) and None)
        return await done


async def _answer(send: Any, document: object) -> None:
    body = json.dumps(document).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@dataclass
class Served:
    """One such child, on one port, started again as often as it is killed.

    Attributes:
        spec: its engine.
        port: of its server.
        folder: where logs go.
        starts: how often it was started.
        stopped: whether it was stopped by a signal.
    """

    spec: EngineSpec
    port: int
    folder: Path
    context: Any
    starts: int = 0
    stopped: bool = False
    process: BaseProcess | None = None

    @property
    def url(self) -> str:
        """Of its server."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it; returns at once."""
        self.starts += 1
        log = self.folder / f"engine-{self.port}-{self.starts}.log"
        self.process = self.context.Process(target=run, args=(self.spec, log, self.port))
        self.process.start()

    def kill(self) -> None:
        """End it at once."""
        assert self.process is not None
        self.process.kill()
        self.process.join()
        self.stopped = False

    def stop(self) -> None:
        """Keep it from running, as a debugger would."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        self.stopped = True

    def go_on(self) -> None:
        """After :meth:`stop`."""
        assert self.process is not None
        if self.stopped:
            os.kill(self.process.pid, signal.SIGCONT)
        self.stopped = False

    def is_healthy(self) -> bool:
        """Whether its server answers."""
        try:
            return httpx.get(f"{self.url}/health", trust_env=False, timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def wait(self) -> None:
        """Until it serves."""
        for _ in range(4):
            with contextlib.suppress(TimeoutError):
                until(self.is_healthy)
                return
        raise TimeoutError(f"{self.url} does not start")

    def census(self) -> dict[str, float]:
        """What it holds, and has counted since it was started."""
        return httpx.get(f"{self.url}/census", trust_env=False, timeout=20).json()
