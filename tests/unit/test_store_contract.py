"""The store in memory keeps what every store by key keeps, so tests with it prove something."""

from __future__ import annotations

import pytest

from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.contract import Store, Tenant
from store_contract import Backing, Change, StoreContract
from stores import MemoryStore, Shelf


class Shelves:
    """Stores in memory; see :class:`~store_contract.Backing`."""

    def __init__(self) -> None:
        self._shelves: dict[tuple[str, int], Shelf] = {}

    def open(self, tenant: Tenant) -> Store:
        return MemoryStore(self._shelf(tenant))

    def change(self, tenant: Tenant, key: ChunkKey, change: Change) -> None:
        held = self._shelf(tenant).held
        held[key] = (key, change(held[key][1]))

    def _shelf(self, tenant: Tenant) -> Shelf:
        return self._shelves.setdefault((tenant.namespace, tenant.shard), Shelf())


class TestMemory(StoreContract):
    @pytest.fixture
    def backing(self) -> Backing:
        return Shelves()
