"""What somebody who watches a store from outside knows of it, however its servers end."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamina_kv.plan import ChunkKey
from simulator.content import Stamps, Violation


@dataclass(frozen=True)
class Found:
    """What one rank's part of a store names when it has been opened.

    Attributes:
        rank: the rank.
        slot: where the chunk is said to be.
        key: which it is said to be.
        stamps: what is read there, shape ``(rows, tokens)``; None if nothing is delivered.
    """

    rank: int
    slot: int
    key: ChunkKey
    stamps: Stamps | None


@dataclass
class Memory:
    """See the module.

    Attributes:
        content: for every chunk that was ever ordered to be written, what it must read.
        durable: chunks reported durable whose slot was not given to another since, with the slot.
        unreadable: slots that were named and not delivered when the store was opened last.
        broken: slots that were damaged since, on any rank; any slot, if None.
        unsettled: slots that were ordered to be written or forgotten since the store was opened,
            without a report of a chunk in them. After a power failure they may say that they hold
            what they do not.
        torn: whether the power has failed since then.
    """

    content: dict[ChunkKey, Stamps] = field(default_factory=dict)
    durable: dict[ChunkKey, int] = field(default_factory=dict)
    unreadable: set[int] = field(default_factory=set)
    broken: set[int] | None = field(default_factory=set)
    unsettled: set[int] = field(default_factory=set)
    torn: bool = False
    _ordered: dict[ChunkKey, int] = field(default_factory=dict)

    def ordered(self, writes: list[tuple[ChunkKey, int, Stamps]], dropped: tuple[int, ...]) -> None:
        """Control has ordered writes, and slots to be forgotten: what they held may go."""
        self.content.update((key, stamps) for key, _, stamps in writes)
        self._ordered = {key: slot for key, slot in self._ordered.items() if slot not in dropped}
        self._ordered.update((key, slot) for key, slot, _ in writes)
        taken = {slot for _, slot, _ in writes}.union(dropped)
        self.unsettled |= taken
        self.durable = {key: slot for key, slot in self.durable.items() if slot not in taken}

    def reported(self, key: ChunkKey) -> None:
        """Control has heard from every rank that a chunk is durable."""
        slot = self._ordered[key]
        self.durable[key] = slot
        self.unreadable.discard(slot)
        self.unsettled.discard(slot)

    def damage(self, slots: set[int] | None) -> None:
        """Bytes of these slots were damaged; of any, if None."""
        self.broken = None if slots is None or self.broken is None else self.broken | slots

    def check(self, found: list[Found], visible: dict[ChunkKey, int]) -> None:
        """A server has opened the store.

        Args:
            found: what each rank's part of it names.
            visible: what the server takes to be there, with its slot.

        Raises:
            Violation: if something is wrong, or lost, or not whole without a damage to explain it.
        """
        for chunk in found:
            where = f"slot {chunk.slot} of rank {chunk.rank}"
            if chunk.stamps is None:
                known = self.unreadable | (self.unsettled if self.torn else set())
                if self.broken is not None and chunk.slot not in self.broken | known:
                    raise Violation(f"{where} is said to hold a chunk, which cannot be read")
                continue
            expected = self.content.get(chunk.key)
            if expected is None or (chunk.stamps != expected).any():
                raise Violation(f"{where} delivers wrong bytes for chunk {chunk.key.hex()}")
        if self.broken is None:
            return
        lost = {
            key: slot
            for key, slot in self.durable.items()
            if key not in visible and slot not in self.broken
        }
        if lost:
            text = ", ".join(f"{key.hex()} in slot {slot}" for key, slot in lost.items())
            raise Violation(f"{len(lost)} chunks were reported durable and are gone: {text}")

    def opened(self, unreadable: set[int], visible: dict[ChunkKey, int]) -> None:
        """Start anew from what a server has found; what is whole now is to stay so."""
        self.unreadable = unreadable
        self.durable = {key: slot for key, slot in visible.items() if slot not in unreadable}
        self.broken = set()
        self.unsettled = set()
        self.torn = False
        self._ordered = {}
