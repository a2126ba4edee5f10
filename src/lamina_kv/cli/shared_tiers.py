"""What ``lamina-kv doctor`` finds out about tiers that engines share: can they be used here?"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lamina_kv.cli.checks import Finding, Verdict
from lamina_kv.geometry import DIRECT_IO_ALIGNMENT
from lamina_kv.keys import KEY_BYTES
from lamina_kv.plan import ChunkKey
from lamina_kv.tiers import KINDS
from lamina_kv.tiers.config import SharedConfig
from lamina_kv.tiers.contract import Store, StoreError, Tenant

_NAMESPACE = "0" * 32
"""Of no model. Nothing is written there but, by some kinds, what the namespace is for."""


def shared_tier(settings: SharedConfig) -> Finding:
    """Open a tier's store as an engine would, and ask it for a chunk that nobody has.

    Args:
        settings: the tier.
    """
    subject = f"tier {settings.name}"
    tenant = Tenant(_NAMESPACE, {"model": "lamina-kv doctor"}, 0, 1, DIRECT_IO_ALIGNMENT, 0)
    with _warnings() as said:
        try:
            store = KINDS[settings.kind].open(settings, tenant)
        except StoreError as error:
            return Finding(subject, Verdict.FAILED, str(error))
        try:
            seconds = _ask(store, settings.timeout)
        finally:
            store.close()
    if seconds is None:
        found = "; ".join(said) or f"{settings.kind}: no answer in {settings.timeout:g} s"
        return Finding(subject, Verdict.WARNING, found, "engines start without it, and try again")
    if said:
        return Finding(subject, Verdict.WARNING, "; ".join(said))
    return Finding(subject, Verdict.GOOD, f"{settings.kind}, answers in {seconds * 1e3:.1f} ms")


def _ask(store: Store, timeout: float) -> float | None:
    """How long a question takes; None if there is no answer."""
    began = time.perf_counter()
    found = store.find([ChunkKey(secrets.token_bytes(KEY_BYTES))], timeout)
    return None if found is None else time.perf_counter() - began


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
