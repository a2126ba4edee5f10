"""The tier in a real Mooncake Store: it keeps what every store by key keeps, and whatever becomes
of the master and of those who donate memory, a chunk is served whole or is a miss, and no request
waits for either."""

from __future__ import annotations

import os
import runpy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disks import key
from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.contract import Fate, Piece, Store, Tenant
from lamina_kv.tiers.mooncake.client import Client, Library
from lamina_kv.tiers.mooncake.config import MooncakeConfig
from lamina_kv.tiers.mooncake.store import UNDELIVERED, MooncakeStore, open_store
from servers.mooncake import Donor, Master, require
from store_contract import Change, StoreContract

pytestmark = pytest.mark.slow

MIB = 1 << 20
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "tiny_engine.py"
QUESTIONS = [[(7 * i + j) % 1000 for j in range(100 + 20 * i)] for i in range(6)]


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    require()


@pytest.fixture(autouse=True)
def unbounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tier's timeout holds for the whole process: no test has another one's."""
    for name in [name for name in os.environ if name.startswith("MC_")]:
        monkeypatch.delenv(name)


def config_of(master: Master, **more: Any) -> MooncakeConfig:
    return MooncakeConfig(master=master.address, **more)


class Pool:
    """A master and a donor; see :class:`~store_contract.Backing`."""

    def __init__(self, master: Master) -> None:
        self._config = config_of(master)
        self._library = Library(self._config)
        self._client: Any = self._library.connect()
        self._memory = np.empty(4 * MIB, np.uint8)
        self._client.register_buffer(self._memory.ctypes.data, self._memory.nbytes)

    def open(self, tenant: Tenant) -> Store:
        return open_store(self._config, tenant)

    def change(self, tenant: Tenant, key: ChunkKey, change: Change) -> None:
        name = f"lamina:{tenant.namespace}:{key.hex()}.{tenant.shard}"
        start, size = self._memory.ctypes.data, self._memory.nbytes
        (length,) = self._client.batch_get_into([name], [start], [size])
        assert length == tenant.object_bytes
        assert self._client.remove(name, True) == 0
        if content := change(self._memory[:length].tobytes()):  # it keeps no empty object
            self._memory[: len(content)] = np.frombuffer(content, np.uint8)
            put = self._client.batch_put_from(
                [name], [start], [len(content)], self._library.replication
            )
            assert put == [0]

    def close(self) -> None:
        self._client.close()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, installed: None) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("mooncake")
    with Master(folder) as master, Donor(master, folder):
        pool = Pool(master)
        yield pool
        pool.close()


class TestMooncake(StoreContract):
    replaces = False

    @pytest.fixture
    def backing(self, pool: Pool) -> Pool:
        return pool


class Rank:
    """A store with chunks of a size."""

    def __init__(self, store: MooncakeStore, size: int) -> None:
        self.store = store
        self.size = size

    def pieces(self, *numbers: int, byte: int | None = None) -> list[Piece]:
        """Chunk ``n`` is ``n`` in every byte, unless ``byte`` is given."""
        return [
            Piece(key(n), 0, np.full(self.size, n % 251 if byte is None else byte, np.uint8))
            for n in numbers
        ]

    def write(self, *numbers: int) -> list[Fate]:
        return self._batches(numbers, lambda some: self.store.write(self.pieces(*some), 1.0))

    def read(self, *numbers: int) -> list[Fate]:
        """What becomes of chunks. One that is done has its bytes, and of others nothing came."""

        def read(some: tuple[int, ...]) -> list[Fate]:
            pieces = self.pieces(*some, byte=255)
            fates = self.store.read(pieces, 1.0)
            for number, piece, fate in zip(some, pieces, fates, strict=True):
                assert (piece.buffer == (number % 251 if fate is Fate.DONE else 255)).all()
            return fates

        return self._batches(numbers, read)

    def find(self, *numbers: int) -> list[bool] | None:
        return self.store.find([key(number) for number in numbers], 1.0)

    def _batches(
        self, numbers: tuple[int, ...], call: Callable[[tuple[int, ...]], list[Fate]]
    ) -> list[Fate]:
        step = self.store.traits.batch
        calls = (call(numbers[i : i + step]) for i in range(0, len(numbers), step))
        return [fate for fates in calls for fate in fates]


def eventually(check: Callable[[], bool]) -> None:
    due = time.monotonic() + 120
    while not check():
        assert time.monotonic() < due
        time.sleep(0.2)


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def rank_of(master: Master, opened: ExitStack, *, size: int = MIB, **more: Any) -> Rank:
    tenant = Tenant("cd" * 16, {}, 0, None, size, 0)
    store = open_store(config_of(master, **more), tenant)
    opened.callback(store.close)
    return Rank(store, size)


def test_a_donor_that_is_killed_takes_its_chunks_along_and_no_others(
    tmp_path: Path, opened: ExitStack
) -> None:
    master = opened.enter_context(Master(tmp_path, client_ttl=4))
    first = opened.enter_context(Donor(master, tmp_path))
    rank = rank_of(master, opened)
    assert set(rank.write(*range(8))) == {Fate.DONE}
    first.kill()
    assert rank.find(*range(8)) == [True] * 8, "nobody has noticed yet"
    answers = [set(rank.read(*range(8))) for _ in range(UNDELIVERED)]
    assert answers == [{Fate.GONE}] * (UNDELIVERED - 1) + [{Fate.DOWN}]
    assert set(rank.write(20)) == {Fate.DOWN}
    opened.enter_context(Donor(master, tmp_path))
    eventually(lambda: rank.find(*range(8)) == [False] * 8)
    eventually(lambda: set(rank.write(*range(30, 38))) == {Fate.DONE})
    assert set(rank.read(*range(30, 38))) == {Fate.DONE}
    assert set(rank.read(*range(8))) == {Fate.GONE}


def test_nothing_of_a_donor_that_was_stopped_arrives_after_the_call(
    tmp_path: Path, opened: ExitStack
) -> None:
    master = opened.enter_context(Master(tmp_path))
    donor = opened.enter_context(Donor(master, tmp_path))
    rank = rank_of(master, opened, timeout=1.0)
    count = rank.store.traits.batch
    assert set(rank.write(*range(count))) == {Fate.DONE}
    donor.stop()
    opened.callback(donor.go_on)
    pieces = rank.pieces(*range(count), byte=255)
    assert set(rank.store.read(pieces, 1.0)) == {Fate.GONE}
    donor.go_on()
    time.sleep(2)
    assert all((piece.buffer == 255).all() for piece in pieces)
    eventually(lambda: set(rank.write(*range(100, 108))) == {Fate.DONE})
    assert set(rank.read(*range(100, 108))) == {Fate.DONE}


def test_a_master_that_is_killed_is_down_and_works_again_when_it_is_back_empty(
    tmp_path: Path, opened: ExitStack
) -> None:
    master = opened.enter_context(Master(tmp_path))
    opened.enter_context(Donor(master, tmp_path))
    rank = rank_of(master, opened)
    assert rank.write(1, 2) == [Fate.DONE] * 2
    master.kill()
    assert rank.find(1, 2) is None
    assert rank.read(1, 2) == [Fate.DOWN] * 2
    assert rank.write(3) == [Fate.DOWN]
    rank.store.touch([(key(1), 0)])
    master.start()
    eventually(lambda: rank.find(1, 2) == [False, False])
    assert rank.read(1, 2) == [Fate.GONE] * 2
    eventually(lambda: rank.write(1, 2, 3) == [Fate.DONE] * 3)  # when the donor is back, too
    assert rank.read(1, 2, 3) == [Fate.DONE] * 3


def test_a_master_that_is_stopped_is_late(tmp_path: Path, opened: ExitStack) -> None:
    master = opened.enter_context(Master(tmp_path, client_ttl=60))
    opened.enter_context(Donor(master, tmp_path))
    rank = rank_of(master, opened, timeout=1.0)
    assert rank.write(1, 2) == [Fate.DONE] * 2
    master.stop()
    opened.callback(master.go_on)
    assert rank.find(1, 2) is None
    assert rank.read(1, 2) == [Fate.LATE] * 2
    assert rank.write(3) == [Fate.LATE]
    master.go_on()
    eventually(lambda: rank.read(1, 2) == [Fate.DONE] * 2)
    assert set(rank.write(3, 4)) == {Fate.DONE}


def test_a_read_that_outlasts_its_lease_is_late_and_the_chunk_stays(
    tmp_path: Path, opened: ExitStack
) -> None:
    master = opened.enter_context(Master(tmp_path, client_ttl=60, lease=200))
    donor = opened.enter_context(Donor(master, tmp_path))
    rank = rank_of(master, opened, timeout=20.0)
    assert rank.write(1) == [Fate.DONE]
    donor.stop()
    opened.callback(donor.go_on)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(rank.read, 1)
        time.sleep(1)
        assert not read.done()
        donor.go_on()
        assert read.result() == [Fate.LATE]
    assert rank.read(1) == [Fate.DONE]


def test_what_is_full_refuses_or_gives_up_others_and_never_confuses_them(
    tmp_path: Path, opened: ExitStack
) -> None:
    master = opened.enter_context(Master(tmp_path, lease=50))
    opened.enter_context(Donor(master, tmp_path, size=32))
    rank = rank_of(master, opened)
    fates: set[Fate] = set()
    for start in range(0, 160, 8):
        fates.update(rank.write(*range(start, start + 8)))
    assert fates == {Fate.DONE, Fate.REFUSED}
    there = rank.find(*range(160))
    assert there is not None
    assert 0 < sum(there) <= 32
    kept = [number for number in range(160) if there[number]]

    def evicted() -> bool:
        rank.write(*range(200, 208))
        now = rank.find(*kept)
        time.sleep(0.2)  # asking pins
        return now is not None and not all(now)

    eventually(evicted)
    assert set(rank.read(*kept)) == {Fate.DONE, Fate.GONE}


def test_a_rank_that_starts_before_the_master_joins_it_later(
    tmp_path: Path, opened: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    master = Master(tmp_path)
    rank = rank_of(master, opened)
    assert "takes no connection" in caplog.text
    assert rank.write(1) == [Fate.DOWN]
    opened.enter_context(master)
    opened.enter_context(Donor(master, tmp_path))
    assert rank.write(1) == [Fate.DONE]
    assert rank.read(1) == [Fate.DONE]


def test_a_rank_may_donate_memory_itself_and_keep_chunks_twice(
    tmp_path: Path, opened: ExitStack
) -> None:
    master = opened.enter_context(Master(tmp_path))
    donors = [
        rank_of(master, opened, segment=64 * MIB, hostname="127.0.0.1", replicas=2),
        rank_of(master, opened, segment=64 * MIB),
    ]
    eventually(lambda: len(master.donors()) == 2)
    assert donors[0].write(1, 2, 3) == [Fate.DONE] * 3
    donors[0].store.close()
    assert donors[1].read(1, 2, 3) == [Fate.DONE] * 3


def test_the_library_works_without_a_card_for_rdma(tmp_path: Path, opened: ExitStack) -> None:
    """It takes TCP then, and says so only on stderr."""
    master = opened.enter_context(Master(tmp_path))
    opened.enter_context(Donor(master, tmp_path))
    rank = rank_of(master, opened, protocol="rdma")
    assert rank.write(1) == [Fate.DONE]
    assert rank.read(1) == [Fate.DONE]


class Hanging:
    """A client, and which of its calls have not returned."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._lock = threading.Lock()
        self.under_way = 0

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def counted(*arguments: Any) -> Any:
            with self._lock:
                self.under_way += 1
            try:
                return call(*arguments)
            finally:
                with self._lock:
                    self.under_way -= 1

        return counted


