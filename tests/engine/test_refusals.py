"""Models that this version would serve wrongly are refused at the start, in words that help."""

from __future__ import annotations

import pytest

from engine.driver import SMALL, Engine, EngineSpec, EngineStartError, Fleet, Start
from engine.models import SHAPES, Checkpoints

pytestmark = pytest.mark.engine


def test_drafts_on_a_state_that_is_overwritten(checkpoints: Checkpoints, start: Start) -> None:
    """Without its prefix cache vLLM keeps one state, and drafts run ahead of it."""
    model = "state-space"
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    options = {**SHAPES[model].options, "speculative_config": drafts}
    with pytest.raises(EngineStartError) as refusal:
        start(EngineSpec(checkpoints.model(model), SMALL, options))
    message = str(refusal.value).strip().splitlines()[-1]
    assert "UnsupportedModel" in message
    assert "with speculative decoding while vLLM's prefix cache is off" in message
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
