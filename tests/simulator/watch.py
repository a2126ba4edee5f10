"""What must hold whatever happens, watched from outside of Lamina."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from lamina.control.breakers import BreakerState, CircuitBreaker
from lamina.control.catalog import TierCatalog
from lamina.control.loading import Hit
from lamina.control.planner import Planner
from lamina.control.requests import RequestRecord
from lamina.observe.metrics import Meter
from lamina.plan import ChunkKey, Outcome, Receipt, SaveOrder, StepPlan, TierName, TransferId
from simulator.content import Ledger, Stamps, Violation
from simulator.options import BLOCK_TOKENS, Options
from simulator.pool import LeasedPool
from simulator.rank import Rank
from simulator.request import Blocks, Request, Run

_CHUNKS = 50_000


_MOMENT = 0.05
"""Seconds between a lookup and the look at it, on a busy machine."""


def _was_just_closed(breaker: CircuitBreaker) -> bool:
    return not breaker.closed and breaker._clock() - breaker._until < _MOMENT


class Watch:
    """See the module.

    Args:
        options: the engine.
        ledger: names stamps.

    Attributes:
        disk_is_damaged: whether a disk may fail to deliver what it shows.
    """

    def __init__(self, options: Options, ledger: Ledger) -> None:
        self._options = options
        self._ledger = ledger
        self._chunks: dict[ChunkKey, Stamps] = {}
        self._computed: set[ChunkKey] = set()
        self._fleeting: set[ChunkKey] = set()
        self._orders: dict[TransferId, SaveOrder] = {}
        self._reading: dict[TransferId, set[int]] = {}
        self._loads: dict[TransferId, str] = {}
        self._unlucky: set[str] = set()
        self._readers: dict[int, set[TransferId]] = {}
        self._lives: dict[str, tuple[Blocks, set[int]]] = {}
        self._floors: dict[str, int] = {}
        self._uncounted: set[str] = set()
        self.disk_is_damaged = False

    def attach(
        self, planner: Planner, ranks: Sequence[Rank], leased: LeasedPool, meter: Meter
    ) -> None:
        """Look over these shoulders."""
        self._planner, self._ranks, self._leased, self._meter = planner, ranks, leased, meter
        count = planner._prompts.count
        planner._prompts.count = partial(self._prompt, count)  # type: ignore[method-assign]
        planner.lookup = partial(self._lookup, planner.lookup)  # type: ignore[method-assign]
        for tier in planner._catalog.tiers.values():
            tier.publish = partial(self._publish, tier, tier.publish)  # type: ignore[method-assign]

    def learn(self, request: Request) -> None:
        """The request's tokens are what they are: so are its chunks."""
        size = self._options.chunk_tokens
        if len(self._chunks) > _CHUNKS:
            kept = (k for tier in self._planner._catalog.tiers.values() for k in tier._visible)
            self._chunks = {key: self._chunks[key] for key in kept}
            self._computed.clear()
        if not request.chain.epoch.lasting:
            self._fleeting.update(request.chain.keys)
        for index, key in enumerate(request.chain.keys):
            if key not in self._chunks:
                self._chunks[key] = request.hashes[index * size : (index + 1) * size].copy()
        # The last token of a request is known, but nobody computes it.
        self._computed.update(request.chain.keys[: (request.num_tokens - 1) // size])

    # -- engine blocks ---------------------------------------------------------------------------

    def planned(self, plan: StepPlan) -> None:
        """A plan was made: its saves read their blocks from now on."""
        self._loads.update((order.transfer, order.request_id) for order in plan.loads)
        if any(order.key in self._fleeting for order in plan.writes):
            raise Violation("a chunk of weights without a name is written to disk")
        for order in plan.saves:
            self._orders[order.transfer] = order
            self._reading[order.transfer] = set(range(self._options.ranks))
            for block in order.blocks:
                self._readers.setdefault(block, set()).add(order.transfer)
        for rank in range(self._options.ranks):
            count = sum(rank in ranks for ranks in self._reading.values())
            if count > self._options.saves_in_flight:
                raise Violation(
                    f"{count} saves are in flight on rank {rank}, the bound is "
                    f"{self._options.saves_in_flight}"
                )

    def reported(self, receipt: Receipt) -> None:
        """A rank has made these receipts, whenever they will arrive."""
        for item in receipt.transfers:
            if item.outcome is Outcome.FAILED and item.transfer in self._loads:
                self._unlucky.add(self._loads[item.transfer])
            ranks = self._reading.get(item.transfer)
            if ranks is None:
                continue
            ranks.discard(receipt.rank)
            if not ranks:
                del self._reading[item.transfer]
                for block in self._orders.pop(item.transfer).blocks:
                    self._readers[block].discard(item.transfer)

    def reused(self, block: int) -> None:
        """The engine gives a block to somebody new."""
        for transfer in self._readers.get(block, ()):
            live = self._planner._transfers.get(transfer)
            if live is None or not live.poisoned:
                raise Violation(f"block {block} is reused while save {transfer} still reads it")

    # -- prompts ---------------------------------------------------------------------------------

    def submitted(self, request: Request) -> None:
        """A request has arrived."""
        self._uncounted.add(request.request_id)

    def ran(self, run: Run, count: int) -> None:
        """The model computes tokens of a request behind what is there."""
        blocks, computed = self._lives.get(run.request.request_id, (None, set[int]()))
        if blocks is not run.blocks:
            computed = set()
        computed.update(
            range(run.position, min(run.position + count, run.request.num_prompt_tokens))
        )
        self._lives[run.request.request_id] = run.blocks, computed

    def _lookup(self, lookup: Callable[..., Hit], request: Request, floor: int, **more: str) -> Hit:
        hit = lookup(request, floor, **more)
        self._floors[request.request_id] = floor
        return hit

    def _prompt(
        self, count: Callable[[RequestRecord, int], None], record: RequestRecord, end: int
    ) -> None:
        """A prompt is counted: once, all of it, and each token for what it was."""
        request_id, prompt = record.view.request_id, record.view.num_prompt_tokens
        if request_id not in self._uncounted:
            raise Violation(f"the prompt of {request_id} is counted twice, or comes from nowhere")
        self._uncounted.remove(request_id)
        before = self._sources()
        count(record, end)
        sources = {name: n for name, n in (self._sources() - before).items() if n}
        complete = record.view.num_tokens > prompt
        _, computed = self._lives.pop(request_id, (None, set[int]()))
        floor = self._floors.get(request_id, 0)
        wrong = sum(sources.values()) != prompt
        if complete:  # else nobody knows what steps in flight will still compute
            wrong |= sources.get("unfinished", 0) > 0 or sources["computed"] != len(computed)
            if not self._options.hand_off:  # there a part is computed up to a boundary
                wrong |= sources.get("engine", 0) != min(floor, *computed)
        if wrong:
            raise Violation(
                f"the {prompt} tokens of the prompt of {request_id} are counted as {sources}; the "
                f"model has computed {len(computed)}, and the engine had {floor} itself"
            )

    def _sources(self) -> Counter[str]:
        counters = self._meter._counters
        figures = {labels[0]: n for (name, labels), n in counters.items() if name == "hit_tokens"}
        for name in ("computed", "unfinished"):
            figures[name] = counters.get((f"{name}_tokens", ()), 0)
        return Counter({name: int(n) for name, n in figures.items()})

    # -- hits ------------------------------------------------------------------------------------

    def check_hit(self, request: Request, floor: int, tokens: int) -> None:
        """A lookup was answered: it must be the longest hit, in tiers that are in use, that leaves
        enough to compute. A request that has had a failed load may be left to itself.

        Args:
            request: who asked.
            floor: tokens of the engine's own hit.
            tokens: tokens that Lamina would add.
        """
        expected = self._longest_hit(request, floor)
        declined = tokens == 0 and request.request_id in self._unlucky
        if self._options.when == "auto":  # as much of it as pays, to a boundary of a chunk
            size = self._options.chunk_tokens
            cut = tokens == 0 or (tokens <= max(expected) and (floor + tokens) % size == 0)
            declined |= cut
        if tokens not in expected and not declined:
            raise Violation(
                f"a hit of {tokens} tokens for {request.request_id} after {floor} of "
                f"{request.num_tokens}, of which {request.recompute_tokens} must be computed; "
                f"it should be {' or '.join(map(str, sorted(expected)))}"
            )

    def _longest_hit(self, request: Request, floor: int) -> set[int]:
        """One length, or two where a breaker's pause has just ended: on a real clock that may have
        been between the lookup and now."""
        planner, size, keys = self._planner, self._options.chunk_tokens, request.chain.keys
        usable = (request.num_tokens - request.recompute_tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        lengths = set()
        for sure in (False, True):
            tiers = [
                tier
                for name, tier in planner._catalog.tiers.items()
                if planner._breakers.readable(name)
                and not (sure and _was_just_closed(planner._breakers.loads(name)))
            ]
            held = [any(key in tier._visible for tier in tiers) for key in keys]
            if self._options.ring_blocks:
                longest = self._longest_window(held, usable)
            else:
                end = floor // size
                while end < len(keys) and held[end]:
                    end += 1
                longest = min(end * size, usable) - floor
            lengths.add(longest if longest >= max(1, self._options.min_tokens) else 0)
        return lengths

    def _longest_window(self, held: Sequence[bool], usable: int) -> int:
        """The last boundary before which there is all that a window looks at."""
        size, window = self._options.chunk_tokens, self._options.window
        for end in range(min(usable // size, len(held)), 0, -1):
            if all(held[max(0, end * size - window + 1) // size : end]):
                return end * size
        return 0

    # -- tiers -----------------------------------------------------------------------------------

    def _publish(
        self, tier: TierCatalog, publish: Callable[..., None], key: ChunkKey, **known: bool
    ) -> None:
        publish(key, **known)
        slot = tier.find(key)
        if slot is None:
            raise Violation(f"a chunk was published in {tier.name.value} and is not visible")
        self._check_content(tier.name, slot, key)

    def _check_content(self, tier: TierName, slot: int, key: ChunkKey) -> None:
        expected = self._chunks.get(key)
        if expected is None:
            raise Violation(f"{tier.value} shows a chunk that no request has had")
        for rank in self._ranks:
            found = rank.held(tier, slot, key)
            if found is None:
                if self.disk_is_damaged:
                    continue
                raise Violation(f"{tier.value} shows a chunk that rank {rank.number} cannot read")
            wrong = np.argwhere(found != expected)
            if len(wrong):
                row, token = wrong[0]
                salt = self._ledger.salts[rank.number, row]
                raise Violation(
                    f"{tier.value} shows a chunk whose token {token} in row {row} on rank "
                    f"{rank.number} is: {self._ledger.name(int(found[row, token] ^ salt))}; it "
                    f"should be: {self._ledger.name(int(expected[token] ^ salt))}"
                )

    def missing(self) -> int:
        """Chunks that no tier shows, of requests that all have come to their end."""
        tiers = self._planner._catalog.tiers.values()
        return sum(all(key not in tier._visible for tier in tiers) for key in self._computed)

    def check_tiers(self) -> None:
        """Every slot of every tier is in exactly one condition."""
        for tier in self._planner._catalog.tiers.values():
            conditions = [
                *tier._visible.values(), *tier._filling.values(), *tier._orphans, *tier._free
            ]  # fmt: skip
            if sorted(conditions) != list(range(tier.slots)):
                raise Violation(f"slots of {tier.name.value} are lost or doubled: {conditions}")

    # -- the end -----------------------------------------------------------------------------------

    @property
    def is_quiet(self) -> bool:
        """Whether control knows that everything has ended."""
        idle = all(rank.is_idle for rank in self._ranks)
        return idle and not self._planner.has_work and not len(self._planner._transfers)

    def check_end(self) -> None:
        """Nothing is left when every request is gone and every transfer has ended."""
        planner = self._planner
        self.check_tiers()
        left: dict[str, object] = {
            "transfers": list(planner._transfers.live()),
            "requests": list(planner._requests),
            "leases on blocks": self._leased.leased,
            "count of leased blocks": planner._leases.leased_blocks,
            "leases on slots": {
                tier.name.value: tier._leases
                for tier in planner._catalog.tiers.values()
                if tier.leased
            },
            "slots being filled": [
                key for tier in planner._catalog.tiers.values() for key in tier._filling
            ],
            "saves without a receipt": list(self._reading),
            "tiers that are tried by nothing": [
                breaker._name
                for tier in planner._catalog.tiers
                for breaker in (planner._breakers.loads(tier), planner._breakers.fills(tier))
                if breaker._state is BreakerState.TRYING
            ],
            "work": planner.has_work,
            "prompts that nobody has counted": sorted(self._uncounted),
            "requests that wait for a load": [r.number for r in self._ranks if not r.is_idle],
            "writes to the gaps between blocks": [
                rank.number for rank in self._ranks if not rank.pages.gaps_untouched
            ],
        }
        for what, value in left.items():
            if value:
                raise Violation(f"at the end there are still {what}: {value}")
        for tier in planner._catalog.tiers.values():
            for key, slot in tier._visible.items():
                self._check_content(tier.name, slot, key)
