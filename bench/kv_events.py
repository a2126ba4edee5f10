"""What KV events cost the scheduler: the same requests with and without somebody who listens.

    python bench/kv_events.py

Lamina's control and vLLM's own requests and events, without an engine. Each prompt is new: it is
hashed when it arrives, all of its chunks are saved in one step, and receipts come back. Beside the
time it counts what goes over the wire: events, and their bytes as vLLM's publisher encodes them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import msgspec
from vllm.distributed.kv_events import KVEventBatch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from lamina_kv.bench.report import Machine
from lamina_kv.config import load_config
from lamina_kv.control.planner import Planner
from lamina_kv.control.shape import ChunkShape
from lamina_kv.engines.vllm.events import KvEvents
from lamina_kv.engines.vllm.requests import VllmRequest
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.observe.metrics import Meter
from lamina_kv.plan import Outcome, RankReport, Receipt, TransferReceipt
from lamina_kv.tiers.regard import USUAL

BLOCK, CHUNK = 16, 64
GROUPS = (Group(GroupKind.FULL, BLOCK),)
CHUNK_BYTES = 1 << 20
STAGES = ("arrival", "plan", "receipts", "events")
WITHOUT, WITH = "without events", "with events"


@dataclass
class Times:
    """Seconds of each request, by stage; and what was published.

    Attributes:
        seconds: by stage.
        events: published.
        size: their bytes.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {s: [] for s in STAGES})
    events: int = 0
    size: int = 0


class _Pool:
    """An engine's block pool that costs nothing."""

    def hold(self, blocks: object) -> None:
        pass

    def free(self, blocks: object) -> None:
        pass


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of each prompt")
    parser.add_argument("--requests", type=int, default=200)
    options = parser.parse_args()
    init_none_hash(sha256_cbor)
    machine = Machine.here()
    times = {WITHOUT: Times(), WITH: Times()}
    sides = {name: _Side(options.tokens, options.requests, name == WITH) for name in times}
    for number in range(options.requests):  # in turn, so that both meet the same machine
        for name, side in sides.items():
            side.serve(number, times[name])
    chunks = options.tokens // CHUNK
    print(
        f"{options.requests} prompts of {options.tokens:,} tokens, {chunks} chunks each; {machine}"
    )
    print(f"{'ms a prompt (median)':24}" + "".join(f"{name:>18}" for name in times))
    for stage in STAGES:
        medians = [1e3 * statistics.median(each.seconds[stage]) for each in times.values()]
        print(f"{stage:24}" + "".join(f"{median:18.3f}" for median in medians))
    sums = [sum(map(statistics.median, each.seconds.values())) for each in times.values()]
    print(f"{'all':24}" + "".join(f"{1e3 * each:18.3f}" for each in sums))
    print(f"more with events: {1e6 * (sums[1] - sums[0]) / chunks:.1f} µs a chunk")
    told, saved = times[WITH], options.requests * chunks
    print(f"{told.events:,} events of {saved:,} chunks, {told.size / saved:.0f} bytes a chunk")


class _Side:
    """One scheduler.

    Args:
        tokens: of a prompt.
        requests: how many prompts there will be.
        listened: whether somebody follows its events.
    """

    def __init__(self, tokens: int, requests: int, listened: bool) -> None:
        self._tokens = tokens
        chunks = requests * (tokens // CHUNK)
        config = load_config({"save": {"max_inflight": 2 * tokens // CHUNK * CHUNK_BYTES}}, {})
        self._events = KvEvents(config.tiers, CHUNK, GROUPS) if listened else None
        if self._events is not None:
            manager: Any = SimpleNamespace(
                block_pool=SimpleNamespace(hash_block_size=BLOCK),
                kv_cache_event_metadata=(("full_attention", None),),
            )
            self._events.bind(manager)
        self._planner = Planner(
            config,
            ChunkShape.uniform(BLOCK, CHUNK),
            b"bench",
            _Pool(),
            [RankReport(0, chunks, CHUNK_BYTES, ())],
            Meter(),
            describe=None if self._events is None else self._events.describe,
        )
        self._hasher = get_request_block_hasher(BLOCK, sha256_cbor)
        self._encode = msgspec.msgpack.Encoder().encode

    def serve(self, number: int, times: Times) -> None:
        """One request from its arrival to its end."""
        request = Request(
            request_id=f"r{number}",
            prompt_token_ids=[number, *range(self._tokens)],
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            block_hasher=self._hasher,
        )
        blocks = list(range(self._tokens // BLOCK + 1))
        view = VllmRequest(request, lambda: (blocks,), GROUPS, "", False, 1, None, USUAL)
        planner, end = self._planner, request.num_tokens
        clock = time.perf_counter
        gc.collect()
        gc.disable()
        try:
            marks = [clock()]
            planner.arrived(view)
            marks.append(clock())
            planner.lookup(view, 0)
            planner.admitted(request.request_id, 0)
            plan = planner.plan_step([(request.request_id, 0, end)], forward=True)
            marks.append(clock())
            done = [
                TransferReceipt(each.transfer, Outcome.DONE, CHUNK_BYTES) for each in plan.saves
            ]
            planner.receive([Receipt(0, tuple(done))])
            marks.append(clock())
            events = self._take()
            marks.append(clock())
        finally:
            gc.enable()
        assert len(plan.saves) == self._tokens // CHUNK, "all chunks are saved at once"
        planner.finished(request.request_id, end, [blocks])
        for stage, (before, after) in zip(STAGES, pairwise(marks), strict=True):
            times.seconds[stage].append(after - before)
        times.events += len(events)
        if events:  # in a thread of vLLM's own
            times.size += len(self._encode(KVEventBatch(ts=time.time(), events=events)))

    def _take(self) -> list[Any]:
        if self._events is None or self._planner.residency is None:
            return []
        return self._events.take(self._planner.residency)


if __name__ == "__main__":
    main()
