"""Whatever a store does: every move and question gets its receipt, nothing that is not the chunk
counts as read, drops happen before writes, and what requests wait for goes first."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pytest
import torch

from lamina_kv.data import moving
from lamina_kv.data.far import FarTier
from lamina_kv.data.moving import MovePipeline
from lamina_kv.data.near import NearSlab
from lamina_kv.data.threads import Threads
from lamina_kv.geometry import OBJECT_HEADER_BYTES, CacheGeometry, Row
from lamina_kv.keys import KEY_BYTES
from lamina_kv.observe.timeline import Lane, Timeline
from lamina_kv.plan import (
    Ask,
    ChunkKey,
    Move,
    Outcome,
    TierName,
    TierOrders,
    TransferId,
    TransferReceipt,
)
from lamina_kv.tiers.contract import Fate, Piece
from stores import Faults, MemoryStore, Shelf

PATIENCE = 60.0
"""Seconds after which something hangs."""
SLOTS, FAR = 16, TierName("far")
GEOMETRY = CacheGeometry(
    rows=tuple(Row((f"layer.{i}",), 0, i * 8 * size, size, size) for i, size in enumerate((96, 8))),
    num_blocks=8,
    block_tokens=16,
    chunk_tokens=32,
    allocation_bytes=(10_000,),
)


class Store(MemoryStore):
    """Notes how it is called, and lets a test step in.

    Attributes:
        calls: verbs and their pieces' keys or places, in order.
        damaged: what was said of each piece that was written.
        on: called in a call of that name, with its pieces.
    """

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.calls: list[tuple[str, list[object]]] = []
        self.damaged: list[bool] = []
        self.on: dict[str, Callable[[], object]] = {}

    def _note(self, verb: str, what: Iterable[object]) -> None:
        self.calls.append((verb, list(what)))
        self.on.get(verb, lambda: None)()

    def find(self, keys: Sequence[ChunkKey], timeout: float) -> Sequence[bool] | None:
        self._note("find", map(number, keys))
        return super().find(keys, timeout)

    def probe(self, timeout: float) -> bool:
        self._note("probe", ())
        return super().probe(timeout)

    def read(self, pieces: Sequence[Piece], timeout: float) -> Sequence[Fate]:
        self._note("read", (number(piece.key) for piece in pieces))
        return super().read(pieces, timeout)

    def write(self, pieces: Sequence[Piece], timeout: float) -> Sequence[Fate]:
        self._note("write", (number(piece.key) for piece in pieces))
        self.damaged += (piece.damaged for piece in pieces)
        return super().write(pieces, timeout)

    def drop(self, slots: Sequence[int]) -> None:
        self._note("drop", slots)
        super().drop(slots)

    def touch(self, uses: Sequence[tuple[ChunkKey, int]]) -> None:
        self._note("touch", (number(key) for key, _ in uses))
        super().touch(uses)

    def verbs(self) -> list[str]:
        return [verb for verb, _ in self.calls]


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(KEY_BYTES, "little"))


def number(key: ChunkKey) -> int:
    return int.from_bytes(key, "little")


def move(number: int, near: int, far: int | None = None, transfer: int = 0) -> Move:
    return Move(
        TransferId(transfer or number), key(number), near, number if far is None else far
    )  # fmt: skip


class Rig:
    """A near tier with different bytes in every slot, and a far one behind a pipeline."""

    def __init__(self, store: Store, shard: int = 3, threads: Threads | None = None) -> None:
        self.store = store
        size = SLOTS * GEOMETRY.object_bytes
        self.near = NearSlab(GEOMETRY, size, lambda size: torch.zeros(size, dtype=torch.uint8))
        for slot in range(SLOTS):
            self.fill(slot, slot)
        self.receipts: queue.Queue[TransferReceipt] = queue.Queue()
        self.timeline = Timeline()
        self.tier = FarTier(
            FAR, store, shard=shard, length=GEOMETRY.chunk_bytes, timeout=PATIENCE
        )  # fmt: skip
        self.pipeline = MovePipeline(
            self.tier, self.near, self._report, threads=threads, timeline=self.timeline
        )

    def _report(self, receipts: Iterable[TransferReceipt]) -> None:
        for receipt in receipts:
            self.receipts.put(receipt)

    def fill(self, slot: int, seed: int) -> None:
        rows = self.rows(slot)
        rows[:] = np.random.default_rng(seed).integers(0, 256, len(rows), np.uint8)

    def rows(self, slot: int) -> np.ndarray:
        return self.near.object(slot)[OBJECT_HEADER_BYTES:][: GEOMETRY.chunk_bytes]

    def order(
        self,
        *,
        drops: tuple[int, ...] = (),
        outward: tuple[Move, ...] = (),
        inward: tuple[Move, ...] = (),
        asks: tuple[Ask, ...] = (),
        touches: tuple[tuple[ChunkKey, int], ...] = (),
        probe: TransferId | None = None,
    ) -> None:
        orders = TierOrders(FAR, drops, outward, inward, asks, touches, probe)
        self.pipeline.carry_out(orders, step=1)

    def settle(self, count: int) -> dict[int, TransferReceipt]:
        got = [self.receipts.get(timeout=PATIENCE) for _ in range(count)]
        assert self.receipts.empty()
        return {int(receipt.transfer): receipt for receipt in got}

    def write(self, *numbers: int) -> None:
        """Chunks ``numbers``, from near slots of that number, to far slots of that number."""
        self.order(outward=tuple(move(n, n, transfer=1000 + n) for n in numbers))
        receipts = self.settle(len(numbers)).values()
        assert {receipt.outcome for receipt in receipts} == {Outcome.DONE}

    def close(self) -> None:
        assert self.pipeline.close(PATIENCE)


@pytest.fixture(params=[0, SLOTS], ids=["by key", "slots"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(Store(slots=request.param, readers=2, batch=4))
    yield rig
    rig.close()


def until(done: Callable[[], object]) -> None:
    due = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < due
        time.sleep(0.001)


# -- what goes well ----------------------------------------------------------------------------


def test_what_went_out_comes_back(rig: Rig) -> None:
    rig.write(1, 2, 5)
    rig.order(inward=(move(5, near=9), move(1, near=8), move(2, near=7)))
    receipts = rig.settle(3)
    assert {n: r.outcome for n, r in receipts.items()} == dict.fromkeys((5, 1, 2), Outcome.DONE)
    assert {r.moved_bytes for r in receipts.values()} == {GEOMETRY.chunk_bytes}
    assert all(r.seconds > 0 and not r.lost and not r.reason for r in receipts.values())
    for slot, number in ((9, 5), (8, 1), (7, 2)):
        assert rig.rows(slot).tobytes() == rig.rows(number).tobytes()
        assert rig.rows(slot).any()
    lanes = [span.lane for span in rig.timeline.spans()]
    assert set(lanes) == {Lane.WRITE, Lane.FETCH}


@pytest.mark.parametrize("inward", [True, False])
def test_a_move_takes_from_its_order_to_its_outcome_whatever_it_shares_a_call_with(
    inward: bool,
) -> None:
    """Control learns from it how long a tier needs: moves that are ordered together, and go by two
    in three calls, keep it busy three times as long as one call."""
    call = 0.05
    rig = Rig(Store(readers=1, batch=2))
    rig.write(*range(6))
    rig.store.on["read" if inward else "write"] = lambda: time.sleep(call)
    moves = tuple(move(n, n) for n in range(6))
    rig.order(**{"inward" if inward else "outward": moves})
    receipts = rig.settle(6)
    rig.close()
    calls = [verb for verb, _ in rig.store.calls[-3:]]
    assert calls == ["read" if inward else "write"] * 3
    for n in range(6):
        assert receipts[n].seconds >= call * (n // 2 + 1)
        assert call / 2 <= receipts[n].active <= receipts[n].seconds


def test_a_question_has_one_answer_a_chunk(rig: Rig) -> None:
    rig.write(1, 3)
    rig.order(asks=(Ask(TransferId(9), tuple(map(key, (1, 2, 3)))), Ask(TransferId(8), ())))
    receipts = rig.settle(2)
    assert [r.outcome for r in receipts.values()] == [Outcome.DONE] * 2
    assert receipts[9].present == b"\1\0\1"
    assert receipts[8].present == b""


@pytest.mark.parametrize("works", [True, False])
def test_a_probe_says_whether_the_store_works(
    rig: Rig, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rig.store, "probe", lambda timeout: works)
    rig.order(probe=TransferId(9))
    (receipt,) = rig.settle(1).values()
    assert receipt.outcome is (Outcome.DONE if works else Outcome.FAILED)
    assert receipt.reason == ("" if works else "no_answer")


def test_batches_are_no_larger_than_a_store_likes_and_readers_share(rig: Rig) -> None:
    rig.write(*range(10))
    assert [len(keys) for verb, keys in rig.store.calls if verb == "write"] == [4, 4, 2]
    together = threading.Barrier(2)
    rig.store.on["read"] = lambda: together.wait(PATIENCE)
    rig.order(inward=(move(1, 11), move(2, 12)))
    assert len(rig.settle(2)) == 2, "each of two readers took one"
    del rig.store.on["read"]
    rig.order(inward=tuple(move(n, n) for n in range(10)))
    rig.settle(10)
    assert max(len(keys) for verb, keys in rig.store.calls if verb == "read") <= 4


def test_a_store_is_told_of_uses_though_it_has_nothing_else_to_do(rig: Rig) -> None:
    rig.write(1, 2)
    rig.order(touches=((key(1), 1),))
    until(lambda: "touch" in rig.store.verbs())
    assert [keys for verb, keys in rig.store.calls if verb == "touch"] == [[1]]


# -- what a store may not deliver ----------------------------------------------------------------


def test_a_chunk_that_is_not_there_is_lost_and_the_others_come(rig: Rig) -> None:
    rig.write(1, 2)
    rig.order(inward=(move(1, near=9), move(7, near=8), move(2, near=7)))
    receipts = rig.settle(3)
    gone = receipts.pop(7)
    assert (gone.outcome, gone.reason, gone.lost, gone.moved_bytes) == (
        Outcome.FAILED,
        "gone",
        True,
        0,
    )
    assert {r.outcome for r in receipts.values()} == {Outcome.DONE}


class Damage(Faults):
    """Bytes that were not written."""

    def __init__(self, position: int) -> None:
        self.position = position

    def content(self, key: ChunkKey, content: bytes) -> bytes:
        changed = bytearray(content)
        changed[self.position] ^= 1
        return bytes(changed)


LAST = OBJECT_HEADER_BYTES + GEOMETRY.chunk_bytes - 1


@pytest.mark.parametrize("position", [0, 9, OBJECT_HEADER_BYTES - 1, OBJECT_HEADER_BYTES, LAST])
def test_no_byte_is_believed(rig: Rig, position: int) -> None:
    rig.write(1)
    rig.store.faults = Damage(position)
    rig.order(inward=(move(1, near=9),))
    receipt = rig.settle(1)[1]
    assert (receipt.outcome, receipt.reason, receipt.lost) == (Outcome.FAILED, "corrupt", True)


def test_what_was_found_damaged_is_said_to_the_store_when_it_is_written_again(rig: Rig) -> None:
    rig.write(1, 2)
    rig.store.faults = Damage(LAST)
    rig.order(inward=(move(1, near=9),))
    assert rig.settle(1)[1].reason == "corrupt"
    rig.store.faults = Faults()
    rig.store.damaged.clear()
    rig.write(1, 2)
    rig.write(1)
    assert rig.store.damaged == [True, False, False], "once"


def test_that_chunks_are_damaged_is_said_once(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.write(1, 2)
    rig.store.faults = Damage(LAST)
    rig.order(inward=(move(1, near=9), move(2, near=10)))
    assert {receipt.reason for receipt in rig.settle(2).values()} == {"corrupt"}
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "is not what was written" in said


def test_neither_another_chunk_nor_another_ranks_part_is_believed(rig: Rig) -> None:
    rig.write(1)
    held = rig.store.shelf.held
    ((where, (_, content)),) = held.items()
    held[2 if rig.store.slots else key(2)] = (key(2), content)
    rig.order(inward=(move(2, near=9),))
    assert rig.settle(1)[2].reason == "corrupt"
    other = Rig(Store(shelf=Shelf({where: (key(1), content)}), slots=rig.store.slots), shard=4)
    other.order(inward=(move(1, near=9),))
    assert other.settle(1)[1].reason == "corrupt"
    other.close()


class Fated(Faults):
    """Chunks of which nothing good becomes."""

    def __init__(self, **fates: Fate) -> None:
        self.fates = fates

    def fate(self, verb: str, key: ChunkKey) -> Fate:
        return self.fates.get(verb, Fate.DONE)


@pytest.mark.parametrize("fate", [fate for fate in Fate if fate is not Fate.DONE])
def test_a_fate_is_the_reason_and_only_what_can_never_come_is_lost(rig: Rig, fate: Fate) -> None:
    rig.write(1)
    rig.store.faults = Fated(read=fate, write=fate)
    rig.order(inward=(move(1, near=9),), outward=(move(2, near=2),))
    receipts = rig.settle(2)
    assert {r.outcome for r in receipts.values()} == {Outcome.FAILED}
    assert {r.reason for r in receipts.values()} == {fate.value}
    assert receipts[1].lost is (fate in (Fate.GONE, Fate.CORRUPT))
    assert not receipts[2].lost, "its source is near"


def test_a_store_that_cannot_tell_fails_the_question(rig: Rig) -> None:
    rig.store.faults = Fated(find=Fate.DOWN)
    rig.order(asks=(Ask(TransferId(9), (key(1),)),))
    receipt = rig.settle(1)[9]
    assert (receipt.outcome, receipt.present, receipt.reason) == (Outcome.FAILED, b"", "no_answer")


@pytest.mark.parametrize("error", [ZeroDivisionError("a fault"), SystemExit(1)])
def test_a_store_that_raises_fails_what_it_was_given_and_says_so_once(
    rig: Rig, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error

    rig.write(1)
    rig.store.on = dict.fromkeys(("find", "read", "write", "drop", "probe"), fail)
    for _ in range(2):
        rig.order(
            drops=(3,),
            outward=(move(2, near=2),),
            inward=(move(1, near=9),),
            asks=(Ask(TransferId(5), (key(1),)),),
            probe=TransferId(6),
        )
        receipts = rig.settle(4)
        assert {r.outcome for r in receipts.values()} == {Outcome.FAILED}
        assert {r.reason for r in receipts.values()} == {type(error).__name__}
        assert not any(r.lost for r in receipts.values())
    rig.store.on.clear()
    rig.order(inward=(move(1, near=9),), outward=(move(2, near=2),))
    assert {r.outcome for r in rig.settle(2).values()} == {Outcome.DONE}
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 5, "once for each verb"
    assert all("tier far" in record.getMessage() for record in said)


@pytest.mark.parametrize("verb", ["find", "read", "write"])
def test_a_store_with_too_few_answers_has_given_none(
    rig: Rig, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.write(1, 2)
    answer: dict[str, list[object]] = {"find": [True], "read": [Fate.DONE], "write": [Fate.DONE]}
    monkeypatch.setattr(rig.store, verb, lambda *_: answer[verb])
    if verb == "find":
        rig.order(asks=(Ask(TransferId(5), (key(1), key(2))),))
    else:
        moves = (move(1, near=9), move(2, near=8))
        monkeypatch.setattr(rig.pipeline, "_readers", 1)  # both in one call
        rig.order(**{"inward" if verb == "read" else "outward": moves})  # type: ignore[arg-type]
    receipts = rig.settle(1 if verb == "find" else 2)
    assert {r.outcome for r in receipts.values()} == {Outcome.FAILED}


# -- order -----------------------------------------------------------------------------------------


def test_slots_are_forgotten_before_they_are_written_again(rig: Rig) -> None:
    rig.write(1)
    rig.store.calls.clear()
    rig.order(drops=(1, 4), outward=(move(2, near=2, far=1),))
    rig.settle(1)
    assert rig.store.calls == [("drop", [1, 4]), ("write", [2])]


def test_a_slot_that_is_dropped_and_filled_while_others_are_dropped_is_filled_at_last(
    rig: Rig,
) -> None:
    def while_it_drops() -> None:
        rig.store.on.pop("drop")
        rig.order(drops=(7,))
        rig.order(outward=(move(1, near=1, far=7),))

    rig.store.on["drop"] = while_it_drops
    rig.order(drops=(5,))
    assert rig.settle(1)[1].outcome is Outcome.DONE
    verbs = rig.store.verbs()
    assert verbs == ["drop", "drop", "write"]


def test_reads_go_before_writes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "GIVE_WAY", PATIENCE)
    rig.write(1)
    go_on = threading.Event()
    rig.store.on["read"] = lambda: go_on.wait(PATIENCE)
    rig.order(inward=(move(1, near=9),), outward=(move(2, near=2),))
    time.sleep(0.1)
    assert "write" not in rig.store.verbs()[1:]
    go_on.set()
    rig.settle(2)


def test_a_tier_that_is_always_read_is_written_all_the_same(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "GIVE_WAY", 0.01)
    rig.write(1)
    go_on = threading.Event()
    rig.store.on["read"] = lambda: go_on.wait(PATIENCE)
    rig.order(inward=(move(1, near=9),), outward=(move(2, near=2),))
    assert list(rig.settle(1)) == [2]
    go_on.set()
    rig.settle(1)


def test_a_question_goes_before_what_waits_to_be_read(rig: Rig) -> None:
    rig.write(*range(8))
    go_on = threading.Semaphore(0)
    rig.store.on["read"] = lambda: go_on.acquire(timeout=PATIENCE)
    rig.order(inward=tuple(move(n, near=n) for n in range(8)))
    until(lambda: rig.store.verbs().count("read") == 2)
    rig.order(asks=(Ask(TransferId(99), (key(1),)),))
    go_on.release()
    until(lambda: "find" in rig.store.verbs())
    verbs = [verb for verb in rig.store.verbs() if verb != "write"]
    assert verbs[:3] == ["read", "read", "find"]
    go_on.release(20)
    rig.settle(9)


# -- threads that hang or die ----------------------------------------------------------------------


def test_a_call_that_hangs_holds_up_one_reader(rig: Rig) -> None:
    rig.write(1, 2, 3)
    go_on, first = threading.Event(), threading.Lock()

    def hang() -> None:
        if first.acquire(blocking=False):
            go_on.wait(PATIENCE)

    rig.store.on["read"] = hang
    rig.order(inward=(move(1, near=9),))
    until(lambda: "read" in rig.store.verbs())
    rig.order(inward=(move(2, near=8), move(3, near=7)), outward=(move(4, near=4),))
    assert set(rig.settle(3)) == {2, 3, 4}
    assert not rig.pipeline.close(0.05)
    assert not rig.store.closed, "a thread still uses it"
    go_on.set()
    rig.settle(1)


def test_closing_writes_what_is_queued_and_reads_nothing_more(rig: Rig) -> None:
    rig.write(*range(6))
    go_on = threading.Event()
    rig.store.on = dict.fromkeys(("read", "write"), lambda: go_on.wait(PATIENCE))
    rig.order(inward=tuple(move(n, near=n) for n in range(6)))
    until(lambda: rig.store.verbs().count("read") == 2)
    assert rig.pipeline.depth == 1, "of six chunks the first reader took three, the second two"
    rig.order(outward=tuple(move(n, near=n) for n in range(6, 12)))
    assert not rig.pipeline.close(0)
    go_on.set()
    rig.close()
    assert rig.store.closed
    assert {n for verb, keys in rig.store.calls if verb == "write" for n in keys} == set(range(12))
    read = sum(len(keys) for verb, keys in rig.store.calls if verb == "read")
    assert read < 6


def test_threads_that_cannot_begin_fail_everything_but_drops(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Damaged chunks would be found after a restart."""

    def cannot_begin() -> None:
        raise RuntimeError("no device")

    whole = Rig(Store(slots=SLOTS))
    whole.write(1, 2)
    rig = Rig(Store(shelf=whole.store.shelf, slots=SLOTS), threads=Threads(enter=cannot_begin))
    rig.order(
        drops=(1,),
        outward=(move(3, near=3),),
        inward=(move(2, near=9),),
        asks=(Ask(TransferId(5), (key(2),)),),
    )
    receipts = rig.settle(3)
    assert {r.outcome for r in receipts.values()} == {Outcome.FAILED}
    assert {r.reason for r in receipts.values()} == {"RuntimeError"}
    assert set(whole.store.shelf.held) == {2}
    rig.close()
    whole.close()
    assert sum("no thread of" in record.message for record in caplog.records) == 2


def test_a_store_that_is_lost_while_it_is_written_to_still_forgets(rig: Rig) -> None:
    rig.write(1, 2)
    rig.store.faults = Fated(write=Fate.DOWN)
    rig.order(drops=(1,), outward=(move(3, near=3),))
    assert rig.settle(1)[3].reason == "down"
    rig.order(drops=(2,))
    until(lambda: rig.store.verbs().count("drop") == 2)
    if rig.store.slots:
        assert not rig.store.shelf.held


# -- many ------------------------------------------------------------------------------------------


def test_chunks_that_come_and_go_at_once_do_not_mix(rig: Rig) -> None:
    rig.write(0, 1, 2, 3)
    for _ in range(100):
        rig.order(
            inward=tuple(move(n, near=n) for n in range(4)),
            outward=tuple(move(n, near=n) for n in range(4, 8)),
        )
        receipts = rig.settle(8)
        assert {r.outcome for r in receipts.values()} == {Outcome.DONE}
    for slot in range(8):
        expected = np.random.default_rng(slot).integers(
            0, 256, GEOMETRY.chunk_bytes, np.uint8
        )  # fmt: skip
        assert rig.rows(slot).tobytes() == expected.tobytes()
