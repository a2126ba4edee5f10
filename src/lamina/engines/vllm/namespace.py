"""What sets this engine's chunks apart from all others."""

from __future__ import annotations

import torch
import vllm
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig

from lamina.checkpoint import fingerprint, locate
from lamina.config import Config
from lamina.engines.identity import describe_checkpoint, describe_model
from lamina.engines.vllm import layout
from lamina.keys import Namespace


def build_namespace(config: Config, vllm_config: VllmConfig, cache: KVCacheConfig) -> Namespace:
    """The namespace of an engine; equal on every rank and after a restart.

    Raises:
        ValueError: if the weights cannot be told apart from others; says to set ``identity``.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return Namespace(
        model=_model(vllm_config),
        checkpoint=_checkpoint(config, vllm_config),
        model_dtype=str(model.dtype),
        cache_dtype=str(vllm_config.cache_config.cache_dtype),
        quantization=str(model.quantization or ""),
        groups=tuple(
            (group.kind.value, group.block_tokens, group.window)
            for group in layout.groups(cache, config.chunk_tokens)
        ),
        chunk_tokens=layout.chunk_tokens(cache, config.chunk_tokens),
        layout=layout.describe(cache),
        page_bytes=layout.page_sizes(cache),
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        context_parallel=parallel.decode_context_parallel_size
        * parallel.prefill_context_parallel_size,
        speculation=_speculation(vllm_config),
        engine="vllm",
        engine_format=_engine_format(vllm_config),
    )


def _model(vllm_config: VllmConfig) -> str:
    fields = vllm_config.model_config.hf_config.to_dict()
    if "longrope" in str(fields):
        # vLLM scales its positions by whether the longest sequence needs it.
        return describe_model(fields, max_model_len=vllm_config.model_config.max_model_len)
    return describe_model(fields)


def _checkpoint(config: Config, vllm_config: VllmConfig) -> str:
    model, load = vllm_config.model_config, vllm_config.load_config
    if load.load_format == "dummy" and config.identity == "auto":
        return f"dummy weights, seed {model.seed}"
    return describe_checkpoint(
        config, model.model, revision=model.revision, download_dir=load.download_dir
    )


def _content(model: ModelConfig, load: LoadConfig) -> str:
    where = locate(model.model, revision=model.revision, download_dir=load.download_dir)
    return fingerprint(where)


def _speculation(vllm_config: VllmConfig) -> str:
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.draft_model_config is None:
        return ""
    draft = speculative.draft_model_config
    if draft.model == vllm_config.model_config.model:
        return str(speculative.method)
    return f"{speculative.method} {_content(draft, vllm_config.load_config)}"


def _engine_format(vllm_config: VllmConfig) -> str:
    """VLLM's attention kernels arrange bytes inside a page as suits them and the hardware."""
    backend = vllm_config.attention_config.backend
    parts = [f"vllm {vllm.__version__}", str(backend), current_platform.device_type]
    if current_platform.is_cpu():
        parts.append(torch.backends.cpu.get_cpu_capability())
    else:
        parts.append(current_platform.get_device_name())
    return " ".join(parts)
