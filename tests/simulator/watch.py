"""What must hold whatever happens, watched from outside of Lamina."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from lamina_kv.control.answers import MOST_PATIENCE
from lamina_kv.control.breakers import BreakerState
from lamina_kv.control.offers import Offer
from lamina_kv.control.planner import Planner
from lamina_kv.control.probes import MOST_WAITED
from lamina_kv.control.questions import LOOK_PLANS
from lamina_kv.control.requests import RequestRecord
from lamina_kv.observe.metrics import Meter
from lamina_kv.plan import (
    NEAR,
    ChunkKey,
    LoadOrder,
    Outcome,
    Receipt,
    SaveOrder,
    StepPlan,
    TierName,
    TransferId,
)
from lamina_kv.tiers.slots import SlotIndex
from simulator.content import Ledger, Stamps, Violation
from simulator.moves import MoveWatch
from simulator.options import BLOCK_TOKENS, Options
from simulator.origins import Origins
from simulator.pool import LeasedPool
from simulator.rank import Rank
from simulator.request import Blocks, Request, Run
from simulator.stores import Past
from simulator.subscriber import Subscriber

_CHUNKS = 50_000


class Watch:
    """See the module.

    Args:
        options: the engine.
        ledger: names stamps.
        past: what earlier engines have left behind.

    Attributes:
        subscriber: who follows what is told of tiers.
        damaged: tiers that may fail to deliver what they show.
        spoiled: chunks that tiers may fail to deliver.
    """

    def __init__(self, options: Options, ledger: Ledger, past: Past) -> None:
        self._options = options
        self._ledger = ledger
        self._chunks = past.chunks
        self._computed: dict[ChunkKey, set[str]] = {}  # by which requests, in this life
        self._orders: dict[TransferId, SaveOrder] = {}
        self._reading: dict[TransferId, set[int]] = {}
        self._loads: dict[TransferId, str] = {}
        self._unlucky: set[str] = set()
        self._readers: dict[int, set[TransferId]] = {}
        self._lives: dict[str, tuple[Blocks, set[int]]] = {}
        self._floors: dict[str, int] = {}
        self._taken: dict[str, dict[TierName, int]] = {}
        self._asked: dict[str, float] = {}
        self._uncounted: set[str] = set()
        self._requests: dict[str, Request] = {}
        self._users, self._life = past.users, past.lives
        self._admissions: Counter[str] = Counter()
        self._given: set[ChunkKey] = set()  # chunks of requests that share what they compute
        self._moves = MoveWatch(options)
        self.subscriber = Subscriber(options.chunk_tokens)
        self.damaged, self.spoiled = past.damaged, past.spoiled

    def attach(
        self, planner: Planner, ranks: Sequence[Rank], leased: LeasedPool, meter: Meter
    ) -> None:
        """Look over these shoulders."""
        self._planner, self._ranks, self._leased, self._meter = planner, ranks, leased, meter
        catalog = planner._books.catalog
        self._near: SlotIndex = catalog.near
        self._far = {name: far.index for name, far in catalog.far.items()}
        self._origins = Origins(self._near, planner._books.transfers)
        self.subscriber.attach(planner)
        count = planner._prompts.count
        planner._prompts.count = partial(self._prompt, count)  # type: ignore[method-assign]
        planner.lookup = partial(self._lookup, planner.lookup)  # type: ignore[method-assign]
        planner.admitted = partial(self._admitted, planner.admitted)  # type: ignore[method-assign]
        for tier, index in ((NEAR, self._near), *self._far.items()):
            index.filled = partial(self._filled, tier, index.filled)  # type: ignore[method-assign]
        for tier, index in self._far.items():
            self._moves.attach(tier, index)
        self._check_contents()

    def learn(self, request: Request) -> None:
        """The request's tokens are what they are: so are its chunks."""
        size = self._options.chunk_tokens
        self.subscriber.learn(request)
        if len(self._chunks) > _CHUNKS:
            raise Violation("the history is too long to remember all of its chunks")
        if not request.chain.epoch.lasting:
            self._moves.fleeting.update(request.chain.keys)
        for index, key in enumerate(request.chain.keys):
            if key not in self._chunks:
                self._chunks[key] = request.hashes[index * size : (index + 1) * size].copy()
        # The last token of a request is known, but nobody computes it.
        for key in request.chain.keys[: (request.num_tokens - 1) // size]:
            self._computed.setdefault(key, set()).add(request.request_id)
        if request.regard.share:
            self._given.update(request.chain.keys)
        self._has(request)

    # -- transfers -------------------------------------------------------------------------------

    def slots_of(self, order: LoadOrder) -> set[int]:
        """The near slots that a load reads."""
        per_chunk = self._options.chunk_blocks
        return {page // per_chunk for pages in order.pages for page in pages.near.tolist()}

    def planned(self, plan: StepPlan) -> None:
        """A plan was made: what it orders is under way from now on."""
        for orders in plan.tiers:
            for move in orders.outward:
                self._check_kept(orders.tier, move.key)
        self._moves.planned(plan, self.slots_of)
        self._origins.planned(plan)
        self._loads.update((order.transfer, order.request_id) for order in plan.loads)
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
            self._moves.reported(receipt.rank, item)
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
            live = self._planner._books.transfers.get(transfer)
            if live is None or not live.poisoned:
                raise Violation(f"block {block} is reused while save {transfer} still reads it")

    # -- what tiers keep -------------------------------------------------------------------------

    def _admitted(
        self, admitted: Callable[..., None], request_id: str, loaded: int, **how: int
    ) -> None:
        record = self._planner._requests.get(request_id)
        if record is not None and not record.admitted:
            self._admissions[request_id] += 1
            self._has(self._requests[request_id])
        admitted(request_id, loaded, **how)

    def _has(self, request: Request) -> None:
        """A request needs chunks of these keys; once more if it was preempted."""
        number = max(1, self._admissions[request.request_id])
        for key in request.chain.keys:
            self._users[key].add(f"{self._life} {request.request_id} {number}")

    def _check_kept(self, tier: TierName, key: ChunkKey) -> None:
        keep = self._options.tier(tier).keep
        if keep == "nothing":
            raise Violation(f"a chunk is written to {tier}, which keeps nothing")
        if keep == "shared" and len(self._users[key]) < 2 and key not in self._given:
            raise Violation(f"a chunk that nobody shares is written to {tier}")

    def unshared(self) -> int:
        """Chunks that several requests have computed, or found, and that a tier lacks which keeps
        such chunks; if none was aborted or preempted, and nothing has failed."""
        shared = [key for key, requests in self._computed.items() if len(requests) > 1]
        names = [tier.name for tier in self._options.tiers if tier.keep == "shared"]
        return sum(not self._far[TierName(name)].holds(key) for key in shared for name in names)

    # -- prompts ---------------------------------------------------------------------------------

    def submitted(self, request: Request) -> None:
        """A request has arrived."""
        self._uncounted.add(request.request_id)
        self._origins.submitted(request)

    def ran(self, run: Run, count: int) -> None:
        """The model computes tokens of a request behind what is there."""
        blocks, computed = self._lives.get(run.request.request_id, (None, set[int]()))
        if blocks is not run.blocks:
            computed = set()
        computed.update(
            range(run.position, min(run.position + count, run.request.num_prompt_tokens))
        )
        self._lives[run.request.request_id] = run.blocks, computed

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
        taken = self._taken.get(request_id, {})
        wrong |= any(sources.get(tier, 0) > taken.get(tier, 0) for tier in self._far)
        if complete:  # else nobody knows what steps in flight will still compute
            wrong |= sources.get("unfinished", 0) > 0 or sources["computed"] != len(computed)
            if not self._options.hand_off:  # there a part is computed up to a boundary
                wrong |= sources.get("engine", 0) != min(floor, *computed)
        if wrong:
            raise Violation(
                f"the {prompt} tokens of the prompt of {request_id} are counted as {sources}; the "
                f"model has computed {len(computed)}, and the engine had {floor} itself"
            )

    @property
    def tokens_loaded(self) -> int:
        """Tokens of prompts that were neither computed nor found in the engine, as counted."""
        apart = ("computed", "unfinished", "engine")
        return sum(n for source, n in self._sources().items() if source not in apart)

    def _sources(self) -> Counter[str]:
        counters = self._meter._counters
        figures = {labels[0]: n for (name, labels), n in counters.items() if name == "hit_tokens"}
        for name in ("computed", "unfinished"):
            figures[name] = counters.get((f"{name}_tokens", ()), 0)
        return Counter({name: int(n) for name, n in figures.items()})

    # -- hits ------------------------------------------------------------------------------------

    def _lookup(
        self, lookup: Callable[..., Offer], request: Request, floor: int, **more: str
    ) -> Offer:
        self._requests[request.request_id] = request
        offer = lookup(request, floor, **more)
        self._floors[request.request_id] = floor
        self._waits(request.request_id, offer.ask_again)
        self._taken[request.request_id] = offer.taken
        again = request.preemptions > 0 or request.request_id in self._unlucky
        if not (offer.ask_again or self._options.ring_blocks or again):
            self._origins.check(request, offer, self._options.chunk_tokens)
        return offer

    def _waits(self, request_id: str, asks_again: bool) -> None:
        """A request that is told to ask again is told so for a while at most: for another's load,
        for what comes near from far tiers, for their answers and for news of one that failed."""
        clock, deadline = self._planner._books.clock, self._options.deadline
        if not asks_again:
            self._asked.pop(request_id, None)
            return
        waited = clock.now - self._asked.setdefault(request_id, clock.now)
        # Each of the four may be a step late.
        longest = 2 * deadline + MOST_PATIENCE + MOST_WAITED + (LOOK_PLANS + 4) * clock.longest
        if waited > longest:
            raise Violation(
                f"{request_id} is told to ask again for {waited:.3f} s, it may be for "
                f"{longest:.3f} s"
            )

    def check_hit(self, request: Request, floor: int, tokens: int) -> None:
        """A lookup was answered: it must be the longest hit near that leaves enough to compute. A
        request that has had a failed load may be left to itself.

        Args:
            request: who asked.
            floor: tokens of the engine's own hit.
            tokens: tokens that Lamina would add.
        """
        expected = self._longest_hit(request, floor)
        declined = tokens == 0 and request.request_id in self._unlucky
        if self._options.when == "auto":  # as much of it as pays, to a boundary of a chunk
            size = self._options.chunk_tokens
            cut = tokens == 0 or (tokens <= expected and (floor + tokens) % size == 0)
            declined |= cut
        if tokens != expected and not declined:
            raise Violation(
                f"a hit of {tokens} tokens for {request.request_id} after {floor} of "
                f"{request.num_tokens}, of which {request.recompute_tokens} must be computed; "
                f"it should be {expected}"
            )

    def _longest_hit(self, request: Request, floor: int) -> int:
        size, keys = self._options.chunk_tokens, request.chain.keys
        usable = (request.num_tokens - request.recompute_tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        held = [key in self._near.visible for key in keys]
        if self._options.ring_blocks:
            longest = self._longest_window(held, usable)
        else:
            end = floor // size
            while end < len(keys) and held[end]:
                end += 1
            longest = min(end * size, usable) - floor
        return longest if longest >= max(1, self._options.min_tokens) else 0

    def _longest_window(self, held: Sequence[bool], usable: int) -> int:
        """The last boundary before which there is all that a window looks at."""
        size, window = self._options.chunk_tokens, self._options.window
        for end in range(min(usable // size, len(held)), 0, -1):
            if all(held[max(0, end * size - window + 1) // size : end]):
                return end * size
        return 0

    # -- tiers -----------------------------------------------------------------------------------

    def _filled(
        self, tier: TierName, filled: Callable[..., None], key: ChunkKey, **known: bool
    ) -> None:
        filled(key, **known)
        if tier == NEAR:
            slot = self._near.slot(key)
            if slot is None:
                raise Violation("a chunk was published near and is not visible")
            self._check_near(slot, key)
            self._origins.arrived(key)
        else:
            self._moves.present(tier, key)
            index = self._far[tier]
            self._check_far(tier, index.slot(key) if isinstance(index, SlotIndex) else 0, key)

    def _check_near(self, slot: int, key: ChunkKey) -> None:
        for rank in self._ranks:
            self._compare(NEAR, rank, key, rank.near(slot))

    def _check_far(self, tier: TierName, place: int | None, key: ChunkKey) -> None:
        """What a far tier shows it must deliver, unless others remove what is in it."""
        if place is None:
            raise Violation(f"a chunk was published in {tier} and is not visible")
        if tier not in self.damaged and (tier, key) not in self.spoiled:
            for rank in self._ranks:
                if rank.leads:
                    self._compare(tier, rank, key, rank.far(tier, place, key))

    def _compare(self, tier: TierName, rank: Rank, key: ChunkKey, found: Stamps | None) -> None:
        expected = self._chunks.get(key)
        if expected is None:
            raise Violation(f"{tier} shows a chunk that no request has had")
        if found is None:
            if not self._options.tier(tier).slotted:
                return
            raise Violation(f"{tier} shows a chunk that rank {rank.number} cannot read")
        wrong = np.argwhere(found != expected)
        if len(wrong):
            row, token = wrong[0]
            salt = self._ledger.salts[rank.number, row]
            raise Violation(
                f"{tier} shows a chunk whose token {token} in row {row} on rank {rank.number} is: "
                f"{self._ledger.name(int(found[row, token] ^ salt))}; it should be: "
                f"{self._ledger.name(int(expected[token] ^ salt))}"
            )

    def missing(self) -> int:
        """Chunks that no tier shows, of requests that all have come to their end."""
        tiers = (self._near, *self._far.values())
        return sum(not any(tier.holds(key) for tier in tiers) for key in self._computed)

    def _slotted(self) -> list[tuple[TierName, SlotIndex]]:
        far = [(n, index) for n, index in self._far.items() if isinstance(index, SlotIndex)]
        return [(NEAR, self._near), *far]

    def check_tiers(self) -> None:
        """Every slot of every tier is in exactly one condition, and who listens knows what is
        visible there."""
        self.subscriber.check()
        for name, tier in self._slotted():
            conditions = [
                *tier._visible.values(), *tier._filling.values(), *tier._orphans, *tier._free
            ]  # fmt: skip
            if sorted(conditions) != list(range(tier._ready)):
                raise Violation(f"slots of {name} are lost or doubled: {conditions}")

    # -- the end -----------------------------------------------------------------------------------

    @property
    def is_quiet(self) -> bool:
        """Whether control knows that everything has ended."""
        idle = all(rank.is_idle for rank in self._ranks)
        return idle and not self._planner.has_work and not len(self._planner._books.transfers)

    def check_end(self) -> None:
        """Nothing is left when every request is gone and every transfer has ended."""
        planner, books = self._planner, self._planner._books
        self.check_tiers()
        left: dict[str, object] = {
            "transfers": list(books.transfers.live()),
            "requests": list(planner._requests),
            "leases on blocks": self._leased.leased,
            "count of leased blocks": books.leases.leased_blocks,
            "leases on slots": {
                name: tier._leases for name, tier in self._slotted() if tier.leased
            },
            "slots being filled": [key for _, tier in self._slotted() for key in tier._filling],
            "requests that something comes near for": list(planner._moves._arrivals),
            "chunks on their way near": [
                *planner._moves._fetches._moves,
                *planner._moves._fetches._expected,
            ],
            "saves without a receipt": list(self._reading),
            "transfers without a receipt": self._moves.under_way,
            "tiers that are tried by nothing": [
                breaker._name
                for breaker in (
                    *(books.breakers.reads(tier) for tier in self._far),
                    *(books.breakers.fills(tier) for tier in (NEAR, *self._far)),
                )
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
        self.subscriber.check_end()
        self._check_contents()

    def _check_contents(self) -> None:
        for name, tier in self._slotted():
            for key, slot in tier._visible.items():
                if name == NEAR:
                    self._check_near(slot, key)
                else:
                    self._check_far(name, slot, key)
