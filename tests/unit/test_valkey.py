"""Chunks on a real Valkey server: what every store by key keeps, and what the server's faults are
made of."""

from __future__ import annotations

import datetime
import ipaddress
import json
import logging
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from glide_shared.exceptions import TimeoutError

from disks import key
from lamina_kv.config import ConfigError, load_config
from lamina_kv.plan import ChunkKey
from lamina_kv.tiers import KINDS, open_audit
from lamina_kv.tiers.contract import Fate, Piece, Store, StoreError, Tenant
from lamina_kv.tiers.valkey import store
from lamina_kv.tiers.valkey.config import ValkeyConfig
from lamina_kv.tiers.valkey.connection import Client, Connection, Failure
from servers.valkey import TlsServer, ValkeyServer
from store_contract import Change, Engine, StoreContract


def config(server: ValkeyServer, **keys: object) -> ValkeyConfig:
    return ValkeyConfig.model_validate({"url": server.url, **keys})


class Servers:
    """Stores on one server; see :class:`~store_contract.Backing`."""

    def __init__(self, server: ValkeyServer, **keys: object) -> None:
        self._server = server
        self._config = config(server, **keys)

    def open(self, tenant: Tenant) -> Store:
        return KINDS["valkey"].open(self._config, tenant)

    def change(self, tenant: Tenant, key: ChunkKey, change: Change) -> None:
        name = f"lamina:{tenant.namespace}:{key.hex()}.{tenant.shard}"
        self._server("SET", name, change(self._server("GET", name)))


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


class TestValkey(StoreContract):
    @pytest.fixture
    def backing(self, server: ValkeyServer) -> Servers:
        return Servers(server)


@pytest.fixture(scope="module")
def cluster() -> Iterator[ValkeyServer]:
    with ValkeyServer(cluster=True) as server:
        yield server


class TestCluster(StoreContract):
    @pytest.fixture
    def backing(self, cluster: ValkeyServer) -> Servers:
        return Servers(cluster, cluster=True)


SIZE = 1 << 20
TENANT = Tenant("ab" * 16, {"model": "tiny"}, 0, None, SIZE, 0)


def open_engine(server: ValkeyServer, *, size: int = SIZE, **keys: object) -> Engine:
    """The store of an engine; waits in vain for a tenth of the usual time."""
    tenant = replace(TENANT, object_bytes=size)
    return Engine(KINDS["valkey"].open(config(server, **{"timeout": 0.2, **keys}), tenant), tenant)


@pytest.fixture
def opened() -> Iterator[Callable[..., Engine]]:
    """Opens stores, closed at the end of the test."""
    engines: list[Engine] = []

    def open_one(server: ValkeyServer, **keys: Any) -> Engine:
        engines.append(open_engine(server, **keys))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.store.close()


Opened = Callable[..., Engine]


def eventually(call: Callable[[], object], expected: object) -> None:
    """A client may take a moment to come back."""
    due = time.monotonic() + 60
    while (answer := call()) != expected:
        assert time.monotonic() < due, answer
        time.sleep(0.01)


def pieces(*numbers: int) -> list[Piece]:
    """Buffers, full of sevens."""
    return [Piece(key(n), 0, np.full(SIZE, 7, np.uint8)) for n in numbers]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_no_byte_comes_late_from_a_server_that_hung(opened: Opened) -> None:
    with ValkeyServer() as server:
        engine = opened(server)
        engine.put(1, 2, 3)
        assert engine.read([1]) == [Fate.DONE]
        server.stop()
        asked = pieces(1, 2, 3)
        assert engine.store.read(asked, 30.0) == [Fate.LATE] * 3
        assert engine.store.find([key(1)], 30.0) is None
        assert engine.write([4, 5]) == [Fate.LATE] * 2
        server.resume()
        eventually(lambda: engine.read([1, 2, 3]), [Fate.DONE] * 3)
        eventually(lambda: engine.store.find([key(1)], 30.0), [True])
        assert all((piece.buffer == 7).all() for piece in asked)


def test_a_probe_fails_while_the_server_hangs_or_is_away(opened: Opened) -> None:
    with ValkeyServer() as server:
        engine = opened(server)
        probe = partial(engine.store.probe, 30.0)
        assert probe()
        server.stop()
        assert not probe()
        server.resume()
        eventually(probe, True)
        server.kill()
        assert not probe()
        server.start()
        eventually(probe, True)


