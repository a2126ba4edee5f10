"""The inside of a system's process: vLLM with one connector or none, stepped as its server does."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lamina_kv.bench.pacing import Link
from lamina_kv.bench.serving import Serving
from lamina_kv.bench.settings import EngineSpec
from lamina_kv.bench.shapes import VOCABULARY
from peers.protocol import Arrival, Response, Start
from peers.systems import System, Wiring, wiring

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.config import KVTransferConfig

_SERVER_SLEEP = 0.001
"""As in vLLM 0.32's ``EngineCoreProc``, after a step in which nothing was computed."""
_SETTLE = 0.2
"""Seconds in which a connector that saves at its next step, or behind it, comes to do so."""
_SETTLE_TURNS = 3


@dataclass(slots=True)
class _Progress:
    """A request that is being served."""

    due: float
    first: float = 0.0
    last: float = 0.0
    cached: int = 0
    tokens: list[int] = field(default_factory=list)

    def note(self, output: RequestOutput, now: float) -> None:
        tokens = list(output.outputs[0].token_ids)
        if tokens and not self.tokens:
            self.first = now - self.due
        if len(tokens) > len(self.tokens):
            self.last = now - self.due
        self.tokens = tokens
        self.cached = int(output.num_cached_tokens or 0)

    def response(self) -> Response:
        return Response(self.first, self.last, self.cached, self.tokens)


class PeerServing(Serving):
    """See the module.

    Args:
        start: what to run.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._wiring: Wiring = wiring(start.system, start.store, start.lamina)
        # Nothing that is installed beside a system has a say in it.
        os.environ["VLLM_PLUGINS"] = ""
        from peers.weights import LOAD_FORMAT

        super().__init__(
            EngineSpec(
                name=start.system.value,
                shape=start.shape,
                model=Path(start.model),
                tokens=start.cache_tokens,
                step_tokens=start.step_tokens,
                environment=self._wiring.environment,
                load_format=LOAD_FORMAT,
            )
        )
        core = self._llm.llm_engine.engine_core.engine_core
        step = core.step_fn

        def step_as_server() -> object:
            outputs, computed = step()
            if not computed and core.scheduler.has_requests():
                time.sleep(_SERVER_SLEEP)
            return outputs, computed

        core.step_fn = step_as_server
        self._scheduler = core.scheduler
        self._served = 0
        self.touch_cache()

    def _connector(self) -> KVTransferConfig | None:
        if self._wiring.connector is None:
            return None
        from vllm.config import KVTransferConfig

        return KVTransferConfig(
            kv_connector=self._wiring.connector,
            kv_connector_module_path=self._wiring.module,
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config=dict(self._wiring.extra),
        )

    def serve(self, arrivals: Sequence[Arrival]) -> list[Response]:
        """Serve requests, each from the moment it is due; one that comes during a step waits for
        the end of it, as in vLLM's server."""
        engine = self._llm.llm_engine
        began = time.perf_counter()
        waiting = deque(sorted(range(len(arrivals)), key=lambda i: arrivals[i].at))
        live: dict[str, _Progress] = {}
        served: list[_Progress] = [_Progress(began + arrival.at) for arrival in arrivals]
        while waiting or live:
            while waiting and served[waiting[0]].due <= time.perf_counter():
                index = waiting.popleft()
                self._served += 1
                name = f"request-{self._served}"
                arrival = arrivals[index]
                live[name] = served[index]
                engine.add_request(
                    name, {"prompt_token_ids": arrival.prompt}, self._sampling(arrival.tokens)
                )
            if not self._scheduler.has_requests():
                time.sleep(max(0.0, served[waiting[0]].due - time.perf_counter()))
                continue
            for output in engine.step():
                live[output.request_id].note(output, time.perf_counter())
                if output.finished:
                    del live[output.request_id]
        return [progress.response() for progress in served]

    def drain(self) -> float:
        """As :meth:`~lamina_kv.bench.serving.Serving.drain`; connectors that save in a later step
        are given some."""
        began = time.perf_counter()
        for _ in range(_SETTLE_TURNS if self._wiring.connector is not None else 1):
            super().drain()
            self.serve([Arrival(0.0, [VOCABULARY - 2] * (self._start.shape.block_size // 2), 2)])
            time.sleep(_SETTLE)
        super().drain()
        return time.perf_counter() - began

    def pace(self, bandwidth: float, latency: float) -> None:
        """See :meth:`lamina_kv.bench.pacing.Link.pace`."""
        self._link().pace(bandwidth, latency)

    def _link(self) -> Link:
        if self._start.system is System.LAMINA:
            from lamina_kv.bench.paced import LINK

            return LINK
        from peers.adapters.batch_copy import LINK as ADAPTERS_LINK

        return ADAPTERS_LINK
