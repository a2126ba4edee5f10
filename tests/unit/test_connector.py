"""One connector keeps one cache of an engine, for as long as it serves it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from lamina_kv.engines.vllm.connector import LaminaConnector
from lamina_kv.engines.vllm.worker_side import WorkerSide


def connector_of(cache: object, role: KVConnectorRole = KVConnectorRole.WORKER) -> Any:
    connector: Any = object.__new__(LaminaConnector)
    connector._role, connector._kv_cache_config = role, cache
    connector._scheduler = connector._worker = None
    connector._be_the_only_one(role, cache)
    return connector


def test_a_connector_that_was_shut_down_is_no_second_one() -> None:
    cache = object()
    kept = [connector_of(cache), connector_of(cache, KVConnectorRole.SCHEDULER)]
    with pytest.raises(ValueError, match="named twice"):
        connector_of(cache)
    for connector in kept:
        connector.shutdown()
    connector_of(cache)


def test_a_worker_that_shuts_down_closes_its_tiers() -> None:
    """They write what is still to be written, and give back their locks."""
    side: Any = object.__new__(WorkerSide)
    closed: list[str] = []
    side._executor = SimpleNamespace(close=lambda: closed.append("executor"))
    side.close()
    assert closed == ["executor"]
