"""A router's half of vLLM's KV events: over ZMQ, with the batches that it missed, and nothing but
what is in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import msgspec
import zmq
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

from lamina_kv.bench.ports import free_port

GPU = "GPU"
"""vLLM's own cache, also on a CPU."""


@dataclass(frozen=True)
class Place:
    """Where a block is; the fields of an event that say so."""

    medium: str | None
    ownership: str | None = None
    locality: str | None = None


class Subscriber:
    """Follows one engine, while the ``with`` block runs.

    Attributes:
        held: blocks by place; a block is its cache group and hash.
        seen: what has happened, how often: an event's type and its medium.
        wrong: what must not be.
    """

    def __init__(self) -> None:
        self.held: dict[Place, set[tuple[int | None, object]]] = {}
        self.seen: dict[tuple[str, str | None], int] = {}
        self.wrong: list[str] = []
        self._ports = free_port(), free_port()
        self._next = 0
        self._blocks: dict[tuple[int | None, object, tuple[int, ...]], object] = {}
        self._sizes: dict[int | None, int] = {}
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)

    @property
    def config(self) -> str:
        """``--kv-events-config`` of the engine."""
        publish, replay = self._ports
        settings = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{publish}",
            "replay_endpoint": f"tcp://*:{replay}",
            "topic": "kv",
        }
        return json.dumps(settings)

    def __enter__(self) -> Self:
        publish, replay = self._ports
        self._context = zmq.Context()
        self._live = self._context.socket(zmq.SUB)
        self._live.setsockopt_string(zmq.SUBSCRIBE, "kv")
        self._live.connect(f"tcp://127.0.0.1:{publish}")
        self._missed = self._context.socket(zmq.REQ)
        self._missed.connect(f"tcp://127.0.0.1:{replay}")
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def follow(self) -> None:
        """Take in what has come by now."""
        while self._live.poll(200):
            _, number, payload = self._live.recv_multipart()
            if int.from_bytes(number, "big") > self._next:
                self._catch_up(int.from_bytes(number, "big"))
            self._take(int.from_bytes(number, "big"), payload)

    def _catch_up(self, until: int) -> None:
        """Batches before this one went out before anybody listened."""
        self._missed.send(self._next.to_bytes(8, "big"))
        while True:
            _, number, payload = self._missed.recv_multipart()
            if int.from_bytes(number, "big", signed=True) < 0:
                return
            if int.from_bytes(number, "big") < until:
                self._take(int.from_bytes(number, "big"), payload)

    def _take(self, number: int, payload: bytes) -> None:
        if number < self._next:
            return
        if number > self._next:
            self.wrong.append(f"batches {self._next} to {number} are missing")
        self._next = number + 1
        for event in self._decoder.decode(payload).events:
            self._apply(event)

    def _apply(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        medium = None if isinstance(event, AllBlocksCleared) else event.medium
        name = type(event).__name__
        self.seen[name, medium] = self.seen.get((name, medium), 0) + 1
        if isinstance(event, AllBlocksCleared):
            self.held.clear()
            return
        place = Place(event.medium, event.ownership, event.locality)
        held = self.held.setdefault(place, set())
        blocks = {(event.group_idx, block) for block in event.block_hashes}
        if isinstance(event, BlockRemoved):
            held -= blocks
            return
        if place.medium != GPU and held & blocks:
            self.wrong.append(f"stored twice in {place}")
        held |= blocks
        size, parent = event.block_size, event.parent_block_hash
        self._sizes[event.group_idx] = size
        for number, block in enumerate(event.block_hashes):
            tokens = tuple(event.token_ids[number * size : (number + 1) * size])
            known = self._blocks.setdefault((event.group_idx, parent, tokens), block)
            if known != block:
                self.wrong.append(f"two names of the same block, one in {place}")
            parent = block

    def holds(self, prompt: Sequence[int], places: Sequence[Place], group: int = 0) -> int:
        """Tokens at the beginning of a prompt whose blocks are in any of these places."""
        size, parent, end = self._sizes.get(group, len(prompt) + 1), None, 0
        while end + size <= len(prompt):
            tokens = tuple(prompt[end : end + size])
            block = self._blocks.get((group, parent, tokens))
            if block is None or not any(
                (group, block) in self.held.get(place, ()) for place in places
            ):
                break
            parent, end = block, end + size
        return end
