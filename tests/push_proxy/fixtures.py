"""Engines that only pretend: three for a module, and as new for each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from push_proxy.engines import FakeEngine


@pytest.fixture(scope="module")
def fake_engines() -> Iterator[tuple[FakeEngine, FakeEngine, FakeEngine]]:
    # Every session has this plugin, and few need a server of HTTP.
    from push_proxy.engines import FakeEngine

    with FakeEngine() as prefill, FakeEngine() as decode, FakeEngine() as other:
        yield prefill, decode, other


@pytest.fixture
def prefill(fake_engines: tuple[FakeEngine, ...]) -> FakeEngine:
    return fake_engines[0].as_new()


@pytest.fixture
def decode(fake_engines: tuple[FakeEngine, ...]) -> FakeEngine:
    return fake_engines[1].as_new()


@pytest.fixture
def other(fake_engines: tuple[FakeEngine, ...]) -> FakeEngine:
    return fake_engines[2].as_new()
