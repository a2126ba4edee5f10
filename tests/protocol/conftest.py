"""What every history needs: no clock but its own, and no log of what goes wrong on purpose."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from lamina.control import push_source
from lamina.data import push_receives


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(push_receives, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(push_source, "DESTINATION_WAIT", 0.0)
    caplog.set_level(logging.CRITICAL, "lamina")
