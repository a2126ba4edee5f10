"""Models that this version would serve wrongly are refused at the start, in words that help."""

from __future__ import annotations

import pytest

from engine.driver import SMALL, Engine, EngineSpec, EngineStartError, Fleet, Start
from engine.models import Checkpoints

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("model", "options", "named"),
    [
        ("sliding-window", {}, "sliding_window"),
        ("interleaved-windows", {}, "sliding_window"),
        ("linear-attention", {"dtype": "bfloat16", "block_size": 256}, "mamba"),
        ("short-convolution", {}, "mamba"),
    ],
)
def test_a_model_with_other_caches_than_full_attention(
    checkpoints: Checkpoints, start: Start, model: str, options: dict[str, object], named: str
) -> None:
    with pytest.raises(EngineStartError) as refusal:
        start(EngineSpec(checkpoints.model(model), SMALL, options))
    message = str(refusal.value).strip().splitlines()[-1]
    assert "UnsupportedModel" in message
    assert named in message
    assert "without --kv-transfer-config" in message


def test_chunks_that_are_no_whole_number_of_blocks(checkpoints: Checkpoints, start: Start) -> None:
    with pytest.raises(EngineStartError, match="chunk_tokens: 48 is not a whole number of blocks"):
        start(EngineSpec(checkpoints.model("llama"), {**SMALL, "chunk_tokens": 48}))


@pytest.mark.slow
def test_pipeline_parallelism(checkpoints: Checkpoints, fleet: Fleet) -> None:
    """vLLM's CPU backend cannot run it either, so it is refused until it can be tried."""
    spec = EngineSpec(checkpoints.model("llama"), SMALL, {"pipeline_parallel_size": 2})
    log = fleet.next_log()
    with pytest.raises(EngineStartError):
        Engine(spec, log)
    assert "does not support pipeline_parallel_size > 1" in log.read_text()
