"""A rank's events, as they come over ZMQ."""

from __future__ import annotations

import logging

import msgspec
import zmq
import zmq.asyncio

from lamina_kv.push.proxy.routing.events.blocks import Blocks
from lamina_kv.push.proxy.routing.events.messages import read_batch

log = logging.getLogger("lamina_kv.push.proxy")

_UNREAD = 100_000
"""Batches that wait to be read, as many as vLLM's publisher holds by default."""


async def follow(endpoint: str, blocks: Blocks) -> None:
    """Read what a rank publishes until cancelled. It need not be there yet, and may come back.

    Args:
        endpoint: ``tcp://HOST:PORT``.
        blocks: is told.
    """
    with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
        socket.set_hwm(_UNREAD)
        socket.subscribe(b"")
        socket.connect(endpoint)
        expected = -1
        while True:
            frames = await socket.recv_multipart()
            if len(frames) != 3 or len(frames[1]) != 8:
                continue
            number = int.from_bytes(frames[1], "big")
            if expected not in {-1, number}:
                log.info(
                    "%s: events %d to %d are missing: what it holds is learnt anew",
                    endpoint,
                    expected,
                    number - 1,
                )
                blocks.forget()
            if number == 0:
                blocks.begins()
            expected = number + 1
            try:
                events = read_batch(frames[2])
            except msgspec.MsgspecError as error:
                log.info("%s: a batch of events is not understood: %s", endpoint, error)
                blocks.forget()
                continue
            for event in events:
                blocks.take(event)
