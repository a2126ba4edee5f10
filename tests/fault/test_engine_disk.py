"""Promise 4 on a real engine: a store that is damaged, slow or cut short at run time is a counted
miss, never a wrong token, and never the end of a request.

Bits of the slab are flipped between the save and the lookup. A chunk that does not verify ends the
hit of its request while that has no blocks; the rest is recomputed, with the answer that it has
without Lamina, and saved again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from engine.driver import Answer, Ask, Engine, EngineSpec, Fleet, Start, differences
from engine.stores import cut, flip
from engine.workload import CHUNK, loadable, prompt
from lamina_kv.geometry import OBJECT_HEADER_BYTES, align_up

pytestmark = pytest.mark.engine

CHUNKS = 6
ASKS = [Ask(prompt(70 + seed, CHUNKS * CHUNK + 10)) for seed in range(4)]
WHOLE = loadable(len(ASKS[0].tokens))
OBJECT_BYTES = align_up(OBJECT_HEADER_BYTES + 4 * CHUNK * 2 * 2 * 32 * 4)
"""Bytes of one chunk's object: rows, tokens, keys and values, heads, head size, float32."""
SLOTS = 64

Damage = Callable[[Path], None]
LOADS = [{"mode": "layerwise", "load_ahead": 1}, {"mode": "layerwise"}, {"mode": "parked"}]


def lamina(store: Path, **load: object) -> Mapping[str, object]:
    return {
        "host": {"capacity": "32MiB"},
        "tiers": [{"kind": "disk", "path": str(store), "capacity": SLOTS * OBJECT_BYTES}],
        "load": load,
    }


def first_chunks(store: Path) -> None:
    flip(store, range(0, SLOTS, CHUNKS))


def last_chunks(store: Path) -> None:
    flip(store, range(CHUNKS - 1, SLOTS, CHUNKS))


def failures(engine: Engine) -> float:
    """Chunks that could not be read."""
    return sum(
        sample.value
        for sample in engine.metrics().samples
        if sample.name == "lamina_failures_total" and sample.labels["kind"].startswith("fetch_")
    )


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


@pytest.mark.parametrize(
    ("load", "damage"),
    [
        (LOADS[0], flip),
        (LOADS[1], last_chunks),
        (LOADS[2], cut),
        *(
            pytest.param(load, damage, marks=pytest.mark.slow)
            for load, damage in (
                (LOADS[0], last_chunks),
                (LOADS[1], first_chunks),
                (LOADS[1], cut),
                (LOADS[2], first_chunks),
                (LOADS[2], flip),
            )
        ),
    ],
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
    answers = engine.generate(ASKS)
    assert not differences(answers, expected)
    assert failures(engine) >= 1
    assert engine.metrics().total("lamina_leased_blocks") == 0
    if damage is last_chunks:
        assert [answer.cached for answer in answers] == [(CHUNKS - 1) * CHUNK] * len(ASKS)
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
    flip(full_store)
    engine.generate(ASKS)
    engine.close()
    expect_whole(start(EngineSpec(llama, lamina(full_store))), expected)


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
    flip(full_store, [CHUNKS + 2])
    answers = engine.generate(ASKS)
    assert not differences(answers, expected)
    assert sorted(answer.cached for answer in answers) == [2 * CHUNK, WHOLE, WHOLE, WHOLE]
    assert engine.metrics().total("lamina_failures_total", kind="fetch_corrupt") == 1


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
    shared = ASKS[0].tokens[: 4 * CHUNK]
    asks = [Ask(shared + prompt(80 + seed, 50 + seed)) for seed in range(4)]
    expected = fleet.answers(EngineSpec(llama), asks)
    engine = start(EngineSpec(llama, lamina(full_store, mode=mode), asynchronous=asynchronous))
    flip(full_store, [1])
    assert not differences(engine.generate(asks), expected)
    engine.forget()
    assert not differences(engine.generate(asks), expected)
    assert engine.metrics().total("lamina_leased_blocks") == 0


@pytest.mark.parametrize("mode", ["layerwise", "parked"])
def test_no_store_fails_a_request(
    llama: Path, fleet: Fleet, start: Start, full_store: Path, mode: str
) -> None:
    """What can fail fails before a request has blocks, whatever vLLM does with failed loads."""
    expected = fleet.answers(EngineSpec(llama), ASKS)
    spec = EngineSpec(
        llama, lamina(full_store, mode=mode), transfer={"kv_load_failure_policy": "fail"}
    )
    engine = start(spec)
    free = engine.free_blocks()
    flip(full_store, [0])
    assert not differences(engine.generate(ASKS), expected)
    assert engine.free_blocks() == free
    assert engine.metrics().total("lamina_leased_blocks") == 0


def test_a_store_that_is_too_slow(
    llama: Path, fleet: Fleet, start: Start, full_store: Path
) -> None:
    """A request waits no longer for it than ``load.deadline``, and holds no blocks meanwhile."""
    expected = fleet.answers(EngineSpec(llama), ASKS)
    spec = EngineSpec(llama, lamina(full_store, deadline=0.1), faults={"slow_reads": 0.5})
    engine = start(spec)
    answers = engine.generate(ASKS)
    assert not differences(answers, expected)
    assert any(answer.cached < WHOLE for answer in answers)
    assert engine.metrics().total("lamina_leased_blocks") == 0


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_load_that_is_too_slow(
    llama: Path, fleet: Fleet, start: Start, full_store: Path, policy: str
) -> None:
    """Between steps, from host memory: the whole request is computed again, or fails."""
    expected = fleet.answers(EngineSpec(llama), ASKS)
    engine = start(
        EngineSpec(
            llama,
            lamina(full_store, mode="parked", deadline=0.3),
            faults={"slow_loads": 1.0},
            transfer={"kv_load_failure_policy": policy},
        )
    )
    free = engine.free_blocks()
    answers = engine.generate(ASKS)
    failed = engine.metrics().total("lamina_failures_total", kind="load_deadline")
    assert failed >= 1
    if policy == "recompute":
        assert not differences(answers, expected)
    else:
        assert sum(answer.finish == "error" for answer in answers) == failed
    assert engine.free_blocks() == free
    assert engine.metrics().total("lamina_leased_blocks") == 0


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
        "host": {"capacity": 2 * CHUNKS * OBJECT_BYTES},
        "tiers": [
            {
                "kind": "disk",
                "path": str(tmp_path / "store"),
                "capacity": 3 * CHUNKS * OBJECT_BYTES,
            }
        ],
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