def test_after_a_probe_nothing_has_to_be_connected(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ValkeyServer() as server:
        engine = opened(server)
        eventually(lambda: engine.store.probe(30.0), True)
        monkeypatch.setattr(Connection, "_make", None)
        assert engine.find([1]) == [False]
        assert engine.read([1]) == [Fate.GONE]


def test_a_call_ends_by_the_shorter_of_its_timeouts(opened: Opened) -> None:
    with ValkeyServer() as server:
        engine = opened(server, timeout=3600)
        engine.put(1)
        server.stop()
        # Would wait for an hour. The connection that is there would, too.
        assert engine.store.read(pieces(2), 0.1) == [Fate.LATE]
        assert engine.store.find([key(1)], 0.1) is None
        server.resume()


def test_a_question_that_connects_first_has_what_is_left_of_its_timeout(
    opened: Opened, server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, exist, pause, left = Connection._make, store._exist, 0.3, []

    def slowly(self: Connection, timeout: float, connecting: float) -> Client:
        time.sleep(pause)
        return make(self, timeout, connecting)

    def asked(client: Client, groups: Sequence[Sequence[bytes]], timeout: float) -> list[int]:
        left.append(timeout)
        return exist(client, groups, timeout)

    engine = opened(server, timeout=30.0)
    monkeypatch.setattr(Connection, "_make", slowly)
    monkeypatch.setattr(store, "_exist", asked)
    for call in (lambda: engine.find([1]) == [False], lambda: engine.store.probe(60.0)):
        engine.store.close()  # what is closed is connected anew
        assert call()
        assert left
        assert max(left) <= 30.0 - pause
        left.clear()


def test_a_connection_that_the_server_ended_costs_no_read(
    opened: Opened, server: ValkeyServer
) -> None:
    """A server ends what was idle for its `timeout`."""
    engine = opened(server, timeout=30.0)
    engine.put(51)
    assert engine.read([51]) == [Fate.DONE]
    server.disconnect()
    assert engine.read([51]) == [Fate.DONE]


def test_a_server_that_dies_and_comes_back_empty(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    with ValkeyServer() as server:
        engine = opened(server)
        engine.put(1)
        about = json.loads(server("GET", f"lamina:{TENANT.namespace}:about.json"))
        server.kill()
        for _ in range(3):
            eventually(lambda: engine.read([1]), [Fate.DOWN])
            eventually(lambda: engine.write([2]), [Fate.DOWN])
            assert engine.store.find([key(1)], 30.0) is None
        server.start()
        eventually(lambda: engine.read([1]), [Fate.GONE])
        eventually(lambda: engine.write([1]), [Fate.DONE])
        assert engine.read([1]) == [Fate.DONE]
        again = json.loads(server("GET", f"lamina:{TENANT.namespace}:about.json"))
        assert about == again == {"model": "tiny", "object_bytes": str(SIZE)}
    said = [text for text in warnings(caplog) if "cannot connect" in text]
    assert len(said) == len(set(said))
    assert any("serving goes on" in text and str(server.socket) in text for text in said)


def test_what_a_full_server_evicts_is_gone(opened: Opened) -> None:
    with ValkeyServer(maxmemory="12mb") as server:
        engine = opened(server)
        engine.put(0)
        assert engine.find([0]) == [True]
        engine.put(*range(1, 30))
        assert engine.read([0]) == [Fate.GONE]
        found = engine.find(range(30))
        assert 0 < sum(found) < 12
        assert engine.read([n for n in range(30) if found[n]]) == [Fate.DONE] * sum(found)


def test_what_is_touched_is_young(opened: Opened) -> None:
    with ValkeyServer() as server:
        engine = opened(server)
        engine.put(0, 1)
        time.sleep(1.5)  # the server's clock of uses counts seconds
        engine.store.touch([(key(0), 0), (key(77), 0)])
        used, unused = (
            server("OBJECT", "IDLETIME", f"lamina:{TENANT.namespace}:{key(n).hex()}.0")
            for n in (0, 1)
        )
        assert used < unused


def test_a_full_server_that_evicts_nothing_refuses(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    with ValkeyServer(maxmemory="6mb", policy="noeviction") as server:
        engine = opened(server)
        fates = engine.write(range(10))
        count = fates.index(Fate.REFUSED)
        assert count > 0
        assert set(fates[count:]) == {Fate.REFUSED}
        assert opened(server).read(range(count)) == [Fate.DONE] * count
    assert sum("noeviction" in text for text in warnings(caplog)) == 2, "at each start"
    assert sum("evicts nothing" in text for text in warnings(caplog)) == 1


@pytest.mark.parametrize("maxmemory", ["0", "64mb"])
def test_a_server_without_bounds_is_warned_of(
    opened: Opened, caplog: pytest.LogCaptureFixture, maxmemory: str
) -> None:
    with ValkeyServer(maxmemory=maxmemory) as server:
        opened(server)
    assert [("maxmemory" in text) for text in warnings(caplog)] == [True] * (maxmemory == "0")


def test_a_password_that_changes(
    opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "password"
    file.write_text("first secret\n")
    with ValkeyServer(password="first secret") as server:
        engine = opened(server, url=f"unix://{server.socket}", password_file=str(file))
        engine.put(1)
        server("CONFIG", "SET", "requirepass", "second secret")
        server.password = "second secret"
        server.disconnect()
        eventually(lambda: engine.read([1]), [Fate.REFUSED])
        eventually(lambda: engine.write([2]), [Fate.REFUSED])
        assert engine.store.find([key(1)], 30.0) is None
        file.write_text("second secret\n")
        eventually(lambda: engine.read([1]), [Fate.DONE])
        file.unlink()
        server("CONFIG", "SET", "requirepass", "third secret")
        server.password = "third secret"
        server.disconnect()
        eventually(lambda: engine.read([1]), [Fate.REFUSED])
    said = warnings(caplog)
    assert any("Check user, password" in text for text in said)
    assert any("tiers.valkey.password_file cannot be read" in text for text in said)
    assert not any("secret" in text.replace("password_file", "") for text in said)


def test_a_permission_that_is_taken_away(opened: Opened) -> None:
    with ValkeyServer() as server:
        rights = ["~lamina:*", "+get", "+mget", "+exists", "+set", "+strlen", "+touch", "+info"]
        server("ACL", "SETUSER", "lamina", "on", ">word", "resetkeys", "-@all", *rights)
        url = f"unix://lamina:word@{server.socket}"
        engine = opened(server, url=url)
        engine.put(1, 2)
        engine.store.touch([(key(1), 0)])
        assert engine.find([1, 3]) == [True, False]
        server("ACL", "SETUSER", "lamina", "-set")
        assert engine.write([3]) == [Fate.REFUSED]
        assert engine.read([1]) == [Fate.DONE]
        server("ACL", "SETUSER", "lamina", "-mget")
        assert engine.read([1]) == [Fate.REFUSED]
        with pytest.raises(StoreError, match=r"tiers.valkey.url.*permissions"):
            opened(server, url=url)


def test_a_replica_takes_no_writes(opened: Opened) -> None:
    with ValkeyServer() as server:
        engine = opened(server)
        engine.put(1)
        server("REPLICAOF", "127.0.0.1", 1)
        eventually(lambda: engine.write([2]), [Fate.DOWN])
        server("CONFIG", "SET", "replica-serve-stale-data", "no")
        eventually(lambda: engine.read([1]), [Fate.DOWN])
        server("REPLICAOF", "NO", "ONE")
        eventually(lambda: engine.read([1]), [Fate.DONE])
        eventually(lambda: engine.write([2]), [Fate.DONE])


def test_what_is_no_value_is_gone(opened: Opened, server: ValkeyServer) -> None:
    engine = opened(server)
    name = f"lamina:{TENANT.namespace}:{key(1).hex()}.0"
    server("DEL", name)
    server("LPUSH", name, "1")
    engine.put(2)
    assert engine.read([1, 2]) == [Fate.GONE, Fate.DONE]


def test_what_has_another_length_is_replaced(opened: Opened, server: ValkeyServer) -> None:
    engine = opened(server)
    engine.put(31, 32)
    server("APPEND", f"lamina:{TENANT.namespace}:{key(31).hex()}.0", "x")
    server("SET", f"lamina:{TENANT.namespace}:{key(32).hex()}.0", "")
    assert engine.read([31, 32]) == [Fate.CORRUPT] * 2
    engine.put(31, 32)
    assert engine.read([31, 32]) == [Fate.DONE] * 2


def test_what_has_other_bytes_is_replaced(opened: Opened, server: ValkeyServer) -> None:
    """A server that evicts by use would keep a damaged system prompt for ever."""
    engine = opened(server)
    engine.put(41)
    name = f"lamina:{TENANT.namespace}:{key(41).hex()}.0"
    whole = server("GETRANGE", name, "0", "-1")
    server("SETRANGE", name, "700", "other bytes")
    assert server("GETRANGE", name, "0", "-1") != whole
    assert engine.read([41]) == [Fate.CORRUPT]
    engine.put(41)
    assert server("GETRANGE", name, "0", "-1") == whole


def test_what_is_not_used_is_forgotten_where_that_is_wished(opened: Opened) -> None:
    with ValkeyServer() as server:
        engine = opened(server, ttl=1000)
        engine.put(1, 2)
        names = server("KEYS", "*")
        assert len(names) == 3, "with the description"
        for name in names:
            assert 0 < server("TTL", name) <= 1000
            server("EXPIRE", name, 5)
        engine.store.touch([(key(1), 0), (key(3), 0)])
        left = {name.decode()[40:]: server("TTL", name) > 5 for name in names}
        assert left == {"about.json": True, f"{key(1).hex()}.0": True, f"{key(2).hex()}.0": False}
        assert engine.find([1, 2, 3]) == [True, True, False]


# -- looking into a server -------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["server", "cluster"])
def test_what_is_there_is_listed_and_verified(
    which: str, opened: Opened, request: pytest.FixtureRequest
) -> None:
    server: ValkeyServer = request.getfixturevalue(which)
    server("FLUSHALL")
    size = 12288
    engine = opened(server, size=size, cluster=which == "cluster")
    engine.put(*range(300))
    other = opened(server, size=size, prefix="b:", cluster=which == "cluster")
    server("SET", "somebody:else", "x")
    server("LPUSH", f"lamina:{TENANT.namespace}:{key(999).hex()}.0", "x")
    with closing(open_audit(server.url)) as audit:
        (part,) = audit.parts()
        assert part.namespace == TENANT.namespace
        assert part.description["model"] == "tiny"
        assert (part.chunks, part.taken) == (300, 300 * size)
        assert time.time() - 600 < part.oldest <= part.newest < time.time() + 5
        checked = list(audit.check())
        assert sum(read for read, _ in checked) == 300 * size
        assert not [line for _, lines in checked for line in lines]
        other.put(7)
        server("SETRANGE", f"b:{TENANT.namespace}:{key(7).hex()}.0", 500, b"damage")
        assert sum(part.chunks or 0 for part in audit.parts()) == 301
        (line,) = (line for _, lines in audit.check() for line in lines)
        assert key(7).hex() in line


def test_a_look_is_no_use(opened: Opened, server: ValkeyServer) -> None:
    server("FLUSHALL")
    opened(server).put(1)
    time.sleep(1.5)  # the server's clock of uses counts seconds
    with closing(open_audit(server.url)) as audit:
        audit.parts()
        assert len(list(audit.check())) == 1
        assert server("OBJECT", "IDLETIME", f"lamina:{TENANT.namespace}:{key(1).hex()}.0") >= 1


def test_a_look_with_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    with ValkeyServer(password="geheim") as server:
        monkeypatch.delenv("VALKEYCLI_AUTH", raising=False)
        bare = f"unix://{server.socket}"
        with pytest.raises(StoreError, match=r"NOAUTH.*Check user, password"):
            open_audit(bare)
        with pytest.raises(StoreError) as wrong:
            open_audit(server.url.replace("geheim", "wrong"))
        assert "wrong@" not in str(wrong.value)
        monkeypatch.setenv("VALKEYCLI_AUTH", "geheim")
        for place in (bare, server.url):
            with closing(open_audit(place)) as audit:
                assert audit.parts() == []
                assert "geheim" not in audit.place
        server.kill()
        with pytest.raises(StoreError, match="cannot connect"):
            open_audit(bare)


def test_a_look_as_the_engine_is_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VALKEYCLI_AUTH", raising=False)
    secret = tmp_path / "password"
    secret.write_text("geheim")
    with ValkeyServer(password="geheim") as server:
        bare = f"unix://{server.socket}"
        tier = ValkeyConfig.model_validate({"url": bare, "password_file": secret, "name": "warm"})
        for place in ("warm", bare, str(server.socket)):
            with closing(open_audit(place, [tier])) as audit:
                assert audit.parts() == []


@pytest.mark.parametrize("place", ["valkey://:geheim@", "unix://geheim", "redis://a:geheim"])
def test_a_wrong_url_is_said_without_a_password(place: str) -> None:
    with pytest.raises(StoreError, match="must be a URL") as caught:
        open_audit(place)
    assert "geheim" not in str(caught.value)


def test_what_a_cluster_has_not_is_said_without_a_password() -> None:
    with pytest.raises(StoreError, match="cluster") as caught:
        open_audit("valkey://u:geheim@h1:1,h2:2/3")
    assert "geheim" not in str(caught.value)


# -- opening ---------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_yet(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    with ValkeyServer() as server:
        server.kill()
        engine = opened(server)
        (text,) = warnings(caplog)
        assert "tiers.valkey.url" in text
        assert "Connection refused" in text
        server.start()
        eventually(lambda: engine.write([1]), [Fate.DONE])
        assert engine.read([1]) == [Fate.DONE]


@pytest.mark.parametrize("given", ["wrong", ""])
def test_a_wrong_password_is_a_mistake_in_the_configuration(opened: Opened, given: str) -> None:
    with ValkeyServer(password="right") as server:
        url = f"unix://:{given}@{server.socket}"
        with pytest.raises(
            StoreError, match=r"^tiers.valkey.url: .*Check user, password"
        ) as caught:
            opened(server, url=url)
        assert "right" not in str(caught.value)
        assert not given or given not in str(caught.value)


def test_a_password_from_the_environment(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    with ValkeyServer(password="right") as server:
        url = f"unix://{server.socket}"
        monkeypatch.delenv("CACHE_WORD", raising=False)
        with pytest.raises(StoreError, match="CACHE_WORD is not set"):
            opened(server, url=url, password_env="CACHE_WORD")
        monkeypatch.setenv("CACHE_WORD", "right")
        opened(server, url=url, password_env="CACHE_WORD").put(1)


@pytest.mark.parametrize("user", ["alice", ":x", "bob:right", "alice:x"])
def test_whoever_may_ask_may_read(opened: Opened, user: str) -> None:
    """On a server without a password of its own, where users may have one."""
    with ValkeyServer() as server:
        server("ACL", "SETUSER", "alice", "on", "nopass", "~*", "+@all")
        server("ACL", "SETUSER", "bob", "on", ">right", "~*", "+@all")
        engine = opened(server, url=f"unix://{user}@{server.socket}")
        engine.put(1)
        assert engine.read([1]) == [Fate.DONE]
        users = {line.split(" user=")[1].split()[0] for line in of_lamina(server)}
        assert users == {user.partition(":")[0] if ":" in user and user[0] != ":" else "default"}


def of_lamina(server: ValkeyServer) -> list[str]:
    """Connections of ours, as the server lists them."""
    lines = server("CLIENT", "LIST").decode().splitlines()
    return [line for line in lines if "lib-name=lamina" in line]


@pytest.mark.parametrize("which", ["server", "cluster"])
def test_a_user_who_may_not_read_is_a_mistake_in_the_configuration(
    which: str, opened: Opened, request: pytest.FixtureRequest
) -> None:
    shared: ValkeyServer = request.getfixturevalue(which)
    shared("ACL", "SETUSER", "writer", "on", ">right", "~*", "&*", "+@all", "-mget")
    url = shared.url.replace("://", "://writer:right@")
    with pytest.raises(StoreError, match=r"mget.*Check user, password and permissions"):
        opened(shared, url=url, cluster=which == "cluster", timeout=2.0)


def test_a_database_that_is_not_there_is_a_mistake_in_the_configuration(opened: Opened) -> None:
    with ValkeyServer(tcp=True) as server, pytest.raises(StoreError, match=r"range.*`databases`"):
        opened(server, url=f"{server.url}/99")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, server: ValkeyServer) -> None:
    for name in ("connection", "store"):
        monkeypatch.delitem(sys.modules, f"lamina_kv.tiers.valkey.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "glide_sync", None)
    with pytest.raises(StoreError, match=r"tiers.valkey.kind: .*pip install 'lamina-kv\[valkey\]'"):
        open_engine(server)


def test_a_chunk_that_no_server_takes(server: ValkeyServer) -> None:
    tenant = Tenant("ab" * 16, {}, 0, None, 1 << 30, 0)
    with pytest.raises(StoreError, match="chunk_tokens"):
        KINDS["valkey"].open(config(server), tenant)


# -- TLS -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two self-signed certificates, one of an authority and one that it vouches for,
    and their keys."""
    folder = tmp_path_factory.mktemp("certificates")
    signed: dict[str, tuple[x509.Name, ec.EllipticCurvePrivateKey]] = {}
    for name, signer in (
        ("server", "server"),
        ("client", "client"),
        ("authority", "authority"),
        ("vouched", "authority"),
    ):
        private = ec.generate_private_key(ec.SECP256R1())
        title = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        signed[name] = title, private
        issuer, signing = signed[signer]
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder(issuer, title, private.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )
        if name == "authority":
            builder = builder.add_extension(x509.BasicConstraints(True, None), critical=False)
        else:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            names = x509.SubjectAlternativeName([address])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(signing, hashes.SHA256())
        secret = private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        public = certificate.public_bytes(serialization.Encoding.PEM)
        (folder / f"{name}.crt").write_bytes(public)
        (folder / f"{name}.key").write_bytes(secret)
        (folder / f"{name}.pem").write_bytes(public + secret)
    return folder


def test_tls(opened: Opened, certificates: Path) -> None:
    ours = {
        "certificate_file": str(certificates / "client.crt"),
        "key_file": str(certificates / "client.key"),
    }
    with (
        ValkeyServer(tcp=True) as server,
        TlsServer(server, certificates / "server.pem", certificates / "client.crt") as tls,
    ):
        keys = {"url": f"valkeys://127.0.0.1:{tls.port}/2", "timeout": 5.0}
        engine = opened(server, ca_file=str(certificates / "server.crt"), **ours, **keys)
        engine.put(1)
        assert engine.read([1, 2]) == [Fate.DONE, Fate.GONE]
        assert "db2" in str(server("INFO", "keyspace"))
        with pytest.raises(StoreError, match=r"certificate.*Check ca_file"):
            opened(server, **ours, **{**keys, "timeout": 0.5})
        for missing in ours:
            files = {**ours, "ca_file": str(certificates / "server.crt"), missing: "/nowhere"}
            with pytest.raises(StoreError, match=rf"\.{missing} cannot be read"):
                opened(server, **files, **keys)


def test_a_certificate_is_judged_by_the_client_library_alone(
    opened: Opened, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.13 refuses authorities whose constraints are not critical; ours is one."""
    lenient, judged = ssl.create_default_context, []

    def strict(*args: Any, **keys: Any) -> ssl.SSLContext:
        context = lenient(*args, **keys)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        judged.append(context)
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict)
    with (
        ValkeyServer(tcp=True) as server,
        TlsServer(server, certificates / "vouched.pem") as tls,
    ):
        keys = {"ca_file": str(certificates / "authority.crt"), "timeout": 5.0}
        url = f"valkeys://127.0.0.1:{tls.port}"
        engine = opened(server, url=url, **keys)
        engine.put(1)
        assert engine.read([1]) == [Fate.DONE]
        assert not judged, "glide has connected"
        wrong = ValkeyConfig.model_validate({**keys, "url": f"{url}/99"})
        with (
            closing(Connection(wrong)) as connection,
            pytest.raises(Failure) as caught,
            connection.client(0.5),
        ):
            pass
        assert judged, "glide has not connected, and does not say why"
        assert caught.value.fate is Fate.LATE


# -- a connection ----------------------------------------------------------------------------------


class FakeClient:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_a_client_is_closed_by_the_last_one_who_uses_it(
    server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[FakeClient] = []

    def connected(self: Connection, timeout: float, due: float) -> FakeClient:
        made.append(FakeClient())
        return made[-1]

    monkeypatch.setattr(Connection, "_connected", connected)
    connection = Connection(config(server))
    with connection.client(1.0):
        with pytest.raises(Failure), connection.client(1.0):
            raise TimeoutError("timed out")
        assert made[0].closed == 0, "the other call is under way"
        with connection.client(1.0) as second:
            assert second is made[1]
    assert [client.closed for client in made] == [1, 0]
    connection.close()
    connection.close()
    assert [client.closed for client in made] == [1, 1]


def test_who_waits_for_a_connection_shares_its_failure(
    server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, waiting = [], threading.Event()

    def connected(self: Connection, timeout: float, due: float) -> FakeClient:
        tries.append(timeout)
        waiting.wait(60)
        raise Failure(Fate.DOWN, "nobody there")

    def ask() -> str:
        try:
            with connection.client(60.0):
                return "connected"
        except Failure as failure:
            return failure.words

    monkeypatch.setattr(Connection, "_connected", connected)
    connection = Connection(config(server))
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask) for _ in range(2)]
        while not (tries and all(each.running() for each in asked)):
            time.sleep(0.01)
        time.sleep(0.1)  # the second one waits for the first
        waiting.set()
        assert [each.result() for each in asked] == ["nobody there"] * 2
    assert len(tries) == 1


# -- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("valkey://cache", "cache:6379"),
        ("redis://cache:7000/3", "cache:7000"),
        ("rediss://me:word@[::1]:7000", "[::1]:7000"),
        ("unix:///run/valkey.sock", "/run/valkey.sock"),
        ("unix://me:w%40rd@/run/valkey.sock", "/run/valkey.sock"),
    ],
)
def test_urls(url: str, expected: str) -> None:
    parsed = ValkeyConfig.model_validate({"url": url})
    assert str(parsed.url) == expected
    assert parsed.url.tls == url.startswith("rediss")
    assert parsed.url.password == ("" if "@" not in url else "w@rd" if "%" in url else "word")
    assert "w@rd" not in repr(parsed)
    assert "word" not in repr(parsed.url)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "url (valkey): is required"),
        ({"url": 5}, "must be a URL such as"),
        ({"url": "http://:geheim@cache"}, "begins with valkey"),
        ({"url": "valkey://:geheim@"}, "with a host"),
        ({"url": "valkey://:geheim@cache:x"}, "port from 1"),
        ({"url": "valkey://:geheim@cache/x"}, "number of a database"),
        ({"url": "valkey://:geheim@cache?x=1"}, "without ? and #"),
        ({"url": "unix://geheim"}, "absolute path"),
        ({"url": "valkey://:geheim@a,b"}, "several nodes"),
        ({"url": "unix:///a", "cluster": True}, "by a socket"),
        ({"url": "valkey://a/1", "cluster": True}, "no numbered databases"),
        ({"url": "valkey://:geheim@a", "password_env": "X"}, "more than once"),
        ({"url": "valkeys://a", "key_file": "/x"}, "go together"),
        ({"url": "valkey://a", "ca_file": "/x"}, "begin url with valkeys"),
        ({"url": "valkey://a", "ttl": 0}, "at least 1"),
    ],
)
def test_mistakes_name_the_key_and_no_password(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"tiers": [{"kind": "valkey", **keys}]}, {})
    (problem,) = caught.value.problems
    assert problem.startswith("tiers[0]")
    assert words in problem
    assert "geheim" not in problem


@pytest.mark.parametrize(
    "tiers",
    [
        {"kind": "valkey", "url": "valkey://:geheim@a"},
        "valkey://:geheim@a",
        ["valkey://:geheim@a"],
        [["valkey://:geheim@a"]],
        [{"kind": "valkye", "url": "valkey://:geheim@a"}],
        [{"kind": "valkey", "ulr": "valkey://:geheim@a"}],
        [{"kind": "valkey", "url": ["valkey://:geheim@a"]}],
    ],
)
def test_a_password_in_the_wrong_place_is_not_quoted(tiers: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"tiers": tiers}, {})
    assert "geheim" not in str(caught.value)
