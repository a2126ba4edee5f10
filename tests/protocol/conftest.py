"""What every history needs: no clock but its own, and no log of what goes wrong on purpose."""

from __future__ import annotations

import logging
from math import inf
from types import SimpleNamespace

import pytest

from lamina_kv.control.push import inbound as push_inbound
from lamina_kv.control.push import queue as push_queue
from lamina_kv.data import push_receives


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(push_receives, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(push_queue, "DESTINATION_WAIT", 0.0)
    # Processes here may be stopped for longer than anybody is suspected to be.
    monkeypatch.setattr(push_inbound, "LONGEST_SUSPICION", inf)
    caplog.set_level(logging.CRITICAL, "lamina_kv")
