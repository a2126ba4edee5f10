"""The two sides of a connector that keeps nothing.

vLLM runs some models without its prefix cache because the beginning of a prompt cannot be reused
there: what attention looks at, or what a pooler needs, is the whole prompt in one step. A hit would
be an error or a wrong answer for them, so they are served as without Lamina. Where vLLM's prefix
cache is off for any other reason, and first of all because the operator wants it, Lamina works.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from lamina_kv.engines.vllm import layout
from lamina_kv.engines.vllm.messages import LaminaPlan
from lamina_kv.plan import StepPlan


def why_idle(vllm_config: VllmConfig, cache: KVCacheConfig) -> str:
    """Why nothing may be kept of a model; empty if something may."""
    if not cache.kv_cache_groups:
        return "the model has no KV cache"
    model = vllm_config.model_config
    if model.runner_type == "pooling" and not model.is_prefix_caching_supported:
        return "its pooling needs every token of a prompt in one step"
    if layout.is_non_causal(cache):
        return "its attention looks at tokens that are still to come"
    return ""


class IdleExecutor:
    """Moves nothing."""

    moves_rows = False

    def wait_layer(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def layer_written(self, layer_name: str) -> None:
        """Nothing is saved."""

    def finish_loads(self) -> None:
        """There are none."""

    def fail_step(self, reason: str) -> None:
        """Nothing of it would have been kept."""

    def end_step(self) -> None:
        """Nothing has begun."""

    def quiet(self) -> None:
        """Nobody reads or writes."""


class IdleWorker:
    """Stands where :class:`~lamina_kv.engines.vllm.worker_side.WorkerSide` does."""

    executor = IdleExecutor()

    def open(self, views: Mapping[str, torch.Tensor]) -> None:
        """Has no tiers."""

    def begin_step(self, message: LaminaPlan) -> None:
        """The plan is empty."""

    def start_loads(self, *, layers_call: bool) -> None:
        """There are none."""

    def collect(self) -> KVConnectorTransferResults:
        """Nothing was under way."""
        return KVConnectorTransferResults()

    def words(self) -> None:
        """None."""

    def close(self) -> None:
        """Nothing is open."""


class IdleScheduler:
    """Stands where :class:`~lamina_kv.engines.vllm.scheduler_side.SchedulerSide` does."""

    watch = None
    has_work = False

    def bind(self, manager: KVCacheManager) -> None:
        """Holds no blocks."""

    def arrived(self, request: Request) -> None:
        """Nothing will be loaded for it."""

    def lookup(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """Nothing is found."""
        return 0, False

    def admitted(self, request: Request, loaded: int) -> None:
        """Nothing is loaded."""

    def hit_sources(self, request: Request, tokens: int) -> dict[CacheHitSource, int]:
        """None."""
        return {}

    def plan(self, output: SchedulerOutput) -> LaminaPlan:
        """An empty one."""
        return LaminaPlan(StepPlan(0))

    def receive(self, output: KVConnectorOutput) -> None:
        """There are no receipts."""

    def reset(self) -> None:
        """There is nothing to forget."""

    def finished(self, request: Request, blocks: tuple[list[int], ...]) -> None:
        """Nothing of it is kept."""

    def take_events(self) -> tuple[()]:
        """None."""
        return ()

    def stats(self) -> None:
        """None."""

    def close(self) -> None:
        """Nothing is open."""
