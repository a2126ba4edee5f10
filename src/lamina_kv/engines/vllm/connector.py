"""``LaminaConnector``: vLLM's connector interface, handed on to the two sides."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

import torch
import vllm

from lamina_kv.engines.vllm.version import check_version

check_version(vllm.__version__)  # before a name is imported that another version may not have

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from lamina_kv.config import load_config
from lamina_kv.engines.vllm import layout
from lamina_kv.engines.vllm.hooks import forward_calls_hooks
from lamina_kv.engines.vllm.idle import IdleScheduler, IdleWorker, why_idle
from lamina_kv.engines.vllm.messages import LaminaPlan
from lamina_kv.engines.vllm.metrics import LaminaPromMetrics, LaminaStats
from lamina_kv.engines.vllm.scheduler_side import SchedulerSide
from lamina_kv.engines.vllm.step_order import Call, StepOrder
from lamina_kv.engines.vllm.weights import Watch
from lamina_kv.engines.vllm.worker_side import WorkerSide

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger("lamina_kv.engines.vllm")


class LaminaConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps vLLM's KV cache in host memory and beyond, and brings it back layer by layer.

    vLLM makes one in its scheduler and one in every worker; each has one side and never the
    other.

    Raises:
        ValueError: for a configuration or a model that cannot be served; the message names the
            key and says what would be right.
    """

    worker_side: ClassVar[type[WorkerSide]] = WorkerSide
    _alive: ClassVar[WeakSet[LaminaConnector]] = WeakSet()

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _log_beside_vllm()
        self._be_the_only_one(role, kv_cache_config)
        config = load_config(self._kv_transfer_config.kv_connector_extra_config, os.environ)
        self._scheduler: SchedulerSide | IdleScheduler | None = None
        self._worker: WorkerSide | IdleWorker | None = None
        self._moves_rows = False
        self._order = StepOrder()
        self._handled: BaseException | None = None
        if idle := why_idle(vllm_config, kv_cache_config):
            log.info("%s: it is served as without Lamina, and nothing is kept", idle)
            if role is KVConnectorRole.SCHEDULER:
                self._scheduler = IdleScheduler()
            else:
                self._worker = IdleWorker()
            return
        layout.check_supported(vllm_config, kv_cache_config)
        if vllm_config.model_config.enable_sleep_mode and config.push is not None:
            raise layout.UnsupportedModel(
                "push: does not go with --enable-sleep-mode: a sleep takes away the memory that "
                "the network was told of. Serve without one of them."
            )
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(config, vllm_config, kv_cache_config)
        else:
            self._worker = self.worker_side(config, vllm_config, kv_cache_config)

    def _be_the_only_one(self, role: KVConnectorRole, cache: KVCacheConfig) -> None:
        """A ``MultiConnector`` hands all of its connectors the same description of the cache."""
        for other in self._alive:
            if other._role is role and other._kv_cache_config is cache:
                raise ValueError(
                    "connectors: LaminaConnector is named twice in one MultiConnector, and both "
                    "would keep the same cache: name it once, with all of its tiers"
                )
        self._alive.add(self)

    @property
    def _on_scheduler(self) -> SchedulerSide | IdleScheduler:
        assert self._scheduler is not None, "this is the worker's connector"
        return self._scheduler

    @property
    def _on_worker(self) -> WorkerSide | IdleWorker:
        assert self._worker is not None, "this is the scheduler's connector"
        return self._worker

    @property
    def watch(self) -> Watch | None:
        """What vLLM's engine core tells of weights, for the scheduler's connector."""
        return None if self._scheduler is None else self._scheduler.watch

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a miss later on, so no request has to wait for one."""
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """vLLM 0.33 asks. A sleeping cache keeps its addresses, but not its registration with
        NIXL."""
        config = load_config(kv_transfer_config.kv_connector_extra_config, os.environ)
        return config.push is None

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """A full graph calls no hooks of layers, and needs none: it comes after the loads of its
        step, and what it has written is saved at the end of the step."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Where pushes go, an engine of another tensor parallel size may be at the other end. It
        gets some heads of each page, so each head has to be one stretch. vLLM heeds
        ``VLLM_KV_CACHE_LAYOUT`` before this, and drops it with a warning where an attention backend
        reads no such pages."""
        transfer, model = vllm_config.kv_transfer_config, vllm_config.model_config
        config = load_config(transfer.kv_connector_extra_config, os.environ)
        if config.push is None or model is None or model.use_mla:
            return None
        return str(KVCacheLayout.LBHNC.name)

    # -- worker --------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """VLLM has allocated its cache."""
        self._on_worker.open(kv_caches)

    def unregister_kv_caches(self) -> None:
        """The cache's memory is about to go to sleep; it will have the same addresses when it is
        back."""
        self._on_worker.executor.quiet()

    def has_connector_metadata(self) -> bool:
        """Whether layers have to call the two layer hooks. vLLM asks this for every layer, so it
        is looked up once a step, and a step with nothing to move skips them here."""
        return self._moves_rows

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """The first hook of every step, before anything of it runs."""
        assert isinstance(kv_connector_metadata, LaminaPlan)
        self._handled = sys.exc_info()[1]  # who calls the engine may be handling one of its own
        self._order.begins(loads=kv_connector_metadata.plan.loads_in_step)
        self._on_worker.begin_step(kv_connector_metadata)
        self._moves_rows = self._on_worker.executor.moves_rows

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: object) -> None:
        """Right before the forward if the step has layerwise loads, else after it."""
        self._order.makes(Call.START)
        self._on_worker.start_loads(layers_call=forward_calls_hooks(forward_context))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Before a layer reads its cache."""
        self._order.layer("wait_for_layer_load")
        self._on_worker.executor.wait_layer(layer_name)

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: object,
    ) -> None:
        """After a layer has written its cache."""
        self._order.layer("save_kv_layer")
        self._on_worker.executor.layer_written(layer_name)

    def finish_forward(self) -> None:
        """Behind the model and before a draft model; the V2 runner alone calls it."""
        self._on_worker.executor.finish_loads()

    def wait_for_save(self) -> None:
        """The end of every step. Waits for no save."""
        self._order.makes(Call.END)
        # The V1 runner ends a step whose forward has failed, too.
        if sys.exc_info()[1] is not self._handled:
            self._on_worker.executor.fail_step("step_failed")
        self._handled = None
        self._on_worker.executor.end_step()
        self._moves_rows = False

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Parked loads that are over."""
        self._order.makes(Call.RESULTS)
        return self._on_worker.collect()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """None: a load that failed is reported by its request, in the call before."""
        self._order.makes(Call.ERRORS)
        return set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Receipts, and in the first step what tiers this rank has, on their way to the
        scheduler."""
        self._order.makes(Call.META)
        return self._on_worker.words()

    def shutdown(self) -> None:
        """The engine ends."""
        self._alive.discard(self)
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()

    # -- scheduler -----------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """VLLM's cache manager exists now."""
        self._on_scheduler.bind(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        """A request has arrived and will wait for its turn."""
        self._on_scheduler.arrived(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """What can be loaded for a request beyond its local hit."""
        return self._on_scheduler.lookup(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """The request has its blocks."""
        self._on_scheduler.admitted(request, num_external_tokens)

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        """Which tier supplied how much, for vLLM's own counters."""
        return self._on_scheduler.hit_sources(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """The plan of the step."""
        return self._on_scheduler.plan(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Receipts of the step."""
        self._on_scheduler.receive(connector_output)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended. Its blocks may be freed: those still to be read are leased."""
        return False, self._on_scheduler.finished(request, block_ids)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same; a ``MultiConnector`` calls it if another of its connectors knows one cache
        group only."""
        return self.request_finished_all_groups(request, (block_ids,))

    def take_events(self) -> Iterable[KVCacheEvent]:
        """What has become of chunks in tiers since the last call; nothing if nobody listens."""
        return self._on_scheduler.take_events()

    def has_pending_push_work(self) -> bool:
        """Whether the engine must keep stepping so that saves and writes come to an end."""
        return self._on_scheduler.has_work

    def reset_cache(self) -> bool | None:
        """VLLM's cache is void, and what is kept of it is not to be found any more."""
        self._on_scheduler.reset()
        return True

    # -- metrics -------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Figures since the last call; the scheduler has them all."""
        return None if self._scheduler is None else self._scheduler.stats()

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        """Unpack figures that came from another process."""
        return LaminaStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        """Publish Lamina's metrics beside vLLM's."""
        return LaminaPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _log_beside_vllm() -> None:
    """Lamina's messages go where vLLM's go, unless somebody has decided otherwise: vLLM
    configures no logger but its own, and Python drops what is below a warning."""
    ours, theirs = logging.getLogger("lamina_kv"), logging.getLogger("vllm")
    if not ours.handlers and ours.level == logging.NOTSET:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = theirs.propagate
