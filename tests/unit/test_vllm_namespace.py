"""Guards: every field of vLLM's configuration is known to change a cache's bytes, or not to; and so
is what vLLM runs on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.config import AttentionConfig, CacheConfig, ModelConfig, VllmConfig
from vllm.config.multimodal import MultiModalConfig
from vllm.platforms.interface import CpuArchEnum, DeviceCapability

from lamina_kv.checkpoint import CheckpointError
from lamina_kv.config import load_config
from lamina_kv.engines.identity import describe_model
from lamina_kv.engines.vllm import namespace
from lamina_kv.engines.vllm.namespace import SETTINGS, _speculation, release, settings

CONFIGS = {
    "model": ModelConfig,
    "multimodal": MultiModalConfig,
    "cache": CacheConfig,
    "attention": AttentionConfig,
}

ELSEWHERE = {
    "model": "convert dtype hf_config hf_overrides hf_text_config max_model_len model "
    "multimodal_config quantization revision runner seed",
    "multimodal": "mm_encoder_fp8_scale_path",
    "cache": "block_size cache_dtype kv_cache_layout mamba_block_size mamba_cache_dtype "
    "mamba_cache_mode mamba_page_size_padded mamba_ssm_cache_dtype skip_page_size_padded "
    "sliding_window",
    "attention": "backend",
}
"""Fields that are in a namespace by another way: in the model's configuration, in the kinds, pages
and layout of its cache, in the checkpoint's content."""

HARMLESS = {
    "model": "allow_deprecated_quantization allowed_local_media_path allowed_media_domains "
    "config_format disable_cascade_attn enable_cumem_allocator enable_nccl_comm_suspend "
    "enable_prompt_embeds enable_sleep_mode enable_trace_replay enforce_eager generation_config "
    "hf_config_path hf_token io_processor_plugin is_submodel_config logits_processors "
    "logprobs_mode max_logprobs model_weights override_generation_config pooler_config "
    "renderer_num_workers return_sampling_mask served_model_name skip_tokenizer_init "
    "sleep_mode_backend sleep_mode_offload_cudagraph sleep_preserve_parameter_names "
    "spec_target_max_model_len tokenizer tokenizer_mode tokenizer_revision trust_remote_code "
    "use_fp64_gumbel word_embeddings_untied_by_checkpoint",
    "multimodal": "allow_missing_mm_embeddings enable_mm_embeds interleave_mm_strings "
    "limit_per_prompt mm_encoder_attn_backend mm_encoder_fp8_scale_save_margin "
    "mm_encoder_fp8_scale_save_path mm_encoder_only mm_encoder_tp_mode mm_hasher_algorithm "
    "mm_ipc_gpu_memory_gb mm_processor_cache_gb mm_processor_cache_type "
    "mm_shm_cache_max_object_size_mb mm_tensor_ipc skip_mm_profiling",
    "cache": "_block_size_resolved cache_hit_alignment_tokens effective_attention_block_size "
    "enable_mamba_shared_prefix_checkpoint enable_prefix_caching gpu_memory_utilization "
    "hash_block_size is_attention_free kv_cache_max_concurrency kv_cache_memory_bytes "
    "kv_cache_size_tokens kv_offloading_backend kv_offloading_size name num_cpu_blocks "
    "num_gpu_blocks num_gpu_blocks_override prefix_cache_retention_interval "
    "prefix_caching_hash_algo prefix_match_unit replayssm_buffer_len "
    "simple_cpu_offload_num_blocks use_kda_recoverssm user_specified_block_size",
    "attention": "flash_attn_max_num_splits_for_cuda_graph flash_attn_version flex_attn_block_m "
    "flex_attn_block_n flex_attn_kv_block_size flex_attn_q_block_size hisparse_config "
    "indexer_tp_shard_min_rows minimax_m3_msa_decode_backend mla_prefill_backend "
    "sparse_mla_force_mqa sparse_mla_prefill_workspace_factor tokenspeed_mla_min_split_kv "
    "tq_max_kv_splits_for_cuda_graph trtllm_ragged_backend use_trtllm_attention",
}
"""Fields that say where something is from, how much memory it takes, what becomes of it after the
cache, or which kernel computes the same."""


@pytest.mark.parametrize("part", CONFIGS)
def test_every_field_is_looked_at_or_is_known_not_to_matter(part: str) -> None:
    fields = {field.name for field in dataclasses.fields(cast(Any, CONFIGS[part]))}
    known = {*SETTINGS[part], *ELSEWHERE[part].split(), *HARMLESS[part].split()}
    assert fields <= known, "decide whether they change the bytes of a cache"


def config(**changed: object) -> VllmConfig:
    parts = {
        part: SimpleNamespace(**{name: changed.get(f"{part}.{name}") for name in names})
        for part, names in SETTINGS.items()
    }
    parts["model"].multimodal_config = parts["multimodal"]
    return cast(
        VllmConfig,
        SimpleNamespace(
            model_config=parts["model"],
            cache_config=parts["cache"],
            attention_config=parts["attention"],
        ),
    )


