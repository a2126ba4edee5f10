"""A hit survives the process, and nothing that changes the bytes is ever taken for the same."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from engine.driver import SMALL, Answer, Ask, Engine, EngineSpec, Fleet, Start, differences
from engine.models import Checkpoints
from engine.workload import CHUNK, loadable, mixed_prompts, prompt

pytestmark = pytest.mark.engine

PROMPTS = mixed_prompts(21, count=24)
ASKS = [Ask(tokens) for tokens in PROMPTS]
ASK = Ask(prompt(22, 5 * CHUNK + 20))
LORA = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 3}


def on_disk(store: Path, **load: object) -> Mapping[str, object]:
    return {
        "host": {"capacity": "128MiB"},
        "tiers": [{"kind": "disk", "path": str(store), "capacity": "128MiB"}],
        "load": {"min_tokens": 1, **load},
    }


@pytest.fixture(scope="module")
def full_store(llama: Path, fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all of :data:`ASKS`, whose server has ended."""
    store = tmp_path_factory.mktemp("full") / "store"
    engine = fleet.get(EngineSpec(llama, on_disk(store)))
    engine.generate(ASKS)
    engine.close()
    return store


@pytest.mark.parametrize(
    "load",
    [
        {"mode": "layerwise", "load_ahead": 1},
        pytest.param({"mode": "layerwise", "load_ahead": 2}, marks=pytest.mark.slow),
        pytest.param({"mode": "layerwise", "load_ahead": 99}, marks=pytest.mark.soak),
        pytest.param({"mode": "layerwise"}, marks=pytest.mark.slow),
        pytest.param({"mode": "parked", "load_ahead": 1}, marks=pytest.mark.slow),
        {"mode": "parked"},
        {},
    ],
    ids=lambda load: "-".join(map(str, load.values())) or "default",
)
def test_answers_from_the_disk_of_an_earlier_process(
    llama: Path, fleet: Fleet, start: Start, full_store: Path, load: dict[str, object]
) -> None:
    expected = fleet.answers(EngineSpec(llama), ASKS)
    engine = start(EngineSpec(llama, on_disk(full_store, **load)))
    together = engine.generate(ASKS)
    assert not differences(together, expected)
    assert all(a.cached >= loadable(len(p)) for a, p in zip(together, PROMPTS, strict=True))
    one_by_one = []
    for ask in ASKS:
        engine.forget()
        one_by_one.append(engine.ask(ask))
    assert not differences(one_by_one, expected)
    assert [answer.cached for answer in one_by_one] == [loadable(len(p)) for p in PROMPTS]
    metrics = engine.metrics()
    assert metrics.total("lamina_hit_tokens_total", tier="disk") > 0
    assert metrics.total("lamina_failures_total") == 0
    engine.close()


@pytest.mark.slow
def test_a_disk_of_another_size(llama: Path, fleet: Fleet, start: Start, tmp_path: Path) -> None:
    """Smaller, what lies behind its new end is computed; larger again, the rest is still found."""
    asks = [Ask(prompt(40 + n, 4 * CHUNK + 20)) for n in range(4)]
    expected = fleet.answers(EngineSpec(llama), asks)
    hits = []
    for capacity, keep in (("32MiB", "all"), ("1MiB", "nothing"), ("64MiB", "nothing")):
        lamina = on_disk(tmp_path / "store", when="always")
        (disk,) = lamina["tiers"]  # type: ignore[misc]
        disk |= {"capacity": capacity, "keep": keep}
        engine = start(EngineSpec(llama, lamina))
        assert not differences(engine.generate(asks), expected)
        hits.append(int(engine.metrics().total("lamina_hit_tokens_total", tier="disk")))
        engine.close()
    assert hits[0] == 0
    assert 0 < hits[1] < sum(loadable(len(ask.tokens)) for ask in asks)
    assert hits[2] == hits[1]


def has_come_near(engine: Engine) -> bool:
    """Whether what a waiting request needs was brought from disk to memory."""
    metrics = engine.metrics()
    under_way = metrics.total("lamina_transfers", direction="fetch")
    return metrics.total("lamina_fetch_bytes_total") > 0 and not under_way


def test_a_request_that_waits_finds_in_memory_what_was_on_disk(
    llama: Path, fleet: Fleet, start: Start, tmp_path: Path
) -> None:
    asks = [Ask(prompt(23, CHUNK), max_tokens=32), ASK]
    expected = fleet.answers(EngineSpec(llama), asks)
    lamina = on_disk(tmp_path / "store")
    writer = start(EngineSpec(llama, lamina))
    writer.ask(ASK)
    writer.close()
    engine = start(EngineSpec(llama, lamina, {"max_num_seqs": 1}))
    names = engine.submit(asks)
    ended: dict[str, Answer] = {}
    while not (ended or has_come_near(engine)):
        time.sleep(0.1)  # an engine that computes nothing meanwhile leaves the disk its time
        ended |= {answer.name: answer for answer in engine.step()}
    ended |= {answer.name: answer for answer in engine.drain()}
    answers = [ended[name] for name in names]
    assert not differences(answers, expected)
    metrics = engine.metrics()
    assert metrics.total("lamina_fetch_bytes_total") > 0
    # It counts for the tier that had it, however early it came near.
    assert metrics.total("lamina_hit_tokens_total", tier="disk") == answers[1].cached > 0
    assert metrics.total("lamina_hit_tokens_total", tier="host") == 0
    engine.close()


