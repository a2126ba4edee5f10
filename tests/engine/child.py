"""The child's side of :mod:`engine.driver`: one ``vllm.LLM`` and a loop over a pipe.

Importing this module imports vLLM, so that processes forked afterwards need not.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch._dynamo
import vllm.model_executor.models.llama
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401 (what every engine imports later)
from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.platforms.cpu import CpuPlatform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.request import Request, RequestStatus

import lamina_kv.engines.vllm.connector  # noqa: F401
from engine import faults
from engine.driver import Answer, Ask, CacheEvent, EngineSpec, Sample

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def run(pipe: Connection, spec: EngineSpec) -> None:
    """Start the engine, say so, and serve calls until the other end goes away."""
    os.environ.update({**ENVIRONMENT, **spec.environment})
    try:
        if spec.asynchronous:
            plan_a_step_ahead()
        for name, value in spec.faults.items():
            getattr(faults, name)(value)
        service = Service(spec)
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise
    pipe.send((True, None))
    with contextlib.suppress(EOFError):
        while True:
            method, arguments = pipe.recv()
            try:
                answer = True, getattr(service, method)(*arguments)
            except Exception:
                answer = False, traceback.format_exc()
            pipe.send(answer)
            if method == "close":
                return


_EXTRA = (
    "lora_name",
    "extra_keys",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
    "session_id",
)
"""Of stored blocks, what does not depend on where they are."""


def plan_a_step_ahead() -> None:
    """Have vLLM schedule asynchronously wherever it would on a GPU. On a CPU, where it brings
    nothing, vLLM takes that back."""
    check = CpuPlatform.check_and_update_config.__func__

    def keep(cls: type, config: Any) -> None:
        asynchronous = config.scheduler_config.async_scheduling
        check(cls, config)
        config.scheduler_config.async_scheduling = asynchronous

    CpuPlatform.check_and_update_config = classmethod(keep)


class Service:
    """What :class:`engine.driver.Engine` calls, by the same names.

    Args:
        spec: how to start the engine.
    """

    def __init__(self, spec: EngineSpec) -> None:
        arguments = spec.arguments()
        # vLLM compiles parts of its sampler even where the model is not to be compiled.
        torch._dynamo.config.disable = arguments["enforce_eager"]
        self._llm = LLM(kv_transfer_config=spec.transfer_config(), **arguments)
        self._engine = self._llm.llm_engine
        self._core = self._engine.engine_core.engine_core
        self._names = 0
        self._live: dict[str, str] = {}
        self._generated: dict[str, int] = {}
        self._adapters: dict[Path, LoRARequest] = {}
        self._events: list[Any] = []
        self._core.scheduler.kv_event_publisher.publish = self._events.append

    def submit(self, asks: Sequence[Ask]) -> list[str]:
        names = []
        for ask in asks:
            self._names += 1
            name = f"r{self._names}"
            prompt: dict[str, Any] = {"prompt_token_ids": list(ask.tokens)}
            if ask.salt is not None:
                prompt["cache_salt"] = ask.salt
            sampling = SamplingParams(
                n=ask.n,
                temperature=0.0 if ask.seed is None else 1.0,
                seed=ask.seed,
                max_tokens=ask.max_tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                extra_args=(
                    {"kv_transfer_params": params} if (params := ask.transfer_params) else None
                ),
                # Several samples come together only at the end; one is watched as it grows.
                output_kind=(
                    RequestOutputKind.FINAL_ONLY if ask.n > 1 else RequestOutputKind.CUMULATIVE
                ),
            )
            adapter = self._adapter(ask.adapter)
            self._live[name] = self._engine.add_request(
                name, prompt, sampling, lora_request=adapter, priority=ask.priority
            )
            self._generated[name] = 0
            names.append(name)
        return names

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        outputs = self._llm.embed([{"prompt_token_ids": list(tokens)} for tokens in prompts])
        return [output.outputs.embedding for output in outputs]

    def converse(
        self, turns: Sequence[Sequence[int]], stops: Sequence[Sequence[int]], longest: int
    ) -> list[list[int]]:
        said = []
        scheduler = self._core.scheduler
        self._names += 1
        name = f"r{self._names}"
        for tokens, stop in zip(turns, stops, strict=True):
            self._core.add_request(self._turn(name, tokens, stop, longest, resumable=True))
            live, heard = scheduler.requests[name], []
            while live.status != RequestStatus.WAITING_FOR_STREAMING_REQ:
                outputs, _ = self._core.step_fn()
                for batch in (outputs or {}).values():
                    for output in batch.outputs:
                        heard += output.new_token_ids
            said.append(heard)
        self._core.add_request(self._turn(name, [0], (), longest, resumable=False))
        self.drain()
        return said

    def _turn(
        self,
        name: str,
        tokens: Sequence[int],
        stop: Sequence[int],
        longest: int,
        *,
        resumable: bool,
    ) -> Request:
        params = SamplingParams(
            temperature=0.0, max_tokens=longest, ignore_eos=True, stop_token_ids=list(stop)
        )
        return Request(
            name,
            list(tokens),
            params,
            None,
            block_hasher=self._core.request_block_hasher,
            resumable=resumable,
        )

    def step(self) -> list[Answer]:
        answers = []
        for output in self._engine.step():
            self._generated[output.request_id] = sum(len(o.token_ids) for o in output.outputs)
            if output.finished:
                self._forget(output.request_id)
                answers.append(_answer(output))
        return answers

    def drain(self) -> list[Answer]:
        answers = []
        while self._engine.has_unfinished_requests() or self._core.scheduler.has_requests():
            answers += self.step()
        return answers

    def abort(self, names: Sequence[str]) -> None:
        self._engine.abort_request(list(names))
        for name in names:
            self._forget(name)

    def progress(self) -> dict[str, int]:
        return dict(self._generated)

    def reset(self, everywhere: bool, running: bool) -> bool:
        return self._llm.reset_prefix_cache(running, everywhere)

    def pause(self, mode: str) -> None:
        self._core.pause_scheduler(mode)

    def resume(self) -> None:
        self._core.resume_scheduler()

    def core(self, method: str, arguments: tuple[object, ...]) -> Any:
        return getattr(self._core, method)(*arguments)

    def in_core(self, function: Callable[..., Any]) -> Any:
        return function(self._core)

    def scribble(self) -> None:
        self._llm.collective_rpc(overwrite_cache)

    def pages(self, name: str) -> list[str]:
        manager = self._core.scheduler.kv_cache_manager
        (blocks,) = manager.get_block_ids(self._live[name])
        by_rank = self._llm.collective_rpc(digest_blocks, args=(list(blocks),))
        return ["".join(digests) for digests in zip(*by_rank, strict=True)]

    def in_workers(self, function: Callable[..., Any], arguments: tuple[object, ...]) -> list[Any]:
        return self._llm.collective_rpc(function, args=arguments)

    def metrics(self) -> list[Sample]:
        return [
            Sample(sample.name, dict(sample.labels), sample.value)
            for metric in REGISTRY.collect()
            for sample in metric.samples
        ]

    def free_blocks(self) -> int:
        return self._core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def events(self) -> list[CacheEvent]:
        events = [event for batch in self._events for event in batch.events]
        self._events.clear()
        return [
            CacheEvent(
                type(event).__name__,
                getattr(event, "medium", None),
                getattr(event, "group_idx", None),
                tuple(getattr(event, "block_hashes", ())),
                getattr(event, "parent_block_hash", None),
                tuple(getattr(event, "token_ids", ())),
                getattr(event, "block_size", 0),
                tuple(getattr(event, name, None) for name in _EXTRA),
            )
            for event in events
        ]

    def hash_of(self, text: str) -> int:
        return hash(text)

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _forget(self, name: str) -> None:
        del self._live[name], self._generated[name]

    def _adapter(self, path: Path | None) -> LoRARequest | None:
        if path is None:
            return None
        number = len(self._adapters) + 1
        return self._adapters.setdefault(path, LoRARequest(f"adapter-{number}", number, str(path)))


def digest_blocks(worker: Any, blocks: Sequence[int]) -> list[str]:
    """Per block, a digest of its bytes in all layers; runs in a worker of vLLM."""
    runner = worker.model_runner
    count = runner.kv_cache_config.num_blocks
    digests = []
    for block in blocks:
        digest = hashlib.blake2b(digest_size=16)
        for cache in runner.kv_caches:
            per_block = cache.shape[0] // count
            page = cache[block * per_block : (block + 1) * per_block].contiguous()
            digest.update(page.view(torch.uint8).numpy())
        digests.append(digest.hexdigest())
    return digests


def overwrite_cache(worker: Any) -> None:
    """Fill the cache with numbers that are finite and wrong, in any type; runs in a worker."""
    for cache in worker.model_runner.kv_caches:
        cache.untyped_storage().fill_(0x40)


def _answer(output: RequestOutput) -> Answer:
    return Answer(
        name=output.request_id,
        samples=tuple(tuple(sample.token_ids) for sample in output.outputs),
        logprobs=tuple(
            tuple(
                entry[token].logprob
                for token, entry in zip(sample.token_ids, sample.logprobs, strict=True)
            )
            for sample in output.outputs
        ),
        cached=output.num_cached_tokens or 0,
        finish=str(output.outputs[0].finish_reason),
        transfer=output.kv_transfer_params,
    )
