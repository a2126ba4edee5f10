"""What vLLM carries between Lamina's two sides for it."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lamina.plan import RankReport, Receipt, StepPlan
from lamina.push.cards import RankCard


@dataclass(frozen=True)
class LaminaPlan(KVConnectorMetadata):
    """Scheduler to workers: the plan of a step."""

    plan: StepPlan


@dataclass(frozen=True)
class LaminaReceipts(KVConnectorWorkerMetadata):
    """Workers to scheduler: the receipts of a step, one of each rank that has any."""

    receipts: tuple[Receipt, ...]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> LaminaReceipts:
        """Join the words of two ranks."""
        assert isinstance(other, LaminaReceipts)
        return LaminaReceipts(self.receipts + other.receipts)


@dataclass(frozen=True)
class LaminaReport(KVConnectorHandshakeMetadata):
    """Workers to scheduler, once: what tiers a rank has.

    Attributes:
        report: for control.
        namespace: what the rank's store is named after, empty without one.
        incarnation: names this run of the engine to others; empty if it takes no part in pushes.
        card: the rank as other engines see it.
        replicated: whether every rank holds the same bytes.
    """

    report: RankReport
    namespace: str
    incarnation: str = ""
    card: RankCard | None = None
    replicated: bool = False
