"""Promises 1, 2 and 4 under everything that an engine, its clients, far tiers and broken hardware
can do: no wrong token, no hang, nothing unverified, nothing left behind. See ``tests/simulator``.

``LAMINA_SOAK_STEPS`` is the budget of the random histories in steps, ``LAMINA_SOAK_SEED`` the first
seed; a history is named by its seed and is the same on every machine.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from simulator.engine import Simulator
from simulator.faults import Weather
from simulator.history import Prompts, run_crowd, run_history, run_return
from simulator.options import Far, Options, Sort

pytestmark = pytest.mark.scaled

Kind = Callable[[Options, Random], Options]

BUDGET = int(os.environ.get("LAMINA_SOAK_STEPS", "24000"))
FIRST_SEED = int(os.environ.get("LAMINA_SOAK_SEED", "0"))
STEPS = 400
"""Steps of one random history."""
CROWDS = 8
"""Crowds of each kind, and returns."""
DISK_SHARE = 0.1
"""Of the budget; a step beside a disk takes many times as long."""


def seeds(share: float) -> range:
    """Seeds of as many random histories as a share of the budget has steps for."""
    return range(FIRST_SEED, FIRST_SEED + int(BUDGET * share / STEPS))


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "lamina_kv")


@pytest.mark.parametrize("seed", seeds(1 - DISK_SHARE))
def test_random_histories(seed: int) -> None:
    run_history(seed, STEPS)


@pytest.fixture
def store() -> Iterator[Path]:
    """A directory in memory where there is one: a disk would be waited for most of the time."""
    memory = "/dev/shm"
    parent = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=parent) as path:
        yield Path(path)


@pytest.mark.parametrize("seed", seeds(DISK_SHARE))
def test_random_histories_with_a_disk(seed: int, store: Path) -> None:
    run_history(seed, STEPS, store)


HAND_OFF_SHARE = 0.3
"""Of the budget, beside what others have of it."""


with_a_hand_off = pytest.mark.parametrize("kind", [Options.with_hand_off, Options.with_ring])


@with_a_hand_off
@pytest.mark.parametrize("seed", seeds(HAND_OFF_SHARE))
def test_random_histories_of_a_scheduler_with_a_hand_off(kind: Kind, seed: int) -> None:
    random = Random(seed)
    run_history(seed, STEPS, options=kind(Options.draw(random), random))


@with_a_hand_off
@pytest.mark.parametrize("seed", seeds(DISK_SHARE / 2))
def test_random_histories_of_a_scheduler_with_a_hand_off_and_a_disk(
    kind: Kind, seed: int, store: Path
) -> None:
    random = Random(seed)
    options = kind(Options.draw(random, disk=True), random)
    run_history(seed, STEPS, store, options=options)


DEVICE_SHARE = 0.2
"""Of the budget, beside what others have of it."""


@pytest.mark.parametrize("seed", seeds(DEVICE_SHARE))
def test_random_histories_of_a_cache_on_a_device(seed: int) -> None:
    """The device runs behind its host, and in any order that events allow."""
    random = Random(seed)
    options = Options.draw(random).on_device()
    if seed % 4 == 3:
        options = random.choice((Options.with_hand_off, Options.with_ring))(options, random)
    run_history(seed, STEPS, options=options)


STORM = Weather(
    far_slow=0.3,
    far_hang=0.03,
    gone=0.2,
    wrong=0.2,
    unread=0.2,
    refused=0.2,
    unsure=0.2,
    unkept=0.2,
    raises=0.1,
    unanswered=0.3,
    lies=0.2,
    vanishes=0.1,
)
"""On far tiers only."""


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_of_host_memory_that_grows(seed: int) -> None:
    options = Options.draw(Random(f"grows {seed}"))
    options = replace(options.on_device() if seed % 2 else options, grows=True)
    run_history(seed, 100, options=options)


def test_no_far_tier_makes_a_load_fail() -> None:
    counts = Counter[str]()
    for seed in range(CROWDS):
        random = Random(seed)
        options = Options.draw(random)
        tiers = options.tiers or (Far("one", Sort.KEYS),)
        options = replace(options, host_slots=12, tiers=tiers, when="always")
        counts += run_history(seed, STEPS, options=options, weather=STORM)
    assert counts["moves inward"] > 0
    assert counts["failed loads"] == 0


@pytest.mark.parametrize("hand_off", [False, True])
@pytest.mark.parametrize("far", [None, *Sort])
def test_a_document_is_loaded_once_for_a_crowd(
    hand_off: bool, far: Sort | None, store: Path
) -> None:
    counts = Counter[str]()
    for seed in range(CROWDS):
        folder = store / str(seed)
        folder.mkdir()
        counts += run_crowd(seed, folder, far=far, hand_off=hand_off)
    assert counts["asks again"] > 0


@pytest.mark.parametrize("hand_off", [False, True])
@pytest.mark.parametrize(
    "sorts",
    [(Sort.SLOTS,), (Sort.KEYS,), (Sort.DISK,), (Sort.KEYS, Sort.SLOTS, Sort.KEYS)],
    ids=lambda sorts: "-".join(sort.value for sort in sorts),
)
def test_what_far_tiers_have_is_found_again(
    hand_off: bool, sorts: tuple[Sort, ...], store: Path
) -> None:
    for seed in range(CROWDS):
        folder = store / str(seed)
        folder.mkdir()
        counts = run_return(seed, folder, sorts=sorts, hand_off=hand_off)
        assert counts["moves inward"] > 0


@pytest.mark.parametrize("broken", [0, 1])
def test_what_one_tier_does_not_deliver_comes_from_another(broken: int) -> None:
    for seed in range(CROWDS):
        run_return(seed, sorts=(Sort.SLOTS, Sort.KEYS), broken=broken)


@pytest.mark.parametrize("seed", range(3))
def test_random_histories_on_real_threads(seed: int) -> None:
    run_history(seed, STEPS, virtual=False)


@pytest.mark.parametrize("hand_off", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_in_fair_weather_everything_is_kept(seed: int, hand_off: bool) -> None:
    random = Random(seed)
    options = replace(
        Options.draw(random),
        host_slots=2000,
        saves_in_flight=2000,
        save_tokens="all",
    )
    if hand_off:
        options = options.with_hand_off(random)
    prompts = Prompts(random, options.longest)
    with Simulator(seed, options) as simulator:
        for step in range(STEPS):
            if step % 4 == 0:
                simulator.submit(*prompts.draw())
            if step % 50 == 0:
                simulator.preempt()
            if step % 70 == 0:
                simulator.forget_prefixes()
            simulator.step()
        simulator.drain()
        assert simulator.counts["complete"] == STEPS // 4
        assert simulator.missing() == 0


@pytest.mark.parametrize("hand_off", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_in_fair_weather_what_is_shared_is_in_every_tier_that_keeps_it(
    seed: int, hand_off: bool
) -> None:
    random = Random(seed)
    tiers = (
        Far("keys", Sort.KEYS, room=5000, keep="shared"),
        Far("slots", Sort.SLOTS, room=5000, keep="shared", in_flight=1),
        Far("read", Sort.KEYS, room=5000, keep="nothing"),
    )
    options = replace(
        Options.draw(random),
        host_slots=2000,
        saves_in_flight=2000,
        save_tokens="all",
        deadline=1.0,
        tiers=tiers,
    )
    if hand_off:
        options = options.with_hand_off(random)
    prompts = Prompts(random, options.longest)
    with Simulator(seed, options) as simulator:
        for step in range(STEPS):
            if step % 8 == 0 and len(simulator.active) < options.max_running:
                simulator.submit(*prompts.draw())
            simulator.step()
        simulator.drain()
        assert simulator.counts["moves outward"] > 0
        assert simulator.unshared() == 0


probability = st.sampled_from((0.0, 0.05, 0.3))
tiers = st.lists(
    st.builds(
        Far,
        name=st.sampled_from(("one", "two", "three")),
        sort=st.sampled_from((Sort.SLOTS, Sort.KEYS)),
        room=st.sampled_from((32, 4)),
        in_flight=st.sampled_from((8, 1)),
        batch=st.sampled_from((4, 1)),
        readers=st.sampled_from((1, 2)),
        keep=st.sampled_from(("all", "shared", "nothing")),
    ),
    max_size=3,
    unique_by=lambda tier: tier.name,
).map(tuple)
engines = st.builds(
    Options,
    ranks=st.sampled_from((1, 2)),
    rows=st.sampled_from((2, 3)),
    blocks=st.sampled_from((64, 28)),
    chunk_blocks=st.sampled_from((1, 2, 3)),
    budget=st.sampled_from((100, 12)),
    max_running=st.sampled_from((6, 2)),
    drafts=st.sampled_from((0, 3)),
    asynchronous=st.booleans(),
    prefix_caching=st.booleans(),
    fails_requests=st.booleans(),
    host_slots=st.sampled_from((100, 12, 3)),
    tiers=tiers,
    mode=st.sampled_from(("auto", "layerwise", "parked")),
    load_ahead=st.sampled_from(("auto", 1, 2)),
    piece_chunks=st.sampled_from((100, 1)),
    saves_in_flight=st.sampled_from((64, 1)),
    saves_by_rows=st.booleans(),
)
boundaries = st.integers(0, 2).map(Random)
with_hand_off = st.builds(Options.with_hand_off, engines, boundaries)
weathers = st.builds(
    Weather,
    error=probability,
    slow=probability,
    hang=st.sampled_from((0.0, 0.03)),
    far_slow=probability,
    far_hang=st.sampled_from((0.0, 0.1)),
    late=probability,
    twice=probability,
    stale=probability,
    shuffled=probability,
    overtaken=probability,
    gone=probability,
    wrong=probability,
    unread=probability,
    refused=probability,
    unsure=probability,
    unkept=probability,
    raises=probability,
    unanswered=probability,
    lies=probability,
    vanishes=probability,
)


class Histories(RuleBasedStateMachine):
    """What hypothesis does to an engine; a failure comes with the shortest way to it."""

    @initialize(options=st.one_of(engines, with_hand_off), seed=st.integers(0, 2**16))
    def start(self, options: Options, seed: int) -> None:
        self.simulator = Simulator(seed, options).__enter__()
        random = Random(0)
        self.documents = [[random.randrange(50) for _ in range(options.longest)] for _ in range(2)]

    @property
    def active(self) -> list[str]:
        return self.simulator.active

    @rule(
        document=st.integers(0, 1),
        blocks=st.integers(0, 20),
        more=st.integers(0, 4),
        own=st.booleans(),
        max_tokens=st.sampled_from((1, 2, 9)),
        salt=st.sampled_from((0, 0, 0, 1)),
    )
    def submit(
        self, document: int, blocks: int, more: int, own: bool, max_tokens: int, salt: int
    ) -> None:
        if len(self.active) < 6:
            most = self.simulator.options.longest - max_tokens - 5
            prompt = self.documents[document][: max(1, min(4 * blocks + more, most))]
            self.simulator.submit(prompt + [77] * own, max_tokens, salt)

    @rule(count=st.integers(1, 12), seed=st.integers(0, 2**16))
    def step(self, count: int, seed: int) -> None:
        self.simulator.reseed(seed)
        for _ in range(count):
            self.simulator.step()

    @rule(weather=weathers)
    def turn(self, weather: Weather) -> None:
        self.simulator.weather = weather

    @precondition(lambda self: self.active)
    @rule(which=st.integers(0, 5))
    def abort(self, which: int) -> None:
        self.simulator.abort(self.active[which % len(self.active)])

    @rule()
    def preempt(self) -> None:
        self.simulator.preempt()

    @rule()
    def forget_prefixes(self) -> None:
        self.simulator.forget_prefixes()

    @rule()
    def hurry(self) -> None:
        self.simulator.hurry()

    @rule()
    def reset(self) -> None:
        self.simulator.reset()

    @rule()
    def change_weights(self) -> None:
        self.simulator.change_weights()

    def teardown(self) -> None:
        if hasattr(self, "simulator"):
            try:
                self.simulator.drain()
            finally:
                self.simulator.__exit__()


Histories.TestCase.settings = settings(
    max_examples=max(50, BUDGET // 400),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestHistories = Histories.TestCase
