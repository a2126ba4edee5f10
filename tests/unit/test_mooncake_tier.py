"""The tier in Mooncake Store, with a library that answers what a test wants. The real one is in
``tests/fault/test_mooncake.py``."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from disks import key
from lamina_kv.config import ConfigError, load_config
from lamina_kv.tiers.contract import Fate, Piece, StoreError, Tenant
from lamina_kv.tiers.mooncake.client import Library, Unreachable
from lamina_kv.tiers.mooncake.codes import Code
from lamina_kv.tiers.mooncake.config import MooncakeConfig
from lamina_kv.tiers.mooncake.store import UNDELIVERED, MooncakeStore, open_store
from servers.mooncake import free_port

SIZE = 8192
TENANT = Tenant("ab" * 16, {}, 5, None, SIZE, 1)


def config_of(**more: object) -> MooncakeConfig:
    config = load_config({"tiers": [{"kind": "mooncake", "master": "127.0.0.1:1", **more}]}, {})
    (tier,) = config.tiers
    assert isinstance(tier, MooncakeConfig)
    return tier


class Script:
    """A client whose objects are in ``objects`` and whose next answers are in ``answers``."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.answers: list[int] = []
        self.late: list[Callable[[], None]] = []
        self.registered: tuple[int, int] = (0, 0)
        self.register_code = 0
        self.closed = 0

    def _answer(self, good: int) -> int:
        return self.answers.pop(0) if self.answers else good

    def batch_is_exist(self, keys: Sequence[str]) -> list[int]:
        return [self._answer(int(key in self.objects)) for key in keys]

    def batch_get_into(
        self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        codes = []
        for name, address, size in zip(keys, buffer_ptrs, sizes, strict=True):
            self._require_registered(address, size)
            content = self.objects.get(name)
            code = self._answer(Code.OBJECT_NOT_FOUND if content is None else len(content))
            if code >= 0 and content is not None:
                ctypes.memmove(address, content, min(size, len(content)))
            self.late.append(lambda to=address, size=size: ctypes.memset(to, 0xEE, size))  # type: ignore[misc]
            codes.append(code)
        return codes

    def batch_put_from(
        self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int], config: Any
    ) -> list[int]:
        codes = []
        for name, address, size in zip(keys, buffer_ptrs, sizes, strict=True):
            self._require_registered(address, size)
            code = self._answer(0)
            if not code:
                self.objects.setdefault(name, ctypes.string_at(address, size))
            codes.append(code)
        return codes

    def register_buffer(self, buffer_ptr: int, size: int) -> int:
        self.registered = (buffer_ptr, size)
        return self.register_code

    def close(self) -> int:
        self.closed += 1
        return 0

    def _require_registered(self, address: int, size: int) -> None:
        start, length = self.registered
        assert start <= address
        assert address + size <= start + length


class Scripted:
    """A library that connects to a script, or fails as a test says."""

    def __init__(self, script: Script | None = None, error: Exception | None = None) -> None:
        self.replication = SimpleNamespace()
        self.script = script or Script()
        self.error = error
        self.attempts = 0

    def connect(self) -> Script:
        self.attempts += 1
        if self.error is not None:
            raise self.error
        return self.script


def store_on(library: Scripted, **more: object) -> MooncakeStore:
    store = MooncakeStore(config_of(**more), TENANT, library)  # type: ignore[arg-type]
    store.join()
    return store


def pieces(*numbers: int, byte: int = 0) -> list[Piece]:
    return [Piece(key(n), 0, np.full(SIZE, byte or n, np.uint8)) for n in numbers]


def test_what_a_configuration_is_made_of() -> None:
    config = config_of()
    assert (config.keep, config.protocol, config.segment) == ("all", "tcp", None)
    assert config_of(master="etcd://10.0.0.1:2379").master == "etcd://10.0.0.1:2379"
    with pytest.raises(ConfigError, match=r"tiers\[0\]\.master .*must be an address such as"):
        config_of(master="somewhere")


def test_where_a_chunk_is_filed() -> None:
    library = Scripted()
    assert store_on(library).write(pieces(3), 1.0) == [Fate.DONE]
    assert list(library.script.objects) == [f"lamina:{'ab' * 16}:{key(3).hex()}.1"]


def test_a_probe_fails_while_the_master_does_not_answer_and_joins_when_it_does() -> None:
    library = Scripted(error=Unreachable("nobody answers"))
    store = store_on(library)
    assert not store.probe(1.0)
    library.error = None
    assert store.probe(1.0)
    library.script.answers = [Code.RPC_FAIL]
    assert not store.probe(1.0)
    assert store.probe(1.0)


