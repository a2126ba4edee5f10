"""What vLLM carries between Lamina's two sides for it."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lamina_kv.plan import RankReport, Receipt, StepPlan
from lamina_kv.push.cards import RankCard
from lamina_kv.push.ranks import RankPlace


@dataclass(frozen=True)
class LaminaPlan(KVConnectorMetadata):
    """Scheduler to workers: the plan of a step.

    Attributes:
        plan: the plan; empty until the scheduler has every rank's report.
        asks: whether each rank is to send its report with what it says after this step.
    """

    plan: StepPlan
    asks: bool = False


@dataclass(frozen=True)
class LaminaReport:
    """What a rank tells the scheduler once: its tiers, and who it is among engines.

    Attributes:
        report: for control.
        namespace: what the rank's far tiers are named after, empty without any.
        arrangement: how all ranks' kernels arrange bytes inside pages; the scheduler cannot tell.
        incarnation: names this run of the engine to others; empty if it takes no part in pushes.
        card: the rank as other engines see it.
        replicated: whether every rank holds the same bytes.
        place: where it hears destinations while a step runs; None if it does not.
    """

    report: RankReport
    namespace: str
    arrangement: str
    incarnation: str = ""
    card: RankCard | None = None
    replicated: bool = False
    place: RankPlace | None = None


@dataclass(frozen=True)
class LaminaWords(KVConnectorWorkerMetadata):
    """Workers to scheduler: what ranks say after a step.

    Attributes:
        receipts: one from each rank that has any.
        reports: one from each rank, after the step that has asked for them. They do not travel in
            vLLM's handshake, which has room for one connector of a ``MultiConnector``.
    """

    receipts: tuple[Receipt, ...] = ()
    reports: tuple[LaminaReport, ...] = ()

    def aggregate(self, other: KVConnectorWorkerMetadata) -> LaminaWords:
        """Join the words of two ranks."""
        assert isinstance(other, LaminaWords)
        return LaminaWords(self.receipts + other.receipts, self.reports + other.reports)
