"""Shared directories of small chunks, for tests."""

from __future__ import annotations

from pathlib import Path

from disks import key
from lamina_kv.plan import ChunkKey
from lamina_kv.tiers import KINDS
from lamina_kv.tiers.contract import Store, Tenant
from lamina_kv.tiers.directory.config import DirectoryConfig
from lamina_kv.tiers.names import object_path
from store_contract import Change, Engine

OBJECT = 12288
"""Bytes of a chunk's file."""


class Directory:
    """A shared directory; see :class:`~store_contract.Backing`."""

    def __init__(self, path: Path, **configured: object) -> None:
        self.path = path
        self._configured = configured

    def open(self, tenant: Tenant) -> Store:
        config = DirectoryConfig(path=self.path, **self._configured)  # type: ignore[arg-type]
        return KINDS["directory"].open(config, tenant)

    def change(self, tenant: Tenant, key: ChunkKey, change: Change) -> None:
        file = self.path / object_path(tenant.namespace, key, tenant.shard)
        file.write_bytes(change(file.read_bytes()))


def tenant(shard: int = 0, namespace: str = "ab" * 16, **description: str) -> Tenant:
    return Tenant(namespace, description, shard, None, OBJECT, shard)


def open_engine(path: Path, owner: Tenant | None = None, **configured: object) -> Engine:
    """An engine's store in a directory."""
    owner = owner or tenant(model="tiny", chunk_tokens="64")
    return Engine(Directory(path, **configured).open(owner), owner)


def put(path: Path, *numbers: int, owner: Tenant | None = None) -> None:
    """Write chunks."""
    engine = open_engine(path, owner)
    engine.put(*numbers)
    engine.store.close()


def file_of(path: Path, number: int, owner: Tenant | None = None) -> Path:
    """The file of a chunk."""
    owner = owner or tenant()
    return path / object_path(owner.namespace, key(number), owner.shard)
