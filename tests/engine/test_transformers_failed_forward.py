"""A forward that raises ends the session in transformers' continuous batching. What it was to
compute is not kept: the next session would answer with what its blocks happened to hold."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

from engine.batching import PATIENCE, Engine, forget, load_model
from engine.models import Checkpoints
from engine.workload import prompt

pytestmark = pytest.mark.engine

LONG = prompt(31, 400)
ROOMY = ContinuousBatchingConfig(page_size=16, num_blocks=200, max_batch_tokens=512)
SETTINGS: dict[str, object] = {
    "load": {"mode": "parked", "when": "always"},
    "host": {"capacity": "64MiB"},
}


@pytest.mark.parametrize(
    "shape",
    [
        "llama",
        pytest.param("sliding-window", marks=pytest.mark.slow),
        pytest.param("interleaved-windows", marks=pytest.mark.slow),
    ],
)
def test_nothing_of_a_forward_that_failed_is_found(
    checkpoints: Checkpoints,
    shape: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = load_model(checkpoints.model(shape))
    with Engine(model, ROOMY) as plain:
        (expected,) = plain.turn([LONG])

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the forward failed")

    with Engine(model, ROOMY, SETTINGS) as engine:
        engine.turn([prompt(77, 130)])
        forget(engine)
        with monkeypatch.context() as broken:
            broken.setattr(ContinuousBatchProcessor, "_generation_step", fail)
            engine.submit(LONG)
            output = engine.manager.output_router.output_queue.get(timeout=PATIENCE)
            assert "the forward failed" in output.error
            engine.manager.stop(keep_for_next_session=True)
        engine.manager.start()
        assert engine.turn([LONG]) == [expected]
        assert not engine.figures().get("hit_tokens host")
        for _ in range(2):  # what fails while the same is computed again is saved the next time
            forget(engine)
            assert engine.turn([LONG]) == [expected]
        assert engine.figures()["hit_tokens host"] > 0
    caplog.clear()  # the error that was logged has the engine in it
