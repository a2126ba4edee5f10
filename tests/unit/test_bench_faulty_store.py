"""Guards what tests and benches of failing stores rest on: a faulty store does what it is told to,
the same for the same seed, and keeps the contract of stores where it is not told to break it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from disks import OBJECT, chunk, key, rows_of
from lamina_kv.bench.faulty_store import (
    FaultyStore,
    InjectedError,
    StoreFaults,
    make_tiers_fail,
)
from lamina_kv.data.far import FarTier
from lamina_kv.plan import TierName
from lamina_kv.tiers import KINDS
from lamina_kv.tiers.contract import Fate, Piece, Tenant
from lamina_kv.tiers.objects import verify
from stores import KIND, MemoryConfig, MemoryStore

MANY = 400


class Sleeps(list[float]):
    """Notes how long each sleep was to be, and does not sleep."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def faulty(
    faults: StoreFaults, count: int = 8, *, slots: int = 0, seed: int = 0
) -> tuple[FaultyStore, Sleeps]:
    """A store that had no fault while its ``count`` chunks were written."""
    sleeps = Sleeps()
    store = FaultyStore(MemoryStore(slots=slots), seed=seed, sleep=sleeps)
    assert set(write(store, count)) <= {Fate.DONE}
    store.faults = faults
    sleeps.clear()
    return store, sleeps


def write(store: FaultyStore, count: int) -> Sequence[Fate]:
    return store.write([Piece(key(n), n, chunk(n)) for n in range(count)], 10.0)


def read(store: FaultyStore, numbers: Sequence[int], timeout: float = 10.0) -> list[Fate]:
    """The fates of chunks; what is not what was written is CORRUPT, as in the data room."""
    pieces = [Piece(key(n), n, np.full(OBJECT, 7, np.uint8)) for n in numbers]
    fates = list(store.read(pieces, timeout))
    for index, piece in enumerate(pieces):
        if fates[index] is Fate.DONE and not verify(piece.buffer, piece.key, 0, rows_of(OBJECT)):
            fates[index] = Fate.CORRUPT
    return fates


def test_without_faults_it_is_the_store() -> None:
    store, sleeps = faulty(StoreFaults())
    assert read(store, [0, 3]) == [Fate.DONE, Fate.DONE]
    assert read(store, [99]) == [Fate.GONE]
    assert store.find([key(1), key(99)], 1.0) == [True, False]
    assert not sleeps
    store.close()
    assert store.inner.closed


@pytest.mark.parametrize("batch", [1, 4])
def test_bytes_take_their_time_and_calls_share_it(batch: int) -> None:
    store, sleeps = faulty(StoreFaults(latency=0.5, bandwidth=OBJECT))
    assert read(store, range(batch)) == [Fate.DONE] * batch
    assert sleeps == pytest.approx([0.5 + batch], abs=0.2)
    assert read(store, [5]) == [Fate.DONE]
    assert sleeps[1] == pytest.approx(0.5 + batch + 1, abs=0.2), "it waits for those before it"


def test_what_does_not_come_in_time_is_late_and_no_byte_of_it_comes() -> None:
    store, sleeps = faulty(StoreFaults(bandwidth=OBJECT))
    assert read(store, range(4), timeout=2.5) == [Fate.DONE, Fate.DONE, Fate.LATE, Fate.LATE]
    assert sleeps == [2.5]
    store.faults = StoreFaults(latency=3.0)
    buffer = np.zeros(OBJECT, np.uint8)
    assert store.read([Piece(key(0), 0, buffer)], 1.0) == [Fate.LATE]
    assert not buffer.any()
    assert store.find([key(0)], 1.0) is None
    assert store.write([Piece(key(50), 50, chunk(50))], 1.0) == [Fate.LATE]
    assert sleeps[1:] == [1.0, 1.0, 1.0]
    store.faults = StoreFaults()
    assert read(store, [50]) == [Fate.GONE]


def test_a_call_that_hangs_outlasts_its_timeout() -> None:
    store, sleeps = faulty(StoreFaults(hangs=1.0, hang=40.0))
    assert read(store, [0], timeout=1.0) == [Fate.DONE]
    assert sleeps == [40.0]


def test_latency_has_the_median_and_the_tail_that_were_asked_for() -> None:
    faults = StoreFaults(latency=0.002, tail=0.050)
    store, sleeps = faulty(faults)
    for _ in range(4000):
        store.find([key(0)], 10.0)
    took = np.sort(sleeps)
    assert np.median(took) == pytest.approx(0.002, rel=0.1)
    assert np.quantile(took, 0.99) == pytest.approx(0.050, rel=0.3)
    assert len(set(took)) > 3000


@pytest.mark.parametrize("fate", [Fate.LATE, Fate.REFUSED, Fate.DOWN, Fate.GONE])
def test_errors_come_as_often_as_they_were_asked_for(fate: Fate) -> None:
    store, _ = faulty(StoreFaults(unread={Fate.CORRUPT: 0.1, fate: 0.3}), MANY)
    fates = read(store, range(MANY))
    assert fates.count(fate) == pytest.approx(0.3 * MANY, rel=0.3)
    assert fates.count(Fate.CORRUPT) == pytest.approx(0.1 * MANY, rel=0.5)
    assert store.struck[f"unread {fate}"] == fates.count(fate)


