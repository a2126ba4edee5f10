"""The connector's half in a vLLM worker: translates between vLLM's hooks and the executor."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing import parent_process
from typing import TypeVar

import torch
import torch.distributed
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.kv_cache_interface import KVCacheConfig

from lamina_kv.config import Config
from lamina_kv.data.assembly import assemble
from lamina_kv.data.executor import Executor
from lamina_kv.data.movers import Mover, make_mover
from lamina_kv.data.push_wire import PushIdentity
from lamina_kv.data.replicas import Replicas
from lamina_kv.engines.vllm import layout, processor
from lamina_kv.engines.vllm.arrangement import arrangement
from lamina_kv.engines.vllm.hooks import hook_recurrent_layers, pieces_hide_hooks, silent_layers
from lamina_kv.engines.vllm.messages import LaminaPlan, LaminaReport, LaminaWords
from lamina_kv.engines.vllm.namespace import arranged, build_namespace
from lamina_kv.engines.vllm.wire import open_wire, rank_card
from lamina_kv.geometry import CacheGeometry
from lamina_kv.keys import Namespace
from lamina_kv.plan import Receipt
from lamina_kv.push.transports.base import Transport
from lamina_kv.tiers.contract import Tenant

log = logging.getLogger("lamina_kv.engines.vllm")

T = TypeVar("T")


class WorkerSide:
    """See the module.

    Args:
        config: Lamina's configuration.
        vllm_config: vLLM's.
        cache: vLLM's cache, as this rank has it.
    """

    def __init__(self, config: Config, vllm_config: VllmConfig, cache: KVCacheConfig) -> None:
        self._config = config
        self._vllm_config = vllm_config
        self._cache = cache
        self._receipt = Receipt(vllm_config.parallel_config.rank)
        self._namespace = ""
        self._arrangement = ""
        self._identity: PushIdentity | None = None
        self._executor: Executor | None = None
        self._report: LaminaReport | None = None
        self._asked = False

    @property
    def executor(self) -> Executor:
        """The executor; it exists once vLLM has registered its caches."""
        assert self._executor is not None, "vLLM ran a step before it registered its caches"
        return self._executor

    def open(self, views: Mapping[str, torch.Tensor]) -> None:
        """VLLM's caches exist now: bind to them and open the tiers.

        Args:
            views: per layer, vLLM's view of its cache.
        """
        processor.prepare()
        config, parallel = self._config, self._vllm_config.parallel_config
        order = self._vllm_config.compilation_config.static_forward_context
        bound = layout.bind(self._cache, views, list(order), config.chunk_tokens)
        self._arrangement = _by_rank(_gather(arrangement(self._vllm_config, self._cache, views)))
        replicas = Replicas(parallel.rank, self._cache.kv_tp_replicas, _gather)
        self._executor = assemble(
            config,
            bound.geometry,
            self.mover(bound.geometry, bound.allocations),
            rank=parallel.rank,
            replicas=replicas,
            slabs=parallel.world_size // replicas.count * parallel.data_parallel_size_local,
            tenant=self._tenant(bound.geometry),
            push=self._open_wire(bound),
        )
        self._hook(self._executor, bound.geometry)
        self._report = self._make_report(self._executor)

    def mover(self, geometry: CacheGeometry, allocations: Sequence[torch.Tensor]) -> Mover:
        """What copies between the engine's cache and host memory."""
        return make_mover(geometry, allocations)

    def _make_report(self, executor: Executor) -> LaminaReport:
        report = LaminaReport(executor.report(), self._namespace, self._arrangement)
        if (push := self._identity) is not None:
            report = replace(
                report,
                incarnation=push.incarnation,
                card=push.card,
                replicated=push.replicated,
                place=executor.listen() if self._dialled else None,
            )
        return report

    @property
    def _dialled(self) -> bool:
        """Whether decode engines may dial this one."""
        return self._config.push is not None and self._config.push.listen is not None

    def begin_step(self, message: LaminaPlan) -> None:
        """Before anything of the step runs."""
        self._asked |= message.asks
        self.executor.begin_step(message.plan)

    def start_loads(self, *, layers_call: bool) -> None:
        """Right before the forward, if the step has layerwise loads.

        Args:
            layers_call: whether the forward calls hooks of layers.
        """
        self.executor.start_loads(layers_call=layers_call)

    def collect(self) -> KVConnectorTransferResults:
        """Parked loads that are over. What else there is to say follows in :meth:`words`. vLLM
        recomputes or fails the whole request of a load that failed, as the operator has chosen.

        Raises:
            RuntimeError: if a load failed in the step.
        """
        outcomes = self.executor.collect()
        self._receipt = outcomes.receipt
        arrived, failed = set(outcomes.arrived), set(outcomes.failed)
        # vLLM takes back waiting requests only.
        if stranded := failed - arrived:
            raise RuntimeError(
                f"a copy from host memory failed under requests {sorted(stranded)} while they ran, "
                "and vLLM cannot take that back"
            )
        failed |= outcomes.rejected
        return KVConnectorTransferResults(finished_recving=arrived, failed_recving=failed)

    def words(self) -> LaminaWords | None:
        """The receipt for control, as of :meth:`collect`, and this rank's report if it was asked
        for. That is said once and not kept: it names every chunk that is stored."""
        receipts = () if self._receipt.is_empty else (self._receipt,)
        reports: tuple[LaminaReport, ...] = ()
        if self._asked and self._report is not None:
            reports, self._report = (self._report,), None
        return LaminaWords(receipts, reports) if receipts or reports else None

    def close(self) -> None:
        """The engine shuts down."""
        if self._executor is not None:
            # vLLM's workers are processes that end with their engine, and have little time then.
            self._executor.close(process_ends=parent_process() is not None)

    def _open_wire(self, bound: layout.BoundCache) -> tuple[PushIdentity, Transport] | None:
        config, parallel = self._config.push, self._vllm_config.parallel_config
        if config is None:
            return None
        transport = open_wire(bound)
        # Every rank must say the same, and another than any run before.
        incarnation = _gather(uuid.uuid4().hex)[0]
        self._identity = PushIdentity(
            incarnation=incarnation,
            card=rank_card(parallel.rank, bound, transport),
            ranks=parallel.world_size,
            replicated=self._cache.kv_tp_replicas > 1,
            batch=config.batch,
            max_inflight=config.max_inflight,
        )
        return self._identity, transport

    def _hook(self, executor: Executor, geometry: CacheGeometry) -> None:
        """Have every layer wait for its row, or all rows be loaded before the forward."""
        compilation = self._vllm_config.compilation_config
        layers = compilation.static_forward_context
        recurrent = layout.recurrent_layers(self._cache)
        named = {layer for row in geometry.rows for layer in row.layers}
        silent = silent_layers(layers, sorted(named.difference(recurrent)))
        silent += hook_recurrent_layers(
            layers,
            recurrent,
            executor.wait_layer,
            executor.layer_written,
            lambda: executor.moves_rows,
        )
        reason = ""
        if silent:
            more = f" and {len(silent) - 4} more" if silent[4:] else ""
            reason = f"layers {', '.join(silent[:4])}{more} do not call KV connectors"
        elif pieces_hide_hooks(compilation):
            reason = "pieces of CUDA graphs hold this model's attention"
        if reason:
            executor.load_before_forward()
            if self._config.load.mode != "parked":
                log.warning(
                    "%s: all rows of a load are brought in before a forward, and not ahead of each "
                    "layer",
                    reason,
                )
        # Not where tokens are guessed from the text alone: there every layer is the model's.
        speculative = self._vllm_config.speculative_config
        if speculative is not None and speculative.uses_draft_kv_cache():
            executor.drafts_follow(list(layers))
        if self._vllm_config.parallel_config.use_ubatching:
            executor.save_after_forward()

    def _tenant(self, geometry: CacheGeometry) -> Tenant | None:
        """For whom far tiers are opened; None without any."""
        if not self._config.tiers:
            return None
        namespace = build_namespace(self._config, self._vllm_config, self._cache)
        namespace = arranged(namespace, self._arrangement)
        self._namespace = namespace.hex
        return tenant_of(self._vllm_config, namespace, geometry.object_bytes)


