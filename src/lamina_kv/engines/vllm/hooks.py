"""Which layers call before and after they use their cache, and calls where vLLM makes none.

vLLM 0.32 and 0.33 call a connector's two layer hooks in the operators that ``Attention.forward``
and ``MLAAttention.forward`` run, and nowhere else that matters
(``vllm/model_executor/layers/attention/kv_transfer_utils.py``). Many models have layers of their
own: sparse attention and its indexers, compressors, short windows. Which those are changes with
every version. So a layer counts as calling only if its ``forward`` is one of these two.

A recurrent layer runs inside a custom operator that looks the layer up by name and calls a method
of it, in eager and in compiled models, within graph capture and outside. That method is wrapped, on
the instance: vLLM's code stays as it is, and the wrapper goes when the model goes.

The one exception are gated delta nets on a CPU, whose operator calls functions of a module and
hands them the layer. These functions are made to look for a method first.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm import envs
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.model_executor.layers.attention import Attention, MLAAttention

_CALLING = (Attention.forward, MLAAttention.forward)
"""Forwards that call the connector's hooks."""

_METHODS: Mapping[str, tuple[str, ...]] = {
    "gdn.olmo_gdn_linear_attn.OlmoHybridGatedDeltaNetAttention": ("_forward_core",),
    "gdn.qwen_gdn_linear_attn.QwenGatedDeltaNetAttention": (
        "_forward_core",
        "_forward_core_fused_norm_packed",
        "_forward_core_rocm",
    ),
    "linear.bailing_linear_attn.BailingMoELinearAttention": ("_forward",),
    "linear.minimax_linear_attn.MiniMaxText01LinearAttention": ("_forward",),
    "mamba_mixer.MambaMixer": ("forward_impl",),
    "mamba_mixer2.MambaMixer2": ("conv_ssm_forward",),
    "short_conv.ShortConv": ("forward_cuda", "forward_native"),
}
"""Per class below ``vllm.model_executor.layers.mamba``, the methods that its operators call: in one
forward one of them, or one that calls another. A class of another name may do otherwise, also if
it is derived from one of these."""

_PACKAGE = "vllm.model_executor.layers.mamba."
_CPU_MODULE = _PACKAGE + "ops.cpu.gdn_attention"
_CPU_FUNCTIONS = ("_cpu_gdn_attention_nonspec", "_cpu_gdn_attention_spec_aware")
_CPU_CLASS = "gdn.qwen_gdn_linear_attn.QwenGatedDeltaNetAttention"


def silent_layers(layers: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """Attention layers that are not known to call the connector's hooks.

    Args:
        layers: the model's layers by name, vLLM's ``static_forward_context``.
        names: which of them to look at.

    Returns:
        Those of ``names`` whose rows must be there before the forward begins.
    """
    return tuple(name for name in names if not _calls(layers.get(name)))


def _calls(layer: Any) -> bool:
    overridden = "forward" in vars(layer) if layer is not None else True
    return not overridden and getattr(type(layer), "forward", None) in _CALLING


def forward_calls_hooks(context: ForwardContext) -> bool:
    """Whether the forward that is about to run calls hooks of layers, as far as the runner knows.
    It does unless it replays one CUDA graph of the whole model.

    Args:
        context: as vLLM hands it to ``start_load_kv``. V1's says what runs. V2 replays a full graph
            outside of any forward context, and makes an empty one up for that call; one of a batch
            describes it (``v1/worker/gpu/kv_connector.py``, ``v1/worker/gpu/model_runner.py``).
    """
    full = context.cudagraph_runtime_mode is CUDAGraphMode.FULL
    return context.batch_descriptor is not None and not full


def pieces_hide_hooks(compilation: CompilationConfig) -> bool:
    """Whether pieces of CUDA graphs hold attention in this configuration, so that no hook runs when
    they are replayed, and :func:`forward_calls_hooks` does not tell. Asked once the graph mode is
    resolved: vLLM's fusion of attention and quantisation changes it late.
    """
    mode = compilation.cudagraph_mode
    if mode is None or not mode.has_piecewise_cudagraphs():
        return False
    # A piece of the graph may hold attention, unless graphs are broken there.
    cut = compilation.is_attention_compiled_piecewise() or envs.VLLM_USE_BREAKABLE_CUDAGRAPH
    return not cut


def hook_recurrent_layers(
    layers: Mapping[str, Any],
    names: Sequence[str],
    before: Callable[[str], None],
    after: Callable[[str], None],
    active: Callable[[], bool],
) -> tuple[str, ...]:
    """Have ``before`` and ``after`` called around each use of a recurrent layer's state.

    Args:
        layers: the model's layers by name, vLLM's ``static_forward_context``.
        names: which of them to hook. Hooking a layer again replaces its hooks.
        before: called with the layer's name before its state is read, once per forward.
        after: called with the layer's name when its state is written.
        active: whether the forward that is running needs the calls. All that a layer costs in a
            forward that does not.

    Returns:
        The names that are not hooked, because their class, or this version of it, is not known.
        What they need must be there before the forward begins.
    """
    return tuple(name for name in names if not _hook(name, layers[name], before, after, active))


def _hook(
    name: str,
    layer: Any,
    before: Callable[[str], None],
    after: Callable[[str], None],
    active: Callable[[], bool],
) -> bool:
    functions = _state_functions(type(layer))
    running = False

    def hooked(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal running
        if running or not active() or not _has_metadata(name):
            return function(layer, *args, **kwargs)
        before(name)
        running = True
        try:
            result = function(layer, *args, **kwargs)
        finally:
            running = False
        after(name)
        return result

    for method, function in functions.items():
        setattr(layer, method, functools.partial(hooked, function))
    return bool(functions)


def _state_functions(kind: type) -> Mapping[str, Callable[..., Any]]:
    """What vLLM calls with a layer of that class, by the attributes that take its place; empty if
    it is not known, or if a part of it is not there."""
    known = f"{kind.__module__}.{kind.__qualname__}".removeprefix(_PACKAGE)
    if known == _CPU_CLASS and (module := sys.modules.get(_CPU_MODULE)) is not None:
        found = {name: _look_for_method(module, name) for name in _CPU_FUNCTIONS}
    else:
        found = {name: getattr(kind, name, None) for name in _METHODS.get(known, ())}
    functions = {name: function for name, function in found.items() if function is not None}
    return functions if len(functions) == len(found) else {}


def _has_metadata(name: str) -> bool:
    """Whether the layer uses its state: in vLLM's profiling and warm-up runs it does not."""
    metadata = get_forward_context().attn_metadata
    return metadata.get(name) is not None if isinstance(metadata, dict) else metadata is not None


def _look_for_method(module: Any, name: str) -> Callable[..., Any] | None:
    """Have ``module``'s function of that name, whose first argument is a layer, call the layer's
    own attribute of that name if it has one. Returns vLLM's function, None if there is none."""
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None or hasattr(function, "__wrapped__"):
        return getattr(function, "__wrapped__", None)
    original = function

    @functools.wraps(original)
    def dispatch(layer: Any, *args: Any, **kwargs: Any) -> Any:
        hooked = layer.__dict__.get(name)
        call = functools.partial(original, layer) if hooked is None else hooked
        return call(*args, **kwargs)

    setattr(module, name, dispatch)
    return original
