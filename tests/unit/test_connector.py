"""One connector keeps one cache of an engine, for as long as it serves it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from lamina_kv.engines.vllm import worker_side
from lamina_kv.engines.vllm.connector import LaminaConnector
from lamina_kv.engines.vllm.worker_side import WorkerSide
from lamina_kv.plan import NearSlots, Receipt


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


def test_a_worker_that_shuts_down_closes_its_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They write what is still to be written, and give back their locks. Only in a process of
    vLLM's own, which ends with it, is pinned memory left to the end."""
    side: Any = object.__new__(WorkerSide)
    closed: list[bool] = []
    side._executor = SimpleNamespace(close=lambda *, process_ends: closed.append(process_ends))
    side.close()
    monkeypatch.setattr(worker_side, "parent_process", lambda: "an API server")
    side.close()
    assert closed == [False, True]


@pytest.mark.parametrize("near", [None, NearSlots(3, 8)])
def test_a_rank_tells_how_many_near_slots_it_may_use(near: NearSlots | None) -> None:
    side: Any = object.__new__(WorkerSide)
    side._asked, side._report, side._receipt = False, None, Receipt(0, near=near)
    words = side.words()
    assert (words is None) is (near is None)
    if words is not None:
        assert [receipt.near for receipt in words.receipts] == [near]
