"""Tiny checkpoints with real random weights, in the shapes that Lamina has to serve or refuse.

vLLM's dummy weights are so small that the answer hardly depends on the prompt. Here the matrices
are scaled until one token changed early in a long prompt changes the greedy answer, so that a
wrong page in the cache is a wrong answer (``test_harness`` holds the models to that).
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = 512
"""Token ids of every model are below this."""


def mla_block() -> int:
    """Tokens of an MLA model's block: vLLM's kernels for AMX, which it takes where the processor
    has it, know multiples of 32 only."""
    flags = Path("/proc/cpuinfo").read_text()
    return 32 if "amx_tile" in flags else 16


@dataclass(frozen=True)
class Shape:
    """One model to be made.

    Attributes:
        model_type: transformers' name of the architecture.
        dtype: type that the weights are saved in.
        gain: factor on all matrices.
        fields: its configuration, beyond what all shapes share.
        constants: by the end of their names, parameters that have one value. Norms of queries and
            keys above one make attention pick tokens; a small decay makes a state remember.
        options: arguments of ``vllm.LLM`` without which the model does not run, or runs wrongly.
    """

    model_type: str
    dtype: str
    gain: float
    fields: dict[str, Any]
    constants: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}

SHAPES: dict[str, Shape] = {
    "llama": Shape("llama", "float32", 5.0, {}),
    "qwen3-moe": Shape("qwen3_moe", "float32", 5.0, _EXPERTS),
    "mla": Shape(
        "deepseek_v2",
        "bfloat16",
        3.0,
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "head_dim": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 3,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "sliding-window": Shape(
        "mistral", "float32", 7.0, {"num_hidden_layers": 5, "sliding_window": 192}
    ),
    "interleaved-windows": Shape(
        "gemma3_text",
        "float32",
        4.0,
        {
            "num_hidden_layers": 12,
            "sliding_window": 128,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
        },
        {"q_norm.weight": 3.0, "k_norm.weight": 3.0},
    ),
    "alternating-windows": Shape(
        "gpt_oss",
        "bfloat16",
        8.0,
        {
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        options={"dtype": "bfloat16"},
    ),
    "linear-attention": Shape(
        "qwen3_next",
        "bfloat16",
        8.0,
        {
            **_EXPERTS,
            "num_hidden_layers": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "shared_expert_intermediate_size": 64,
        },
        {"A_log": -5.0, "q_norm.weight": 2.0, "k_norm.weight": 2.0},
        {"dtype": "bfloat16"},
    ),
    "short-convolution": Shape(
        "lfm2",
        "float32",
        5.0,
        {
            "num_hidden_layers": 6,
            "tie_word_embeddings": True,  # vLLM ties them in any case
            "block_auto_adjust_ff_dim": False,
            "block_dim": 128,
            "block_ff_dim": 128,
            "conv_dim": 128,
            "conv_dim_out": 128,
            "layer_types": ["conv", "conv", "full_attention"] * 2,
        },
        {"q_layernorm.weight": 3.0, "k_layernorm.weight": 3.0},
        # vLLM's rotary kernel for CPUs takes the heads of this model's queries for tokens.
        {"compilation_config": {"custom_ops": ["-rotary_embedding"]}},
    ),
    "state-space": Shape(
        "mamba2",
        "float32",
        2.0,
        {
            "intermediate_size": 256,
            "num_heads": 8,
            "head_dim": 32,
            "state_size": 32,
            "n_groups": 1,
            "expand": 2,
            "chunk_size": 64,
        },
        {"A_log": -4.0},
        {"enable_prefix_caching": False},
    ),
    "attention-and-state-space": Shape(
        "granitemoehybrid",
        "float32",
        4.0,
        {
            "num_hidden_layers": 6,
            "layer_types": (["linear_attention"] * 2 + ["full_attention"]) * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 128,
            "attention_multiplier": 0.5,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 32,
            "mamba_chunk_size": 64,
        },
        {"A_log": -4.0},
        {"enable_prefix_caching": False},
    ),
}
"""What :func:`make_model` can make, by name."""


def make_model(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint ``name`` of :data:`SHAPES` into ``folder``.

    Args:
        name: which.
        folder: made if it is not there.
        seed: another seed makes other weights of the same shape.

    Returns:
        ``folder``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPES[name]
    config = AutoConfig.for_model(shape.model_type, **(_SHARED | shape.fields))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(shape.gain)
            for ending, value in shape.constants.items():
                if parameter_name.endswith(ending):
                    parameter.fill_(value)
    model.to(getattr(torch, shape.dtype)).save_pretrained(folder)
    return folder


def make_adapter(model: Path, folder: Path, seed: int = 0) -> Path:
    """Write a LoRA adapter of rank 8 for the attention of ``model`` into ``folder``.

    Args:
        model: a checkpoint that :func:`make_model` made.
        folder: made if it is not there.
        seed: another seed makes another adapter.

    Returns:
        ``folder``.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden = config["hidden_size"]
    widths = {
        "q_proj": config["num_attention_heads"] * config["head_dim"],
        "v_proj": config["num_key_value_heads"] * config["head_dim"],
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, width in widths.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for part, size in (("lora_A", (8, hidden)), ("lora_B", (width, 8))):
                tensors[f"{stem}.{part}.weight"] = torch.randn(size, generator=generator) / 4
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 8,
        "target_modules": sorted(widths),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return folder


class Checkpoints:
    """Models and adapters, each made once, when it is first asked for.

    Args:
        folder: where they go. Processes that are given the same folder share what is in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def model(self, name: str, seed: int = 0) -> Path:
        """See :func:`make_model`."""
        return self._once(f"{name}-{seed}", lambda path: make_model(name, path, seed))

    def adapter(self, model: Path, seed: int = 0) -> Path:
        """See :func:`make_adapter`."""
        return self._once(
            f"{model.name}-adapter-{seed}", lambda path: make_adapter(model, path, seed)
        )

    def _once(self, name: str, make: Callable[[Path], Path]) -> Path:
        path = self._folder / name
        with (self._folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
            if not path.exists():
                # A process that is killed meanwhile leaves nothing that passes for a checkpoint.
                part = self._folder / f"{name}.part"
                shutil.rmtree(part, ignore_errors=True)
                make(part).rename(path)
        return path