@pytest.mark.parametrize(
    ("code", "fate"),
    [
        (SIZE, Fate.DONE),
        (SIZE - 1, Fate.CORRUPT),
        (0, Fate.CORRUPT),
        (Code.INVALID_PARAMS, Fate.CORRUPT),
        (Code.CHECKSUM_MISMATCH, Fate.CORRUPT),
        (Code.OBJECT_NOT_FOUND, Fate.GONE),
        (Code.REPLICA_IS_NOT_READY, Fate.GONE),
        (Code.TRANSFER_FAIL, Fate.GONE),
        (Code.LEASE_EXPIRED, Fate.LATE),
        (Code.RPC_TIMEOUT, Fate.LATE),
        (Code.RPC_FAIL, Fate.DOWN),
        (Code.NO_AVAILABLE_HANDLE, Fate.DOWN),
        (-4711, Fate.DOWN),
    ],
)
def test_what_an_answer_to_a_read_means(code: int, fate: Fate) -> None:
    library = Scripted()
    store = store_on(library)
    store.write(pieces(1, 2, 3), 1.0)
    library.script.answers = [SIZE, int(code), SIZE]
    read = pieces(1, 2, 3, byte=99)
    assert store.read(read, 1.0) == [Fate.DONE, fate, Fate.DONE]
    assert [piece.buffer[0] for piece in read] == [1, 2 if fate is Fate.DONE else 99, 3]


@pytest.mark.parametrize(
    ("code", "fate"),
    [
        (0, Fate.DONE),
        (Code.OBJECT_ALREADY_EXISTS, Fate.DONE),
        (Code.NO_AVAILABLE_HANDLE, Fate.REFUSED),
        (Code.TENANT_QUOTA_EXCEEDED, Fate.REFUSED),
        (Code.RPC_TIMEOUT, Fate.LATE),
        (Code.RPC_FAIL, Fate.DOWN),
        (Code.TRANSFER_FAIL, Fate.DOWN),
        (-4711, Fate.DOWN),
    ],
)
def test_what_an_answer_to_a_write_means(code: int, fate: Fate) -> None:
    library = Scripted()
    store = store_on(library)
    library.script.answers = [0, int(code), 0]
    assert store.write(pieces(1, 2, 3), 1.0) == [Fate.DONE, fate, Fate.DONE]


def test_a_question_that_the_master_did_not_answer_has_no_answer() -> None:
    library = Scripted()
    store = store_on(library)
    store.write(pieces(1), 1.0)
    assert store.find([key(1), key(2)], 1.0) == [True, False]
    library.script.answers = [1, Code.RPC_FAIL]
    assert store.find([key(1), key(2)], 1.0) is None


def test_what_arrives_after_a_call_arrives_in_no_slot() -> None:
    """Mooncake may go on writing where it was told to read to."""
    library = Scripted()
    store = store_on(library)
    store.write(pieces(1, 2), 1.0)
    library.script.answers = [SIZE, Code.TRANSFER_FAIL]
    read = pieces(1, 2, byte=99)
    assert store.read(read, 1.0) == [Fate.DONE, Fate.GONE]
    assert len(library.script.late) == 2
    for arrive in library.script.late:
        arrive()
    assert [set(piece.buffer.tolist()) for piece in read] == [{1}, {99}]


def test_when_no_donor_can_be_reached_the_tier_is_down_and_not_its_chunks_gone() -> None:
    library = Scripted()
    store = store_on(library)
    store.write(pieces(1, 2), 1.0)

    def read(*codes: int) -> list[Fate]:
        library.script.answers = list(codes)
        return store.read(pieces(1, 2), 1.0)

    gone, down = [Fate.GONE] * 2, [Fate.DOWN] * 2
    lost = (Code.TRANSFER_FAIL, Code.TRANSFER_FAIL)
    answers = [read(*lost) for _ in range(UNDELIVERED + 1)]
    assert answers == [gone] * (UNDELIVERED - 1) + [down] * 2
    assert read(Code.OBJECT_NOT_FOUND, Code.TRANSFER_FAIL) == [Fate.GONE, Fate.DOWN]
    assert read(SIZE, Code.TRANSFER_FAIL) == [Fate.DONE, Fate.GONE], "one of them is back"
    assert read(*lost) == gone


def test_each_kind_of_error_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    library = Scripted()
    store = store_on(library, name="pool")
    for _ in range(3):
        library.script.answers = [Code.NO_AVAILABLE_HANDLE, Code.NO_AVAILABLE_HANDLE]
        store.write(pieces(1, 2), 1.0)
        library.script.answers = [Code.TRANSFER_FAIL, Code.OBJECT_NOT_FOUND]
        store.read(pieces(1, 2), 1.0)
        library.script.answers = [-4711]
        store.read(pieces(1), 1.0)
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 3
    assert all(line.startswith("tier pool: ") for line in said)
    assert "NO_AVAILABLE_HANDLE -200: there is no room" in said[0]
    assert "TRANSFER_FAIL -800" in said[1]
    assert "error -4711: see the messages of Mooncake" in said[2]


