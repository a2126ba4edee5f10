"""The tier in an object store against a real server, which is also stopped and killed."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from obstore.store import S3Store

from disks import key
from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.contract import Fate, Piece, Store, StoreError, Tenant
from lamina_kv.tiers.s3.config import S3Config
from lamina_kv.tiers.s3.store import MOST_AT_ONCE, ObjectStore, open_store
from push_proxy.running import until
from servers.seaweed import KEY_ID, READER_ID, READER_SECRET, Seaweed
from store_contract import TIMEOUT, Arena, Backing, Change, Engine, StoreContract

BUCKET = "lamina-test"


class Bucket:
    """Stores in one bucket, behind a prefix of their own; see :class:`~store_contract.Backing`."""

    def __init__(self, server: Seaweed) -> None:
        self.endpoint = server.endpoint
        self.url = f"s3://{server.bucket(BUCKET)}/{uuid.uuid4().hex}"

    def open(self, tenant: Tenant, *, timeout: float = TIMEOUT, **keys: Any) -> ObjectStore:
        config = {"url": self.url, "options": {"endpoint": self.endpoint}, "timeout": timeout}
        return open_store(S3Config(**config | keys), tenant)

    def change(self, tenant: Tenant, key: ChunkKey, change: Change) -> None:
        client = S3Store.from_url(
            self.url, endpoint=self.endpoint, client_options={"allow_http": True}
        )
        name = f"{tenant.namespace}/{key.hex()[:2]}/{key.hex()}.{tenant.shard}"
        client.put(name, change(client.get(name).bytes().to_bytes()))


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in Seaweed.environment().items():
        monkeypatch.setenv(name, value)


class TestSeaweed(StoreContract):
    @pytest.fixture
    def backing(self, seaweed: Seaweed) -> Backing:
        return Bucket(seaweed)

    def test_all_names_are_asked_for_if_there_are_many(
        self, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch, engine: Any
    ) -> None:
        one = engine()
        one.put(1, 2, 3)
        monkeypatch.setattr("lamina_kv.tiers.s3.store.LISTED_FOR_ONE", 0)
        count = 3 * MOST_AT_ONCE
        assert one.find(range(count)) == [number in (1, 2, 3) for number in range(count)]


def tenant_of(namespace: str = "ab" * 16) -> Tenant:
    return Tenant(namespace, {"model": "tiny"}, 0, None, 12288, 0)


# -- who is let in ---------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there(seaweed: Seaweed) -> None:
    with pytest.raises(StoreError, match=r"^tiers\.s3\.url: .*has no such bucket"):
        Bucket(seaweed).open(tenant_of(), url="s3://never-made/x")


@pytest.mark.parametrize("credentials", [(KEY_ID, "wrong"), ("nobody", "wrong")])
def test_wrong_credentials(
    seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch, credentials: tuple[str, str]
) -> None:
    bucket = Bucket(seaweed)
    for name, value in Seaweed.environment(*credentials).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=r"^tiers\.s3\.url: .*does not let this engine in"):
        bucket.open(tenant_of())


def test_who_may_only_read(
    seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = Bucket(seaweed)
    writer = Engine(bucket.open(tenant_of()), tenant_of())
    writer.put(1)
    for name, value in Seaweed.environment(READER_ID, READER_SECRET).items():
        monkeypatch.setenv(name, value)
    for keep, warnings in (("nothing", 0), ("all", 1)):
        caplog.clear()
        reader = Engine(bucket.open(tenant_of(), keep=keep), tenant_of())
        assert sum("s3:PutObject" in text for text in caplog.messages) == warnings
        assert reader.read([1, 2]) == [Fate.DONE, Fate.GONE]
        assert reader.write([2]) == [Fate.REFUSED]
    for each in (writer, reader):
        each.store.close()


# -- a server that fails ---------------------------------------------------------------------------


@pytest.fixture
def own() -> Iterator[Seaweed]:
    """A server that may be stopped and killed."""
    with Seaweed() as server:
        yield server


@pytest.mark.slow
def test_stopped_killed_and_restarted(own: Seaweed, caplog: pytest.LogCaptureFixture) -> None:
    bucket, tenant = Bucket(own), tenant_of()
    store: Store = bucket.open(tenant, timeout=1.0)
    patient = Engine(bucket.open(tenant), tenant)
    patient.put(1, 2)
    arena = Arena(2, tenant.object_bytes)
    pieces = [Piece(key(n), 0, b) for n, b in zip((1, 2), arena.buffers, strict=True)]

    own.stop()
    assert store.read(pieces, TIMEOUT) == [Fate.LATE] * 2
    assert store.find([key(1)], TIMEOUT) is None
    assert all((buffer == 0xA5).all() for buffer in arena.buffers)
    own.cont()
    assert patient.read([1, 2]) == [Fate.DONE] * 2
    assert all((buffer == 0xA5).all() for buffer in arena.buffers), "nothing came later"

    own.kill()
    assert set(store.read(pieces, TIMEOUT)) <= {Fate.DOWN, Fate.LATE}
    assert store.find([key(1)], TIMEOUT) is None
    assert set(store.write(pieces, TIMEOUT)) <= {Fate.DOWN, Fate.LATE}
    late = bucket.open(tenant, timeout=1.0)
    assert [text for text in caplog.messages if "cannot be reached" in text]

    own.start()
    until(lambda: patient.read([1, 2]) == [Fate.DONE] * 2)
    for each in (store, late, patient.store):
        assert Engine(each, tenant).read([1, 2]) == [Fate.DONE] * 2
        each.close()
