"""How a bench sets up an engine, and what it asks it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import isinf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina_kv.bench.shapes import VOCABULARY, ModelShape

if TYPE_CHECKING:
    from lamina_kv.bench.faulty_store import StoreFaults

TokenIds = list[int]


REMOTE_DECODE: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""``kv_transfer_params`` that a router gives to the prefill engine of vLLM's NixlConnector."""


class Connector(Enum):
    """A connector's class and the module it is in; None for one of vLLM's own."""

    LAMINA = ("LaminaConnector", "lamina_kv.engines.vllm")
    PACED = ("PacedConnector", "lamina_kv.bench.paced")
    """Lamina with every tier behind a :class:`~lamina_kv.bench.pacing.Link`."""
    IDLE = ("IdleConnector", "lamina_kv.bench.idle")
    """One that does nothing."""
    NIXL = ("NixlConnector", None)
    """vLLM's own between two engines: the decode engine pulls once the prefill engine is done."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine, in one process.

    Attributes:
        name: for messages.
        shape: the model.
        model: directory of its ``config.json``.
        tokens: tokens that its KV cache holds.
        step_tokens: tokens that one step computes at most.
        connector: which connector; None for an engine without.
        lamina: the connector's configuration.
        role: vLLM's ``kv_role``.
        environment: variables of its process.
        network: the network namespace that it is in; empty for the machine's own.
        load_format: vLLM's, where its weights come from.
        faults: what is wrong with its far tiers; None: nothing.
    """

    name: str
    shape: ModelShape
    model: Path
    tokens: int
    step_tokens: int
    connector: Connector | None = None
    lamina: Mapping[str, Any] = field(default_factory=dict, hash=False)
    role: str = "kv_both"
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    network: str = ""
    load_format: str = "dummy"
    faults: StoreFaults | None = None


class PromptSource:
    """Prompts that share nothing with each other. The same ones in every run.

    Args:
        seed: sets them apart from those of another source.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def prompt(self, tokens: int) -> TokenIds:
        """``tokens`` token ids, none of them special."""
        return self._random.choices(range(3, VOCABULARY), k=tokens)


def require_whole(option: str, tokens: int, chunk: int) -> None:
    """Refuse a number of tokens that is not a whole number of chunks of ``chunk``.

    Raises:
        ValueError: names the option and the next number that would do.
    """
    if tokens < chunk or tokens % chunk:
        nearest = max(1, round(tokens / chunk)) * chunk
        raise ValueError(
            f"{option} must be a whole number of chunks of {chunk} tokens, so that all of them can "
            f"be hit; {tokens} is not, {nearest} would be"
        )


def store_options(faults: StoreFaults | None) -> dict[str, float]:
    """How slow a far tier was made, for a report."""
    if faults is None:
        return {}
    shown = {"store_latency_ms": faults.latency * 1e3, "store_tail_ms": faults.tail * 1e3}
    return shown | (
        {} if isinf(faults.bandwidth) else {"store_gb_per_second": faults.bandwidth / 1e9}
    )
