"""What transformers' scheduler and Lamina do to each other's requests: loads that are slow or fail,
whose requests are cancelled, and ways of running the library that are refused."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from transformers.generation.configuration_utils import (
    ContinuousBatchingConfig,
    GenerationConfig,
)
from transformers.generation.continuous_batching.requests import RequestState

from engine.batching import PATIENCE, Engine, Gate, Tokens, forget, load_model, refused
from engine.models import Checkpoints
from engine.workload import prompt
from lamina_kv.config import ConfigError
from lamina_kv.engines.hand_off import Phase
from lamina_kv.engines.transformers import UnsupportedEngine, attach, attached_to

pytestmark = pytest.mark.engine

PAGE, LONG = 16, prompt(31, 200)
ROOMY = ContinuousBatchingConfig(page_size=PAGE, num_blocks=80, max_batch_tokens=64)
PARKED: dict[str, object] = {
    "chunk_tokens": PAGE,
    "load": {"mode": "parked", "when": "always"},
    "host": {"capacity": "64MiB"},
}
LAYERWISE = PARKED | {"load": {"mode": "layerwise", "when": "always"}}


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return load_model(llama)


@pytest.fixture(scope="module")
def expected(model: Any) -> Tokens:
    """What the engine says after :data:`LONG`."""
    with Engine(model, ROOMY) as engine:
        return engine.turn([LONG])[0]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    with Gate(monkeypatch) as gate:
        yield gate


def test_what_was_loaded_is_found_by_the_next_request(model: Any, expected: Tokens) -> None:
    """ATOM 1725: there, the same prefix was loaded again in every turn."""
    for settings in (PARKED, LAYERWISE):
        with Engine(model, ROOMY, settings) as engine:
            assert engine.turn([LONG]) == [expected]
            forget(engine)
            assert engine.turn([LONG]) == [expected]
            assert engine.figures()["hit_tokens host"] == 192
            assert engine.turn([LONG]) == [expected]
            assert engine.figures()["hit_tokens host"] == 192
            assert engine.figures()["hit_tokens engine"] == 192
            assert engine.computed == {"r1": 205, "r2": 13, "r3": 13}
            engine.settle()


def test_others_run_while_one_is_parked(model: Any, expected: Tokens, gate: Gate) -> None:
    with Engine(model, ROOMY, PARKED) as engine:
        engine.turn([LONG])
        forget(engine)
        gate.opened.clear()
        parked = engine.submit(LONG)
        assert gate.reached.wait(PATIENCE)
        other = engine.submit(prompt(32, 50))
        assert len(engine.await_answers([other])[other]) == engine.max_new_tokens
        lamina = attached_to(engine.manager)
        assert lamina is not None
        assert lamina.hand_off.phase(parked) is Phase.PARKED
        gate.opened.set()
        assert engine.await_answers([parked]) == {parked: expected}
        engine.settle()


def test_a_parked_request_that_is_cancelled_keeps_its_blocks_until_nothing_writes_to_them(
    model: Any, expected: Tokens, gate: Gate
) -> None:
    with Engine(model, ROOMY, PARKED) as engine:
        engine.turn([LONG])
        forget(engine)
        gate.opened.clear()
        parked = engine.submit(LONG)
        assert gate.reached.wait(PATIENCE)
        engine.manager.cancel_request(parked)
        after = engine.submit(prompt(33, 50))
        engine.await_answers([after])
        scheduler = engine.manager.batch_processor.scheduler
        assert scheduler.lamina.hand_off.phase(parked) is Phase.DRAINING
        assert scheduler._pool.held == 192 // PAGE
        gate.opened.set()
        engine.settle()
        assert engine.turn([LONG]) == [expected]


def test_a_layer_waits_for_its_row(model: Any, expected: Tokens, gate: Gate) -> None:
    with Engine(model, ROOMY, LAYERWISE) as engine:
        engine.turn([LONG])
        forget(engine)
        gate.seconds = 0.1
        assert engine.turn([LONG]) == [expected]
        assert engine.figures()["wait_seconds_sum"] > 0
        assert engine.computed["r2"] == 13


def test_a_load_that_fails_is_computed(model: Any, expected: Tokens, gate: Gate) -> None:
    with Engine(model, ROOMY, PARKED) as engine:
        engine.turn([LONG])
        forget(engine)
        gate.error = OSError("the memory is gone")
        assert engine.turn([LONG]) == [expected]
        assert engine.computed["r2"] == len(LONG) + engine.max_new_tokens - 1
        figures = engine.figures().items()
        assert sum(v for k, v in figures if k.startswith("failures host load")) == 1
        engine.settle()
        gate.error = None
        forget(engine)
        assert engine.turn([LONG]) == [expected]
        assert engine.computed["r3"] < PAGE + engine.max_new_tokens


def test_a_load_that_fails_under_a_running_request_gives_no_wrong_answer(
    model: Any, gate: Gate
) -> None:
    with Engine(model, ROOMY, LAYERWISE) as engine:
        engine.turn([LONG])
        forget(engine)
        gate.error = OSError("the memory is gone")
        engine.submit(LONG)
        output = engine.manager.output_router.output_queue.get(timeout=PATIENCE)
        assert "a copy from host memory failed under r2" in output.error
        assert output.generated_tokens == []


def test_a_request_that_is_reset_loads_what_it_had_generated(model: Any) -> None:
    """ATOM g. The cache is too small for both to come to their end, so one is reset."""
    prompts = [prompt(seed, 100) for seed in (41, 42)]
    small = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=17, max_batch_tokens=64, safety_margin=0.0
    )
    with Engine(model, ROOMY, max_new_tokens=60) as engine:
        expected = engine.turn(prompts)
    with Engine(model, small, PARKED, max_new_tokens=60) as engine:
        assert engine.turn(prompts) == expected
        # Each computes 159 tokens. One is reset when it needs a block that is not there, so that
        # all that it has is in whole blocks, and kept.
        assert engine.computed == {"r1": 159, "r2": 159}
        engine.settle()
        config, figures = model.config, engine.figures()
        head = config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * head
        loaded = figures["load_bytes"] / (token * model.dtype.itemsize)
        assert loaded > 100, "what it had generated is not among it"


def test_cancelled_requests_leave_nothing(model: Any, expected: Tokens) -> None:
    with Engine(model, ROOMY, PARKED) as engine:
        engine.turn([LONG])
        for number in range(12):
            name = engine.submit((*LONG[: 40 + 10 * number], number))
            engine.manager.cancel_request(name)
            if number % 4 == 0:
                engine.await_answers([engine.submit(prompt(number, 30))])
        engine.settle()
        assert engine.turn([LONG]) == [expected]


def test_weights_that_are_replaced(llama: Path, checkpoints: Checkpoints) -> None:
    mine, other = load_model(llama), load_model(checkpoints.model("llama", seed=1))
    with Engine(other, ROOMY) as engine:
        wanted = engine.turn([LONG])
    with Engine(mine, ROOMY, PARKED) as engine:
        assert engine.turn([LONG]) != wanted
        forget(engine)
        with engine.manager.pause():
            mine.load_state_dict(other.state_dict())
            lamina = attached_to(engine.manager)
            assert lamina is not None
            lamina.hand_off.reset()
        assert engine.turn([LONG]) == wanted
        engine.settle()


def test_generate_batch_takes_it_too(model: Any, expected: Tokens) -> None:
    before = set(threading.enumerate())
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1)
    outputs = model.generate_batch(
        [list(LONG)] * 2,
        generation_config=greedy,
        continuous_batching_config=attach(ROOMY, PARKED),
    )
    assert [output.generated_tokens for output in outputs.values()] == [expected] * 2
    left = set(threading.enumerate()) - before
    assert not [thread.name for thread in left if thread.name.startswith("lamina")]


def test_a_manager_that_is_kept_keeps_its_tiers(llama: Path, expected: Tokens) -> None:
    model = load_model(llama)
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1)
    batching = attach(ROOMY, PARKED)
    for _ in range(3):
        outputs = model.generate_batch(
            [list(LONG)],
            generation_config=greedy,
            continuous_batching_config=batching,
            persistent_manager=True,
        )
        assert [output.generated_tokens for output in outputs.values()] == [expected]
        manager = model._cached_continuous_batching_manager
        manager.batch_processor.cache.evict_cached_blocks()
    lamina = attached_to(manager)
    assert lamina is not None
    assert lamina.figures()["hit_tokens host"] == 2 * 192
    model.destroy_cached_continuous_batching_manager()


def await_running(engine: Engine, names: list[str]) -> None:
    """Wait until all of them have computed something."""
    give_up = time.monotonic() + PATIENCE
    while not all(engine.computed.get(name) for name in names):
        assert time.monotonic() < give_up, f"{names} do not run"
        time.sleep(0.01)


def test_a_hit_that_waits_for_room_is_not_overtaken(model: Any, expected: Tokens) -> None:
    """It needs blocks for all of its tokens at once; others would be content with fewer."""
    small = ContinuousBatchingConfig(page_size=PAGE, num_blocks=16, max_batch_tokens=64)
    with Engine(model, small, PARKED) as engine:
        engine.turn([LONG])
        forget(engine)
        short = [engine.submit(prompt(seed, 40), 30) for seed in range(3)]
        await_running(engine, short)
        first = engine.submit(LONG)
        later = [engine.submit(prompt(seed, 40), 30) for seed in range(10, 22)]
        answers = engine.await_answers([*short, first, *later])
        assert list(answers).index(first) <= len(short)
        assert answers[first] == expected
        engine.settle()


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["4.57.1", "5.18.2", "5.25.0", "6.0rc1"])
def test_another_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test may have made the library's lazy module anew.
    theirs = sys.modules[attach.__module__].transformers  # type: ignore[attr-defined]
    monkeypatch.setattr(theirs, "__version__", version)
    with pytest.raises(UnsupportedEngine, match=rf"transformers {version} .* 5\.19 to 5\.24 only"):
        attach()


@pytest.mark.parametrize(
    ("batching", "said"),
    [
        ({"use_async_batching": True}, "use_async_batching"),
        ({"scheduler_type": "best"}, "there is no scheduler_type 'best'; there are: fifo"),
    ],
)
def test_what_cannot_be_served_is_refused(batching: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedEngine, match=said):
        attach(ContinuousBatchingConfig(**batching))


def test_a_mistake_in_the_settings_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match=r"host\.capacty"):
        attach(settings={"host": {"capacty": "1GiB"}})


def test_one_configuration_is_attached_to_once() -> None:
    with pytest.raises(UnsupportedEngine, match="has Lamina already"):
        attach(attach(ROOMY, PARKED), PARKED)
    assert ROOMY.scheduler_type == "fifo", "it is not changed"


def test_processes_of_which_nobody_says_who_shares_the_model_are_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    assert "attach(..., model=model)" in refused(model, attach(ROOMY, PARKED))


def test_pushes_are_refused(model: Any) -> None:
    assert "push: " in refused(model, attach(ROOMY, PARKED | {"push": {}}))


def test_a_store_for_weights_of_unknown_origin_is_refused(llama: Path, tmp_path: Path) -> None:
    model = load_model(llama)
    model.config._name_or_path = ""
    disk = {"tiers": [{"kind": "disk", "path": str(tmp_path / "store"), "capacity": "64MiB"}]}
    assert "identity" in refused(model, attach(ROOMY, PARKED | disk))
    with Engine(model, ROOMY, PARKED | disk | {"identity": "mine"}) as engine:
        engine.turn([LONG])


# -- sessions, forks, figures ----------------------------------------------------------------------


def test_a_hard_stop_leaves_nothing_to_the_next_session(model: Any, gate: Gate) -> None:
    """The library drops its waiting requests without a word."""
    with Engine(model, ROOMY, PARKED) as engine:
        engine.turn([LONG])
        forget(engine)
        gate.opened.clear()
        engine.submit(LONG)
        assert gate.reached.wait(PATIENCE)
        manager = engine.manager
        manager.stop(hard_stop=True, keep_for_next_session=True)
        gate.opened.set()
        while not manager.output_router.output_queue.empty():
            manager.output_router.output_queue.get()
        manager.switch_to_cb_friendly_attn(model, True)
        manager.start()
        name = engine.submit(LONG[:40])
        assert engine.await_answers([name])[name]
        assert manager.background_thread_status.fatal_error is None


@pytest.mark.parametrize("settings", [PARKED, LAYERWISE], ids=["parked", "layerwise"])
def test_a_hit_of_all_but_one_token_is_forked(model: Any, settings: dict[str, Any]) -> None:
    tokens = LONG[:193]
    with Engine(model, ROOMY, settings) as engine:
        (first,) = engine.turn([tokens])
        forget(engine)
        state = RequestState(
            request_id="f",
            initial_tokens=list(tokens),
            num_children=2,
            max_new_tokens=len(first),
            eos_token_id=-1,
        )
        engine.manager.input_queue.put(state)
        engine.manager._wake_up_loop.set()
        names = ["f", "f__child#0", "f__child#1"]
        assert list(engine.await_answers(names).values()) == [first] * 3


def test_figures_are_the_same_for_everybody_who_asks(model: Any) -> None:
    with Engine(model, ROOMY, PARKED) as engine:
        engine.turn([LONG])
        engine.settle()
        assert engine.figures() == engine.figures()
        assert engine.figures()["lookups"] == 1
        assert engine.figures()["tier_capacity_bytes host"] > 0


def test_one_configuration_is_known_to_the_library_once() -> None:
    settings = {"host": {"capacity": "2MiB"}}
    assert attach(None, settings).scheduler_type == attach(None, settings).scheduler_type
    assert attach(None, settings).scheduler_type != attach(None, {}).scheduler_type
