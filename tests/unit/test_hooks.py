"""Which layers call by themselves; hooks around a recurrent layer: what is called when, and which
layers cannot be hooked.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

hooks = pytest.importorskip("lamina_kv.engines.vllm.hooks")

MAMBA = "vllm.model_executor.layers.mamba"


class Mixer:
    """Stands for vLLM's Mamba-1 layer."""

    __module__ = f"{MAMBA}.mamba_mixer"
    __qualname__ = "MambaMixer"

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def forward_impl(self, text: str, *, fail: bool = False) -> str:
        self.log.append(text)
        if fail:
            raise ZeroDivisionError
        return text.upper()


class Net:
    """Stands for vLLM's gated delta net, of which one method calls another."""

    __module__ = f"{MAMBA}.gdn.qwen_gdn_linear_attn"
    __qualname__ = "QwenGatedDeltaNetAttention"

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def _forward_core(self) -> None:
        self.log.append("core")

    def _forward_core_rocm(self) -> None:
        self._forward_core()

    def _forward_core_fused_norm_packed(self) -> None:
        self._forward_core()


class Derived(Mixer):
    """May do otherwise."""

    __module__ = f"{MAMBA}.mamba_mixer"
    __qualname__ = "Derived"


class Older:
    """The class as another version of vLLM has it."""

    __module__ = f"{MAMBA}.mamba_mixer2"
    __qualname__ = "MambaMixer2"


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Of the forward that is running; cleared, it is a warm-up."""
    metadata: dict[str, object] = {"layer": object()}
    context = SimpleNamespace(attn_metadata=metadata)
    monkeypatch.setattr(hooks, "get_forward_context", lambda: context)
    monkeypatch.delitem(sys.modules, f"{MAMBA}.ops.cpu.gdn_attention", raising=False)
    return metadata


def install(layer: Any, log: list[str], active: bool = True, mark: str = "") -> tuple[str, ...]:
    return hooks.hook_recurrent_layers(
        {"layer": layer, "other": object()},
        ["layer"],
        lambda name: log.append(f"{mark}before {name}"),
        lambda name: log.append(f"{mark}after {name}"),
        lambda: active,
    )


@pytest.mark.usefixtures("metadata")
def test_calls_come_around_the_layer(log: list[str]) -> None:
    layer, other = Mixer(log), Mixer(log)
    assert install(layer, log) == ()
    assert layer.forward_impl("state") == "STATE"
    assert log == ["before layer", "state", "after layer"]
    log.clear()
    other.forward_impl("state")
    assert log == ["state"]


@pytest.mark.usefixtures("metadata")
def test_once_where_a_method_calls_another(log: list[str]) -> None:
    layer = Net(log)
    assert install(layer, log) == ()
    for method in (
        layer._forward_core,
        layer._forward_core_rocm,
        layer._forward_core_fused_norm_packed,
    ):
        log.clear()
        method()
        assert log == ["before layer", "core", "after layer"]


def test_nothing_in_a_warm_up(log: list[str], metadata: dict[str, object]) -> None:
    layer = Mixer(log)
    install(layer, log)
    metadata.clear()
    layer.forward_impl("state")
    assert log == ["state"]


def test_nothing_when_there_is_nothing_to_move(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Mixer(log)
    install(layer, log, active=False)
    monkeypatch.delattr(hooks, "get_forward_context")
    assert layer.forward_impl("state") == "STATE"
    assert log == ["state"]


@pytest.mark.usefixtures("metadata")
def test_the_last_hooks_count(log: list[str]) -> None:
    layer = Mixer(log)
    install(layer, log, mark="first ")
    install(layer, log, mark="second ")
    layer.forward_impl("state")
    assert log == ["second before layer", "state", "second after layer"]


@pytest.mark.usefixtures("metadata")
def test_a_forward_that_fails_has_written_nothing(log: list[str]) -> None:
    layer = Mixer(log)
    install(layer, log)
    with pytest.raises(ZeroDivisionError):
        layer.forward_impl("bad", fail=True)
    layer.forward_impl("good")
    assert log == ["before layer", "bad", "before layer", "good", "after layer"]


@pytest.mark.usefixtures("metadata")
@pytest.mark.parametrize("layer", [Derived([]), Older(), object()], ids=lambda x: type(x).__name__)
def test_layers_that_are_not_known_are_named(layer: object, log: list[str]) -> None:
    assert install(layer, log) == ("layer",)


# -- layers that call by themselves --------------------------------------------------------------


def attention_layers() -> dict[str, Any]:
    """Instances without their parts, of layers as vLLM's models have them."""
    from torch import nn
    from vllm.model_executor.layers.attention import Attention, MLAAttention
    from vllm.model_executor.models.deepseek_v2 import DeepseekV32IndexerCache
    from vllm.models.deepseek_v32.attention import DeepseekV32Attention

    class Cut(Attention):
        """Changes something else."""

    class Own(Attention):
        def forward(self, query: Any) -> Any:
            """Reads the cache in its own way."""

    class Indexer(nn.Module):
        """Has a cache and no forward."""

    kinds = {
        "attention": Attention,
        "latent": MLAAttention,
        "same": Cut,
        "own": Own,
        "sparse": DeepseekV32Attention,
        "indexer": DeepseekV32IndexerCache,
        "future": Indexer,
    }
    layers: dict[str, Any] = {name: kind.__new__(kind) for name, kind in kinds.items()}
    for layer in layers.values():
        nn.Module.__init__(layer)
    layers["replaced"] = Attention.__new__(Attention)
    nn.Module.__init__(layers["replaced"])
    layers["replaced"].__dict__["forward"] = lambda query: query
    return layers


