"""A rank opens what its configuration names, in that order, and leaves nothing open at an error."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

import stores
from lamina_kv.config import load_config
from lamina_kv.data.assembly import assemble
from lamina_kv.data.executor import Executor
from lamina_kv.data.movers import make_mover
from lamina_kv.data.movers.cpu import CpuMover
from lamina_kv.data.replicas import Replicas
from lamina_kv.data.step_loads import LayersDidNotWait
from lamina_kv.geometry import CacheGeometry, Row
from lamina_kv.plan import (
    Ask,
    ChunkKey,
    LoadMode,
    LoadOrder,
    Move,
    Outcome,
    PageMap,
    StepPlan,
    TierOrders,
    TransferId,
    TransferReceipt,
)
from lamina_kv.tiers import KINDS
from lamina_kv.tiers.contract import StoreError, Tenant
from lamina_kv.tiers.objects import verify
from stores import KIND, MemoryConfig, MemoryStore

GEOMETRY = CacheGeometry((Row(("a",), 0, 0, 64, 64),), 4, 16, 32, (256,))
TENANT = Tenant("ab" * 16, {}, 5, None, GEOMETRY.object_bytes, 1)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tenant, MemoryStore]]:
    """The stores that are opened, and for whom. One of the name ``broken`` cannot be."""
    opened: list[tuple[str, Tenant, MemoryStore]] = []
    open_store = stores.open_store

    def noted(config: MemoryConfig, tenant: Tenant) -> MemoryStore:
        if config.name == "broken":
            raise StoreError("tiers.broken: a fault")
        opened.append((config.name, tenant, open_store(config, tenant)))
        return opened[-1][2]

    monkeypatch.setitem(KINDS, "memory", KIND)
    monkeypatch.setattr(stores, "open_store", noted)
    return opened


def open_rank(settings: dict[str, Any], tenant: Tenant | None = TENANT) -> Executor:
    mover = make_mover(GEOMETRY, [torch.zeros(256, dtype=torch.uint8)])
    config = load_config({"host": {"capacity": 1 << 20}, **settings}, {})
    replicas = Replicas(0, 1, lambda word: [word])
    return assemble(config, GEOMETRY, mover, rank=0, replicas=replicas, slabs=1, tenant=tenant)


def tiers(*names: str) -> dict[str, Any]:
    return {"tiers": [{"kind": "memory", "name": name, "slots": 3} for name in names]}


Opened = list[tuple[str, Tenant, MemoryStore]]


def test_tiers_are_opened_for_the_tenant_in_the_order_of_the_configuration(opened: Opened) -> None:
    executor = open_rank(tiers("first", "second"))
    assert [(name, tenant) for name, tenant, _ in opened] == [("first", TENANT), ("second", TENANT)]
    assert [store.closed for _, _, store in opened] == [False, False]
    report = executor.report()
    assert [(tier.name, tier.slots) for tier in report.tiers] == [("first", 3), ("second", 3)]
    assert report.near_slots == (1 << 20) // GEOMETRY.object_bytes
    executor.close()
    assert [store.closed for _, _, store in opened] == [True, True]


@pytest.mark.parametrize("slots", [3, 0])
def test_what_any_store_holds_is_sealed_as_the_part_that_ranks_share(
    opened: Opened, slots: int
) -> None:
    """One near slot is written to all tiers at the same time: two numbers would spoil each other's
    headers."""
    executor = open_rank({"tiers": [{"kind": "memory", "name": f"of-{slots}", "slots": slots}]})
    carry_out(executor, outward=(Move(TransferId(1), ChunkKey(bytes(20)), near=0, far=0),))
    executor.close()
    ((_, _, store),) = opened
    ((key, content),) = store.shelf.held.values()
    chunk = np.frombuffer(content, np.uint8)
    shards = [n for n in range(10) if verify(chunk, key, n, GEOMETRY.chunk_bytes)]
    assert shards == [TENANT.shard]


def carry_out(executor: Executor, **orders: Any) -> list[TransferReceipt]:
    """What an executor with one far tier says of its orders, by transfer."""
    (tier,) = executor.report().tiers
    executor.begin_step(StepPlan(1, tiers=(TierOrders(tier.name, **orders),)))
    executor.end_step()
    said: list[TransferReceipt] = []
    while len(said) < sum(map(len, orders.values())):
        said += executor.collect().receipt.transfers
        time.sleep(0.001)
    return sorted(said, key=lambda receipt: receipt.transfer)


def test_engines_open_a_store_by_key_at_once_and_find_what_the_others_have_written(
    opened: Opened,
) -> None:
    replicas = [open_rank({"tiers": [{"kind": "memory", "name": "shared"}]}) for _ in range(3)]
    key = ChunkKey(bytes(range(20)))
    (written,) = carry_out(replicas[0], outward=(Move(TransferId(1), key, near=0, far=0),))
    assert written.outcome is Outcome.DONE
    for replica in replicas[1:]:
        asked, read = carry_out(
            replica,
            asks=(Ask(TransferId(2), (key,)),),
            inward=(Move(TransferId(3), key, near=1, far=0),),
        )
        assert asked.present == b"\1"
        assert read.outcome is Outcome.DONE
    for replica in replicas:
        replica.close()


def test_without_far_tiers_there_is_no_tenant() -> None:
    executor = open_rank({}, None)
    assert executor.report().tiers == ()
    executor.close()


def test_what_was_opened_before_an_error_is_closed(opened: Opened) -> None:
    before = set(threading.enumerate())
    with pytest.raises(StoreError, match=r"tiers\.broken"):
        open_rank(tiers("first", "broken"))
    assert [store.closed for _, _, store in opened] == [True]
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("mode", ["auto", "layerwise"])
@pytest.mark.parametrize("shares_cores", [True, False])
def test_only_copies_that_would_take_the_models_cores_all_come_before_it(
    monkeypatch: pytest.MonkeyPatch, mode: str, shares_cores: bool
) -> None:
    """Unless the operator wants them row by row all the same."""
    monkeypatch.setattr(CpuMover, "shares_cores", shares_cores)
    executor = open_rank({"load": {"mode": mode}}, None)
    pages = PageMap(0, np.zeros(1, np.int32), np.ones(1, np.int32))
    order = LoadOrder(TransferId(1), "r", LoadMode.LAYERWISE, (pages,), 30.0)
    executor.begin_step(StepPlan(1, loads=(order,)))
    executor.start_loads()
    may_end = shares_cores and mode == "auto"
    with nullcontext() if may_end else pytest.raises(LayersDidNotWait):
        executor.end_step()  # no layer has waited
    executor.close()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"save": {"max_inflight": 10}}, r"save\.max_inflight: 10 B is less than one chunk"),
        (
            {"tiers": [{"kind": "disk", "path": "/s", "capacity": 4096, "max_inflight": 10}]},
            r"tiers\.disk\.max_inflight: 10 B is less than one chunk",
        ),
    ],
)
def test_a_bound_smaller_than_a_chunk_is_an_error(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        open_rank(settings)
