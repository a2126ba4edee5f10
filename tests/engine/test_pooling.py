"""Models of which nothing may be kept are served as without Lamina; others that pool are not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from vllm.config import PoolerConfig

from engine.driver import SMALL, EngineSpec, Start
from engine.workload import CHUNK, prompt

pytestmark = pytest.mark.engine

PROMPTS = [prompt(51 + length, length) for length in (CHUNK + 20, 2 * CHUNK + 9, 5 * CHUNK + 1)]


def encoder(folder: Path) -> Path:
    """A checkpoint without a KV cache."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=1024,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def pooling(model: Path, folder: Path, how: str, **options: object) -> EngineSpec:
    """vLLM pools nothing without a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(model, folder)
    words = Tokenizer(WordLevel({str(i): i for i in range(512)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="0")
    tokenizer.save_pretrained(folder)
    settings = {
        "runner": "pooling",
        "pooler_config": PoolerConfig(seq_pooling_type=how),
        "skip_tokenizer_init": False,
    }
    return EngineSpec(folder, SMALL, settings | options)


def near(embeddings: list[list[float]]) -> list[object]:
    return [pytest.approx(embedding, abs=1e-4) for embedding in embeddings]


def test_a_pooler_that_needs_the_whole_prompt_gets_it(
    llama: Path, tmp_path: Path, start: Start
) -> None:
    engine = start(pooling(llama, tmp_path / "model", "MEAN"))
    first = engine.embed(PROMPTS)
    engine.forget()
    assert engine.embed(PROMPTS) == near(first)


def test_a_pooler_that_needs_the_last_token_finds_the_others(
    llama: Path, tmp_path: Path, start: Start
) -> None:
    engine = start(pooling(llama, tmp_path / "model", "LAST", enable_prefix_caching=False))
    first = engine.embed(PROMPTS)
    engine.drain()
    assert engine.embed(PROMPTS) == near(first)
    assert engine.metrics().total("lamina_hit_tokens_total", tier="host") > 0


def test_an_encoder_is_served(tmp_path: Path, start: Start) -> None:
    engine = start(
        pooling(encoder(tmp_path / "bert"), tmp_path / "model", "CLS", max_model_len=1024)
    )
    first = engine.embed(PROMPTS)
    assert engine.embed(PROMPTS) == near(first)