def tenant_of(vllm_config: VllmConfig, namespace: Namespace, object_bytes: int) -> Tenant:
    """For whom a rank's stores are opened.

    Args:
        vllm_config: vLLM's, as the rank has it.
        namespace: of the engine.
        object_bytes: bytes of a chunk's object.
    """
    parallel = vllm_config.parallel_config
    # vLLM tells the engines of dense models that there is no data parallelism but for this.
    first = parallel.data_parallel_index * parallel.world_size
    return Tenant(
        namespace.hex,
        namespace.describe(),
        first + parallel.rank,
        ranks_of_server(vllm_config),
        object_bytes,
        parallel.rank,
    )


def ranks_of_server(vllm_config: VllmConfig) -> int | None:
    """How many ranks all engines of this server have; None if vLLM does not tell."""
    parallel, transfer = vllm_config.parallel_config, vllm_config.kv_transfer_config
    engine = (transfer.engine_id if transfer else None) or ""
    if parallel.data_parallel_size == 1 and (
        parallel.data_parallel_index or engine.endswith(f"_dp{parallel.data_parallel_index}")
    ):
        return None  # one of several engines of a dense model, of which vLLM says no more
    return int(parallel.data_parallel_size * parallel.world_size)


def _by_rank(said: Sequence[str]) -> str:
    """What ranks say, once if all say the same."""
    return said[0] if len(set(said)) == 1 else " | ".join(said)


def _gather(word: T) -> list[T]:
    """What every tensor-parallel rank has to say; without pipeline and context parallelism these
    are all ranks."""
    group = get_tp_group()
    words = [word] * group.world_size
    torch.distributed.all_gather_object(words, word, group=group.cpu_group)
    return words
