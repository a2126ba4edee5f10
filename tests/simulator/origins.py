"""Where chunks that are near have come from, so that each tier gets the credit for what it had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lamina_kv.control.offers import Offer
from lamina_kv.control.transfers import TransferTable
from lamina_kv.plan import NEAR, ChunkKey, StepPlan, TierName
from lamina_kv.tiers.slots import SlotIndex
from simulator.content import Violation
from simulator.request import Request


@dataclass(frozen=True, slots=True)
class Origin:
    """How a chunk has come near.

    Attributes:
        tier: from where; near if it was saved.
        request_id: for whom it was ordered; empty if for nobody.
        number: counts arrivals.
    """

    tier: TierName
    request_id: str
    number: int


class Origins:
    """See the module.

    Args:
        near: the near tier.
        transfers: all transfers of the engine.
    """

    def __init__(self, near: SlotIndex, transfers: TransferTable) -> None:
        self._transfers = transfers
        self._coming: dict[ChunkKey, tuple[TierName, str]] = {}
        self._origins: dict[ChunkKey, list[Origin]] = {}
        self._arrivals = 0
        self._since: dict[str, int] = {}
        abandoned = partial(self._abandoned, near.abandoned)
        near.abandoned = abandoned  # type: ignore[method-assign]

    def submitted(self, request: Request) -> None:
        """A request has arrived, and what comes near from now on may be for it."""
        self._since[request.request_id] = self._arrivals

    def planned(self, plan: StepPlan) -> None:
        """A plan was made."""
        for orders in plan.tiers:
            for move in orders.inward:
                transfer = self._transfers.get(move.transfer)
                assert transfer is not None, "it was just ordered"
                self._coming[move.key] = orders.tier, transfer.request_id

    def arrived(self, key: ChunkKey) -> None:
        """A chunk is near."""
        self._arrivals += 1
        tier, request_id = self._coming.pop(key, (NEAR, ""))
        origins = self._origins.setdefault(key, [])
        origins.append(Origin(tier, request_id, self._arrivals))
        del origins[:-8]

    def _abandoned(self, abandoned: Callable[[ChunkKey], None], key: ChunkKey) -> None:
        abandoned(key)
        self._coming.pop(key, None)

    def check(self, request: Request, offer: Offer, chunk: int) -> None:
        """A far tier is credited with what was moved for the request, and with nothing that did not
        come while it waited.

        Args:
            request: the request; it has not had blocks yet.
            offer: what is loaded for it.
            chunk: tokens of a chunk.
        """
        surely: dict[TierName, int] = {}
        perhaps: dict[TierName, int] = {}
        first, last = offer.floor, offer.floor + offer.loaded
        for index in range(first // chunk, -(-last // chunk)) if offer.loaded else ():
            tokens = min(last, (index + 1) * chunk) - max(first, index * chunk)
            origins = self._origins.get(request.chain.keys[index], [])
            recent = [each for each in origins if each.number > self._since[request.request_id]]
            for tier in {origin.tier for origin in recent}:
                perhaps[tier] = perhaps.get(tier, 0) + tokens
            if recent and recent[-1].request_id == request.request_id:
                surely[recent[-1].tier] = surely.get(recent[-1].tier, 0) + tokens
        for tier in {*offer.taken, *perhaps} - {NEAR}:
            least, most = surely.get(tier, 0), perhaps.get(tier, 0)
            if not least <= offer.taken.get(tier, 0) <= most:
                raise Violation(
                    f"{tier} is credited with {offer.taken.get(tier, 0)} tokens of "
                    f"{request.request_id}; it has brought {least} of them near for it, and {most} "
                    "while it waited"
                )
