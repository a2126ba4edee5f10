"""Engines that only pretend: three for a module, and as new for each test; and a proxy for two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from push_proxy.engines import FakeEngine
    from push_proxy.proxies import Proxy


@pytest.fixture(scope="module")
def fake_engines() -> Iterator[tuple[FakeEngine, FakeEngine, FakeEngine]]:
    # Every session has this plugin, and few need a server of HTTP.
    from push_proxy.engines import FakeEngine

    with FakeEngine() as prefill, FakeEngine() as decode, FakeEngine() as other:
        yield prefill, decode, other


@pytest.fixture(scope="module")
def shared_proxy(fake_engines: tuple[FakeEngine, ...]) -> Iterator[Proxy]:
    from push_proxy.proxies import proxied

    with proxied(fake_engines[:1], fake_engines[1:2]) as proxy:
        yield proxy


@pytest.fixture
def prefill(fake_engines: tuple[FakeEngine, ...]) -> FakeEngine:
    return fake_engines[0].as_new()


@pytest.fixture
def decode(fake_engines: tuple[FakeEngine, ...]) -> FakeEngine:
    return fake_engines[1].as_new()


@pytest.fixture
def other(fake_engines: tuple[FakeEngine, ...]) -> FakeEngine:
    return fake_engines[2].as_new()
