"""Sliding windows in transformers' continuous batching, which keeps them as rings that a request
overwrites: the answers are those without Lamina, whatever becomes of the request.

The models have 192 tokens in the windows of all layers, or 128 in those of ten layers in twelve.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import RequestState

from engine.batching import PATIENCE, Engine, Gate, Tokens, forget, load_model, refused
from engine.models import Checkpoints
from engine.workload import prompt
from lamina_kv.data.movers.base import pages_of
from lamina_kv.engines.hand_off import Phase
from lamina_kv.engines.transformers import attach, layout
from lamina_kv.engines.transformers.streams import ComputeStream

pytestmark = pytest.mark.engine

PAGE, CHUNK, LONG = 16, 64, prompt(31, 700)
ROOMY = ContinuousBatchingConfig(page_size=PAGE, num_blocks=200, max_batch_tokens=512)
PARKED: dict[str, object] = {
    "load": {"mode": "parked", "when": "always"},
    "host": {"capacity": "64MiB"},
}
LAYERWISE = PARKED | {"load": {"mode": "layerwise", "when": "always"}}
MODES = pytest.mark.parametrize(
    "settings",
    [
        pytest.param(PARKED, id="parked", marks=pytest.mark.slow),
        pytest.param(LAYERWISE, id="layerwise"),
    ],
)
LENGTHS = (5, 63, 64, 65, 127, 128, 129, 191, 192, 193, 320, 700)


@pytest.fixture(
    scope="module",
    params=[pytest.param("sliding-window", marks=pytest.mark.slow), "interleaved-windows"],
)
def model(checkpoints: Checkpoints, request: pytest.FixtureRequest) -> Any:
    return load_model(checkpoints.model(request.param))


@pytest.fixture(scope="module")
def expected(model: Any) -> Tokens:
    """What the engine says after :data:`LONG`."""
    with Engine(model, ROOMY) as engine:
        return engine.turn([LONG])[0]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    with Gate(monkeypatch) as gate:
        yield gate


def last_boundary(tokens: int) -> int:
    return tokens // CHUNK * CHUNK


@MODES
def test_hits_of_every_length(model: Any, settings: dict[str, object]) -> None:
    """Prompts shorter than a window and longer, that end on a boundary and beside it. Each is asked
    again, and gone on with: then a hit ends on the last boundary that was ever passed."""
    prompts = [LONG[700 - length :] for length in LENGTHS]
    with Engine(model, ROOMY) as engine:
        first = engine.turn(prompts)
        longer = [(*p, *a, *LONG[:10]) for p, a in zip(prompts, first, strict=True)]
        second = engine.turn(longer)
    found = []
    with Engine(model, ROOMY, settings) as engine:
        answers = [*first, *first, *second]
        for tokens, answer in zip([*prompts, *prompts, *longer], answers, strict=True):
            assert engine.turn([tokens]) == [answer], len(tokens)
            found.append(len(tokens) + len(answer) - 1 - engine.computed[f"r{engine._names}"])
            forget(engine)
    lacking, again, on = (found[i : i + len(LENGTHS)] for i in (0, 12, 24))
    assert lacking == [0] * len(LENGTHS)
    assert again == [last_boundary(length - 1) for length in LENGTHS]
    assert on == [last_boundary(length + 5) for length in LENGTHS]


def test_where_pages_are(model: Any) -> None:
    """What the library writes for one layer and block lies where the geometry says."""
    with Engine(model, ROOMY) as engine:
        engine.turn([LONG[:5]])
        cache = engine.manager.batch_processor.cache
        parts = layout.parts(cache)
        geometry = layout.geometry(cache, parts, "auto")
        with engine.manager.pause():
            for name, index in geometry.row_of_layer.items():
                layer, row = int(name.removeprefix("layers.")), geometry.rows[index]
                (group,) = (
                    group
                    for group, part in enumerate(parts)
                    if layer in [part.allocator.layer_indices[page] for page in part.pages]
                )
                allocator = parts[group].allocator
                for block in (2, 5, allocator.num_blocks - 1):
                    cache.cache_tensor.zero_()
                    start = block * allocator.block_physical_stride
                    for view in allocator._kv_token_views[layer]:
                        view.view(torch.uint8)[start : start + PAGE] = 1
                    named = np.array([parts[group].first_block + block])
                    (page,) = pages_of(row, group, named) if row.places else [block]
                    begin = row.offset + int(page) * row.block_stride
                    assert cache.cache_tensor[begin : begin + row.page_bytes].all()
                    assert int(cache.cache_tensor.sum()) == row.page_bytes
            cache.cache_tensor.zero_()
    assert len(geometry.row_of_layer) == model.config.num_hidden_layers
    assert all(group.block_tokens == PAGE for group in layout.groups(parts))
    # A slot has room for one layer of each group in each row, and no more.
    layers = sum(len(part.pages) for part in parts)
    assert geometry.chunk_bytes * len(parts) == layers * CHUNK // PAGE * row.page_bytes


def test_a_ring_is_loaded_before_its_layer_reads_it(
    model: Any, expected: Tokens, gate: Gate
) -> None:
    with Engine(model, ROOMY, LAYERWISE) as engine:
        engine.turn([LONG])
        forget(engine)
        gate.seconds = 0.03
        assert engine.turn([LONG]) == [expected]
        assert engine.figures()["wait_seconds_sum"] > 0
        assert engine.computed["r2"] == 60 + 5


def test_a_load_that_fails_is_computed_from_the_beginning(
    model: Any, expected: Tokens, gate: Gate
) -> None:
    with Engine(model, ROOMY, PARKED) as engine:
        engine.turn([LONG])
        forget(engine)
        gate.error = OSError("the memory is gone")
        assert engine.turn([LONG]) == [expected]
        assert engine.computed["r2"] == len(LONG) + 5
        engine.settle()
        gate.error = None
        forget(engine)
        assert engine.turn([LONG]) == [expected]
        assert engine.computed["r3"] == 60 + 5
        engine.settle()


@MODES
def test_the_same_prefix_twice_at_once(
    model: Any, expected: Tokens, settings: dict[str, object]
) -> None:
    with Engine(model, ROOMY, settings) as engine:
        assert engine.turn([LONG, LONG]) == [expected] * 2
        forget(engine)
        assert engine.turn([LONG, LONG]) == [expected] * 2
        assert engine.computed["r3"] == engine.computed["r4"] == 60 + 5
        engine.settle()


def test_a_parked_request_that_is_cancelled(model: Any, expected: Tokens, gate: Gate) -> None:
    with Engine(model, ROOMY, PARKED) as engine:
        engine.turn([LONG])
        forget(engine)
        gate.opened.clear()
        parked = engine.submit(LONG)
        assert gate.reached.wait(PATIENCE)
        engine.manager.cancel_request(parked)
        engine.await_answers([engine.submit(prompt(33, 50))])
        scheduler = engine.manager.batch_processor.scheduler
        assert scheduler.lamina.hand_off.phase(parked) is Phase.DRAINING
        assert scheduler._pool.held > 0
        gate.opened.set()
        engine.settle()
        assert engine.turn([LONG]) == [expected]


def test_cancelled_requests_leave_nothing(model: Any, expected: Tokens) -> None:
    with Engine(model, ROOMY, PARKED) as engine:
        for number in range(12):
            name = engine.submit((*LONG[: 60 * number + 40], number), 40)
            if number % 3 == 0:
                engine.await_answers([engine.submit(prompt(number, 30))])
            engine.manager.cancel_request(name)
        engine.settle()
        assert engine.turn([LONG]) == [expected]


@MODES
@pytest.mark.parametrize("length", [193, pytest.param(600, marks=pytest.mark.slow)])
def test_a_hit_is_forked(model: Any, settings: dict[str, Any], length: int) -> None:
    tokens = LONG[:length]
    with Engine(model, ROOMY) as engine:
        (first,) = engine.turn([tokens])
    with Engine(model, ROOMY, settings) as engine:
        for _ in range(2):
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
            forget(engine)
        assert engine.figures()["hit_tokens host"] == last_boundary(length - 2)


SMALL = {"page_size": PAGE, "num_blocks": 17, "max_batch_tokens": 64, "safety_margin": 0.0}
"""Too small for two requests of 100 tokens to come to 100 more."""


def both(
    model: Any,
    batching: ContinuousBatchingConfig,
    lamina: dict[str, object] | None = None,
    *,
    reset: bool = False,
) -> list[Tokens]:
    """What is said after both, twice with Lamina; whether one had to begin anew meanwhile."""
    prompts = [prompt(seed, 100) for seed in (41, 42)]
    with Engine(model, batching, lamina, max_new_tokens=100) as engine:
        answers = engine.turn(prompts)
        if lamina is not None:
            forget(engine)
            answers += engine.turn(prompts)
            found = engine.figures()["hit_tokens host"]
            assert found > 128 if reset else found == 128
            engine.settle()
    return answers


@MODES
def test_a_request_that_is_reset_goes_on_in_its_ring(
    model: Any, settings: dict[str, object]
) -> None:
    expected = both(model, ROOMY)
    small = ContinuousBatchingConfig(**SMALL)
    assert both(model, small, settings, reset=True) == expected * 2


def test_requests_that_the_library_moves_to_host_memory(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = both(model, ROOMY)
    empty, offload, moved = torch.empty, OffloadingManager._offload_to_cpu, []

    def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return empty(*args, **options)  # without an accelerator there is no pinned memory

    def counted(manager: Any, victims: Any, tables: Any) -> Any:
        found = offload(manager, victims, tables)
        moved.extend(found)
        return found

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(OffloadingManager, "_offload_to_cpu", counted)
    waits: list[ComputeStream] = []
    monkeypatch.setattr(ComputeStream, "precede", lambda stream: waits.extend([stream]))
    small = ContinuousBatchingConfig(**SMALL, cpu_offload_space=0.1)
    assert both(model, small, PARKED) == expected * 2
    assert moved
    assert waits, "loads were begun beside the library's copies"


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "do"), [(256, "set it to 128"), (48, "set it to 32")])
def test_pages_that_do_not_fit_into_a_window_are_refused(
    checkpoints: Checkpoints, page: int, do: str
) -> None:
    model = load_model(checkpoints.model("interleaved-windows"))
    batching = attach(ContinuousBatchingConfig(page_size=page, num_blocks=20), PARKED)
    assert f"page_size is {page}, {do}" in refused(model, batching)


@pytest.mark.parametrize("chunk", [24, 48, 256])
def test_chunks_that_do_not_fit_into_a_window_are_refused(
    checkpoints: Checkpoints, chunk: int
) -> None:
    model = load_model(checkpoints.model("interleaved-windows"))
    said = refused(model, attach(ROOMY, PARKED | {"chunk_tokens": chunk}))
    assert f"chunk_tokens: {chunk} does not fit" in said
    assert "that divides the sliding window of 128 tokens" in said


@pytest.mark.parametrize(("page", "chunk"), [(16, 64), (32, 64), (96, 96), (192, 192), (4, 64)])
def test_chunks_by_themselves_fit_into_a_window(
    checkpoints: Checkpoints, page: int, chunk: int
) -> None:
    model = load_model(checkpoints.model("sliding-window"))
    batching = ContinuousBatchingConfig(
        page_size=page, num_blocks=800 // page, max_batch_tokens=128
    )
    before = set(threading.enumerate())
    with Engine(model, batching, PARKED) as engine:
        (answer,) = engine.turn([LONG[:400]])
        forget(engine)
        assert engine.turn([LONG[:400]]) == [answer]
        assert engine.figures()["hit_tokens host"] == 399 // chunk * chunk
    left = set(threading.enumerate()) - before
    assert not [thread.name for thread in left if thread.name.startswith("lamina")]
