"""What every store by key keeps, whatever it is: a class of tests that each store subclasses.

::

    class TestShelf(StoreContract):
        @pytest.fixture
        def backing(self, tmp_path: Path) -> Iterator[Backing]:
            yield ShelfBacking(tmp_path)

A backing may outlive a test: each test has a namespace that no other one has. What happens when a
server is slow, stopped or full is for the store's own file.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import pytest

from disks import key
from lamina_kv.geometry import DIRECT_IO_ALIGNMENT, OBJECT_HEADER_BYTES
from lamina_kv.keys import KEY_BYTES
from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.contract import Fate, Piece, Store, Tenant
from lamina_kv.tiers.objects import Object, aligned_memory, seal, verify

PADDING = 1000
"""Bytes at the end of an object that are none of its rows."""

TIMEOUT = 30.0
"""Seconds: none of these tests is about time."""

_GUARD = 0xA5

Change = Callable[[bytes], bytes]
"""What an object's bytes become."""


class Backing(Protocol):
    """What stores of several engines have in common: a server, a directory."""

    def open(self, tenant: Tenant) -> Store:
        """Open a store as another engine would: nothing is shared with those opened before but
        what is stored."""

    def change(self, tenant: Tenant, key: ChunkKey, change: Change) -> None:
        """Change the bytes of a stored chunk, past every store."""


class Arena:
    """Buffers as in the near tier, with a page around each that nobody may write to."""

    def __init__(self, count: int, size: int) -> None:
        self._memory = aligned_memory(DIRECT_IO_ALIGNMENT + count * (size + DIRECT_IO_ALIGNMENT))
        self._memory[:] = _GUARD
        self._guarded = np.ones(len(self._memory), np.bool_)
        self.buffers: list[Object] = []
        for i in range(count):
            start = DIRECT_IO_ALIGNMENT + i * (size + DIRECT_IO_ALIGNMENT)
            self._guarded[start : start + size] = False
            self.buffers.append(self._memory[start : start + size])

    def check(self) -> None:
        assert (self._memory[self._guarded] == _GUARD).all(), "written beyond a buffer"


def rows_of(size: int) -> int:
    """Bytes of the rows in an object of ``size``."""
    return size - OBJECT_HEADER_BYTES - PADDING


def fill(buffer: Object, number: int, *, shard: int = 0, version: int = 0) -> None:
    """Make ``buffer`` the sealed object of chunk ``number``; versions differ in their rows."""
    random = np.random.default_rng([number, shard, version])
    buffer[:] = random.integers(0, 256, len(buffer), np.uint8)
    seal(buffer, key(number), shard, rows_of(len(buffer)))


class Engine:
    """One engine's store, with its tenant, called as the data room does."""

    def __init__(self, store: Store, tenant: Tenant) -> None:
        self.store = store
        self.tenant = tenant
        self._damaged: set[int] = set()

    @property
    def batch(self) -> int:
        return self.store.traits.batch

    def write(self, numbers: Sequence[int], *, version: int = 0) -> list[Fate]:
        """Write chunks, as many a call as the store takes; their buffers stay as they were."""
        fates: list[Fate] = []
        for some in _cut(numbers, self.batch):
            arena = Arena(len(some), self.tenant.object_bytes)
            for number, buffer in zip(some, arena.buffers, strict=True):
                fill(buffer, number, shard=self.tenant.shard, version=version)
            before = [buffer.tobytes() for buffer in arena.buffers]
            pieces = [
                Piece(key(n), 0, b, n in self._damaged)
                for n, b in zip(some, arena.buffers, strict=True)
            ]
            fates += self.store.write(pieces, TIMEOUT)
            assert [buffer.tobytes() for buffer in arena.buffers] == before
            arena.check()
        assert len(fates) == len(numbers)
        return fates

    def put(self, *numbers: int, version: int = 0) -> None:
        """Write chunks, and all must go well."""
        assert self.write(numbers, version=version) == [Fate.DONE] * len(numbers)

    def read(self, numbers: Sequence[int], *, version: int = 0) -> list[Fate]:
        """What becomes of chunks that are read, verified as the data room does. What verifies must
        be what was written."""
        fates: list[Fate] = []
        for some in _cut(numbers, self.batch):
            arena = Arena(len(some), self.tenant.object_bytes)
            pieces = [Piece(key(n), 0, b) for n, b in zip(some, arena.buffers, strict=True)]
            answers = self.store.read(pieces, TIMEOUT)
            arena.check()
            for number, piece, fate in zip(some, pieces, answers, strict=True):
                fates.append(self._verified(number, piece.buffer, fate, version))
                if fates[-1] is Fate.CORRUPT:
                    self._damaged.add(number)
        return fates

    def find(self, numbers: Sequence[int]) -> list[bool]:
        """Which chunks the store says that it has."""
        found = self.store.find([key(number) for number in numbers], TIMEOUT)
        assert found is not None
        return [bool(each) for each in found]

    def _verified(self, number: int, buffer: Object, fate: Fate, version: int) -> Fate:
        shard, length = self.tenant.shard, rows_of(len(buffer))
        if fate is not Fate.DONE:
            return fate
        if not verify(buffer, key(number), shard, length):
            return Fate.CORRUPT
        expected = aligned_memory(len(buffer))
        fill(expected, number, shard=shard, version=version)
        end = OBJECT_HEADER_BYTES + length
        assert (buffer[:end] == expected[:end]).all(), f"other bytes than chunk {number} has"
        return Fate.DONE