def test_only_layers_that_are_known_to_call_do() -> None:
    layers = attention_layers()
    silent = hooks.silent_layers(layers, [*layers, "of another rank"])
    assert set(layers).difference(silent) == {"attention", "latent", "same"}
    assert "of another rank" in silent


def test_the_operators_of_layers_that_call_are_hooked_by_vllm() -> None:
    from vllm.model_executor.layers.attention.attention import unified_attention_with_output
    from vllm.model_executor.layers.attention.mla_attention import unified_mla_attention_with_output

    for operator in (unified_attention_with_output, unified_mla_attention_with_output):
        assert operator.__wrapped__.__name__ == operator.__name__


def compilation(mode: str, *, cut: bool = True) -> Any:
    from vllm.config import CUDAGraphMode

    return SimpleNamespace(
        cudagraph_mode=CUDAGraphMode[mode], is_attention_compiled_piecewise=lambda: cut
    )


@pytest.mark.parametrize(
    ("mode", "cut", "hidden"),
    [
        ("NONE", False, False),
        ("PIECEWISE", True, False),
        ("PIECEWISE", False, True),
        ("FULL", False, False),
        ("FULL_DECODE_ONLY", False, False),
        ("FULL_AND_PIECEWISE", True, False),
        ("FULL_AND_PIECEWISE", False, True),
    ],
)
def test_pieces_of_graphs_that_hold_attention_hide_its_hooks(
    mode: str, cut: bool, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_USE_BREAKABLE_CUDAGRAPH", raising=False)
    assert hooks.pieces_hide_hooks(compilation(mode, cut=cut)) is hidden


@pytest.mark.parametrize(("mode", "calls"), [("NONE", True), ("PIECEWISE", True), ("FULL", False)])
def test_a_forward_calls_hooks_unless_it_is_one_graph(mode: str, calls: bool) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor, ForwardContext

    batch = BatchDescriptor(1)
    kind = CUDAGraphMode[mode]
    context = ForwardContext({}, {}, {}, cudagraph_runtime_mode=kind, batch_descriptor=batch)
    assert hooks.forward_calls_hooks(context) is calls
    assert not hooks.forward_calls_hooks(ForwardContext({}, {}, {}))  # V2 makes it up


def test_graphs_that_are_broken_at_attention_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    assert not hooks.pieces_hide_hooks(compilation("PIECEWISE", cut=False))
