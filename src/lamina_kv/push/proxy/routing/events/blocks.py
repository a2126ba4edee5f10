"""Which blocks one rank holds, from what it announces."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

from lamina_kv.push.proxy.routing.events.messages import (
    REMOTE,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    Hash,
)
from lamina_kv.push.proxy.routing.events.names import BlockName, first_name, names, next_name
from lamina_kv.push.proxy.routing.events.stores import SharedStores

MAX_NAMES = 1_000_000
"""Blocks of a rank whose names are remembered, with their engine's: some 200 MB. More are forgotten
as they come, and what is behind them is not found."""
MAX_ORPHAN_TOKENS = 1 << 20
"""Tokens of blocks that are kept whose parent was not announced yet: some 40 MB."""

_FULL = frozenset({None, "full_attention", "mla_attention", "sink_full_attention"})
"""Kinds of cache groups in which every block of a prompt counts."""

Place = tuple[str | None, str | None]
"""Medium and ownership."""


class Blocks:
    """See the module.

    Args:
        stores: what all engines find.

    Attributes:
        told: whether it has announced anything.
        whole: whether all that it holds was announced to us: we have heard it from its beginning,
            or from when it held nothing.
    """

    def __init__(self, stores: SharedStores) -> None:
        self.told = False
        self.whole = False
        self._stores = stores
        self._names: OrderedDict[Hash, BlockName] = OrderedDict()
        self._held: dict[BlockName, set[Place]] = {}
        self._orphans: OrderedDict[Hash, list[BlockStored]] = OrderedDict()
        self._orphan_tokens = 0
        self._group: int | None = None
        self._block_tokens = 0
        self._adapters: set[str] = set()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def complete(self) -> bool:
        """Whether it holds nothing but what is found here. Blocks whose parent was not announced
        cannot be found."""
        return self.whole and not self._orphans

    def hit(self, tokens: Sequence[int], model: str) -> int:
        """Tokens at the beginning of a prompt that it holds, or finds in a store.

        Args:
            tokens: the prompt's.
            model: the name that the request gives, which may be an adapter's.
        """
        if not self._block_tokens:
            return 0
        adapter = model if model in self._adapters else ""
        found = takewhile(self._has, names(adapter, tokens, self._block_tokens))
        return sum(self._block_tokens for _ in found)

    def take(self, event: Event) -> None:
        """It has announced something."""
        self.told = True
        match event:
            case BlockStored():
                if self._counts(event):
                    self._stored(event)
            case BlockRemoved():
                if event.group_idx in {None, self._group}:
                    self._removed(event)
            case AllBlocksCleared():
                self._held.clear()
                self._forget_orphans()
                self._stores.forget(self)
                self.whole = True

    def begins(self) -> None:
        """What it announces from now on is all that it holds."""
        self.whole = True

    def forget(self) -> None:
        """Something it said was missed, or it is another one: nothing is known any more."""
        self._names.clear()
        self._held.clear()
        self._forget_orphans()
        self._stores.forget(self)
        self.whole = False
        self._group = None
        self._block_tokens = 0

    def _has(self, name: BlockName) -> bool:
        return name in self._held or self._stores.has(name, self)

    def _counts(self, event: BlockStored) -> bool:
        """Whether it is of the one group that is followed."""
        if event.kv_cache_spec_kind not in _FULL or event.block_size < 1:
            return False
        if not self._block_tokens:
            self._group, self._block_tokens = event.group_idx, event.block_size
        return (event.group_idx, event.block_size) == (self._group, self._block_tokens)

    def _stored(self, event: BlockStored) -> None:
        waiting = [event]
        while waiting:
            event = waiting.pop()
            parent = event.parent_block_hash
            if parent is not None and parent not in self._names:
                self._wait(parent, event)
                continue
            self._name(event, parent)
            for each in event.block_hashes:
                waiting += self._adopted(each)

    def _wait(self, parent: Hash, event: BlockStored) -> None:
        self._orphans.setdefault(parent, []).append(event)
        self._orphan_tokens += _size(event)
        while self._orphan_tokens > MAX_ORPHAN_TOKENS:
            self._adopted(next(iter(self._orphans)))
            self.whole = False

    def _adopted(self, parent: Hash) -> list[BlockStored]:
        """Those that wait for a parent, and from now on do not."""
        events = self._orphans.pop(parent, [])
        self._orphan_tokens -= sum(map(_size, events))
        return events

    def _forget_orphans(self) -> None:
        self._orphans.clear()
        self._orphan_tokens = 0

    def _name(self, event: BlockStored, parent: Hash | None) -> None:
        adapter = event.lora_name or ""
        if adapter:
            self._adapters.add(adapter)
        name = first_name(adapter) if parent is None else self._names[parent]
        size = event.block_size
        extras = event.extra_keys or [None] * len(event.block_hashes)
        for index, (each, keys) in enumerate(zip(event.block_hashes, extras, strict=False)):
            extra = [key for key in keys or () if key != adapter]
            try:
                name = next_name(name, event.token_ids[index * size : (index + 1) * size], extra)
            except struct.error:
                return  # no token ids
            self._names[each] = name
            self._names.move_to_end(each)
            if len(self._names) > MAX_NAMES:
                _, gone = self._names.popitem(last=False)
                if self._held.pop(gone, None) is not None:
                    self.whole = False
                self._stores.forget_block(gone, self)
            if event.locality == REMOTE:
                self._stores.stored(event.ownership or "", name, self)
            else:
                self._held.setdefault(name, set()).add((event.medium, event.ownership))

    def _removed(self, event: BlockRemoved) -> None:
        for each in event.block_hashes:
            if (name := self._names.get(each)) is None:
                continue
            if event.locality == REMOTE:
                self._stores.removed(event.ownership or "", name)
            elif (places := self._held.get(name)) is not None:
                places.discard((event.medium, event.ownership))
                if not places:
                    del self._held[name]


def _size(event: BlockStored) -> int:
    return len(event.token_ids) + len(event.block_hashes) + 1
