"""A proxy in front of stand-ins for engines."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from lamina_kv.push.proxy.app import create_app
from lamina_kv.push.proxy.routing.words import Disaggregate, PolicyName, RoutingPolicy
from lamina_kv.push.proxy.settings import PrefillAddress, Settings
from push_proxy.engines import FakeEngine
from push_proxy.running import PATIENCE, Running, until

QUICK: dict[str, Any] = {"health_interval": 0.2, "backoff": 0.01, "connect_timeout": 2.0}
PLAIN: dict[str, Any] = {"policy": PolicyName.LEAST_LOADED, "disaggregate": Disaggregate.ALWAYS}
"""Routing that depends on load alone, so that tests of everything else know where requests go."""
COMPLETION = {"model": "model", "prompt": "Once upon", "max_tokens": 7}
CHAT = {"model": "model", "messages": [{"role": "user", "content": "Hello"}]}


def push_address(index: int) -> str:
    """Where decode engines reach the ``index``-th prefill engine."""
    return f"10.0.0.{index + 1}:7000"


class Proxy:
    """One that runs, and a client of it."""

    def __init__(self, running: Running, **client: Any) -> None:
        self.running = running
        self.url = running.url
        self.client = httpx.Client(
            base_url=running.url, timeout=PATIENCE, trust_env=False, **client
        )

    def post(self, path: str, body: object, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def metric(self, name: str, **labels: str) -> float:
        """What it publishes, all series together that have these labels."""
        text = self.client.get("/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"lamina_proxy_{name}" and labels.items() <= sample.labels.items()
        )

    def wait_usable(self, count: int) -> None:
        """Until so many engines are."""
        until(lambda: self.metric("engine_usable") == count)


@contextmanager
def proxied(
    prefill: Sequence[FakeEngine | str],
    decode: Sequence[FakeEngine | str],
    *,
    push: Sequence[str] | None = None,
    chooses: RoutingPolicy | None = None,
    usable: int | None = None,
    patient: bool = True,
    **settings: Any,
) -> Iterator[Proxy]:
    """A proxy while the ``with`` block runs.

    Args:
        prefill: engines, or URLs of such as there are none.
        decode: the same.
        push: addresses of the prefill engines; by default nobody's.
        chooses: a policy of the test's own.
        usable: how many engines to wait for; by default those that are more than a URL.
        patient: whether to wait for them, on a machine that may be too busy for the proxy to have
            them all when it begins to listen.
        settings: that differ from the defaults.
    """
    urls = [_url(engine) for engine in prefill]
    addresses = push or [push_address(index) for index in range(len(urls))]
    app = create_app(
        Settings(
            prefill=tuple(map(PrefillAddress, urls, addresses)),
            decode=tuple(_url(engine) for engine in decode),
            **{**QUICK, **PLAIN, **settings},
        ),
        chooses,
    )
    there = [engine for engine in (*prefill, *decode) if isinstance(engine, FakeEngine)]
    with _running(app) as proxy:
        if patient:
            proxy.wait_usable(len(there) if usable is None else usable)
        yield proxy


def write_engines(
    file: Path,
    prefill: Sequence[FakeEngine],
    decode: Sequence[FakeEngine],
    drained: Sequence[FakeEngine] = (),
) -> Path:
    """The file of ``--engines``, replaced as a whole. JSON is YAML.

    Args:
        file: is written, and returned.
        prefill: engines that it names.
        decode: the same.
        drained: those of them that get no new requests.
    """
    listing = {
        "prefill": [
            {"url": engine.url, "push": f"10.0.0.1:{engine.port}", "drain": engine in drained}
            for engine in prefill
        ],
        "decode": [{"url": engine.url, "drain": engine in drained} for engine in decode],
    }
    new = file.with_suffix(".new")
    new.write_text(json.dumps(listing))
    new.replace(file)
    return file


@contextmanager
def listed(file: Path, usable: int, **settings: Any) -> Iterator[Proxy]:
    """A proxy whose engines stand in a file.

    Args:
        file: see ``--engines``.
        usable: how many engines to wait for.
        settings: that differ from the defaults.
    """
    quick = {**QUICK, **PLAIN, "engines_interval": 0.05}
    app = create_app(Settings(engines=file, **{**quick, **settings}))
    with _running(app) as proxy:
        proxy.wait_usable(usable)
        yield proxy


@contextmanager
def _running(app: FastAPI) -> Iterator[Proxy]:
    running = Running(app)
    proxy = Proxy(running)
    try:
        yield proxy
    finally:
        proxy.client.close()
        running.stop()


def ask(proxy: Proxy, more: dict[str, object] | None = None) -> socket.socket:
    """Send a request for a completion, and return without an answer.

    Args:
        proxy: whom.
        more: what else the request says.
    """
    body = json.dumps(COMPLETION | (more or {}))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", proxy.running.port))
    connection.settimeout(PATIENCE)
    connection.sendall((head + body).encode())
    return connection


def _url(engine: FakeEngine | str) -> str:
    return engine if isinstance(engine, str) else engine.url
