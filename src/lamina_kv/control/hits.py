"""What of a request is kept outside of the engine: hits, and which chunks make them up."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, takewhile

from lamina_kv.control.breakers import Breakers
from lamina_kv.control.catalog import Catalog
from lamina_kv.control.offers import HitPart
from lamina_kv.control.requests import Hit, RequestRecord
from lamina_kv.control.shape import ChunkShape
from lamina_kv.geometry import GroupKind
from lamina_kv.plan import NEAR, ChunkKey, TierName
from lamina_kv.tiers.contract import End
from lamina_kv.tiers.reuse import Use

LOOKS_AT_ONCE = 32
"""Chunks that a search looks at, at most, before it says how many; of more groups than that, one
of each."""


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

    def find(self, record: RequestRecord, floor: int, *, far: bool) -> Hit:
        """The longest prefix of which every group has what it needs; remembered in the record. The
        part of it that all of a prefix is needed of is extended, not sought again.

        Args:
            record: the request.
            floor: tokens at its beginning that the engine has.
            far: whether chunks count that only far tiers have.
        """
        found, shape, chunk = record.hit, self._shape, self._shape.chunk_tokens
        far = far and bool(self._catalog.far)
        version = self._catalog.version + self._breakers.refusals
        tiers = (NEAR, *(tier.name for tier in self._catalog.readable_far())) if far else (NEAR,)
        arrivals = self._catalog.arrivals, tiers
        fewer = len(tiers) < len(found.arrivals[1])
        if found.floor != floor or found.version != version or fewer:
            found = Hit(floor, version, (-1, ()), floor // chunk)
        groups = record.known_keys()
        full = [groups[group] for group in shape.full]
        start, last = found.end_chunk, len(groups[0])
        end_chunk, unknown, near = start, False, True
        if start < last:
            end_chunk, unknown, near = self._prefix_end(full, start, last, far=far)
        same = found.arrivals == arrivals or not (shape.sparse or found.has_far)
        if end_chunk == found.end_chunk and same:
            unknown |= bool(shape.sparse) and found.unknown
            record.hit = replace(found, unknown=unknown) if unknown != found.unknown else found
            return record.hit
        # Cut before looking: a state that is too far ahead cannot be cut afterwards.
        limit = min(end_chunk * chunk, self._usable(record))
        end, unknown_end = self._last_boundary(groups, floor, limit, far=far)
        unknown |= unknown_end
        tokens = max(0, end - floor)
        if tokens == found.tokens and found.arrivals[0] >= 0 and not found.has_far:
            found = replace(found, arrivals=arrivals, end_chunk=end_chunk, unknown=unknown)
        else:
            parts: tuple[HitPart, ...] = ()
            if tokens and near and start == floor // chunk and not shape.sparse:
                count = (-(-end // chunk) - floor // chunk) * len(full)
                parts = (HitPart(NEAR, tokens, count * self._chunk_bytes),)
            elif tokens:
                parts = self.parts(record, floor, end, {})
            found = Hit(floor, version, arrivals, end_chunk, unknown, tokens, parts)
        record.hit = found
        return found

    def _usable(self, record: RequestRecord) -> int:
        """Tokens of a request that a hit may have at most."""
        known, resume = record.view.num_tokens, self._shape.resume_tokens
        return max(0, known - record.view.recompute_tokens) // resume * resume

    def _prefix_end(
        self, groups: Sequence[Sequence[ChunkKey]], start: int, end: int, *, far: bool
    ) -> tuple[int, bool, bool]:
        """The first of the chunks ``start..end`` that is missing of one of ``groups``, whether it
        is missing only as far as is known, and whether all before it are near."""
        near, unknown, all_near = self._catalog.near.visible, False, True
        for keys in groups:
            first = start + self._catalog.near.leading((keys,), start, end)
            for index in range(first, end):
                key = keys[index]
                if key in near:
                    continue
                if far and self._catalog.locate(key) is not None:
                    all_near = False
                    continue
                end, unknown = index, far and self._catalog.unknown(key)
                break
        return end, unknown, all_near

    def _has(self, key: ChunkKey, *, far: bool) -> bool:
        return key in self._catalog.near.visible or (far and self._catalog.locate(key) is not None)

    def parts(
        self, record: RequestRecord, floor: int, end: int, came: Mapping[ChunkKey, TierName]
    ) -> tuple[HitPart, ...]:
        """A hit by tiers: as the first group has them that has all of its tokens, with the bytes
        of every group.

        Args:
            record: the request.
            floor: tokens at its beginning that the engine has.
            end: tokens that it has with the hit.
            came: chunks that count as those of a tier from which they have come near.
        """
        groups = record.known_keys()
        chunk = self._shape.chunk_tokens
        counts: dict[TierName, int] = {}
        runs: list[tuple[TierName, int]] = []
        for group, keys in enumerate(groups):
            first = self.first_chunk(group, floor, end)
            found = self._runs(keys[first : -(-end // chunk)], came)
            for tier, count in found:
                counts[tier] = counts.get(tier, 0) + count
            if self._shape.full and group == self._shape.full[0]:
                runs = found
        sizes = {tier: count * self._chunk_bytes for tier, count in counts.items()}
        if not self._shape.full:
            tier = next((tier for tier in sizes if tier != NEAR), NEAR)
            return (HitPart(tier, end - floor, sum(sizes.values())),) if sizes else ()
        parts, index = [], floor // chunk
        spread: dict[TierName, int] = {}
        for tier, count in runs:
            spread[tier] = spread.get(tier, 0) + count
        for tier, count in runs:
            first, last = max(floor, index * chunk), min(end, (index + count) * chunk)
            parts.append(HitPart(tier, last - first, sizes[tier] * count // spread[tier]))
            index += count
        stray = sorted(tier for tier in counts if tier not in spread)
        return (*parts, *(HitPart(tier, 0, sizes[tier]) for tier in stray))

    def _runs(
        self, keys: Sequence[ChunkKey], came: Mapping[ChunkKey, TierName]
    ) -> list[tuple[TierName, int]]:
        """Chunks by the tier that each is best had from, up to the first that no tier has:
        neighbours together, with how many they are."""
        near = self._catalog.near.visible
        if not came and all(map(near.__contains__, keys)):
            return [(NEAR, len(keys))] if keys else []
        names = [came.get(key) or self._catalog.locate(key) for key in keys]
        runs = takewhile(lambda run: run[0] is not None, groupby(names))
        return [(name, len(list(run))) for name, run in runs if name is not None]

    def _last_boundary(
        self, groups: Sequence[Sequence[ChunkKey]], floor: int, end: int, *, far: bool
    ) -> tuple[int, bool]:
        """The last boundary up to ``end`` at which every window and state is there that a request
        with the first ``floor`` tokens lacks, ``floor`` or less if there is none; and whether there
        is no later one only as far as is known."""
        search = self._search_boundary(groups, floor, end, far=far)
        while True:
            try:
                next(search)
            except StopIteration as over:
                found: tuple[int, bool] = over.value
                return found

    def _search_boundary(
        self, groups: Sequence[Sequence[ChunkKey]], floor: int, end: int, *, far: bool
    ) -> Generator[int, None, tuple[int, bool]]:
        """:meth:`_last_boundary`, look by look."""
        chunk, unknown = self._shape.chunk_tokens, False
        while end > floor:
            gap = -1
            for group in self._shape.sparse:
                first = self.first_chunk(group, floor, end)
                for index in range((end - 1) // chunk, first - 1, -1):
                    yield 1
                    if not self._has(key := groups[group][index], far=far):
                        gap = max(gap, index)
                        unknown |= far and self._catalog.unknown(key)
                        break
            if gap < 0:
                return end, unknown
            end = gap * chunk  # no later one does without that chunk
        return end, unknown

    def first_chunk(self, group: int, floor: int, end: int) -> int:
        """The first chunk that a group needs of a prefix of ``end`` tokens, for a request that has
        the first ``floor``."""
        shape, chunk = self._shape.groups[group], self._shape.chunk_tokens
        if shape.kind is GroupKind.STATE:
            return (end - 1) // chunk
        return max(floor, shape.first_token(end)) // chunk

    def needs(self, record: RequestRecord, floor: int, end: int) -> list[ChunkKey]:
        """What must be near for a request to go on behind its first ``end`` tokens when it has the
        first ``floor``, in prefix order."""
        groups, last = record.known_keys(), -(-end // self._shape.chunk_tokens)
        firsts = [self.first_chunk(group, floor, end) for group in range(len(groups))]
        return [
            keys[index]
            for index in range(min(firsts), last)
            for keys, first in zip(groups, firsts, strict=True)
            if index >= first
        ]

    def is_near(self, record: RequestRecord, floor: int, end: int) -> bool:
        """Whether everything is near that a request lacks to go on behind its first ``end`` tokens
        when it has the first ``floor`` of a hit that was just found."""
        near, last = self._catalog.near.visible, -(-end // self._shape.chunk_tokens)
        return end <= floor or all(
            all(map(near.__contains__, keys[self.first_chunk(group, floor, end) : last]))
            for group, keys in enumerate(record.known_keys())
        )

    def fitting(self, record: RequestRecord, floor: int, end: int, most: int) -> int:
        """The last boundary up to ``end`` for which a request that has the first ``floor`` tokens
        needs ``most`` chunks or less; ``floor`` if there is none."""
        groups, chunk = record.known_keys(), self._shape.chunk_tokens
        while end > floor and (excess := len(self.needs(record, floor, end)) - most) > 0:
            # One chunk less is one less of each group, or none of one of which the end is needed.
            end = (-(-end // chunk) - -(-excess // len(groups))) * chunk
            end, _ = self._last_boundary(groups, floor, end, far=True)
        return max(floor, end)

    def is_out_of_use(self, record: RequestRecord, found: Hit) -> bool:
        """Whether more is kept of a request, but only in tiers that are out of use."""
        return any(
            self._catalog.out_of_use(keys[found.end_chunk])
            for keys in record.known_keys()
            if found.end_chunk < len(keys)
        )

    def lacked(self, record: RequestRecord, end: int) -> list[ChunkKey]:
        """The chunk, of every group that does not have it, that would make a hit of ``end`` tokens
        longer; none if it is as long as it may be, or if what follows is no whole chunk."""
        index = end // self._shape.chunk_tokens
        if end >= self._usable(record):
            return []
        keys = (keys[index] for keys in record.known_keys() if index < len(keys))
        return [key for key in keys if not self._catalog.keeps(key)]

    def search(self, record: RequestRecord) -> Iterator[ChunkKey | int]:
        """Look for what a request would load that has no tokens in the engine, chunk by chunk, so
        that whoever asks can stop at any of them and go on in a later step.

        What is kept of it is expected to be used from then on, and so is not given up before the
        request runs, if that can be helped.

        Returns:
            The key of a chunk that only a far tier has; or how many looks found no such chunk,
            :data:`LOOKS_AT_ONCE` at most.
        """
        shape, chunk, near = self._shape, self._shape.chunk_tokens, self._catalog.near
        groups = record.known_keys()
        usable = self._usable(record)
        end = yield from self._search_prefix(groups, min(len(groups[0]), -(-usable // chunk)))
        firsts = [0] * len(groups)
        if shape.sparse:
            tokens = min(end * chunk, usable)
            tokens, _ = yield from self._search_boundary(groups, 0, tokens, far=True)
            if tokens <= 0:
                return
            end = -(-tokens // chunk)
            firsts = [self.first_chunk(group, 0, tokens) for group in range(len(groups))]
            for keys, first in zip(groups, firsts, strict=True):
                for key in keys[first:end]:
                    yield 1 if near.holds(key) else key
        if not end or not record.view.regard.keep:
            return
        chain, ends = self._prefix(record, end)
        # It is a use when the request begins: only then is it known what the engine has itself.
        for _ in self._catalog.expect(chain, ends):
            yield 1

    def _search_prefix(
        self, groups: Sequence[Sequence[ChunkKey]], end: int
    ) -> Generator[ChunkKey | int, None, int]:
        """The first chunk that is missing of a group that needs all of a prefix, ``end`` at most.
        Where there are other groups, it is yet to be found out what is needed."""
        shape, near = self._shape, self._catalog.near
        full = [groups[group] for group in shape.full]
        index, at_once = 0 if full else end, max(1, LOOKS_AT_ONCE // shape.deep)
        while index < end:
            most = min(end, index + at_once)
            # What is near costs next to nothing, and is often all that there is.
            if run := near.leading(full, index, most):
                yield run * len(full)
                index += run
            if index == most:
                continue
            for keys in full:
                key = keys[index]
                if near.holds(key):
                    yield 1
                elif self._catalog.locate(key) is not None:
                    yield 1 if shape.sparse else key
                else:
                    return index
            index += 1
        return index

    def used(self, record: RequestRecord, floor: int, end: int) -> None:
        """Note that the first ``end`` tokens of a request were found, the first ``floor`` of them
        in the engine. A request uses its prefix once: what it finds when it comes back, it had
        computed itself. One that is not worth keeping uses nothing."""
        if record.use is None and record.view.regard.keep:
            chain, ends = self._prefix(record, -(-end // self._shape.chunk_tokens))
            record.use = self._use(record, floor, end)
            self._catalog.note_use(chain, record.use, ends)

    def over(self, record: RequestRecord) -> None:
        """A request has ended: all that is kept of it is as young as what others use now."""
        if record.use is not None:
            chain, ends = self._prefix(record, len(record.chain.groups[0]), all_ends=True)
            self._catalog.note_use(chain, record.use, ends, over=True)

    def _use(self, record: RequestRecord, floor: int, end: int) -> Use:
        """The use that a request makes of its prefix, of which the first ``end`` tokens were found,
        and the first ``floor`` in the engine."""
        chunk, deep = self._shape.chunk_tokens, self._shape.deep
        total = record.view.num_prompt_tokens // chunk
        found = min(-(-end // chunk), total)
        # Of the last chunk the engine may have had a part. If it had all that was found, nothing
        # was needed of it.
        had = found if floor >= end else min(floor // chunk, found)
        return Use(found * deep, total * deep, record.view.regard, had * deep)

    def _prefix(
        self, record: RequestRecord, end: int, *, all_ends: bool = False
    ) -> tuple[Sequence[ChunkKey], list[End]]:
        """Of the first ``end`` chunks of a request what it takes to go on behind them: the chain,
        and the last ones of windows and states; with ``all_ends`` all of those, with which one may
        go on before the end, too."""
        shape, groups = self._shape, record.chain.groups
        end = min(end, len(groups[0]))
        if not end:
            return (), []
        ends = [
            (groups[group][index], shape.behind(groups, group, index))
            for group in shape.sparse
            for index in range(
                0 if all_ends else self.first_chunk(group, 0, end * shape.chunk_tokens), end
            )
        ]
        return shape.chain(groups, end), ends
