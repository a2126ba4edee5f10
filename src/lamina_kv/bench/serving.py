"""The inside of an engine's process: vLLM, with or without Lamina, and what is measured on it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamina_kv.bench.settings import Connector, EngineSpec, TokenIds
from lamina_kv.bench.shapes import VOCABULARY

if TYPE_CHECKING:
    from torch import nn
    from vllm import RequestOutput, SamplingParams
    from vllm.config import KVTransferConfig

_DRAIN_TIMEOUT = 120.0
_IDLE_POLL = 0.001
_SERVER_SLEEP = 0.001
"""As in vLLM 0.32's ``EngineCoreProc``."""
_SPARE = 4
"""Blocks and prompts that the engine's cache has room for beyond the tokens asked for."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """One request for one token.

    Attributes:
        began: when it was made, on this process's monotonic clock.
        seconds: until the token was there.
        cached: tokens of the prompt that were not computed.
        hits: Lamina's own account: tokens by where they were found.
        forward_ended: when the last forward pass ended; 0 unless the engine is paced.
    """

    began: float
    seconds: float
    cached: int
    hits: dict[str, int]
    forward_ended: float


@dataclass(frozen=True, slots=True)
class Part:
    """One engine's part in a request that one engine prefills and another decodes.

    Attributes:
        forward_began: when its first forward pass began, on the machine's monotonic clock.
        forward_ended: when its last one ended.
        token: when its first token was there.
        computed: tokens that its forward passes computed.
        parameters: what it answers for the other engine.
    """

    forward_began: float
    forward_ended: float
    token: float
    computed: int
    parameters: Mapping[str, Any]


@dataclass(slots=True)
class _Forward:
    """A forward pass: how many tokens it computes, and when."""

    tokens: int
    began: float
    ended: float = 0.0


class Serving:
    """See the module. Nothing of vLLM is imported before one is made.

    Args:
        spec: what to run.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, sorted(os.sched_getaffinity(0)))),
            VLLM_LOGGING_LEVEL="WARNING",
            VLLM_NO_USAGE_STATS="1",
        )
        os.environ.update(spec.environment)
        for name in ("VLLM_CPU_KVCACHE_SPACE", "LAMINA_CONFIG"):
            os.environ.pop(name, None)
        if spec.faults is not None:
            from lamina_kv.bench.faulty_store import make_tiers_fail

            make_tiers_fail(spec.faults)
        from vllm import LLM

        shape = spec.shape
        blocks = -(-spec.tokens // shape.block_size) + _SPARE
        self._llm = LLM(
            model=str(spec.model),
            skip_tokenizer_init=True,
            load_format=spec.load_format,
            enforce_eager=True,
            dtype=shape.dtype.value,
            block_size=shape.block_size,
            max_model_len=spec.tokens,
            max_num_batched_tokens=spec.step_tokens,
            max_num_seqs=8,
            kv_cache_memory_bytes=shape.kv_bytes(blocks * shape.block_size, _SPARE),
            enable_prefix_caching=True,
            disable_log_stats=False,
            kv_transfer_config=self._connector(),
        )
        self._forwards: list[_Forward] = []
        self._watched = False

    def _connector(self) -> KVTransferConfig | None:
        if self._spec.connector is None:
            return None
        from vllm.config import KVTransferConfig

        name, module = self._spec.connector.value
        return KVTransferConfig(
            kv_connector=name,
            kv_connector_module_path=module,
            kv_role=self._spec.role,
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={
                **self._spec.lamina,
                # What is measured is the load, and it must happen.
                "load": {"when": "always", **self._spec.lamina.get("load", {})},
            },
        )

    # -- what is measured ----------------------------------------------------------------------

    def first_token(self, prompt: TokenIds) -> FirstToken:
        """Time to the first token of ``prompt``. What it saves goes on after this returns."""
        before = self._hits()
        began = time.perf_counter()
        (answer,) = self._llm.generate(
            [{"prompt_token_ids": prompt}], self._sampling(1), use_tqdm=False
        )
        seconds = time.perf_counter() - began
        forward_ended = 0.0
        if self._spec.connector is Connector.PACED:
            from lamina_kv.bench.paced import PacedConnector

            forward_ended = PacedConnector.forward_ended
        return FirstToken(
            began=began,
            seconds=seconds,
            cached=int(answer.num_cached_tokens or 0),
            hits={tier: count - before.get(tier, 0) for tier, count in self._hits().items()},
            forward_ended=forward_ended,
        )

    def serve_part(self, prompt: TokenIds, parameters: Mapping[str, Any] | None) -> Part:
        """Serve one token of ``prompt``. What the other engine needs of this one goes on while
        :meth:`drain` steps it.

        Args:
            prompt: what to send.
            parameters: what a router gives to the engine, vLLM's ``kv_transfer_params``.
        """
        self._watch_forwards()
        self._forwards.clear()
        sampling = self._sampling(1)
        if parameters is not None:
            sampling.extra_args = {"kv_transfer_params": dict(parameters)}
        self._llm.llm_engine.add_request("part", {"prompt_token_ids": prompt}, sampling)
        answer = None
        while answer is None:
            answer = next((output for output in self._serve_step() if output.finished), None)
        return Part(
            forward_began=self._forwards[0].began,
            forward_ended=self._forwards[-1].ended,
            token=time.perf_counter(),
            computed=sum(forward.tokens for forward in self._forwards),
            parameters=answer.kv_transfer_params or {},
        )

    def begin_decode(self, prompt: TokenIds, steps: int) -> None:
        """Compute ``prompt``, so that ``steps`` decode steps follow."""
        engine = self._llm.llm_engine
        engine.add_request("decode", {"prompt_token_ids": prompt}, self._sampling(steps + 1))
        engine.step()

    def decode_steps(self, count: int) -> tuple[float, ...]:
        """Seconds of each of the next ``count`` decode steps."""
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            self._llm.llm_engine.step()
            seconds.append(time.perf_counter() - began)
        return tuple(seconds)

    def copy_memory(self, size: int) -> float:
        """Seconds that one copy of ``size`` bytes into the engine's kind of memory takes, with all
        threads or with one, whichever is faster."""
        import numpy as np
        import torch

        device = self._llm.llm_engine.vllm_config.device_config.device_type
        on_device = device != "cpu"
        source = torch.ones(size, dtype=torch.uint8, pin_memory=on_device)
        target = torch.zeros(size, dtype=torch.uint8, device=device)
        began = time.perf_counter()
        target.copy_(source)
        if on_device:
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - began
        if on_device:
            return seconds
        began = time.perf_counter()
        np.copyto(target.numpy(), source.numpy())
        return min(seconds, time.perf_counter() - began)

    # -- between measurements --------------------------------------------------------------------

    def warm_up(self) -> None:
        """Run every kind of step once, so that nothing is measured for the first time."""
        half = min(self._spec.tokens // 2, 256)
        self._llm.generate(
            [{"prompt_token_ids": [VOCABULARY - 1] * half}], self._sampling(4), use_tqdm=False
        )
        self.forget()

    def touch_cache(self) -> None:
        """Have the machine give the engine its cache's memory, which it does at the first touch."""
        worker = self._llm.llm_engine.model_executor.driver_worker
        for cache in worker.model_runner.kv_caches:
            cache.untyped_storage().fill_(0)

    def drain(self) -> float:
        """Seconds until nothing is on its way any more.

        Raises:
            TimeoutError: if that takes minutes.
        """
        engine = self._llm.llm_engine
        began = time.perf_counter()
        while engine.engine_core.engine_core.scheduler.has_requests():
            if time.perf_counter() - began > _DRAIN_TIMEOUT:
                raise TimeoutError(f"transfers did not end within {_DRAIN_TIMEOUT:.0f} s")
            engine.step()
        return time.perf_counter() - began

    def forget(self) -> None:
        """Empty the engine's own prefix cache, and nothing else.

        Raises:
            TimeoutError: if some of its blocks stay in use.
        """
        self.drain()
        give_up = time.perf_counter() + _DRAIN_TIMEOUT
        while not self._llm.reset_prefix_cache():
            if time.perf_counter() > give_up:
                raise TimeoutError("blocks of the engine's cache stay in use")
            time.sleep(_IDLE_POLL)

    def pace(self, bandwidth: float, latency: float) -> None:
        """Set the pace of a paced engine, see :meth:`lamina_kv.bench.pacing.Link.pace`."""
        from lamina_kv.bench.paced import LINK

        LINK.pace(bandwidth, latency)

    def carried(self) -> int:
        """Bytes that have come through the link of a paced engine since its pace was set."""
        from lamina_kv.bench.paced import LINK

        return LINK.carried

    def close(self) -> None:
        """Let what is under way come to its end, and shut the engine down."""
        self.drain()
        self._llm.llm_engine.engine_core.shutdown()

    def _serve_step(self) -> list[RequestOutput]:
        """One step as vLLM's server makes it: after one in which nothing was computed it sleeps."""
        engine = self._llm.llm_engine
        before = len(self._forwards)
        outputs: list[RequestOutput] = engine.step()
        if (
            len(self._forwards) == before
            and engine.engine_core.engine_core.scheduler.has_requests()
        ):
            time.sleep(_SERVER_SLEEP)
        return outputs

    def _watch_forwards(self) -> None:
        """Keep when each forward pass begins and ends."""
        if not self._watched:
            self._watched = True
            self._llm.apply_model(self._watch)

    def _watch(self, model: nn.Module) -> None:
        import torch

        def began(_: nn.Module, __: object, arguments: Mapping[str, torch.Tensor]) -> None:
            tokens = arguments["positions"].shape[-1]
            self._forwards.append(_Forward(tokens, time.perf_counter()))

        def ended(*_: object) -> None:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            self._forwards[-1].ended = time.perf_counter()

        model.register_forward_pre_hook(began, with_kwargs=True)
        model.register_forward_hook(ended)

    def _sampling(self, tokens: int) -> SamplingParams:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)

    def _hits(self) -> dict[str, int]:
        from prometheus_client import REGISTRY

        hits: dict[str, int] = {}
        for metric in REGISTRY.collect():
            if metric.name == "lamina_hit_tokens":
                for sample in metric.samples:
                    if sample.name.endswith("_total"):
                        tier = sample.labels["tier"]
                        hits[tier] = hits.get(tier, 0) + int(sample.value)
        return hits
