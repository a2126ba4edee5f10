"""A router that follows what is told of tiers and knows prompts only: no keys, no epochs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from lamina_kv.control.planner import Planner
from lamina_kv.control.requests import RequestView
from lamina_kv.keys import Epoch
from lamina_kv.plan import NEAR, ChunkKey, TierName
from lamina_kv.tiers.contract import Index
from lamina_kv.tiers.hints import HintIndex
from lamina_kv.tiers.slots import SlotIndex
from simulator.content import Violation
from simulator.request import Request

_ALL = 1 << 30


@dataclass(frozen=True, slots=True)
class Prefix:
    """What everybody calls a chunk: the tokens up to its end; a label.

    Attributes:
        name: salt and tokens.
    """

    name: Hashable


def prefix_of(request: Request, end: int) -> Prefix:
    """The label of the chunk in front of a token."""
    return Prefix((request.salt, tuple(request.tokens()[:end])))


class Subscriber:
    """See the module.

    Args:
        chunk_tokens: tokens of a chunk.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self.counts = {True: 0, False: 0}
        self._chunk_tokens = chunk_tokens
        self._held: set[tuple[TierName, Hashable]] = set()
        self._names: dict[ChunkKey, tuple[Epoch, Hashable]] = {}
        self._old: set[tuple[TierName, ChunkKey]] = set()

    def describe(self, view: RequestView, group: int, index: int) -> Prefix:
        """What the engine's adapter says of a chunk."""
        assert isinstance(view, Request)
        label = prefix_of(view, (index + 1) * self._chunk_tokens)
        # What goes on under weights that were replaced has keys that it does not know of.
        chain = self._planner._requests[view.request_id].chain
        self._names.setdefault(chain.groups[group][index], (chain.epoch, label.name))
        return label

    def attach(self, planner: Planner) -> None:
        """Look at these tiers. What they have by now nobody can name yet."""
        catalog = planner._books.catalog
        self._planner = planner
        self._tiers: dict[TierName, Index] = {NEAR: catalog.near}
        self._tiers |= {name: far.index for name, far in catalog.far.items()}
        self._old = set(self._present())

    def learn(self, request: Request) -> None:
        """Whatever the request is called, its chunks are these."""
        for index, key in enumerate(request.chain.keys):
            if key not in self._names:
                name = prefix_of(request, (index + 1) * self._chunk_tokens).name
                self._names[key] = request.chain.epoch, name

    def check(self) -> None:
        """What was told is what is there, and what can be found. Of a store of others, whose answer
        may come when nobody asks any more, not all need be told.

        Raises:
            Violation: if it is not.
        """
        residency = self._planner.residency
        assert residency is not None
        for change in residency.take(_ALL):
            held = change.tier, change.label.name
            if (held in self._held) is change.stored:
                raise Violation(f"what is told of {change.tier} has been told before")
            (self._held.add if change.stored else self._held.discard)(held)
            self.counts[change.stored] += 1
        present = {}
        for tier, key in self._present():
            epoch, name = self._names.get(key, (None, None))
            if epoch == self._planner.epoch:
                present[tier, name] = tier, key
        if wrong := self._held - present.keys():
            raise Violation(f"{len(wrong)} chunks are told of and not there: {_some(wrong)}")
        new = {
            told
            for told, place in present.items()
            if place not in self._old and isinstance(self._tiers[told[0]], SlotIndex)
        }
        if missing := new - self._held:
            raise Violation(f"{len(missing)} chunks are there and not told of: {_some(missing)}")

    def check_end(self) -> None:
        """Nothing is remembered of chunks that are nowhere.

        Raises:
            Violation: if something is.
        """
        self.check()
        residency = self._planner.residency
        assert residency is not None
        present = {key for _, key in self._present()}
        if kept := residency._entries.keys() - present:
            raise Violation(f"at the end {len(kept)} chunks have labels that no tier holds")

    def _present(self) -> list[tuple[TierName, ChunkKey]]:
        """What tiers have, and stores were last said to have."""
        found = []
        for tier, index in self._tiers.items():
            assert isinstance(index, SlotIndex | HintIndex)
            keys = index.visible if isinstance(index, SlotIndex) else index._hints
            found += [(tier, key) for key in keys if index.has(key)]
        return found


def _some(chunks: set[tuple[TierName, Hashable]]) -> list[tuple[TierName, Hashable]]:
    return sorted(chunks, key=str)[:3]
