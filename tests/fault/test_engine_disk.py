"""Promise 4 on a real engine: a store damaged at run time is a counted miss, never a wrong token.

Bytes of the slab are flipped between the save and the load. The request is recomputed with the
answer that it has without Lamina, the others of its step are served, and what was recomputed is
saved again. With ``kv_load_failure_policy: fail`` the request fails and the engine lives on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from engine.driver import Answer, Ask, Engine, EngineSpec, Fleet, Start, differences
from engine.workload import CHUNK, loadable, prompt

pytestmark = pytest.mark.engine

CHUNKS = 6
ASKS = [Ask(prompt(70 + seed, CHUNKS * CHUNK + 10)) for seed in range(4)]
WHOLE = loadable(len(ASKS[0].tokens))
ROWS = 4
EXTENT = CHUNK * 2 * 2 * 32 * 4
"""Bytes of one chunk in one row: tokens, keys and values, heads, head size, float32."""
SLOTS = 64

Damage = Callable[[Path], None]


def lamina(store: Path, **load: object) -> Mapping[str, object]:
    capacity = SLOTS * ROWS * EXTENT
    return {
        "host": {"capacity": "32MiB"},
        "disk": {"path": str(store), "capacity": capacity},
        "load": load,
    }


def flip(store: Path, rows: range, slots: range) -> None:
    """Flip one bit in the middle of these extents."""
    (slab,) = store.glob("*/rank-0.slab")
    with slab.open("r+b") as file:
        for row in rows:
            for slot in slots:
                position = (row * SLOTS + slot) * EXTENT + EXTENT // 2
                file.seek(position)
                (byte,) = file.read(1)
                file.seek(position)
                file.write(bytes([byte ^ 0x10]))


def everything(store: Path) -> None:
    flip(store, range(ROWS), range(SLOTS))


def first_chunks(store: Path) -> None:
    flip(store, range(1), range(0, SLOTS, CHUNKS))


def last_row(store: Path) -> None:
    flip(store, range(ROWS - 1, ROWS), range(3, SLOTS, CHUNKS))


def truncated(store: Path) -> None:
    (slab,) = store.glob("*/rank-0.slab")
    with slab.open("r+b") as file:
        file.truncate(slab.stat().st_size // 2)


@pytest.fixture(scope="module")
def original(llama: Path, fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds :data:`ASKS`, saved one after another, whose server has ended."""
    store = tmp_path_factory.mktemp("original") / "store"
    engine = fleet.get(EngineSpec(llama, lamina(store)))
    for ask in ASKS:
        engine.ask(ask)
    engine.close()
    return store


@pytest.fixture
def full_store(original: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(original, tmp_path / "store")


@pytest.mark.parametrize("damage", [everything, first_chunks, last_row, truncated])
@pytest.mark.parametrize(
    "load",
    [{"mode": "layerwise", "load_ahead": 1}, {"mode": "layerwise"}, {"mode": "parked"}],
    ids=["layerwise-1", "layerwise", "parked"],
)
def test_damage_while_the_server_runs(
    llama: Path,
    fleet: Fleet,
    start: Start,
    full_store: Path,
    load: dict[str, object],
    damage: Damage,
) -> None:
    expected = fleet.answers(EngineSpec(llama), ASKS)
    engine = start(EngineSpec(llama, lamina(full_store, **load)))
    damage(full_store)
    assert not differences(engine.generate(ASKS), expected)
    metrics = engine.metrics()
    kind = "load_disk_io_error" if damage is truncated else "load_disk_checksum"
    assert metrics.total("lamina_failures_total", kind=kind) >= 1
    assert metrics.total("lamina_leased_blocks") == 0
    expect_whole(engine, expected)


def expect_whole(engine: Engine, expected: Sequence[Answer]) -> None:
    """Every request is a whole hit with the right answer, and nothing fails any more."""
    before = engine.metrics()
    for ask, answer in zip(ASKS, expected, strict=True):
        engine.forget()
        again = engine.ask(ask)
        assert not differences([again], [answer])
        assert again.cached == WHOLE
    assert engine.metrics().since(before, "lamina_failures_total") == 0


def test_what_was_recomputed_is_on_disk_again(
    llama: Path, fleet: Fleet, start: Start, full_store: Path
) -> None:
    expected = fleet.answers(EngineSpec(llama), ASKS)
    engine = start(EngineSpec(llama, lamina(full_store)))
    everything(full_store)
    engine.generate(ASKS)
    engine.close()
    expect_whole(start(EngineSpec(llama, lamina(full_store))), expected)


def test_recomputed_while_the_saves_of_the_failed_step_are_under_way(
    llama: Path, fleet: Fleet, start: Start, full_store: Path
) -> None:
    """Chunks loaded from disk are saved to the host tier in the same step. When the load fails
    that is void, and must not stand in the way of saving what is then recomputed."""
    expected = fleet.answers(EngineSpec(llama), ASKS)
    spec = EngineSpec(llama, lamina(full_store, mode="layerwise"), faults={"slow_saves": 0.2})
    engine = start(spec)
    everything(full_store)
    assert not differences(engine.generate(ASKS), expected)
    expect_whole(engine, expected)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "a-step-ahead"])
