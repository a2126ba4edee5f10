"""Ranks that have a scheduler each: they decide alike, or say that they do not before a token is
wrong; and nobody waits for a rank that has failed."""

from __future__ import annotations

import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_engine_example import EXAMPLE, QUESTIONS
from test_replicas import Gathering

from lamina_kv.data.movers.cpu import CpuMover
from lamina_kv.engines.ranks import Ranks, RanksError
from lamina_kv.engines.standalone import LoadFailed
from lamina_kv.plan import LoadMode, LoadOrder, PageMap, TransferId
from lamina_kv.tiers.contract import StoreError

SETTINGS: dict[str, object] = {"load": {"when": "always"}, "host": {"capacity": "1MiB"}}


@pytest.fixture(scope="module")
def engine_of() -> Callable[..., Any]:
    """The example for authors of engines."""
    kind: Callable[..., Any] = runpy.run_path(str(EXAMPLE))["TinyEngine"]
    return kind


@pytest.fixture
def threads() -> Gathering:
    return Gathering(2)


@pytest.fixture
def cannot_copy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Has every load of an engine fail from now on, and no other engine's."""
    broken: list[Any] = []
    load = CpuMover.load

    def fail(mover: Any, *args: Any, **how: Any) -> Any:
        if mover in broken:
            raise OSError("not on this rank")
        return load(mover, *args, **how)

    monkeypatch.setattr(CpuMover, "load", fail)
    return lambda engine: broken.append(engine.lamina._executor._mover)


def ranks_of(threads: Gathering, rank: int) -> Ranks:
    return Ranks(rank, threads.of(rank), neighbours=threads.ranks)


@pytest.fixture
def left() -> Callable[[], set[threading.Thread]]:
    """Threads that were not there before the test."""
    before = set(threading.enumerate())
    return lambda: set(threading.enumerate()) - before


@pytest.mark.parametrize("mode", ["parked", "layerwise", "auto"])
def test_ranks_load_what_each_has_saved(
    engine_of: Any, threads: Gathering, mode: str, tmp_path: Path
) -> None:
    settings = SETTINGS | {
        "load": {"mode": mode, "when": "always"},
        "tiers": [{"kind": "disk", "path": str(tmp_path), "capacity": "16MiB"}],
    }
    alone = engine_of(settings)  # what it leaves in rank 0's shard is not in the other's
    expected = alone.generate(QUESTIONS)
    alone.lamina.close()

    def work(rank: int) -> Any:
        engine = engine_of(settings, ranks_of(threads, rank))
        first, computed = engine.generate(QUESTIONS), engine.computed
        again, more = engine.generate(QUESTIONS), engine.computed - computed
        left = +engine.pool.references
        engine.lamina.close()
        engine = engine_of(settings, ranks_of(threads, rank))
        after, restarted = engine.generate(QUESTIONS), engine.computed
        engine.lamina.close()
        return [first, again, after], computed, more, restarted, left

    for said in threads.together(work):
        assert isinstance(said, tuple), said
        answers, computed, more, restarted, left = said
        assert answers == [expected] * 3
        assert computed == alone.computed
        assert more < 0.2 * computed
        assert restarted < 0.2 * computed
        assert not left


def test_what_one_rank_has_lost_is_lost_for_all(
    engine_of: Any, threads: Gathering, cannot_copy: Callable[[Any], None]
) -> None:
    """Rank 1 cannot copy: no request runs on what only rank 0 has."""
    settings = SETTINGS | {"load": {"mode": "parked", "when": "always"}}

    def work(rank: int) -> Any:
        engine = engine_of(settings, ranks_of(threads, rank))
        if rank:
            cannot_copy(engine)
        first, computed = engine.generate(QUESTIONS), engine.computed
        again = engine.generate(QUESTIONS)
        recomputed = engine.computed - computed
        engine.lamina.close()
        return first == again, recomputed == computed

    assert threads.together(work) == [(True, True)] * 2


def test_a_load_that_fails_in_the_step_of_one_rank_fails_it_on_all(
    engine_of: Any, threads: Gathering, cannot_copy: Callable[[Any], None]
) -> None:
    settings = SETTINGS | {"load": {"mode": "layerwise", "when": "always"}}

    def work(rank: int) -> Any:
        engine = engine_of(settings, ranks_of(threads, rank))
        engine.generate(QUESTIONS)
        if rank:
            cannot_copy(engine)
        try:
            engine.generate(QUESTIONS)
        finally:
            engine.lamina.close()

    assert [type(error) for error in threads.together(work)] == [LoadFailed] * 2


def test_plans_that_differ_are_not_carried_out(engine_of: Any, threads: Gathering) -> None:
    """Rank 1 was asked something else: what it would load belongs to other tokens."""

    def work(rank: int) -> Any:
        engine = engine_of(SETTINGS, ranks_of(threads, rank))
        engine.generate(QUESTIONS)
        began: list[object] = []
        start = engine.lamina._executor.start_loads
        engine.lamina._executor.start_loads = lambda: (began.append(rank), start())
        try:
            engine.generate([QUESTIONS[rank]])
        except RanksError as error:
            return str(error), began
        finally:
            engine.lamina.close()

    for said, began in threads.together(work):
        assert "before a step, rank 1 differs from rank 0" in said
        assert not began