@pytest.mark.parametrize("who", ["master", "donor"])
def test_requests_are_answered_while_calls_hang(
    tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """A request is computed when the store does not answer, and nobody waits for the call."""
    for name, value in {"MC_RPC_TIMEOUT_MS": "40000", "MC_TCP_PROGRESS_TIMEOUT_SEC": "20"}.items():
        monkeypatch.setenv(name, value)
    clients: list[Hanging] = []
    connect = Library.connect

    def watched(library: Library) -> Any:
        clients.append(Hanging(connect(library)))
        return clients[-1]

    monkeypatch.setattr(Library, "connect", watched)
    master = opened.enter_context(Master(tmp_path, client_ttl=120))
    donor = opened.enter_context(Donor(master, tmp_path))
    example = runpy.run_path(str(EXAMPLE))
    settings = {
        "load": {"when": "always", "deadline": 0.5},
        "host": {"capacity": "1MiB"},
        "tiers": [{"kind": "mooncake", "master": master.address, "keep": "all"}],
    }
    engine = example["TinyEngine"](settings)
    first, computed = engine.generate(QUESTIONS), engine.computed
    engine.lamina.close()

    engine = example["TinyEngine"](settings)
    assert engine.generate(QUESTIONS) == first
    assert engine.computed < 0.2 * computed, "another engine has what the first one saved"
    engine.lamina.close()

    engine = example["TinyEngine"](settings)
    stopped = master if who == "master" else donor
    stopped.stop()
    opened.callback(stopped.go_on)
    assert engine.generate(QUESTIONS) == first
    assert engine.computed >= 0.8 * computed
    assert clients[-1].under_way > 0, "a call hangs, and the answers are out"
    stopped.go_on()
    engine.lamina.close()