Open = Callable[..., Engine]
"""Opens the store of an engine: ``open(shard=0, namespace=None, size=None)``."""


class StoreContract:
    """See the module."""

    object_bytes = 12288
    """Bytes of an object, a multiple of the alignment of direct I/O."""

    large_bytes = (1 << 20) + 4096

    replaces = True
    """Whether such a store can replace an object."""

    @pytest.fixture
    def backing(self) -> Iterator[Backing]:
        raise NotImplementedError("a store's test file says what its stores have in common")

    @pytest.fixture
    def namespace(self) -> str:
        return uuid.uuid4().hex

    @pytest.fixture
    def engine(self, backing: Backing, namespace: str) -> Iterator[Open]:
        """Opens stores, closed at the end of the test."""
        opened: list[Store] = []

        def open_one(
            shard: int = 0, *, within: str | None = None, size: int | None = None
        ) -> Engine:
            size = size or self.object_bytes
            tenant = Tenant(within or namespace, {"model": "tiny"}, shard, None, size, shard)
            store = backing.open(tenant)
            opened.append(store)
            assert store.stored(keys=False) is None, "a store by key does not say what it holds"
            return Engine(store, tenant)

        yield open_one
        for store in opened:
            store.close()

    # -- what is written is read -------------------------------------------------------------------

    def test_is_a_store_by_key(self, engine: Open) -> None:
        store = engine().store
        assert store.slots == 0
        assert store.traits.readers >= 1
        assert store.traits.batch >= 1

    @pytest.mark.parametrize("large", [False, True])
    def test_another_engine_reads_what_one_wrote(self, engine: Open, large: bool) -> None:
        size = self.large_bytes if large else self.object_bytes
        first, second = engine(size=size), engine(size=size)
        first.put(1, 2, 3)
        assert first.read([3, 1, 2]) == [Fate.DONE] * 3
        assert second.find([1, 2, 3]) == [True] * 3
        assert second.read([2, 3, 1]) == [Fate.DONE] * 3

    def test_what_was_written_outlives_who_wrote_it(self, engine: Open) -> None:
        first = engine()
        first.put(1, 2)
        first.store.close()
        assert engine().read([1, 2]) == [Fate.DONE] * 2

    def test_batches_of_every_size(self, engine: Open) -> None:
        one = engine()
        start = 0
        for count in sorted({1, 2, 3, one.batch - 1, one.batch} - {0}):
            numbers = range(start, start + count)
            start += count
            one.put(*numbers)
            assert one.read(numbers) == [Fate.DONE] * count
        assert engine().read(range(start)) == [Fate.DONE] * start

    def test_a_store_that_works_says_so_to_a_probe(self, engine: Open) -> None:
        one = engine()
        assert one.store.probe(TIMEOUT), "an empty one, too"
        one.put(1)
        assert one.store.probe(TIMEOUT)

    def test_empty_calls(self, engine: Open) -> None:
        one = engine()
        assert list(one.store.read([], TIMEOUT)) == []
        assert list(one.store.write([], TIMEOUT)) == []
        assert list(one.store.find([], TIMEOUT) or ()) == []
        one.store.touch([])
        one.store.drop([])

    # -- what is not there -------------------------------------------------------------------------

    def test_a_chunk_that_nobody_wrote_is_gone(self, engine: Open) -> None:
        one = engine()
        assert one.find([1, 2]) == [False, False]
        assert one.read([1, 2]) == [Fate.GONE] * 2

    def test_a_batch_of_which_some_are_gone(self, engine: Open) -> None:
        one = engine()
        one.put(1, 3, 5)
        expected = [Fate.GONE, Fate.DONE, Fate.GONE, Fate.DONE, Fate.GONE, Fate.DONE]
        assert engine().read(range(6)) == expected
        assert one.read(range(6)) == expected

    def test_two_thousand_keys_are_answered_one_by_one_and_in_order(self, engine: Open) -> None:
        one = engine()
        there = {0, 1, 2, 700, 701, 1333, 1998, 1999}
        one.put(*sorted(there))
        numbers = list(reversed(range(2000)))
        assert engine().find(numbers) == [number in there for number in numbers]
        assert one.find(numbers[:1990]) == [number in there for number in numbers[:1990]]

    # -- who shares what ---------------------------------------------------------------------------

    def test_namespaces_do_not_meet(self, engine: Open) -> None:
        ours, others = engine(), engine(within=uuid.uuid4().hex)
        ours.put(1)
        assert others.find([1]) == [False]
        assert others.read([1]) == [Fate.GONE]
        others.put(1, version=7)
        assert ours.read([1]) == [Fate.DONE]
        assert others.read([1], version=7) == [Fate.DONE]

    def test_shards_do_not_meet(self, engine: Open) -> None:
        ours, others = engine(0), engine(1)
        ours.put(1, 2)
        assert others.find([1, 2]) == [False, False]
        assert others.read([1, 2]) == [Fate.GONE] * 2
        others.put(2)
        assert [each.read([2]) for each in (ours, others)] == [[Fate.DONE]] * 2
        assert others.read([1]) == [Fate.GONE]

    def test_keys_that_differ_in_one_bit_do_not_meet(self, engine: Open) -> None:
        one = engine()
        one.put(1)
        others = []
        for bit in (0, 7, 8, 8 * KEY_BYTES - 1):
            flipped = int.from_bytes(key(1), "little") ^ 1 << bit
            others.append(ChunkKey(flipped.to_bytes(KEY_BYTES, "little")))
        found = one.store.find([key(1), *others], TIMEOUT)
        assert found is not None
        assert list(map(bool, found)) == [True, *[False] * len(others)]

    def test_the_first_writer_wins_and_the_second_one_does_not_notice(self, engine: Open) -> None:
        first, second = engine(), engine()
        first.put(1, 2)
        second.put(1, 3, version=7)
        for each in (first, second, engine()):
            assert each.read([1, 2]) == [Fate.DONE] * 2
            assert each.read([3], version=7) == [Fate.DONE]
        first.put(1)

    def test_two_writers_at_once_leave_the_chunks_of_one(self, engine: Open) -> None:
        writers, reader = [engine(), engine()], engine()
        together = threading.Barrier(2)

        def write(who: int) -> None:
            for number in range(20):
                together.wait(TIMEOUT)
                writers[who].put(number, version=who)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, range(2)))
        buffers = Arena(1, self.object_bytes).buffers
        for number in range(20):
            assert reader.store.read([Piece(key(number), 0, buffers[0])], TIMEOUT) == [Fate.DONE]
            rows = buffers[0].tobytes()
            assert verify(buffers[0], key(number), 0, rows_of(self.object_bytes))
            writers[0].put(number, version=2)
            assert reader.store.read([Piece(key(number), 0, buffers[0])], TIMEOUT) == [Fate.DONE]
            end = OBJECT_HEADER_BYTES + rows_of(self.object_bytes)
            assert buffers[0].tobytes()[:end] == rows[:end], "an object has changed"

    # -- several threads ---------------------------------------------------------------------------

    def test_readers_and_a_writer_at_once(self, engine: Open) -> None:
        one = engine()
        one.put(*range(20))

        def ask(reader: int) -> None:
            for _ in range(5):
                numbers = np.random.default_rng(reader).permutation(20).tolist()
                assert one.read(numbers) == [Fate.DONE] * 20
                assert one.find([*numbers, 10_000]) == [*[True] * 20, False]

        with ThreadPoolExecutor(one.store.traits.readers + 1) as pool:
            asked = [pool.submit(ask, reader) for reader in range(one.store.traits.readers)]
            for number in range(100, 120):
                one.put(number)
                one.store.touch([(key(number), 0), (key(0), 0)])
            for each in asked:
                each.result()
        assert engine().read(range(100, 120)) == [Fate.DONE] * 20

    def test_a_chunk_is_visible_whole_or_not_at_all(self, engine: Open) -> None:
        writer, reader = (engine(size=self.large_bytes) for _ in range(2))
        count = 12
        seen: set[Fate] = set()
        with ThreadPoolExecutor(1) as pool:
            written = pool.submit(lambda: [writer.put(number) for number in range(count)])
            while not written.done():
                seen.update(reader.read(range(count)))
            written.result()
        assert seen <= {Fate.DONE, Fate.GONE}
        assert reader.read(range(count)) == [Fate.DONE] * count

    # -- what is damaged ---------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda content: b"", id="empty"),
            pytest.param(lambda content: content[:1], id="a byte"),
            pytest.param(lambda content: content[: len(content) // 2], id="half"),
            pytest.param(lambda content: content[:-1], id="one less"),
            pytest.param(lambda content: content + b"\xff", id="one more"),
            pytest.param(lambda content: content * 2, id="twice"),
        ],
    )
    def test_an_object_of_another_length_is_not_delivered(
        self, engine: Open, backing: Backing, change: Change
    ) -> None:
        one = engine()
        one.put(1, 2, 3)
        backing.change(one.tenant, key(2), change)
        for each in (one, engine()):
            arena = Arena(3, self.object_bytes)
            pieces = [Piece(key(n), 0, arena.buffers[n - 1]) for n in (1, 2, 3)]
            fates = each.store.read(pieces, TIMEOUT)
            arena.check()
            assert fates[1] in (Fate.CORRUPT, Fate.GONE)
            assert each.read([1, 3]) == [Fate.DONE] * 2
            assert [fates[0], fates[2]] == [Fate.DONE] * 2, "others of the batch are whole"

    def test_what_is_stored_is_read_each_time(self, engine: Open, backing: Backing) -> None:
        one = engine()
        one.put(1)
        assert one.read([1]) == [Fate.DONE]
        backing.change(one.tenant, key(1), lambda content: content[:100] + bytes(4) + content[104:])
        assert one.read([1]) == [Fate.CORRUPT]

    def test_what_an_engine_has_found_damaged_it_replaces(
        self, engine: Open, backing: Backing
    ) -> None:
        one, other = engine(), engine()
        one.put(1, 2)
        backing.change(one.tenant, key(1), lambda content: content[:100] + bytes(4) + content[104:])
        other.put(1)
        assert one.read([1]) == [Fate.CORRUPT], "who has not read it does not know"
        one.put(1, 2)
        assert other.read([1, 2]) == [Fate.DONE if self.replaces else Fate.CORRUPT, Fate.DONE]

    # -- what ends ---------------------------------------------------------------------------------

    def test_nothing_is_written_into_a_buffer_after_its_call(self, engine: Open) -> None:
        one = engine()
        one.put(1, 2, 3)
        arena = Arena(3, self.object_bytes)
        pieces = [Piece(key(n), 0, arena.buffers[n - 1]) for n in (1, 2, 3)]
        assert list(one.store.read(pieces, TIMEOUT)) == [Fate.DONE] * 3
        for buffer in arena.buffers:
            buffer[:] = _GUARD
        one.put(4)
        assert one.read([4, 1]) == [Fate.DONE] * 2
        one.store.close()
        for buffer in arena.buffers:
            assert (buffer == _GUARD).all()
        assert engine().read([1]) == [Fate.DONE], "nor is what was read from it meanwhile"

    def test_what_is_touched_stays_what_it_is(self, engine: Open) -> None:
        one = engine()
        one.put(1, 2)
        one.store.touch([(key(1), 0), (key(2), 0), (key(3), 0), (key(1), 0)])
        assert engine().find([1, 2, 3]) == [True, True, False]
        assert one.read([1, 2, 3]) == [Fate.DONE, Fate.DONE, Fate.GONE]

    def test_nothing_is_dropped(self, engine: Open) -> None:
        one = engine()
        one.put(1)
        one.store.drop([0, 1])
        assert engine().read([1]) == [Fate.DONE]

    def test_closes_twice(self, engine: Open) -> None:
        one, other = engine(), engine()
        one.put(1)
        one.store.close()
        one.store.close()
        assert other.read([1]) == [Fate.DONE]


def _cut(numbers: Sequence[int], batch: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), batch):
        yield numbers[start : start + batch]