def test_after_an_error_there_is_nothing_but_that(threads: Gathering) -> None:
    """Planners that differ would go on to, in the library's next session."""

    def work(rank: int) -> Any:
        ranks = ranks_of(threads, rank)
        with pytest.raises(RanksError) as first:
            ranks.agree("before a step", rank)
        with pytest.raises(RanksError) as again:
            ranks.tell("after a step", None)
        return first.value is again.value

    assert threads.together(work) == [True, True]


def test_long_plans_are_compared_to_the_last_number(threads: Gathering) -> None:
    def work(rank: int) -> Any:
        near = np.arange(5000, dtype=np.int32)
        near[2500] += rank
        order = LoadOrder(
            TransferId(1), "a", LoadMode.PARKED, (PageMap(0, near, np.arange(5000)),), 1.0
        )
        ranks_of(threads, rank).agree("before a step", order)

    for error in threads.together(work):
        assert isinstance(error, RanksError)
        assert "2501" in str(error)


def test_ranks_that_are_at_different_places(threads: Gathering) -> None:
    def work(rank: int) -> Any:
        ranks = ranks_of(threads, rank)
        ranks.tell("between steps" if rank else "after a step", None)

    for error in threads.together(work):
        assert isinstance(error, RanksError)
        assert "rank 0: after a step; rank 1: between steps" in str(error)


def test_ranks_with_another_configuration(
    engine_of: Any, threads: Gathering, left: Callable[[], set[threading.Thread]]
) -> None:
    capacity = "1MiB", "2MiB"

    def work(rank: int) -> Any:
        return engine_of({"host": {"capacity": capacity[rank]}}, ranks_of(threads, rank))

    for error in threads.together(work):
        assert isinstance(error, RanksError)
        assert "at the start, rank 1 differs from rank 0" in str(error)
        assert "capacity" in str(error)
    assert not left()


def test_a_rank_that_cannot_start_is_not_waited_for(
    engine_of: Any, threads: Gathering, tmp_path: Path, left: Callable[[], set[threading.Thread]]
) -> None:
    """Its shard is in use by somebody else."""
    settings = SETTINGS | {"tiers": [{"kind": "disk", "path": str(tmp_path), "capacity": "16MiB"}]}
    alone = engine_of(settings)  # is rank 0 of that store, too

    def work(rank: int) -> Any:
        return engine_of(settings, ranks_of(threads, rank))

    first, second = threads.together(work)
    assert isinstance(first, StoreError)
    assert isinstance(second, RanksError)
    assert str(second).startswith("another rank has failed, opening its tiers: rank 0: StoreError")
    alone.lamina.close()
    assert not left()


def test_a_shard_has_the_same_rank_in_every_job(
    engine_of: Any, threads: Gathering, tmp_path: Path
) -> None:
    """Processes 0 and 1 share a model, in the next job 1 and 2, or 0 and 2: the heads that process
    1 has are others each time."""
    settings = SETTINGS | {"tiers": [{"kind": "disk", "path": str(tmp_path), "capacity": "1MiB"}]}

    def shards(engine: int) -> set[str]:
        before = set(tmp_path.rglob("rank-*.slab"))

        def work(rank: int) -> None:
            ranks = Ranks(rank, threads.of(rank), engine)
            engine_of(settings, ranks).lamina.close()

        assert threads.together(work) == [None, None]
        return {path.stem for path in set(tmp_path.rglob("rank-*.slab")) - before}

    engine_of(settings).lamina.close()  # ranks are processes, and may make a store at once
    assert shards(0) == {"rank-1"}
    assert shards(1) == {"rank-2", "rank-3"}
    assert shards(0) == set()


MEETING = """
import sys
from torch import distributed
from lamina_kv.engines.ranks import Ranks

rank = int(sys.argv[1])
distributed.init_process_group(
    "gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=3
)
members = (0, 2)
for turn in range(3):
    if rank in members:
        ranks = Ranks.among(members)
        word = (rank, turn, "x" * turn * 5000)
        assert ranks.tell("here", word) == [(each, *word[1:]) for each in members]
        ranks.agree("there", word[1:])
        # The engine's own groups come and go meanwhile.
        own = distributed.new_group(members, use_local_synchronization=True)
        if turn != rank:
            ranks.close()
            del ranks
        distributed.barrier(own)
distributed.barrier()
print("met")
"""


def test_a_part_of_a_job_meets_again_and_again(tmp_path: Path) -> None:
    """Of three processes two share a model. Nobody ever waits for a name of the time before."""
    command = [sys.executable, "-c", MEETING]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(3)
    ]
    try:
        assert [child.communicate(timeout=100)[0] for child in children] == ["met\n"] * 3
    finally:
        for child in children:
            child.kill()


def test_a_rank_that_is_gone(threads: Gathering) -> None:
    ranks = ranks_of(Gathering(1), 0)

    def gather(word: Any) -> Any:
        raise RuntimeError("Connection closed by peer")

    ranks._gather = gather
    with pytest.raises(RanksError, match="one of them has ended or is stuck"):
        ranks.tell("after a step", None)


def test_all_ranks_have_the_time_of_the_first(threads: Gathering) -> None:
    """Or one of them would give up a load that the other waits for."""

    def work(rank: int) -> Any:
        ranks = ranks_of(threads, rank)
        clocks = []
        for _ in range(3):
            time.sleep(0.01 * rank)
            ranks.tell("between steps", None)
            clocks.append(ranks.clock())
            time.sleep(0.01 * rank)
            clocks.append(ranks.clock())
        return clocks

    first, second = threads.together(work)
    assert first == second
    assert first == sorted(first)
    assert first[0] == first[1] < first[2]