@pytest.mark.parametrize("load", [{"mode": "layerwise"}, {"mode": "parked"}, {}])
def test_one_bad_request_among_good_ones(
    llama: Path,
    fleet: Fleet,
    start: Start,
    full_store: Path,
    load: dict[str, object],
    asynchronous: bool,
) -> None:
    expected = fleet.answers(EngineSpec(llama), ASKS)
    engine = start(EngineSpec(llama, lamina(full_store, **load), asynchronous=asynchronous))
    flip(full_store, range(1, 2), range(CHUNKS + 2, CHUNKS + 3))
    answers = engine.generate(ASKS)
    assert not differences(answers, expected)
    assert [answer.cached for answer in answers].count(WHOLE) >= 3
    assert engine.metrics().total("lamina_failures_total", kind="load_disk_checksum") == 1


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "a-step-ahead"])
@pytest.mark.parametrize("mode", ["layerwise", "parked"])
def test_requests_that_share_a_bad_chunk(
    llama: Path,
    fleet: Fleet,
    start: Start,
    full_store: Path,
    mode: str,
    asynchronous: bool,
) -> None:
    """In one step a request may build on blocks that another one loads: both are recomputed."""
    shared = ASKS[0].tokens[: 4 * CHUNK]
    asks = [Ask(shared + prompt(80 + seed, 50 + seed)) for seed in range(4)]
    expected = fleet.answers(EngineSpec(llama), asks)
    engine = start(EngineSpec(llama, lamina(full_store, mode=mode), asynchronous=asynchronous))
    flip(full_store, range(2, 3), range(1, 2))
    assert not differences(engine.generate(asks), expected)
    engine.forget()
    assert not differences(engine.generate(asks), expected)
    assert engine.metrics().total("lamina_leased_blocks") == 0


@pytest.mark.parametrize("mode", ["layerwise", "parked"])
def test_the_policy_to_fail(
    llama: Path, fleet: Fleet, start: Start, full_store: Path, mode: str
) -> None:
    expected = fleet.answers(EngineSpec(llama), ASKS)
    spec = EngineSpec(
        llama, lamina(full_store, mode=mode), transfer={"kv_load_failure_policy": "fail"}
    )
    engine = start(spec)
    free = engine.free_blocks()
    flip(full_store, range(1), range(1))
    bad, *good = engine.generate(ASKS)
    assert bad.finish == "error"
    assert not differences(good, expected[1:])
    assert engine.free_blocks() == free
    assert engine.metrics().total("lamina_leased_blocks") == 0
    engine.forget()
    assert not differences(engine.generate(ASKS), expected)


def test_a_load_that_is_too_slow(llama: Path, fleet: Fleet, start: Start, full_store: Path) -> None:
    expected = fleet.answers(EngineSpec(llama), ASKS)
    for mode in ("layerwise", "parked"):
        engine = start(
            EngineSpec(
                llama,
                lamina(full_store, mode=mode, deadline=0.1),
                faults={"slow_loads": 0.5},
            )
        )
        assert not differences(engine.generate(ASKS), expected)
        assert engine.metrics().total("lamina_failures_total", kind="load_deadline") >= 1
        engine.close()


@pytest.mark.parametrize("moment", ["while saves are under way", "when all is written"])
def test_a_server_that_is_killed(
    llama: Path, fleet: Fleet, start: Start, tmp_path: Path, moment: str
) -> None:
    """At most what was not yet durable is lost."""
    expected = fleet.answers(EngineSpec(llama), ASKS)
    store = tmp_path / "store"
    engine = start(EngineSpec(llama, lamina(store)))
    if moment == "when all is written":
        engine.generate(ASKS)
    else:
        engine.ask(ASKS[0])
        engine.submit(ASKS[1:])
        engine.step()
        engine.step()
    engine.kill()
    engine = start(EngineSpec(llama, lamina(store)))
    answers = engine.generate(ASKS)
    assert not differences(answers, expected)
    assert answers[0].cached == WHOLE
    assert engine.metrics().total("lamina_failures_total") == 0
    if moment == "when all is written":
        assert [answer.cached for answer in answers] == [WHOLE] * len(ASKS)


def test_a_full_store_makes_room(llama: Path, fleet: Fleet, start: Start, tmp_path: Path) -> None:
    """Both tiers are bounded: what was used last is what is left."""
    lamina = {
        "host": {"capacity": 2 * CHUNKS * ROWS * EXTENT},
        "disk": {"path": str(tmp_path / "store"), "capacity": 3 * CHUNKS * ROWS * EXTENT},
    }
    expected = fleet.answers(EngineSpec(llama), ASKS)
    engine = start(EngineSpec(llama, lamina))
    for ask, answer in zip(ASKS * 2, expected * 2, strict=True):
        assert not differences([engine.ask(ask)], [answer])
        engine.forget()
    metrics = engine.metrics()
    for tier in ("host", "disk"):
        used = metrics.total("lamina_tier_used_bytes", tier=tier)
        assert 0 < used <= metrics.total("lamina_tier_capacity_bytes", tier=tier)
    assert engine.ask(ASKS[-1]).cached == WHOLE
