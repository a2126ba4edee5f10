"""The engine's scheduler: vLLM's rules, as far as they decide what Lamina is asked and told.

It does one thing better than vLLM 0.32, because what comes of it is vLLM's own and would hide what
is Lamina's: a request that has lost all of its load does not stand before those whose load is
there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from random import Random

from lamina_kv.control.planner import Planner
from lamina_kv.control.sharing import Sharing
from lamina_kv.plan import LoadMode, Receipt
from simulator.content import Violation
from simulator.options import BLOCK_TOKENS, Options
from simulator.pool import EnginePool
from simulator.request import Blocks, Request, Run, RunState, Status
from simulator.step import Item, Step

DECLINED = 0.02
"""Of hits: the engine does not want them, as vLLM for a request that asks for prompt logprobs."""


class Scheduler:
    """Decides who runs.

    Args:
        options: the engine.
        pool: its blocks.
        planner: Lamina's scheduler side.
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
        self.holding: deque[Request] = deque()
        self.preempt_next = False
        self._pool = pool
        self._planner = planner
        self._note = note
        self._check_hit = check_hit
        self._random = random
        self._arrived: set[str] = set()
        self._scheduled_steps = 0
        self._processed_steps = 0
        self._deferred: deque[tuple[int, Blocks]] = deque()

    @property
    def has_requests(self) -> bool:
        """Whether any request is unfinished, or finished and still in its blocks."""
        return bool(self.requests)

    @property
    def parked(self) -> list[Request]:
        """Requests that wait for their load."""
        return [r for r in self.holding if r.status is Status.PARKED]

    def submit(self, request: Request) -> None:
        """A new request."""
        self.requests[request.request_id] = request
        self.waiting.append(request)
        self._planner.arrived(request)

    # -- a step --------------------------------------------------------------------------------

    def schedule(self) -> Step:
        """The next step."""
        items: list[Item] = []
        budget, preempted = self._schedule_running(items, self.options.budget)
        loads_now = False
        if not preempted:
            loads_now = self._schedule_waiting(items, budget)
        progress = [
            (r.request_id, r.computed, r.computed + i.count)
            for i, r in ((i, i.run.request) for i in items)
        ]
        plan = self._planner.plan_step(progress, forward=bool(items))
        loads = {order.transfer: self._blocks_of(order.request_id) for order in plan.loads}
        if items:
            self._scheduled_steps += 1
        for item in items:
            request = item.run.request
            request.computed += item.count
            request.in_flight += item.count
            request.last_step = self._scheduled_steps
            request.drafts = 0
            prefilling = request.computed < request.num_tokens + request.placeholders
            if self.options.asynchronous and not prefilling:
                request.placeholders += 1 + item.drafts
                request.drafts = self.options.drafts
        return Step(items, plan, loads, loads_now)

    def _blocks_of(self, request_id: str) -> Blocks:
        run = self.requests[request_id].run
        assert run is not None
        return run.blocks

    def _schedule_running(self, items: list[Item], budget: int) -> tuple[int, bool]:
        preempted = self.preempt_next and bool(self.running) and self._may_free(self.running[-1])
        self.preempt_next = False
        if preempted:
            self._preempt(self.running.pop())
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            index += 1
            ahead = request.num_tokens + request.drafts + request.placeholders
            count = min(ahead - request.computed, budget)
            surely_over = request.computed + 2 - request.placeholders >= request.limit
            if count <= 0 or (request.placeholders and surely_over):
                continue
            while not (grown := self._grow(request, request.computed + count)):
                victim = self.running[-1]
                if not self._may_free(victim):
                    break
                self.running.pop()
                self._preempt(victim)
                preempted = True
                if victim is request:
                    break
            if not grown:
                break
            budget -= count
            self._add(items, request, count)
        return budget, preempted

    def _schedule_waiting(self, items: list[Item], budget: int) -> bool:
        loads_now = False
        for request in [*self.holding, *self.waiting]:
            if budget <= 0 or len(self.running) >= self.options.max_running:
                break
            if request.status is Status.PARKED and not self._promote(request):
                continue
            if request.stale and request.deliver_stale:
                continue
            known, floor, found = request.computed, 0, list[int]()
            extra, parked = 0, False
            if known == 0:
                found = self._find(request)
                floor = len(found) * BLOCK_TOKENS
                sharing = Sharing.PARKED if self.options.prefix_caching else Sharing.NOTHING
                hit = self._planner.lookup(request, floor, sharing=sharing)
                if hit.ask_again:
                    self._note("asks again", request.request_id)
                    continue
                self._check_hit(request, floor, hit.tokens)
                if hit.tokens and self._random.random() > DECLINED:
                    extra, parked = hit.tokens, hit.mode is LoadMode.PARKED
                known = floor + extra
            count = 0 if parked else min(request.num_tokens - known, budget)
            if not self._admit(request, found, known + count, parked=parked):
                break
            self._planner.admitted(request.request_id, extra)
            self._leave_queues(request)
            assert request.run is not None
            request.run.position = request.computed = known
            self._note("admit", request.request_id, floor, extra, "parked" if parked else "")
            if parked:
                request.status = Status.PARKED
                self.holding.append(request)
                continue
            loads_now |= extra > 0
            request.status = Status.RUNNING
            self.running.append(request)
            budget -= count
            self._add(items, request, count)
        return loads_now

    def _add(self, items: list[Item], request: Request, count: int) -> None:
        """Compute ``count`` tokens; full blocks of known tokens can be found from now on."""
        assert request.run is not None
        self._remember(request, min(request.computed + count, request.num_tokens))
        drafts = request.computed + count - request.num_tokens - request.placeholders
        items.append(Item(request.run, count, max(0, drafts)))

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
            failed: requests whose load between steps failed, on any rank.
            arrived: requests whose load is over on every rank.
            receipts: for control.
        """
        if step.items:
            self._processed_steps += 1
            while self._deferred and self._deferred[0][0] <= self._processed_steps:
                self._release(self._deferred.popleft()[1])
        cut = self._take_back(failed)
        for item in step.items:
            request = item.run.request
            request.in_flight -= item.count
            request.stale = max(0, request.stale - item.count)
            if item.run.state is not RunState.DROPPED and request.status is not Status.FINISHED:
                self._take_output(item, request)
        if self.options.fails_requests:
            for request in cut:
                self.finish(request)
        self._planner.receive(receipts)
        for request_id in arrived:
            request = self.requests[request_id]
            if request.status is Status.PARKED:
                self._arrived.add(request_id)
            elif request.status is Status.FINISHED:
                self._free(request)
                del self.requests[request_id]
            else:
                raise Violation(f"the load of {request_id} arrived, which waits for none")

    def _take_output(self, item: Item, request: Request) -> None:
        fresh = item.run.state is RunState.LIVE
        if fresh and item.drafts and item.sampled:
            rejected = item.drafts - (len(item.sampled) - 1)
            request.computed -= rejected
            request.placeholders = max(0, request.placeholders - rejected)
        if not item.sampled:
            return
        tokens = item.sampled[: request.limit - request.num_tokens]
        request.append(tokens)
        if fresh and self.options.asynchronous:
            request.placeholders -= len(tokens)
        if request.is_complete:
            self._note("complete", request.request_id)
            self.finish(request)
        elif fresh and self.options.asynchronous:
            self._remember(request, request.computed - request.placeholders)
        elif fresh:
            request.drafts = self._random.randint(0, self.options.drafts)

    # -- failed loads --------------------------------------------------------------------------

    def _take_back(self, failed: Iterable[str]) -> list[Request]:
        """Nothing of these requests counts any more. None of them may have computed on its load."""
        cut = []
        for request in map(self.requests.__getitem__, failed):
            if request.status is Status.PARKED and request.request_id not in self._arrived:
                request.computed = 0
                self._note("cut", request.request_id)
                cut.append(request)
            elif request.status is not Status.FINISHED:
                raise Violation(f"a load failed under {request.request_id}, which runs")
        return cut

    def _promote(self, request: Request) -> bool:
        """A parked request whose load is over waits like any other, with its blocks."""
        if request.request_id not in self._arrived:
            return False
        self._arrived.remove(request.request_id)
        self._note("arrived", request.request_id, request.computed)
        if request.computed:
            self._remember(request, request.computed)
        else:
            self._free(request)
            self.holding.remove(request)
            self.waiting.appendleft(request)
        request.status = Status.PREEMPTED if request.preemptions else Status.WAITING
        return True

    # -- ends ----------------------------------------------------------------------------------

    def finish(self, request: Request) -> None:
        """A request ends: complete, aborted or failed."""
        request_id = request.request_id
        under_way = request.status is Status.PARKED and request_id not in self._arrived
        self._arrived.discard(request_id)
        self._leave_queues(request)
        request.status = Status.FINISHED
        covered = -(-request.computed // BLOCK_TOKENS)
        self._planner.finished(request_id, request.computed, [request.blocks()[:covered]])
        if not under_way:
            self._free(request)
            del self.requests[request_id]

    def _preempt(self, request: Request, *, deliver: bool = True) -> None:
        assert request.run is not None
        request.run.state = RunState.STALE if deliver else RunState.DROPPED
        self._free(request)
        request.status = Status.PREEMPTED
        request.computed = request.drafts = request.placeholders = 0
        request.stale, request.deliver_stale = request.in_flight, deliver
        request.preemptions += 1
        self.waiting.appendleft(request)
        self._note("preempt", request.request_id)

    def preempt_all(self) -> None:
        """Every running request gives up its blocks; nothing of steps under way counts."""
        while self.running:
            self._preempt(self.running.pop(), deliver=False)

    def _leave_queues(self, request: Request) -> None:
        for queue in (self.running, self.waiting, self.holding):
            if request in queue:
                queue.remove(request)

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

    def _admit(self, request: Request, found: list[int], upto: int, *, parked: bool) -> bool:
        """Blocks for a request that waits, those that the engine found among them."""
        have = len(request.blocks()) + len(found)
        free = self._pool.num_free - self._pool.free_of(found)
        whole = -(-request.num_tokens // BLOCK_TOKENS) - have
        needed = max(0, -(-upto // BLOCK_TOKENS) - have)
        if whole > free or needed > free - (self._reserved() if parked else 0):
            return False
        if request.run is None:
            request.run = Run(request, 0, Blocks())
        self._pool.touch(found)
        request.run.blocks.ids += found + self._pool.take(needed)
        return True

    def _reserved(self) -> int:
        """Blocks that prefills in flight still need."""
        return sum(
            max(0, -(-r.num_tokens // BLOCK_TOKENS) - len(r.blocks()))
            for r in (*self.running, *self.holding)
        )

    def _grow(self, request: Request, upto: int) -> bool:
        assert request.run is not None
        needed = -(-upto // BLOCK_TOKENS) - len(request.run.blocks.ids)
        if needed > self._pool.num_free:
            return False
        if needed > 0:
            request.run.blocks.ids += self._pool.take(needed)
        return True

    def _remember(self, request: Request, tokens: int) -> None:
        assert request.run is not None
        blocks, full = request.run.blocks, tokens // BLOCK_TOKENS
        for index in range(blocks.cached, full):
            prefix = int(request.hashes[(index + 1) * BLOCK_TOKENS - 1])
            self._pool.remember(blocks.ids[index], prefix)
        blocks.cached = max(blocks.cached, full)

    def _may_free(self, request: Request) -> bool:
        """Whether no step under way may still write into its blocks."""
        return request.last_step <= self._processed_steps

    def _free(self, request: Request) -> None:
        run, request.run = request.run, None
        if run is None:
            return
        if self._may_free(request):
            self._release(run.blocks)
        else:
            self._deferred.append((self._scheduled_steps, run.blocks))

    def _release(self, blocks: Blocks) -> None:
        blocks.held = False
        self._pool.release(reversed(blocks.ids))