@pytest.mark.slow
def test_an_interpreter_with_another_hash_seed(llama: Path, start: Start, tmp_path: Path) -> None:
    lamina = on_disk(tmp_path / "store")
    engine = start(EngineSpec(llama, lamina))
    expected = engine.ask(ASK)
    ours = engine.hash_of("a word")
    engine.close()
    seed = {"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    engine = start(EngineSpec(llama, lamina, environment=seed), fresh=True)
    assert engine.hash_of("a word") != ours
    answer = engine.ask(ASK)
    assert answer.cached == loadable(len(ASK.tokens))
    assert not differences([answer], [expected])


def flip_a_weight(model: Path) -> None:
    """Change one byte in the middle of the weights."""
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x01
    file.write_bytes(content)


def edit_nothing(model: Path) -> None:
    """A copy elsewhere is the same checkpoint."""


@pytest.mark.parametrize(
    ("edit", "options", "hit"),
    [
        pytest.param(edit_nothing, {}, True, id="moved"),
        pytest.param(flip_a_weight, {}, False, id="weights"),
        pytest.param(
            edit_nothing, {"dtype": "bfloat16"}, False, id="dtype", marks=pytest.mark.slow
        ),
        pytest.param(
            edit_nothing, {"block_size": 64}, False, id="block-size", marks=pytest.mark.slow
        ),
        pytest.param(
            edit_nothing,
            {"hf_overrides": {"rope_theta": 5e5}},
            False,
            id="overridden-config",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_the_same_after_a_restart(
    llama: Path,
    start: Start,
    tmp_path: Path,
    edit: object,
    options: dict[str, object],
    hit: bool,
) -> None:
    spec = EngineSpec(llama, on_disk(tmp_path / "store"))
    engine = start(spec)
    engine.ask(ASK)
    engine.close()

    other = tmp_path / "checkpoint"
    shutil.copytree(llama, other)
    edit(other)
    engine = start(EngineSpec(other, spec.lamina, options))
    answer = engine.ask(ASK)
    engine.close()
    assert answer.cached == (loadable(len(ASK.tokens)) if hit else 0)

    plain = start(EngineSpec(other, options=options))
    assert not differences([answer], [plain.ask(ASK)])


def test_weights_changed_in_place(llama: Path, start: Start, tmp_path: Path) -> None:
    """The digest that is remembered for a file must not outlive its content."""
    model = tmp_path / "checkpoint"
    shutil.copytree(llama, model)
    spec = EngineSpec(model, on_disk(tmp_path / "store"))
    engine = start(spec)
    engine.ask(ASK)
    engine.close()
    flip_a_weight(model)
    engine = start(spec)
    assert engine.ask(ASK).cached == 0


def test_salts_do_not_share(llama: Path, fleet: Fleet) -> None:
    engine = fleet.get(EngineSpec(llama, SMALL))
    cached = []
    for salt in (None, "a", "b", "a", None):
        engine.forget()
        cached.append(engine.ask(Ask(ASK.tokens, salt=salt)).cached)
    whole = loadable(len(ASK.tokens))
    assert cached == [0, 0, 0, whole, whole]


def test_adapters_do_not_share(
    checkpoints: Checkpoints, llama: Path, fleet: Fleet, tmp_path: Path
) -> None:
    first, second = (checkpoints.adapter(llama, seed) for seed in (1, 2))
    moved = tmp_path / "moved"
    shutil.copytree(first, moved)
    asks = [Ask(ASK.tokens, adapter=adapter) for adapter in (None, first, second, moved, None)]

    plain = fleet.get(EngineSpec(llama, options=LORA))
    expected = []
    for ask in asks:
        plain.forget()
        expected.append(plain.ask(ask))
    assert min(expected[0].distance(expected[1]), expected[1].distance(expected[2])) > 0.01

    engine = fleet.get(EngineSpec(llama, SMALL, LORA))
    answers = []
    for ask in asks:
        engine.forget()
        answers.append(engine.ask(ask))
    assert not differences(answers, expected)
    whole = loadable(len(ASK.tokens))
    assert [answer.cached for answer in answers] == [0, 0, 0, whole, whole]


def test_an_adapter_that_is_replaced_in_its_folder_is_another(
    checkpoints: Checkpoints, llama: Path, fleet: Fleet, tmp_path: Path
) -> None:
    first, second = (checkpoints.adapter(llama, seed) for seed in (1, 2))
    folder = tmp_path / "adapter"
    shutil.copytree(first, folder)
    engine = fleet.get(EngineSpec(llama, SMALL, LORA))
    engine.forget()
    old = engine.ask(Ask(ASK.tokens, adapter=folder))
    shutil.copytree(second, folder, dirs_exist_ok=True)
    for number in engine.core("list_loras"):
        engine.core("remove_lora", number)
    engine.forget()
    new = engine.ask(Ask(ASK.tokens, adapter=folder))
    assert new.distance(old) > 0.01
    engine.forget()
    assert not differences([engine.ask(Ask(ASK.tokens, adapter=second))], [new])
