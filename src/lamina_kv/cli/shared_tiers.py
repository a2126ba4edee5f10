"""What ``lamina-kv doctor`` finds out about tiers that engines share: can they be used here?"""

from __future__ import annotations

import logging
import mmap
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from lamina_kv.cli.checks import Finding, Verdict
from lamina_kv.keys import KEY_BYTES
from lamina_kv.plan import ChunkKey
from lamina_kv.quantities import size_of
from lamina_kv.tiers import KINDS
from lamina_kv.tiers.config import SharedConfig
from lamina_kv.tiers.contract import Fate, Piece, Store, StoreError, Tenant

_NAMESPACE = "0" * 32
"""Of no model. Nothing is written there, unless somebody wants to know how fast that is, but by
some kinds what the namespace is for."""

OBJECT_BYTES = 1 << 20
"""Bytes of an object: some 8 tokens of a large model."""

_OBJECTS = 16


def shared_tier(settings: SharedConfig, *, speed: bool = False) -> Finding:
    """Open a tier's store as an engine would, and ask it for a chunk that nobody has.

    Args:
        settings: the tier.
        speed: whether objects are written, and read back, to see how fast that is. They stay until
            the store evicts them.
    """
    subject = f"tier {settings.name}"
    tenant = Tenant(_NAMESPACE, {"model": "lamina-kv doctor"}, 0, 1, OBJECT_BYTES, 0)
    rates = ""
    with _warnings() as said:
        try:
            store = KINDS[settings.kind].open(settings, tenant)
        except StoreError as error:
            return Finding(subject, Verdict.FAILED, str(error))
        try:
            seconds = _ask(store, settings.timeout)
            if speed and seconds is not None:
                rates = _speed(store, settings.timeout)
        finally:
            store.close()
    if seconds is None:
        found = "; ".join(said) or f"{settings.kind}: no answer in {settings.timeout:g} s"
        return Finding(subject, Verdict.WARNING, found, "engines start without it, and try again")
    if said:
        return Finding(subject, Verdict.WARNING, "; ".join(said) + rates)
    return Finding(
        subject, Verdict.GOOD, f"{settings.kind}, answers in {seconds * 1e3:.1f} ms{rates}"
    )


def _ask(store: Store, timeout: float) -> float | None:
    """How long a question takes; None if there is no answer."""
    began = time.perf_counter()
    found = store.find([ChunkKey(secrets.token_bytes(KEY_BYTES))], timeout)
    return None if found is None else time.perf_counter() - began


def _speed(store: Store, timeout: float) -> str:
    """How fast a store takes objects and gives them back, in words."""
    memory = mmap.mmap(-1, _OBJECTS * OBJECT_BYTES)  # aligned, as stores want it
    memory.write(secrets.token_bytes(_OBJECTS * OBJECT_BYTES))
    buffers = np.frombuffer(memory, np.uint8).reshape(_OBJECTS, OBJECT_BYTES)
    pieces = [Piece(ChunkKey(secrets.token_bytes(KEY_BYTES)), 0, each) for each in buffers]
    said = []
    for verb, call in (("written", store.write), ("read", store.read)):
        began = time.perf_counter()
        fates = call(pieces, timeout)
        rate = buffers.nbytes / (time.perf_counter() - began)
        if failed := [fate for fate in fates if fate is not Fate.DONE]:
            said.append(f"could not be {verb} ({failed[0]})")
            break
        said.append(f"were {verb} at {size_of(int(rate))}/s")
    return f"; {size_of(_OBJECTS * OBJECT_BYTES)} {' and '.join(said)}"


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What is warned of meanwhile; nobody else hears of it."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, listener = logging.getLogger("lamina_kv"), Listener(logging.WARNING)
    logger.addHandler(listener)
    propagated, logger.propagate = logger.propagate, False
    try:
        yield said
    finally:
        logger.propagate = propagated
        logger.removeHandler(listener)
