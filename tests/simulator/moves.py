"""What moves: no slot is used for two things of which one writes, and no tier is asked for more
than it may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lamina_kv.plan import (
    NEAR,
    ChunkKey,
    LoadOrder,
    StepPlan,
    TierName,
    TransferId,
    TransferReceipt,
)
from lamina_kv.tiers.contract import Index
from simulator.content import Violation
from simulator.options import Options

Slot = tuple[TierName, int]
"""A slot of a tier."""


@dataclass(eq=False)
class _Use:
    """What a transfer does with its slots until every rank has ended it.

    Attributes:
        what: words.
        transfer: the transfer.
        reads: slots that it reads.
        writes: slots that it writes.
        ranks: ranks that have not ended it.
    """

    what: str
    transfer: TransferId
    reads: frozenset[Slot]
    writes: frozenset[Slot]
    ranks: set[int]


class MoveWatch:
    """See the module.

    Args:
        options: the engine.

    Attributes:
        fleeting: chunks that nobody can find again after a restart.
    """

    def __init__(self, options: Options) -> None:
        self.fleeting: set[ChunkKey] = set()
        self._options = options
        self._uses: dict[TransferId, _Use] = {}
        self._of_slot: dict[Slot, set[TransferId]] = {}
        self._ways: dict[TransferId, tuple[TierName, str]] = {}
        self._sources: dict[TransferId, tuple[TierName, ChunkKey]] = {}
        self._lost: set[tuple[TierName, ChunkKey]] = set()

    @property
    def under_way(self) -> list[str]:
        """What has not ended on every rank."""
        return [f"{use.what} {use.transfer}" for use in self._uses.values()]

    def attach(self, tier: TierName, index: Index) -> None:
        """Look over the shoulder of a far tier's index."""
        index.told = partial(self._told, tier, index.told)  # type: ignore[method-assign]

    def planned(self, plan: StepPlan, slots_of: Callable[[LoadOrder], set[int]]) -> None:
        """A plan was made.

        Args:
            plan: the plan.
            slots_of: the near slots that a load reads.
        """
        for orders in plan.tiers:
            tier = orders.tier
            slotted = self._options.tier(tier).slotted
            for slot in orders.drops:
                self._check(f"a drop in {tier}", frozenset(), frozenset([(tier, slot)]))
            for move in orders.outward:
                if move.key in self.fleeting:
                    raise Violation(f"a chunk of weights without a name is moved to {tier}")
                far = frozenset([(tier, move.far)] if slotted else [])
                near = frozenset([(NEAR, move.near)])
                self._begin(f"the move to {tier}", move.transfer, near, far)
                self._ways[move.transfer] = tier, "out"
            for move in orders.inward:
                if (tier, move.key) in self._lost:
                    raise Violation(f"a chunk that {tier} has lost is moved from it again")
                far = frozenset([(tier, move.far)] if slotted else [])
                near = frozenset([(NEAR, move.near)])
                self._begin(f"the move from {tier}", move.transfer, far, near)
                self._ways[move.transfer] = tier, "in"
                self._sources[move.transfer] = tier, move.key
            for ask in orders.asks:
                self._begin(f"the question to {tier}", ask.transfer, frozenset(), frozenset())
        for save in plan.saves:
            slot = frozenset([(NEAR, save.slot)])
            self._begin("the save", save.transfer, frozenset(), slot)
        for load in plan.loads:
            slots = frozenset((NEAR, slot) for slot in slots_of(load))
            self._begin("the load", load.transfer, slots, frozenset())
        self._check_bounds()

    def reported(self, rank: int, receipt: TransferReceipt) -> None:
        """A rank has ended its part of a transfer."""
        transfer = receipt.transfer
        use = self._uses.get(transfer)
        if use is None:
            return
        if receipt.lost:
            self._lost.add(self._sources[transfer])
        use.ranks.discard(rank)
        if not use.ranks:
            del self._uses[transfer]
            self._ways.pop(transfer, None)
            self._sources.pop(transfer, None)
            for slot in use.reads | use.writes:
                self._of_slot[slot].discard(transfer)

    def present(self, tier: TierName, key: ChunkKey) -> None:
        """There is a reason to believe that a tier has a chunk."""
        self._lost.discard((tier, key))

    def _begin(
        self,
        what: str,
        transfer: TransferId,
        reads: frozenset[Slot],
        writes: frozenset[Slot],
    ) -> None:
        self._check(f"{what} {transfer}", reads, writes)
        ranks = set(range(self._options.ranks))
        self._uses[transfer] = _Use(what, transfer, reads, writes, ranks)
        for slot in reads | writes:
            self._of_slot.setdefault(slot, set()).add(transfer)

    def _check(self, what: str, reads: frozenset[Slot], writes: frozenset[Slot]) -> None:
        for slot in reads | writes:
            for transfer in self._of_slot.get(slot, ()):
                use = self._uses.get(transfer)
                if use is None:  # another one has had its name, and has ended
                    continue
                if slot in writes or slot in use.writes:
                    raise Violation(
                        f"slot {slot[1]} of {slot[0]} is given to {what} while {use.what} "
                        f"{transfer} still {'writes' if slot in use.writes else 'reads'} it"
                    )

    def _check_bounds(self) -> None:
        for tier in self._options.tiers:
            for way in ("out", "in"):
                count = sum(1 for each in self._ways.values() if each == (tier.name, way))
                if count > tier.in_flight:
                    raise Violation(
                        f"{count} chunks are on their way {way} of near and {tier.name}, the bound "
                        f"is {tier.in_flight}"
                    )

    def _told(
        self,
        tier: TierName,
        told: Callable[..., None],
        keys: tuple[ChunkKey, ...],
        present: tuple[bool, ...] | None,
    ) -> None:
        told(keys, present)
        self._lost.difference_update((tier, key) for key in keys)