@pytest.mark.parametrize("slots", [0, MANY])
def test_what_is_not_written_is_not_there(slots: int) -> None:
    store, _ = faulty(StoreFaults(unwritten={Fate.REFUSED: 0.5}), 0, slots=slots)
    written = write(store, MANY)
    store.faults = StoreFaults()
    for fate, after in zip(written, read(store, range(MANY)), strict=True):
        assert (fate, after) in {(Fate.DONE, Fate.DONE), (Fate.REFUSED, Fate.GONE)}
    assert 0.3 * MANY < written.count(Fate.REFUSED) < 0.7 * MANY


def test_a_chunk_that_vanishes_is_promised_and_then_gone_until_it_is_written_again() -> None:
    store, _ = faulty(StoreFaults(vanishes=1.0), 2)
    assert store.find([key(0)], 1.0) == [True]
    assert read(store, [0]) == [Fate.GONE]
    store.faults = StoreFaults()
    assert store.find([key(0), key(1)], 1.0) == [False, True]
    assert read(store, [0, 1]) == [Fate.GONE, Fate.DONE]
    write(store, 1)
    assert read(store, [0]) == [Fate.DONE]


def test_a_store_may_not_keep_what_it_has_written_and_deny_what_it_keeps() -> None:
    store, _ = faulty(StoreFaults(unkept=1.0), 0)
    assert set(write(store, 4)) == {Fate.DONE}
    assert set(read(store, range(4))) == {Fate.GONE}
    store.faults = StoreFaults(unsure=1.0)
    assert Fate.DONE not in write(store, 4)
    assert set(read(store, range(4))) == {Fate.DONE}


def test_wrong_bytes_are_said_to_be_right_and_are_never_right() -> None:
    store, _ = faulty(StoreFaults(wrong=1.0), 50)
    fates = read(store, range(50))
    assert set(fates) == {Fate.CORRUPT}
    assert store.struck["wrong"] == 50
    store.faults = StoreFaults()
    assert set(read(store, range(50))) == {Fate.DONE}, "what the store holds is not touched"


def test_answers_lie_or_do_not_come_and_calls_raise() -> None:
    store, _ = faulty(StoreFaults(lies=1.0), 1)
    assert store.find([key(0), key(9)], 1.0) == [False, True]
    store.faults = StoreFaults(unanswered=1.0)
    assert store.find([key(0)], 1.0) is None
    store.faults = StoreFaults(raises=1.0)
    for call in (store.find, lambda keys, timeout: read(store, [0]), lambda *_: write(store, 1)):
        with pytest.raises(InjectedError):
            call([key(0)], 1.0)


def test_bytes_that_come_too_late_come_after_the_call() -> None:
    """What no store may do: the data room would have given the slot to another chunk."""
    store, _ = faulty(StoreFaults(overruns=1.0, overrun=0.05))
    tier = FarTier(TierName("far"), store, shard=0, length=rows_of(OBJECT), timeout=1.0)
    slot = np.zeros(OBJECT, np.uint8)
    assert tier.read([Piece(key(0), 0, slot)]) == [Fate.LATE]
    assert not verify(slot, key(0), 0, rows_of(OBJECT))
    give_up = time.monotonic() + 30
    while not verify(slot, key(0), 0, rows_of(OBJECT)):
        assert time.monotonic() < give_up
        time.sleep(0.01)
    store.faults = replace(store.faults, overrun=60.0)
    tier.read([Piece(key(1), 0, slot)])
    tier.close()
    assert not verify(slot, key(1), 0, rows_of(OBJECT)), "nothing comes after the store was closed"


def test_the_same_seed_has_the_same_chunks_fail_in_any_order() -> None:
    faults = StoreFaults(unread={Fate.DOWN: 0.3}, wrong=0.2)
    runs = []
    for seed, order in ((1, range(40)), (1, range(39, -1, -1)), (2, range(40))):
        store, _ = faulty(faults, 40, seed=seed)
        runs.append({n: read(store, [n]) + read(store, [n]) for n in order})
    assert runs[0] == runs[1] != runs[2]
    assert any(first != again for first, again in runs[0].values()), "a retry may go well"


def test_every_tier_that_is_opened_can_be_made_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina_kv.bench.faulty_store.KINDS", kinds := {**KINDS, "memory": KIND})
    make_tiers_fail(StoreFaults(unwritten={Fate.REFUSED: 1.0}))
    tenant = Tenant("ab" * 16, {}, 0, 1, OBJECT, 0)
    store = kinds["memory"].open(MemoryConfig(name="faulty"), tenant)
    assert store.write([Piece(key(0), 0, chunk(0))], 1.0) == [Fate.REFUSED]
    assert kinds["disk"].config is KINDS["disk"].config


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bandwidth": 0.0}, "positive bandwidth"),
        ({"latency": -1.0}, "negative latency"),
        ({"latency": 0.02, "tail": 0.01}, "tail of 0.01"),
        ({"tail": 0.01}, "median latency above 0"),
    ],
)
def test_figures_that_make_no_sense_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StoreFaults(**wrong)  # type: ignore[arg-type]
