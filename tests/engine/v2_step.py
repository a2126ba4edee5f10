"""A step of vLLM's model runners without its model: what no CPU shows.

Real are what the runners call connectors with (V2's ``ActiveKVConnector``, V1's
``KVConnectorModelRunnerMixin``), vLLM's decorator around attention and its forward context, and all
of ``LaminaConnector`` in a worker. Around them stands what ``v1/worker/gpu/model_runner.py`` and
``v1/worker/gpu_model_runner.py`` do with them, in their order, and a device that runs behind its
host (:mod:`engine.device`). A layer's kernel looks at pages and fills pages; nothing is computed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import CUDAGraphMode, KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from engine.device import DeviceMover, Stream
from lamina_kv.engines.vllm import worker_side
from lamina_kv.engines.vllm.connector import LaminaConnector
from lamina_kv.engines.vllm.messages import LaminaPlan, LaminaWords
from lamina_kv.plan import LoadMode, StepPlan, TransferReceipt

BLOCKS, BLOCK_TOKENS = 16, 16
CHUNK_BLOCKS = 2
"""Blocks of a chunk."""

Stamps = Mapping[int, int]
"""Per block, the byte that its pages are full of."""


class Forward(Enum):
    """How the runner runs the model."""

    EAGER = auto()
    FULL_GRAPH = auto()
    """Kernels are replayed, and no Python of the model's runs."""
    MICRO_BATCHES = auto()
    """Twice, on two threads that take turns."""


@dataclass(frozen=True)
class Work:
    """What each layer does in a forward.

    Attributes:
        reads: what it must find.
        writes: what it leaves.
    """

    reads: Stamps = field(default_factory=dict)
    writes: Stamps = field(default_factory=dict)


class _Backend:
    """Of the layers: none that arranges bytes by itself."""

    @staticmethod
    def get_name() -> str:
        return "SIMULATED"


class SilentLayer(torch.nn.Module):
    """A layer with a cache that calls no connector, as sparse attention's indexers."""

    attn_backend: type[_Backend]

    def get_attn_backend(self) -> type[_Backend]:
        return self.attn_backend


