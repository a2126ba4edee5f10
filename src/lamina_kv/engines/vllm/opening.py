"""The time before every rank has reported its tiers.

Reports travel with what workers say after a step. vLLM's handshake would bring them sooner, and
cannot be used: a ``MultiConnector`` hands on the metadata of one of its connectors only. So the
first plan asks for them, and the engine steps once for it even if it has no request. A request that
comes sooner is told to ask again: after a restart it, too, finds what is stored.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from vllm.v1.request import Request

from lamina_kv.engines.vllm.messages import LaminaReport
from lamina_kv.keys import CHECKPOINT, Epoch

PLANS = 100
"""Plans after which reports are missing, and not only late: vLLM has a few steps in flight."""


class Opening:
    """See the module.

    Args:
        ranks: how many report.

    Attributes:
        epoch: which weights compute now.
    """

    def __init__(self, ranks: int) -> None:
        self.epoch = CHECKPOINT
        self._ranks = ranks
        self._plans = 0
        self._reports: dict[int, LaminaReport] = {}
        self._arrived: dict[str, Request] = {}

    def begin(self, epoch: Epoch) -> None:
        """Other weights compute from now on."""
        self.epoch = epoch

    def reset(self) -> None:
        """Weights without a name compute from now on."""
        self.epoch = Epoch(run=uuid.uuid4().hex)

    def arrived(self, request: Request) -> None:
        """A request has arrived."""
        self._arrived[request.request_id] = request

    def finished(self, request: Request) -> None:
        """A request has ended."""
        self._arrived.pop(request.request_id, None)

    def hand_over(self) -> Iterable[Request]:
        """Requests that have arrived and not ended; they are known to somebody else from now on."""
        arrived, self._arrived = self._arrived, {}
        return arrived.values()

    def asks(self) -> bool:
        """Whether the next plan asks the ranks for their reports.

        Raises:
            RuntimeError: if they have been asked long ago, and some have not said a word.
        """
        self._plans += 1
        if self._plans > PLANS:
            missing = sorted(set(range(self._ranks)) - set(self._reports))
            raise RuntimeError(
                f"ranks {missing} have not reported their tiers: vLLM does not hand on what the "
                "connector's workers say after a step (build_connector_worker_meta)"
            )
        return self._plans == 1

    def heard(self, reports: Iterable[LaminaReport]) -> list[LaminaReport] | None:
        """Take in reports.

        Returns:
            One from each rank, in their order, as soon as all are there; they are not kept.

        Raises:
            ValueError: if the ranks serve different checkpoints.
        """
        self._reports |= {report.report.rank: report for report in reports}
        if len(self._reports) < self._ranks:
            return None
        reported, self._reports = self._reports, {}
        found = [reported[rank] for rank in sorted(reported)]
        if len({report.namespace for report in found} - {""}) > 1:
            raise ValueError(
                "the checkpoint changed while the engine was starting: its ranks disagree about "
                "what they serve. Start again."
            )
        return found
