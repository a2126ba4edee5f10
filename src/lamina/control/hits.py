"""What of a request is kept outside of the engine: hits, and which chunks make them up."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

from lamina.control.breakers import Breakers
from lamina.control.catalog import Catalog, Location
from lamina.control.policy import HitPart
from lamina.control.requests import ChunkShape, FoundChunk, FoundPrefix, RequestRecord
from lamina.geometry import GroupKind
from lamina.plan import ChunkKey, TierName


class HitFinder:
    """Finds hits. A part of the planner.

    Args:
        shape: tokens of blocks and chunks, and what each group needs of a prefix.
        catalog: where chunks are.
        breakers: which tiers are in use.
        chunk_bytes: bytes of one chunk, all ranks.
    """

    def __init__(
        self, shape: ChunkShape, catalog: Catalog, breakers: Breakers, chunk_bytes: int
    ) -> None:
        self._shape = shape
        self._catalog = catalog
        self._breakers = breakers
        self._chunk_bytes = chunk_bytes

    def find(self, record: RequestRecord, floor: int) -> FoundPrefix:
        """The longest prefix of which every group has what it needs; remembered in the record. The
        part of it that all of a prefix is needed of is extended, not sought again.

        Args:
            record: the request.
            floor: tokens at its beginning that the engine has.
        """
        found, shape, chunk = record.hit, self._shape, self._shape.chunk_tokens
        losses = self._catalog.losses + self._breakers.refusals
        arrivals = self._catalog.arrivals, self._catalog.readable()
        if found.floor != floor or found.losses != losses:
            found = FoundPrefix(floor, losses, (-1, ()), floor // chunk)
        groups = record.known_keys()
        full = [groups[group] for group in shape.full]
        end_chunk = self._catalog.prefix_end(full, found.end_chunk, len(groups[0]))
        same = found.arrivals == arrivals or not (shape.sparse or found.below_host)
        if end_chunk == found.end_chunk and same:
            record.hit = found
            return found
        # Cut before looking: a state that is too far ahead cannot be cut afterwards.
        resume = shape.resume_tokens
        usable = max(0, record.view.num_tokens - record.view.recompute_tokens) // resume * resume
        end = self._last_boundary(groups, floor, min(end_chunk * chunk, usable))
        tokens = max(0, end - floor)
        if tokens == found.tokens and found.arrivals[0] >= 0 and not found.below_host:
            record.hit = replace(found, arrivals=arrivals, end_chunk=end_chunk)
        else:
            parts = self._parts_of(groups, floor, end) if tokens else ()
            record.hit = FoundPrefix(floor, losses, arrivals, end_chunk, tokens, parts)
        return record.hit

    def _parts_of(
        self, groups: Sequence[Sequence[ChunkKey]], floor: int, end: int
    ) -> tuple[HitPart, ...]:
        """A hit by tiers: as the first group has them that has all of its tokens, with the bytes
        of every group."""
        chunk, counts = self._shape.chunk_tokens, dict.fromkeys(TierName, 0)
        runs: list[tuple[TierName, int]] = []
        for group, keys in enumerate(groups):
            found = self._catalog.runs(keys, self._first_chunk(group, floor, end), -(-end // chunk))
            for tier, count in found:
                counts[tier] += count
            if self._shape.full and group == self._shape.full[0]:
                runs = found
        sizes = {tier: count * self._chunk_bytes for tier, count in counts.items()}
        if not runs:
            tier = TierName.DISK if sizes[TierName.DISK] else TierName.HOST
            return (HitPart(tier, end - floor, sum(sizes.values())),)
        parts, index = [], floor // chunk
        spread = {tier: sum(count for t, count in runs if t is tier) for tier in TierName}
        for tier, count in runs:
            first, last = max(floor, index * chunk), min(end, (index + count) * chunk)
            parts.append(HitPart(tier, last - first, sizes[tier] * count // spread[tier]))
            index += count
        stray = {tier for tier, count in counts.items() if count and not spread[tier]}
        return (*parts, *(HitPart(tier, 0, sizes[tier]) for tier in sorted(stray)))

    def _last_boundary(self, groups: Sequence[Sequence[ChunkKey]], floor: int, end: int) -> int:
        """The last boundary up to ``end`` at which every window and state is there that a request
        with the first ``floor`` tokens lacks; ``floor`` or less if there is none."""
        search = self._search_boundary(groups, floor, end)
        while True:
            try:
                next(search)
            except StopIteration as found:
                boundary: int = found.value
                return boundary

    def _search_boundary(
        self, groups: Sequence[Sequence[ChunkKey]], floor: int, end: int
    ) -> Generator[None, None, int]:
        """:meth:`_last_boundary`, chunk by chunk."""
        chunk, held = self._shape.chunk_tokens, self._catalog.finder()
        while end > floor:
            gap = -1
            for group in self._shape.sparse:
                first = self._first_chunk(group, floor, end)
                for index in range((end - 1) // chunk, first - 1, -1):
                    yield
                    if held(groups[group][index]) is None:
                        gap = max(gap, index)
                        break
            if gap < 0:
                return end
            end = gap * chunk  # no later one does without that chunk
        return end

    def _first_chunk(self, group: int, floor: int, end: int) -> int:
        """The first chunk that a group needs of a prefix of ``end`` tokens."""
        shape, chunk = self._shape.groups[group], self._shape.chunk_tokens
        if shape.kind is GroupKind.STATE:
            return (end - 1) // chunk
        return max(floor, shape.first_token(end)) // chunk

    def chunks(
        self, groups: Sequence[Sequence[ChunkKey]], floor: int, end: int
    ) -> tuple[FoundChunk, ...]:
        """What a request must load to go on behind its first ``end`` tokens when it has the first
        ``floor``."""
        chunk, find = self._shape.chunk_tokens, self._catalog.finder()
        found = []
        for group, keys in enumerate(groups):
            block = self._shape.groups[group].block_tokens
            start = max(floor, self._shape.groups[group].first_token(end) // block * block)
            for index in range(self._first_chunk(group, floor, end), -(-end // chunk)):
                place = find(keys[index])
                assert place is not None, "a boundary was found at which it is not there"
                first, last = max(start, index * chunk), min(end, (index + 1) * chunk)
                found.append(FoundChunk(place, group, first, last))
        return tuple(found)

    def is_out_of_use(self, record: RequestRecord, found: FoundPrefix) -> bool:
        """Whether more is kept of a request, but only in tiers that are out of use."""
        return any(
            self._catalog.out_of_use(keys[found.end_chunk])
            for keys in record.known_keys()
            if found.end_chunk < len(keys)
        )

    def search(self, record: RequestRecord) -> Iterator[Location | None]:
        """Look for what a request would load that has no tokens in the engine, chunk by chunk, so
        that whoever asks can stop at any of them and go on in a later step.

        What host memory has of it is used, last chunk first, so that it is not given up before the
        request runs, if that can be helped.

        Returns:
            For every look at a chunk, where it is if the host has yet to get it; else None.
        """
        shape, chunk, host = self._shape, self._shape.chunk_tokens, self._catalog.host
        groups = record.known_keys()
        usable = record.view.num_tokens - record.view.recompute_tokens
        usable = max(0, usable) // shape.resume_tokens * shape.resume_tokens
        end = yield from self._search_prefix(groups, min(len(groups[0]), -(-usable // chunk)))
        firsts = [0] * len(groups)
        if shape.sparse:
            tokens = min(end * chunk, usable)
            tokens = yield from self._search_boundary(groups, 0, tokens)
            if tokens <= 0:
                return
            end = -(-tokens // chunk)
            firsts = [self._first_chunk(group, 0, tokens) for group in range(len(groups))]
            for keys, first in zip(groups, firsts, strict=True):
                for key in keys[first:end]:
                    yield None if host.holds(key) else self._catalog.locate(key)
        for index in range(end - 1, min(firsts) - 1, -1):
            for keys, first in zip(groups, firsts, strict=True):
                if index >= first:
                    host.touch(keys[index])
                    yield None

    def _search_prefix(
        self, groups: Sequence[Sequence[ChunkKey]], end: int
    ) -> Generator[Location | None, None, int]:
        """The first chunk that is missing of a group that needs all of a prefix, ``end`` at most.
        Where there are other groups, it is yet to be found out what is needed."""
        shape, holds = self._shape, self._catalog.host.holds
        for index in range(end if shape.full else 0):
            for group in shape.full:
                key = groups[group][index]
                if holds(key):
                    yield None
                elif (place := self._catalog.locate(key)) is not None:
                    yield None if shape.sparse else place
                else:
                    return index
        return end

    def reuse(self, record: RequestRecord, end: int) -> None:
        """Note that the first ``end`` tokens of a request were found, wherever.

        If another request has gone on behind them, in its own way, they are shared, as a document
        is that is asked about, and what it takes to find as much again is worth keeping. If nobody
        has, this is probably the next turn of a conversation.
        """
        chunk, groups = self._shape.chunk_tokens, record.known_keys()
        last = min(-(-end // chunk), len(groups[0])) - 1
        tiers = self._catalog.tiers.values()
        if last < 0 or not any(tier.is_passed(keys[last]) for tier in tiers for keys in groups):
            return
        firsts = [self._first_chunk(group, 0, end) for group in range(len(groups))]
        self._catalog.note_reuse(groups, firsts, last + 1)
