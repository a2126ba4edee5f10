"""What sets this engine's chunks apart from all others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import vllm
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig

from lamina_kv.config import Config
from lamina_kv.engines.identity import describe_checkpoint, describe_model
from lamina_kv.engines.vllm import layout
from lamina_kv.keys import Namespace

SETTINGS: Mapping[str, tuple[str, ...]] = {
    "model": (
        "code_revision",
        "disable_sliding_window",
        "model_class_overrides",
        "model_impl",
        "quantization_config",
    ),
    "multimodal": (
        "language_model_only",
        "media_io_kwargs",
        "mm_device_do_normalize",
        "mm_encoder_attn_dtype",
        "mm_processor_kwargs",
        "video_pruning_method",
        "video_pruning_rate",
    ),
    "cache": (
        "kv_cache_dtype_skip_layers",
        "kv_sharing_fast_prefill",
        "swa_bounded_replay",
        "use_replayssm",
    ),
    "attention": (
        "backend_per_kind",
        "disable_flashinfer_q_quantization",
        "indexer_kv_dtype",
        "indexer_sparse_logits",
        "use_non_causal",
        "use_prefill_query_quantization",
    ),
}
"""Fields of vLLM's configuration that change a cache's bytes and that no other part of a namespace
tells: the model's own configuration has ``hf_overrides`` in it, cache groups have windows, and so
on. What merely computes the same by another kernel is none. Types of recurrent states are told by
the layout; vLLM sets them for models without any, too, as the processor suggests."""


_BUILD = re.compile(r"cpu|cu\d+|rocm\d*|xpu|")


def build_namespace(config: Config, vllm_config: VllmConfig, cache: KVCacheConfig) -> Namespace:
    """The namespace of an engine, but for the arrangement of its pages, which only ranks know: see
    :func:`arranged`. It is equal on every rank, on every machine and after a restart.

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
        speculation=_speculation(config, vllm_config),
        engine="vllm",
        engine_format=_engine_format(),
    )


def arranged(namespace: Namespace, arrangement: str) -> Namespace:
    """A namespace whose pages are arranged as
    :func:`~lamina_kv.engines.vllm.arrangement.arrangement` says."""
    return replace(namespace, layout=f"{namespace.layout}; {arrangement}")


def _model(vllm_config: VllmConfig) -> str:
    model = vllm_config.model_config
    fields = model.hf_config.to_dict()
    engine: dict[str, object] = {"settings": settings(vllm_config)}
    if "longrope" in str(fields):
        # vLLM scales its positions by whether the longest sequence needs it.
        engine["max_model_len"] = model.max_model_len
    return describe_model(fields, **engine)


def settings(vllm_config: VllmConfig) -> dict[str, object]:
    """What the operator has set, beyond the model's own configuration, of what changes the cache's
    bytes; see :data:`SETTINGS`."""
    model = vllm_config.model_config
    parts = {
        "model": model,
        "multimodal": model.multimodal_config,
        "cache": vllm_config.cache_config,
        "attention": vllm_config.attention_config,
    }
    found = {
        f"{part}.{name}": getattr(parts[part], name, None)
        for part, names in SETTINGS.items()
        for name in names
    }
    scales = getattr(model.multimodal_config, "mm_encoder_fp8_scale_path", None)
    if scales is not None:
        found["mm_encoder_fp8_scales"] = blake2b(Path(scales).read_bytes()).hexdigest()
    return found


def _checkpoint(config: Config, vllm_config: VllmConfig) -> str:
    model, load = vllm_config.model_config, vllm_config.load_config
    if load.load_format == "dummy" and config.identity == "auto":
        return f"dummy weights, seed {model.seed}"
    return describe_checkpoint(
        config, model.model, revision=model.revision, download_dir=load.download_dir
    )


def _speculation(config: Config, vllm_config: VllmConfig) -> str:
    """How the engine drafts, and with which weights; ``identity`` stands for those, too."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.draft_model_config is None:
        return ""
    draft = speculative.draft_model_config
    if draft.model == vllm_config.model_config.model:
        return str(speculative.method)
    content = describe_checkpoint(
        config,
        draft.model,
        revision=draft.revision,
        download_dir=vllm_config.load_config.download_dir,
    )
    if config.identity != "auto":
        content += f" {draft.model}"
    return f"{speculative.method} {content}"


def _engine_format() -> str:
    """What makes engines give bytes another meaning in the same place: vLLM's release, and what
    quantised formats it chooses between, which the kind of device decides."""
    parts = ["vllm", release(vllm.__version__), current_platform.device_name]
    if current_platform.is_cpu():
        parts.append(current_platform.get_cpu_architecture().name)
    elif (capability := current_platform.get_device_capability()) is not None:
        parts.append(capability.as_version_str())
    else:
        parts.append(current_platform.get_device_name())
    return " ".join(parts)


def release(version: str) -> str:
    """A version of vLLM without what only says which hardware it was built for.

    Args:
        version: as ``vllm.__version__`` has it, such as ``0.33.0+cu130``.
    """
    public, _, local = version.partition("+")
    kept = [part for part in local.split(".") if not _BUILD.fullmatch(part)]
    return "+".join(filter(None, (public, ".".join(kept))))