def test_a_master_that_is_not_there_is_looked_for_with_every_call(
    caplog: pytest.LogCaptureFixture,
) -> None:
    library = Scripted(error=Unreachable("10.0.0.1:50051 takes no connection"))
    store = store_on(library)
    assert store.find([key(1)], 1.0) is None
    assert store.read(pieces(1), 1.0) == store.write(pieces(1), 1.0) == [Fate.DOWN]
    store.touch([(key(1), 0)])
    assert library.attempts == 5
    (said,) = caplog.records
    assert "takes no connection" in said.message
    assert "tiers.mooncake.master" in said.message
    library.error = None
    assert store.write(pieces(1), 1.0) == [Fate.DONE]
    assert store.read(pieces(1), 1.0) == [Fate.DONE]
    assert library.attempts == 6
    store.close()
    store.close()
    assert library.script.closed == 1


def test_a_cluster_that_cannot_be_joined_while_serving_is_down() -> None:
    library = Scripted(error=Unreachable("no"))
    store = store_on(library)
    library.error = StoreError("no such device")
    assert store.read(pieces(1), 1.0) == [Fate.DOWN]


def test_memory_that_cannot_be_registered_is_an_error_at_the_start() -> None:
    library = Scripted()
    library.script.register_code = -600
    with pytest.raises(StoreError, match=r"tiers\.mooncake\.protocol: .*ulimit -l"):
        store_on(library)
    assert library.script.closed == 1


def test_a_library_that_is_missing_is_said_with_all_that_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with pytest.raises(StoreError, match=r"tiers\.mooncake\.kind: .*lamina-kv\[mooncake\].*libnl"):
        open_store(config_of(), TENANT)


class TestLibrary:
    """:class:`Library` on a module that is not the real one."""

    @pytest.fixture
    def master(self) -> Iterator[str]:
        """The address of something that takes connections."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            yield f"127.0.0.1:{listening.getsockname()[1]}"

    @pytest.fixture
    def setups(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        """How clients were set up."""
        made: list[tuple[Any, ...]] = []

        class Store(Script):
            def setup(self, *arguments: Any) -> int:
                made.append(arguments)
                return -1 if arguments[4] == "rdma" else 0

        module = SimpleNamespace(MooncakeDistributedStore=Store, ReplicateConfig=SimpleNamespace)
        monkeypatch.setitem(sys.modules, "mooncake.store", module)
        monkeypatch.setattr("os.environ", {"MC_LOG_LEVEL": "INFO"})
        return made

    def test_calls_are_bounded_and_an_operators_own_words_stay(
        self, setups: list[tuple[Any, ...]]
    ) -> None:
        Library(config_of(timeout=1.5))
        assert os.environ["MC_RPC_TIMEOUT_MS"] == "1500"
        assert os.environ["MC_TCP_PROGRESS_TIMEOUT_SEC"] == "2"
        assert os.environ["MC_LOG_LEVEL"] == "INFO"

    def test_nothing_is_set_up_where_no_master_is(self, setups: list[tuple[Any, ...]]) -> None:
        """It would hold up the whole process."""
        library = Library(config_of(master=f"127.0.0.1:{free_port()}"))
        with pytest.raises(Unreachable, match="takes no connection"):
            library.connect()
        assert not setups

    def test_what_is_configured_arrives(self, setups: list[tuple[Any, ...]], master: str) -> None:
        config = config_of(master=master, segment="1MiB", replicas=2)
        library = Library(config)
        library.connect()
        expected = ("127.0.0.1", "P2PHANDSHAKE", 1 << 20, 0, "tcp", "", master)
        assert setups == [expected]
        assert library.replication.replica_num == 2
        more = config_of(master=master, hostname="node7", devices="mlx5_0")
        Library(more).connect()
        assert setups[1] == ("node7", "P2PHANDSHAKE", 0, 0, "tcp", "mlx5_0", master)

    def test_what_cannot_be_set_up_is_an_error(
        self, setups: list[tuple[Any, ...]], master: str
    ) -> None:
        with pytest.raises(StoreError, match=r"tiers\.pool\.master: .*protocol, devices"):
            Library(config_of(master=master, protocol="rdma", name="pool")).connect()

    def test_a_master_that_does_not_answer_is_none(
        self, setups: list[tuple[Any, ...]], master: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stopped one takes connections, and costs the timeout."""
        times = iter([0.0, 2.0])
        monkeypatch.setattr("time.monotonic", lambda: next(times))
        with pytest.raises(Unreachable, match="does not answer as a master does"):
            Library(config_of(master=master, protocol="rdma")).connect()