@pytest.mark.parametrize(
    "name", [f"{part}.{name}" for part, names in SETTINGS.items() for name in names]
)
def test_a_setting_changes_the_namespace(name: str) -> None:
    assert settings(config(**{name: {"crop": 1}})) != settings(config())


def test_scales_are_known_by_their_content(tmp_path: Path) -> None:
    found = []
    for content in ("1", "2", "1"):
        path = tmp_path / f"scales-{len(found)}"
        path.write_text(content)
        scaled = config()
        cast(Any, scaled.model_config.multimodal_config).mm_encoder_fp8_scale_path = path
        found.append(settings(scaled))
    assert found[0] == found[2] != found[1]


def test_a_model_without_inputs_but_text_has_settings() -> None:
    plain = config()
    plain.model_config.multimodal_config = None
    assert settings(plain) == settings(config())


def drafting(model: Path) -> VllmConfig:
    """A configuration with that draft model."""
    draft = SimpleNamespace(model=str(model), revision=None)
    config = SimpleNamespace(
        model_config=SimpleNamespace(model="target"),
        load_config=SimpleNamespace(download_dir=None),
        speculative_config=SimpleNamespace(method="eagle", draft_model_config=draft),
    )
    return cast(VllmConfig, config)


def test_what_an_error_about_a_draft_model_says_to_set_helps(tmp_path: Path) -> None:
    """A draft model without weight files: what vLLM downloads when it starts, say."""
    with pytest.raises(CheckpointError, match="set `identity`"):
        _speculation(load_config({}, {}), drafting(tmp_path))
    named = {
        _speculation(load_config({"identity": identity}, {}), drafting(tmp_path / model))
        for identity in ("one", "two")
        for model in ("draft", "other")
    }
    assert len(named) == 4


def test_a_draft_model_is_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = []
    for name, content in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(content)
        found.append(_speculation(load_config({}, {}), drafting(tmp_path / name)))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("version", "released"),
    [
        ("0.33.0", "0.33.0"),
        ("0.33.0+cpu", "0.33.0"),
        ("0.33.0+cu130", "0.33.0"),
        ("0.33.0+rocm700", "0.33.0"),
        ("0.33.1", "0.33.1"),
        ("0.33.0rc2", "0.33.0rc2"),
        ("0.33.1.dev7+g1a2b3c4.cu130", "0.33.1.dev7+g1a2b3c4"),
        ("0.33.0+ours.2", "0.33.0+ours.2"),
    ],
)
def test_a_release_is_the_same_for_all_hardware_and_any_other_source_is_not(
    version: str, released: str
) -> None:
    assert release(version) == released


WORDS = {f"word {number}" for number in range(20)}


def test_a_model_is_the_same_in_every_folder_and_every_process() -> None:
    fields = {"_name_or_path": "/a", "text_config": {"_name_or_path": "/a", "width": 8}}
    moved = {"_name_or_path": "/b", "text_config": {"_name_or_path": "/b", "width": 8}}
    other = {"_name_or_path": "/a", "text_config": {"_name_or_path": "/a", "width": 9}}
    assert describe_model(fields) == describe_model(moved) != describe_model(other)
    assert json.loads(describe_model({"words": WORDS})) == {"words": sorted(WORDS)}


@dataclasses.dataclass
class Machine:
    """What vLLM says of where it runs."""

    device_name: str
    name: str
    capability: tuple[int, int] | None = None
    architecture: CpuArchEnum = CpuArchEnum.X86

    def is_cpu(self) -> bool:
        return self.device_name == "cpu"

    def get_cpu_architecture(self) -> CpuArchEnum:
        return self.architecture

    def get_device_capability(self) -> DeviceCapability | None:
        return None if self.capability is None else DeviceCapability(*self.capability)

    def get_device_name(self) -> str:
        return self.name


H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
XEON = Machine("cpu", "Intel Xeon")


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (H100, Machine("cuda", "NVIDIA H200", (9, 0)), True),
        (H100, Machine("cuda", "NVIDIA A100-SXM4-80GB", (8, 0)), False),
        (H100, Machine("cuda", "NVIDIA B200", (10, 0)), False),
        (H100, Machine("rocm", "AMD Instinct MI250X", (9, 0)), False),
        (H100, XEON, False),
        (Machine("xpu", "one"), Machine("xpu", "another"), False),
        (XEON, Machine("cpu", "AMD EPYC"), True),
        (XEON, Machine("cpu", "Neoverse-V2", architecture=CpuArchEnum.ARM), False),
    ],
    ids=lambda value: f"{value.name}" if isinstance(value, Machine) else "",
)
def test_machines_share_whose_kernels_give_bytes_the_same_meaning(
    one: Machine, other: Machine, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = []
    for machine in (one, other):
        monkeypatch.setattr(namespace, "current_platform", machine)
        formats.append(namespace._engine_format())
    assert (formats[0] == formats[1]) is alike
