"""The inside of an engine's process: vLLM, with or without Lamina, and what is measured on it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamina.bench.settings import Connector, EngineSpec, TokenIds
from lamina.bench.shapes import VOCABULARY

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import KVTransferConfig

_DRAIN_TIMEOUT = 120.0
_IDLE_POLL = 0.001
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
        for name in ("VLLM_CPU_KVCACHE_SPACE", "LAMINA_CONFIG"):
            os.environ.pop(name, None)
        from vllm import LLM

        shape = spec.shape
        blocks = -(-spec.tokens // shape.block_size) + _SPARE
        self._llm = LLM(
            model=str(spec.model),
            skip_tokenizer_init=True,
            load_format="dummy",
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

    def _connector(self) -> KVTransferConfig | None:
        if self._spec.connector is None:
            return None
        from vllm.config import KVTransferConfig

        name, module = self._spec.connector.value
        return KVTransferConfig(
            kv_connector=name,
            kv_connector_module_path=module,
            kv_role="kv_both",
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
            from lamina.bench.paced import PacedConnector

            forward_ended = PacedConnector.forward_ended
        return FirstToken(
            began=began,
            seconds=seconds,
            cached=int(answer.num_cached_tokens or 0),
            hits={tier: count - before.get(tier, 0) for tier, count in self._hits().items()},
            forward_ended=forward_ended,
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
        """Set the pace of a paced engine, see :meth:`lamina.bench.pacing.Link.pace`."""
        from lamina.bench.paced import LINK

        LINK.pace(bandwidth, latency)

    def carried(self) -> int:
        """Bytes that have come through the link of a paced engine since its pace was set."""
        from lamina.bench.paced import LINK

        return LINK.carried

    def close(self) -> None:
        """Let what is under way come to its end, and shut the engine down."""
        self.drain()
        self._llm.llm_engine.engine_core.shutdown()

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
