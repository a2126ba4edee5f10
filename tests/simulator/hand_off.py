"""An engine's own scheduler, which knows nothing of loads, with Lamina's hand-off in it.

It frees what it wants when it wants: what is still being loaded into is only kept from being reused
by the hand-off's leases. It takes steps one at a time, and knows what became of the loads in a step
when that is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from random import Random

from lamina_kv.control.planner import Planner
from lamina_kv.engines.hand_off import Admission, HandOff, Phase
from lamina_kv.plan import LoadMode, Receipt
from simulator.content import Violation
from simulator.options import BLOCK_TOKENS, Options
from simulator.pool import EnginePool
from simulator.request import Blocks, Request, Run, RunState, Status
from simulator.step import Item, Step

UNCUT = 0.1
"""Of steps that are longer than a ring: they end anywhere."""

DECLINED = 0.05
"""Of hits: the engine gives the request blocks for a part of its tokens only."""


class HandOffScheduler:
    """Decides who runs.

    Args:
        options: the engine.
        pool: its blocks.
        planner: what decides about loads.
        check_hit: called with a request, the engine's own hit and what Lamina adds to it.
        note: told what happens, for the trace.
        random: decides what an engine is free to decide.
    """

    def __init__(
        self,
        options: Options,
        pool: EnginePool,
        planner: Planner,
        check_hit: Callable[[Request, int, int], None],
        note: Callable[..., None],
        random: Random,
    ) -> None:
        self.options = options
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.holding: list[Request] = []
        self.preempt_next = False
        self._boundary = options.boundary_blocks * BLOCK_TOKENS
        self._hand_off = HandOff(
            planner,
            boundary=self._boundary,
            limit=options.max_running,
            shares=options.prefix_caching,
        )
        self._pool = pool
        self._check_hit = check_hit
        self._note = note
        self._random = random
        self._stops: dict[str, int] = {}
        self._given: dict[str, Blocks] = {}
        self._freed: list[Blocks] = []

    @property
    def has_requests(self) -> bool:
        """Whether any request is unfinished, or finished and something still comes for it."""
        return bool(self.requests) or self._hand_off.count(*Phase) > 0

    def submit(self, request: Request) -> None:
        """A new request."""
        self.requests[request.request_id] = request
        self.waiting.append(request)
        self._hand_off.arrived(request)

    # -- a step --------------------------------------------------------------------------------

    def schedule(self) -> Step:
        """The next step."""
        self._take_ready()
        if self.preempt_next and (victims := [*self.running, *self.holding]):
            self._preempt(self._random.choice(victims))
        self.preempt_next = False
        for request in [r for r in self.running if self._stops.get(r.request_id) == r.computed]:
            del self._stops[request.request_id]
            self._go_on(request, self._hand_off.reached(request.request_id))
        items: list[Item] = []
        budget = self._schedule_running(items, self.options.budget)
        self._schedule_waiting(items, budget)
        progress = []
        for item in items:
            request = item.run.request
            progress.append((request.request_id, request.computed, request.computed + item.count))
        plan = self._hand_off.plan(progress, forward=bool(items))
        for item in items:
            item.run.request.computed += item.count
        loads = {}
        for order in plan.loads:
            # Who was preempted since has no blocks any more, and is loaded all the same.
            loads[order.transfer] = self._given[order.request_id]
        return Step(
            items, plan, loads, any(order.mode is LoadMode.LAYERWISE for order in plan.loads)
        )

    def _take_ready(self) -> None:
        for resumption in self._hand_off.take_ready():
            request = self.requests[resumption.request_id]
            assert request.run is not None
            self._note("arrived", request.request_id, resumption.start)
            self.holding.remove(request)
            self.running.append(request)
            request.status = Status.RUNNING
            request.run.position = request.computed = resumption.start
            self._remember(request)

    def _schedule_running(self, items: list[Item], budget: int) -> int:
        for request in list(self.running):
            if request not in self.running or budget <= 0:
                continue
            count = self._count(request, budget)
            while not self._grow(request, request.computed + count):
                victim = self.running[-1]
                self._preempt(victim)
                items[:] = [item for item in items if item.run.request is not victim]
                if victim is request:
                    break
            if request.run is not None:
                items.append(Item(request.run, count, 0))
                budget -= count
        return budget

    def _count(self, request: Request, budget: int) -> int:
        end = self._stops.get(request.request_id, request.num_tokens)
        return self._cut(request, min(end - request.computed, budget))

    def _cut(self, request: Request, count: int) -> int:
        """Of a step that goes further than a ring, the end of the last chunk is all that remains:
        it ends on a boundary, mostly."""
        start, size = request.computed, self.options.chunk_tokens
        end = start + count
        long = end - start // size * size > self.options.window > 0
        if not long or self._random.random() < UNCUT:
            return count
        usable = request.num_tokens - request.recompute_tokens
        return max(0, min(end, usable) // size * size - start) or count

    def _schedule_waiting(self, items: list[Item], budget: int) -> None:
        for request in list(self.waiting):
            if budget <= 0 or not self._hand_off.has_room:
                return
            found = self._find(request)
            floor = len(found) * BLOCK_TOKENS
            hit = self._hand_off.look(request, floor)
            if hit is None:
                self._note("asks again", request.request_id)
                continue
            rounded = -(-floor // self._boundary) * self._boundary
            if rounded < request.num_tokens:
                self._check_hit(request, rounded, hit)
            whole = hit > 0 and self._random.random() > DECLINED
            upto = request.num_tokens if whole else min(request.num_tokens, floor + budget)
            if not self._allocate(request, found, upto):
                return
            self.waiting.remove(request)
            part = upto < request.num_tokens or (hit > 0 and not whole)
            declined = "part_of_its_blocks" if part else ""  # the admission looks once more
            request.computed = floor
            self._go_on(request, self._hand_off.admit(request, floor, declined=declined))
            if request.status is Status.RUNNING:
                count = self._count(request, budget)
                assert request.run is not None
                items.append(Item(request.run, count, 0))
                budget -= count

    def _go_on(self, request: Request, admission: Admission) -> None:
        """A request has its blocks; what becomes of it was decided."""
        name, run = request.request_id, request.run
        assert run is not None
        self._note("admit", name, request.computed, admission.start, admission.phase.value)
        if admission.until:
            self._stops[name] = admission.until
        parked = admission.phase is Phase.PARKED
        queue, other = (self.holding, self.running) if parked else (self.running, self.holding)
        if request in other:
            other.remove(request)
        if request not in queue:
            queue.append(request)
        request.status = Status.PARKED if parked else Status.RUNNING
        run.position = request.computed = admission.start
        self._given[name] = run.blocks

    def update(
        self,
        step: Step,
        failed: Iterable[str],
        arrived: Iterable[str],
        receipts: Sequence[Receipt],
    ) -> None:
        """A step's output is there.

        Args:
            step: the step.
            failed: what vLLM is told; nobody here.
            arrived: likewise.
            receipts: for control.
        """
        in_step = {o.transfer for o in step.plan.loads if o.mode is LoadMode.LAYERWISE}
        for report in step.reports:
            items = tuple(item for item in report.transfers if item.transfer in in_step)
            self._hand_off.receive([Receipt(report.rank, items)])
        if cut := self._hand_off.take_cut():
            raise Violation(f"a load failed under {cut[0].request_id}, which runs")
        for item in step.items:
            request = item.run.request
            request.append(item.sampled[: request.limit - request.num_tokens])
            self._remember(request)
            if request.is_complete:
                self._note("complete", request.request_id)
                self.finish(request)
        self._hand_off.receive(receipts)

    # -- ends ----------------------------------------------------------------------------------

    def finish(self, request: Request) -> None:
        """A request ends: complete or aborted."""
        for queue in (self.running, self.waiting, self.holding):
            if request in queue:
                queue.remove(request)
        parked = request.status is Status.PARKED
        request.status = Status.FINISHED
        computed = 0 if parked else request.computed
        blocks = request.blocks()[: -(-computed // BLOCK_TOKENS)]
        self._hand_off.finished(request.request_id, computed, [blocks])
        self._free(request)
        del self.requests[request.request_id]

    def _preempt(self, request: Request) -> None:
        assert request.run is not None
        request.run.state = RunState.STALE
        (self.running if request in self.running else self.holding).remove(request)
        self._hand_off.preempted(request.request_id)
        self._free(request)
        request.status = Status.PREEMPTED
        request.preemptions += 1
        request.computed = 0
        self.waiting.appendleft(request)
        self._note("preempt", request.request_id)

    def preempt_all(self) -> None:
        """Every running request gives up its blocks."""
        while self.running:
            self._preempt(self.running[-1])

    # -- blocks --------------------------------------------------------------------------------

    def _find(self, request: Request) -> list[int]:
        """Blocks of the engine's own hit; at least one token is left."""
        found = []
        for index in range((request.num_tokens - 1) // BLOCK_TOKENS):
            block = self._pool.find(int(request.hashes[(index + 1) * BLOCK_TOKENS - 1]))
            if block is None:
                break
            found.append(block)
        return found

    def _blocks(self, tokens: int) -> int:
        """Blocks that a request has for so many tokens."""
        return min(-(-tokens // BLOCK_TOKENS), self.options.ring_blocks or tokens)

    def _allocate(self, request: Request, found: list[int], upto: int) -> bool:
        needed = self._blocks(upto) - len(found)
        if needed > self._pool.num_free - self._pool.free_of(found):
            return False
        request.run = Run(request, len(found) * BLOCK_TOKENS, Blocks())
        self._pool.touch(found)
        self._give(found)
        request.run.blocks.ids += found + self._take(needed)
        request.run.blocks.cached = len(found)
        return True

    def _grow(self, request: Request, upto: int) -> bool:
        if request.run is None:
            return True
        blocks = request.run.blocks.ids
        needed = self._blocks(upto) - len(blocks)
        if needed > self._pool.num_free:
            return False
        if needed > 0:
            blocks += self._take(needed)
        return True

    def _take(self, count: int) -> list[int]:
        taken = self._pool.take(count)
        self._give(taken)
        return taken

    def _give(self, given: Sequence[int]) -> None:
        """Somebody has these blocks now: whatever was to be loaded into them must be over."""
        for blocks in self._freed:
            blocks.leased.difference_update(given)
        self._freed = [blocks for blocks in self._freed if blocks.leased]

    def _remember(self, request: Request) -> None:
        assert request.run is not None
        if not self.options.prefix_caching:
            return
        blocks = request.run.blocks
        full = min(request.computed, request.num_tokens) // BLOCK_TOKENS
        for index in range(blocks.cached, full):
            prefix = int(request.hashes[(index + 1) * BLOCK_TOKENS - 1])
            self._pool.remember(blocks.ids[index], prefix)
        blocks.cached = max(blocks.cached, full)

    def _free(self, request: Request) -> None:
        """The request's blocks are its own no more. A load may still write to those of them that
        nobody else is given."""
        self._stops.pop(request.request_id, None)
        run, request.run = request.run, None
        if run is not None:
            run.blocks.held = False
            run.blocks.leased = set(run.blocks.ids)
            self._freed.append(run.blocks)
            self._pool.release(reversed(run.blocks.ids))
