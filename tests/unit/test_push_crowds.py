"""Guards what becomes of pushes when there is too much of everything: two engines, each with the
real planner, a block pool that can be full, and a queue of which only the head is looked at, in
virtual time. Work that a prefill engine has done must not be done again by a decode engine that is
full, and a prefill engine that hangs must leave a decode engine enough to serve from.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from lamina_kv.config import load_config
from lamina_kv.control.planner import Planner
from lamina_kv.control.requests import PushParameters
from lamina_kv.control.shape import ChunkShape
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.observe.metrics import Meter
from lamina_kv.plan import Outcome, RankReport, Receipt, TransferId, TransferReceipt
from lamina_kv.push.cards import EngineCard, RankCard, RowCard
from lamina_kv.push.letters import Letter, News, Opened
from lamina_kv.push.messages import Claim
from lamina_kv.tiers.regard import USUAL

BLOCK = 16
PROMPT, OUTPUT = 512, 200
PROMPT_BLOCKS = PROMPT // BLOCK
ALL_BLOCKS = -(-(PROMPT + OUTPUT) // BLOCK)
STEP = 0.05
DECODE = "decode"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def card(name: str, blocks: int) -> EngineCard:
    row = RowCard(0, 64, 64, 1, (0,))
    return EngineCard(
        name, b"model", False, (("full", BLOCK, 0),), (RankCard(0, b"", blocks, (row,)),)
    )


class Pool:
    """Blocks, some of them free."""

    def __init__(self, blocks: int) -> None:
        self.references = [0] * blocks
        self.spare = list(range(blocks))

    def allocate(self, count: int) -> list[int] | None:
        if count > len(self.spare):
            return None
        taken = [self.spare.pop() for _ in range(count)]
        self.hold(taken)
        return taken

    def hold(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.references[block] -= 1
            assert self.references[block] >= 0
            if not self.references[block]:
                self.spare.append(block)


@dataclass(eq=False)
class Job:
    """One request of one engine.

    Attributes:
        arrived: when it came.
        table: its blocks.
        computed: tokens that are there.
        generated: tokens that were sampled.
        own: tokens of its prompt that this engine has computed.
        done: when it had its last token.
    """

    request_id: str
    number: int
    push: PushParameters | None
    output: int
    arrived: float
    table: list[int] = field(default_factory=list)
    computed: int = 0
    generated: int = 0
    own: int = 0
    done: float | None = None
    num_prompt_tokens: int = PROMPT
    recompute_tokens: int = 1
    root_extra: bytes = b""
    regard = USUAL

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.generated

    def tokens(self) -> Sequence[int]:
        return range(1000 * self.number, 1000 * self.number + self.num_tokens)

    def chunk_extra(self, start: int, end: int) -> bytes:
        return b""

    def blocks(self, group: int) -> Sequence[int]:
        return self.table

    def state_blocks(self, group: int, end: int) -> Sequence[int]:
        return ()


class Server:
    """An engine: it runs what has blocks, and then what its queue has, from its head on.

    Args:
        world: the time, and where letters go.
        name: its own.
        blocks: how many it has.
        tokens: how many it computes in a step.
    """

    def __init__(self, world: World, name: str, blocks: int, tokens: int) -> None:
        self.world = world
        self.name = name
        self.tokens = tokens
        self.pool = Pool(blocks)
        self.meter = Meter()
        self.planner = Planner(
            load_config({"push": {}, "host": {"capacity": "1MiB"}}, {}),
            ChunkShape(64, (Group(GroupKind.FULL, BLOCK),)),
            b"namespace",
            self.pool,
            [RankReport(0, 10, 0, 1000, ())],
            self.meter,
            card=card(name, blocks),
            loads=False,
            saves=False,
            clock=lambda: world.now,
        )
        self.inbox: list[News] = []
        self.queue: deque[Job] = deque()
        self.running: list[Job] = []
        self.parked: dict[TransferId, Job] = {}
        self.deadlines: dict[TransferId, float] = {}
        self.receipts: list[TransferReceipt] = []
        self.jobs: list[Job] = []
        self.ran: list[tuple[Job, int]] = []

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        self.queue.append(job)
        self.planner.arrived(job)
        self.exchange()

    def exchange(self) -> None:
        news, self.inbox = self.inbox, []
        assert self.planner.pushes is not None
        self.planner.pushes.take_news(news)
        for letter in self.planner.pushes.drain_letters():
            self.world.carry(self.name, letter)

    def step(self) -> None:
        """The step before is over; the next one begins."""
        for job, count in self.ran:
            self._run(job, count)
        self.exchange()
        left = self.tokens
        ran: list[tuple[Job, int]] = []
        for job in self.running:
            ran.append((job, min(left, max(1, PROMPT - job.computed))))
            left -= ran[-1][1]
        left = self._begin(left, ran)
        progress = [(job.request_id, job.computed, job.computed + n) for job, n in ran]
        plan = self.planner.plan_step(progress, forward=bool(ran))
        self.exchange()
        for receive in plan.push.receives:
            self.deadlines[receive.transfer] = self.world.now + receive.deadline
        for transfer in plan.push.give_ups:
            self.end(transfer, Outcome.FAILED, "given_up")
        for transfer, due in list(self.deadlines.items()):
            if due <= self.world.now:
                self.end(transfer, Outcome.FAILED, "deadline")
        for order in plan.push.orders:
            self.receipts.append(TransferReceipt(order.transfer, Outcome.DONE))
            if order.last:
                self.world.decode.end(TransferId(order.epoch), Outcome.DONE, "")
        self.ran = ran
        receipts, self.receipts = self.receipts, []
        self.planner.receive([Receipt(0, tuple(receipts))])
        for receipt in receipts:
            self._received(receipt)
        self.exchange()

    def _begin(self, left: int, ran: list[tuple[Job, int]]) -> int:
        skipped = []
        while self.queue and left > 0:
            job = self.queue[0]
            if job.computed:  # what was pushed to it is there
                self.running.append(self.queue.popleft())
                ran.append((job, min(left, PROMPT - job.computed)))
                left -= ran[-1][1]
                continue
            hit = self.planner.lookup(job, 0)
            if hit.ask_again:
                skipped.append(self.queue.popleft())
                continue
            table = self.pool.allocate(-(-(PROMPT + job.output) // BLOCK))
            if table is None:
                break
            job.table = table
            self.queue.popleft()
            self.planner.admitted(job.request_id, hit.tokens)
            self.exchange()
            if hit.tokens:
                transfer = self.planner._requests[job.request_id].receive
                assert transfer is not None
                self.parked[transfer] = job
                continue
            self.running.append(job)
            ran.append((job, min(left, PROMPT)))
            left -= ran[-1][1]
        self.queue.extendleft(reversed(skipped))
        return left

    def _run(self, job: Job, count: int) -> None:
        job.own += max(0, min(PROMPT, job.computed + count) - job.computed)
        job.computed += count
        if job.computed >= PROMPT:
            job.generated += 1
            if job.generated >= job.output:
                job.done = self.world.now
                self.running.remove(job)
                self.planner.finished(job.request_id, job.computed, [job.table], push=job.push)
                self.pool.free(job.table)

    def abort(self, job: Job) -> None:
        """The router needs nothing of a request that waits."""
        self.queue.remove(job)
        self.planner.finished(job.request_id, 0, [[]], push=job.push)

    def end(self, transfer: TransferId, outcome: Outcome, reason: str) -> None:
        """A push has arrived, or is not waited for any longer."""
        if self.deadlines.pop(transfer, None) is not None:
            self.receipts.append(TransferReceipt(transfer, outcome, reason=reason))

    def _received(self, receipt: TransferReceipt) -> None:
        job = self.parked.pop(receipt.transfer, None)
        if job is None:
            return
        if receipt.outcome is Outcome.DONE:
            job.computed = PROMPT - 1
        else:
            self.pool.free(job.table)
        self.queue.appendleft(job)


class World:
    """Engines, and a router which cancels a prefill when the decode engine has answered.

    Args:
        decode_blocks: of the decode engine.
        prefill_blocks: of each prefill engine.
        prefill_tokens: that a prefill engine computes in a step.
        prefills: how many of these there are.
    """

    def __init__(
        self,
        decode_blocks: int,
        prefill_blocks: int,
        prefill_tokens: int = 512,
        prefills: int = 1,
    ) -> None:
        self.now = 0.0
        self.hung: set[Server] = set()
        self.claims = True
        self.decode = Server(self, DECODE, decode_blocks, 512)
        self.prefills = [
            Server(self, f"10.0.0.{number}:9300", prefill_blocks, prefill_tokens)
            for number in range(prefills)
        ]
        for prefill in self.prefills:
            self.decode.inbox.append(Opened(prefill.name, prefill.name))
            prefill.inbox.append(Opened(DECODE, DECODE, card(DECODE, decode_blocks)))
        self.on_the_way: dict[Server, list[Job]] = {prefill: [] for prefill in self.prefills}
        self.asked = 0.0
        self.count = 0

    def carry(self, sender: str, letter: Letter) -> None:
        if self.claims or not isinstance(letter.message, Claim):
            (to,) = (s for s in (self.decode, *self.prefills) if s.name == letter.peer)
            to.inbox.append(Letter(sender, letter.message))

    def ask(self, *, pushed: bool = True, refused: bool = False) -> Job:
        self.count += 1
        name = f"request {self.count}"
        push = f"push {self.count}"
        prefill = self.prefills[self.count % len(self.prefills)]
        here = PushParameters(push, prefill.name) if pushed else None
        job = Job(name, self.count, here, OUTPUT, self.now)
        self.decode.submit(job)
        if pushed and not refused:
            there = Job(name, self.count, PushParameters(push, None), 1, self.now)
            self.on_the_way[prefill].append(there)
        return job

    def _serve(self, prefill: Server) -> None:
        for job in self.on_the_way[prefill]:
            prefill.submit(job)
        self.on_the_way[prefill].clear()
        answered = {job.number for job in self.decode.jobs if job.generated}
        for job in [job for job in prefill.queue if job.number in answered]:
            prefill.abort(job)
        prefill.step()

    def run(self, seconds: float, *, rate: float = 0.0, refused: bool = False) -> None:
        """Time passes, and ``rate`` requests a second come."""
        end = self.now + seconds
        while self.now < end:
            self.asked += rate * STEP
            while self.asked >= 1:
                self.asked -= 1
                self.ask(refused=refused)
            self.decode.step()
            for prefill in self.prefills:
                if prefill not in self.hung:
                    self._serve(prefill)
            self.now += STEP

    @property
    def computed_by_decode(self) -> float:
        """Share of the prompts that the decode engine has computed, of those that have begun."""
        begun = [job for job in self.decode.jobs if job.computed]
        return sum(job.own > BLOCK for job in begun) / len(begun)

    def done(self, since: float, until: float) -> int:
        """Requests that were over within a time."""
        return sum(job.done is not None and since <= job.done < until for job in self.decode.jobs)


CONCURRENT = 16
CAPACITY = CONCURRENT / (OUTPUT * STEP)
"""Requests a second of a decode engine that runs so many at once."""


@pytest.mark.parametrize("cache", [4, 8, 32], ids=lambda cache: f"{cache} prompts")
def test_a_decode_engine_that_is_full_computes_no_prompt_that_was_prefilled(cache: int) -> None:
    """For 90 s at twice its capacity. The prefill engine has a cache of a few prompts."""
    world = World(CONCURRENT * ALL_BLOCKS, cache * PROMPT_BLOCKS)
    world.run(90, rate=2 * CAPACITY)
    waiting = len(world.decode.queue)
    assert waiting > CAPACITY * 60  # or it was not full
    assert world.computed_by_decode < 0.05
    assert world.done(60, 90) > 0.9 * CAPACITY * 30
    world.run(waiting / CAPACITY + 30)
    assert all(job.done is not None for job in world.decode.jobs)
    assert world.computed_by_decode < 0.05
    assert len(world.decode.pool.spare) == CONCURRENT * ALL_BLOCKS
    assert len(world.prefills[0].pool.spare) == cache * PROMPT_BLOCKS


def test_it_would_without_claims() -> None:
    """What the test above is able to see."""
    world = World(CONCURRENT * ALL_BLOCKS, 8 * PROMPT_BLOCKS)
    world.claims = False
    world.run(90, rate=2 * CAPACITY)
    assert world.computed_by_decode > 0.05


def test_a_prefill_engine_that_is_too_slow_loses_nothing_of_what_it_can_do() -> None:
    """It gets twice as much for far longer than anybody waits: what the decode engine computes is
    the other half, and nothing any more when the crowd is gone."""
    rate = 1.0
    world = World(
        100 * ALL_BLOCKS, 64 * PROMPT_BLOCKS, prefill_tokens=int(PROMPT * rate / 2 * STEP)
    )
    world.run(240, rate=rate)
    pushed = [job for job in world.decode.jobs if job.computed and job.own <= BLOCK]
    assert len(pushed) > 0.9 * 240 * rate / 2
    assert world.computed_by_decode < 0.5
    world.run(100)
    assert all(job.done is not None for job in world.decode.jobs)
    before = len(world.decode.jobs)
    world.run(60, rate=rate / 4)
    assert not any(job.own > BLOCK for job in world.decode.jobs[before:])


def test_a_prefill_engine_that_hangs_leaves_the_rest_to_everybody() -> None:
    """Its connection lives, and nothing of it is ever fenced."""
    world = World(CONCURRENT * ALL_BLOCKS, 32 * PROMPT_BLOCKS)
    world.run(5, rate=CAPACITY)
    world.hung.update(world.prefills)
    world.run(10, rate=4 * CAPACITY)
    assert world.decode.queue
    job = world.ask(pushed=False)
    world.run(10)
    assert job.generated > 0
    world.run(300)
    assert all(job.done is not None for job in world.decode.jobs)
    assert len(world.decode.pool.spare) >= CONCURRENT * ALL_BLOCKS // 2


def test_a_prefill_engine_that_hangs_takes_nothing_from_another() -> None:
    """What is parked for the one stays, what is parked for the other goes."""
    world = World(CONCURRENT * ALL_BLOCKS, 32 * PROMPT_BLOCKS, prefills=2)
    world.run(5, rate=CAPACITY)
    world.hung.add(world.prefills[0])
    world.run(35, rate=2 * CAPACITY)
    before = len(world.decode.jobs)
    world.run(120, rate=CAPACITY / 4)
    world.run(120)
    assert all(job.done is not None for job in world.decode.jobs)
    later = [job for job in world.decode.jobs[before:] if job.push is not None]
    healthy = [job for job in later if job.push and job.push.prefill == world.prefills[1].name]
    assert len(healthy) > 20
    assert not [job for job in healthy if job.own > BLOCK]
    assert all(job.own > BLOCK for job in later if job not in healthy)


def test_a_prefill_engine_whose_front_refuses_costs_a_second_each() -> None:
    world = World(CONCURRENT * ALL_BLOCKS, 32 * PROMPT_BLOCKS)
    jobs = []
    for _ in range(20):
        jobs.append(world.ask(refused=True))
        world.run(3)
    world.run(30)
    assert all(job.done is not None for job in jobs)
    slowest = max(job.done - job.arrived for job in jobs if job.done is not None)
    assert slowest < OUTPUT * STEP + 3
    assert len(world.decode.pool.spare) == CONCURRENT * ALL_BLOCKS