class Worker:
    """A worker of vLLM without a model.

    Args:
        patch: undoes what is changed in modules.
        runner: which of vLLM's model runners, 1 or 2.
        layers: names of the model's layers in the order of its forward.
        silent: those of a class that does not call the connector.
        mute: those that do not call it although their class does.
        drafts: names of a draft model's layers, which run after it.
        guesses: whether tokens are guessed without a draft model, as n-grams are.
        micro_batches: whether vLLM is configured to split batches.
        graphs: its mode of CUDA graphs.
        lamina: the connector's configuration.
        sleeps: whether vLLM may put the worker to sleep.
    """

    def __init__(
        self,
        patch: Any,
        *,
        runner: int = 2,
        layers: Sequence[str] = ("layer.0", "layer.1", "layer.2"),
        silent: Sequence[str] = (),
        mute: Sequence[str] = (),
        drafts: Sequence[str] = (),
        guesses: bool = False,
        micro_batches: bool = False,
        graphs: CUDAGraphMode = CUDAGraphMode.NONE,
        lamina: Mapping[str, object] | None = None,
        sleeps: bool = False,
    ) -> None:
        self.layers, self.drafts = tuple(layers), tuple(drafts)
        self._silent, self._mute = frozenset(silent), frozenset(mute)
        self.compute = Stream("compute")
        self.wrong: list[str] = []
        self._movers: list[DeviceMover] = []
        patch.setattr(worker_side, "_gather", lambda word: [word])
        patch.setattr(worker_side, "make_mover", self._make_mover)
        self._config = VllmConfig(
            kv_transfer_config=KVTransferConfig(
                kv_connector="LaminaConnector",
                kv_connector_module_path="lamina_kv.engines.vllm",
                kv_role="kv_both",
                kv_connector_extra_config=lamina or {"host": {"capacity": "1MiB"}},
            )
        )
        self._config.model_config = SimpleNamespace(
            enable_sleep_mode=sleeps, runner_type="generate"
        )
        self._config.compilation_config.cudagraph_mode = graphs
        if drafts or guesses:
            self._config.speculative_config = SimpleNamespace(
                uses_draft_kv_cache=lambda: bool(drafts)
            )
        if micro_batches:
            self._config.parallel_config.ubatch_size = 2
        cache, self._pages = self._allocate()
        context = self._config.compilation_config.static_forward_context
        for name, view in self._pages.items():
            context[name] = self._layer(name, view)
        self.lamina = LaminaConnector(self._config, KVConnectorRole.WORKER, cache)
        patch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", self.lamina)
        self._runner = ActiveKVConnector(self._config, self._pages)
        self._is_v1 = runner == 1
        self._steps = 0

    @property
    def mover(self) -> DeviceMover:
        """The mover of this worker."""
        (mover,) = self._movers
        return mover

    def step(
        self,
        plan: StepPlan,
        work: Work | Sequence[Work] = Work(),
        forward: Forward = Forward.EAGER,
        draft: Work = Work(),
        between: Callable[[], None] = lambda: None,
    ) -> list[TransferReceipt]:
        """``execute_model`` and ``sample_tokens``; nothing waits for the device.

        Args:
            plan: of the step.
            work: of the model's layers; one for each micro-batch if there are such.
            forward: how the model is run.
            draft: of the draft model's layers.
            between: called after a layer of the first micro-batch.

        Returns:
            The step's receipts.
        """
        self._steps += 1
        output = self._scheduled(plan)
        works = [work] if isinstance(work, Work) else list(work)
        if self._is_v1:
            return self._step_of_v1(output, plan, works, forward, draft, between)
        if not plan.forward:
            return _receipts(self._runner.no_forward(output).kv_connector_output)
        batch = SimpleNamespace(idx_mapping=None, req_ids=[], num_tokens=1)
        if forward is Forward.FULL_GRAPH:
            # Of several micro-batches there is no metadata that they share.
            metadata = self._metadata() if len(works) == 1 else None
            self._runner.pre_forward(output, batch, attn_metadata=metadata)
            self._replay(works)
        else:
            with self._context(forward):
                self._runner.pre_forward(output, batch)
                self._forward(works, forward, between)
        self._runner.finish_forward()
        return self._sample_tokens(output, draft)

    def begin(self, plan: StepPlan) -> None:
        """The beginning of a step, and no more of it."""
        self._steps += 1
        self._runner.pre_forward(self._scheduled(plan))

    def settle(self, count: int) -> list[TransferReceipt]:
        """Steps without a forward until there are ``count`` receipts."""
        receipts: list[TransferReceipt] = []
        while len(receipts) < count:
            receipts += self.step(StepPlan(0, forward=False, outstanding=True))
        return receipts

    def let_device_run(self) -> None:
        """Return when the device has done what was launched, and whoever waited for it, too."""
        self.compute.synchronize()
        for _ in range(3):  # a row has a thread and a stream to go through
            time.sleep(0.01)
            self.mover.saves.synchronize()

    def finish(self) -> list[str]:
        """Wait for the device; what layers found that they should not have."""
        self.compute.synchronize()
        return self.wrong

    def pages(self, layer: str, block: int) -> set[int]:
        """The bytes that a page has."""
        return set(self._pages[layer][block].flatten().tolist())

    def stamp(self, stamps: Stamps) -> None:
        """Fill blocks in all layers, at once."""
        for name in self._pages:
            for block, stamp in stamps.items():
                self._pages[name][block].fill_(stamp)

    def warm_up(self) -> None:
        """What vLLM runs before it serves: the connector is switched off meanwhile."""
        self._runner.set_disabled(True)
        with self._context():
            self._model(self.layers, Work())
        self._runner.set_disabled(False)

    def close(self) -> None:
        """End the worker."""
        self.lamina.shutdown()
        self.compute.close()

    # -- inside ----------------------------------------------------------------------------

    def _scheduled(self, plan: StepPlan) -> Any:
        numbered = LaminaPlan(_numbered(plan, self._steps))
        return SimpleNamespace(
            kv_connector_metadata=numbered,
            has_sync_kv_loads=any(load.mode is LoadMode.LAYERWISE for load in plan.loads),
            finished_req_ids=set(),
        )

    def _step_of_v1(
        self,
        output: Any,
        plan: StepPlan,
        works: Sequence[Work],
        forward: Forward,
        draft: Work,
        between: Callable[[], None],
    ) -> list[TransferReceipt]:
        mixin = KVConnectorModelRunnerMixin
        self.lamina.handle_preemptions(output.kv_connector_metadata)
        if not plan.forward:
            result = mixin.kv_connector_no_forward(output, self._config)
            return _receipts(result.kv_connector_output)
        drafts = self._config.speculative_config is not None
        with (
            self._context(forward),
            mixin.maybe_get_kv_connector_output(output, defer_finalize=drafts) as result,
        ):
            self._forward(works, forward, between)
        if drafts:
            with self._context():
                self._model(self.drafts, draft)
            mixin.finalize_kv_connector()
        return _receipts(result)

    def _sample_tokens(self, output: Any, draft: Work) -> list[TransferReceipt]:
        """The end of the step: drafts before it in vLLM 0.32, in the middle of it in 0.33."""
        finished = output.finished_req_ids
        if not self.drafts:
            return _receipts(self._runner.post_forward(finished))
        if not hasattr(self._runner, "finalize_step"):
            with self._context():
                self._model(self.drafts, draft)
            return _receipts(self._runner.post_forward(finished))
        result = self._runner.post_forward(finished, defer_finalize=True)
        with self._context():
            self._model(self.drafts, draft)
        self._runner.finalize_step()
        return _receipts(result)

    def _forward(
        self, works: Sequence[Work], forward: Forward, between: Callable[[], None]
    ) -> None:
        if forward is Forward.FULL_GRAPH:
            self._replay(works)
        elif forward is Forward.MICRO_BATCHES:
            self._micro_batches(works, between)
        else:
            self._model(self.layers, works[0])

    def _replay(self, works: Sequence[Work]) -> None:
        for name in self.layers:
            for work in works:
                self._launch(name, work)

    def _micro_batches(self, works: Sequence[Work], between: Callable[[], None]) -> None:
        """Two threads, each with the forward context, that hand over after every layer."""
        turns = [threading.Semaphore(1), threading.Semaphore(0)]
        errors: list[BaseException] = []

        def run(number: int) -> None:
            try:
                for name in self.layers:
                    turns[number].acquire()
                    if not errors:
                        self._model([name], works[number])
                        if number == 0:
                            between()
                    turns[1 - number].release()
            except BaseException as error:
                errors.append(error)
                for _ in self.layers:  # the other thread goes to its end
                    turns[1 - number].release()

        threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _model(self, layers: Sequence[str], work: Work) -> None:
        for name in layers:
            if name in self._silent | self._mute:
                self._launch(name, work)
            else:
                _attention(self._launch, work, name)

    def _launch(self, layer: str, work: Work) -> None:
        def kernel() -> None:
            for block, stamp in work.reads.items():
                if (found := self.pages(layer, block)) != {stamp}:
                    self.wrong.append(f"{layer} reads {found} in block {block} instead of {stamp}")
            for block, stamp in work.writes.items():
                self._pages[layer][block].fill_(stamp)

        self.compute.launch(kernel)

    def _metadata(self) -> dict[str, object]:
        return dict.fromkeys((*self.layers, *self.drafts), object())

    def _context(self, forward: Forward = Forward.EAGER) -> Any:
        full = forward is Forward.FULL_GRAPH
        return set_forward_context(
            self._metadata(),
            self._config,
            num_tokens=1,
            cudagraph_runtime_mode=CUDAGraphMode.FULL if full else CUDAGraphMode.NONE,
            batch_descriptor=BatchDescriptor(1),
            slot_mapping={},
        )

    def _allocate(self) -> tuple[KVCacheConfig, dict[str, torch.Tensor]]:
        spec = FullAttentionSpec(
            block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=16, dtype=torch.float32
        )
        names, page = [*self.layers, *self.drafts], spec.page_size_bytes
        size = len(names) * BLOCKS * page
        memory = torch.zeros(len(names), BLOCKS, page, dtype=torch.uint8)
        tensor = KVCacheTensor(
            size=size, layers=names, layer_stride=BLOCKS * page, block_stride=page
        )
        cache = KVCacheConfig(
            num_blocks=BLOCKS,
            kv_cache_tensors=[tensor],
            kv_cache_groups=[KVCacheGroupSpec(names, spec)],
            kv_cache_layout="LBNHC",
        )
        return cache, dict(zip(names, memory, strict=True))

    def _layer(self, name: str, view: torch.Tensor) -> torch.nn.Module:
        kind = SilentLayer if name in self._silent else Attention
        layer = kind.__new__(kind)
        torch.nn.Module.__init__(layer)
        layer.kv_cache = view
        layer.attn_backend = _Backend
        return layer

    def _make_mover(self, geometry: Any, allocations: Any) -> DeviceMover:
        self._movers.append(DeviceMover(geometry, allocations, self.compute))
        return self._movers[-1]


@maybe_transfer_kv_layer
def _attention(launch: Callable[[str, Work], None], work: Work, layer_name: str) -> None:
    """An attention layer as vLLM's: what the decorator does is around it."""
    launch(layer_name, work)


def _numbered(plan: StepPlan, step: int) -> StepPlan:
    return replace(plan, step=step)


def _receipts(output: Any) -> list[TransferReceipt]:
    if output is None or (metadata := output.kv_connector_worker_meta) is None:
        return []
    assert isinstance(metadata, LaminaWords)
    return [receipt for rank in metadata.receipts for receipt in rank.transfers]
