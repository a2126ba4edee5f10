"""Guards what is decided by measurement: what is known after what was measured, how much of a hit
is loaded and how, that nobody guesses where nothing is known, and that mistakes end."""

from __future__ import annotations

from dataclasses import replace

import pytest
from driven_planner import CHUNK_BYTES, FAR, Engine, View, inward, keys_of, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_kv.config import LoadConfig
from lamina_kv.control.cost import HALF_LIFE, Costs, Rate
from lamina_kv.control.offers import HitPart, Offer
from lamina_kv.control.policy import (
    ALLOWANCE,
    LEAST_TIMEOUT,
    PRESUMED,
    SHORT_STALL,
    Asked,
    LoadPolicy,
)
from lamina_kv.plan import NEAR, TIMED_OUT, LoadMode, Outcome, TierName
from lamina_kv.tiers.regard import Regard

OTHER = TierName("other")
CHUNK = 64
MIB = 1 << 20


class Clock:
    """Control's clock."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def asked(*parts: HitPart, suffix: int = 64, floor: int = 0) -> Asked:
    hit = sum(part.tokens for part in parts)
    return Asked(floor, floor + hit + suffix, parts)


def known(
    *, near: float = 1e-9, far: float = 1e-9, token: float = 1e-4, clock: Clock | None = None
) -> Costs:
    """Seconds per byte of each tier, and per token."""
    costs = Costs(clock or Clock())
    costs.loaded(NEAR, 64 * MIB, near * 64 * MIB)
    costs.loaded(FAR, 64 * MIB, far * 64 * MIB)
    costs.computed(0, 1000, token * 1000)
    return costs


def decide(what: Asked, costs: Costs, *, divisible: bool = True, **load: object) -> Offer:
    config = LoadConfig.model_validate(load)
    return LoadPolicy(config, CHUNK, divisible=divisible).decide(what, costs)


class TestRates:
    def test_nothing_is_known_at_first(self) -> None:
        assert Costs().load_seconds(NEAR, 1000) is None
        assert Costs().prefill_seconds(0, 1000) is None

    def test_what_was_measured_once_is_believed(self) -> None:
        costs = known(near=2e-9, token=3e-4)
        assert costs.load_seconds(NEAR, 32 * MIB) == pytest.approx(32 * MIB * 2e-9)
        assert costs.prefill_seconds(0, 1000) == pytest.approx(0.3)

    def test_a_load_counts_by_its_bytes(self) -> None:
        costs = Costs()
        costs.loaded(NEAR, 256 * MIB, 0.256)
        costs.loaded(NEAR, MIB, 0.05)
        assert costs.load_seconds(NEAR, 257 * MIB) == pytest.approx(0.306)

    def test_what_was_true_long_ago_is_forgotten(self) -> None:
        clock = Clock()
        costs = Costs(clock)
        for _ in range(100):
            costs.loaded(FAR, 64 * MIB, 0.01)
        clock.now = 20 * HALF_LIFE
        costs.loaded(FAR, 64 * MIB, 1.0)
        assert costs.load_seconds(FAR, 64 * MIB) == pytest.approx(1, rel=0.01)

    def test_a_wait_in_vain_is_believed_at_once_and_a_good_load_after_it_too(self) -> None:
        costs = known(near=1e-10)
        for _ in range(100):
            costs.loaded(NEAR, 512 * MIB, 0.05)
        costs.given_up(NEAR, MIB, 20.0)
        assert costs.load_seconds(NEAR, MIB) == pytest.approx(20)
        costs.given_up(NEAR, 0, 0.01)
        assert costs.load_seconds(NEAR, MIB) == pytest.approx(0.01 * MIB), "nothing had come"
        costs.loaded(NEAR, 512 * MIB, 0.05)
        assert costs.load_seconds(NEAR, 512 * MIB) == pytest.approx(0.06)

    def test_where_nothing_came_a_chunk_takes_longer_than_that_and_no_byte_as_long(self) -> None:
        """A byte that took a second would keep the tier out of use for a quarter of an hour."""
        costs = Costs()
        costs.given_up(FAR, 0, 1.0, least=MIB)
        assert costs.load_seconds(FAR, MIB) == pytest.approx(1.0)
        costs.given_up(FAR, 0, 0.1, least=MIB)
        assert costs.load_seconds(FAR, MIB) == pytest.approx(1.0), "as was thought"

    @pytest.mark.parametrize("measured", [True, False])
    def test_a_tier_that_works_again_is_as_fast_as_before_it_was_given_up(
        self, measured: bool
    ) -> None:
        costs = known(far=1e-9) if measured else Costs()
        before = costs.load_seconds(FAR, MIB)
        for _ in range(3):
            costs.given_up(FAR, 0, 1.0, least=MIB)
        costs.recovered(FAR)
        assert costs.load_seconds(FAR, MIB) == before

    def test_what_a_tier_has_done_since_it_was_given_up_is_believed(self) -> None:
        costs = known(far=1e-9)
        costs.given_up(FAR, 0, 1.0, least=MIB)
        costs.loaded(FAR, MIB, 1.0)
        costs.recovered(FAR)
        assert costs.load_seconds(FAR, MIB) == pytest.approx(1.0)

    def test_what_was_measured_long_ago_is_a_figure_still(self) -> None:
        """Whatever was waited for in vain meanwhile: a mean of nothing is none."""
        clock = Clock()
        costs = known(far=1e-9, clock=clock)
        for _ in range(3):
            costs.given_up(FAR, 0, 1.0, least=MIB)
            clock.now += 40_000
            seconds = costs.load_seconds(FAR, MIB)
            assert seconds == pytest.approx(1.0)

    def test_what_came_with_others_does_not_end_a_stall_by_itself(self) -> None:
        """The first of those that come together is charged for all of them."""
        clock = Clock()
        costs = known(far=1e-9, clock=clock)
        costs.given_up(FAR, 0, 1.0, least=MIB)
        clock.now = 2.0
        costs.loaded(FAR, MIB, 0.0, ordered=1.5)
        assert costs.load_seconds(FAR, MIB) == pytest.approx(0.5, rel=0.05)
        costs.loaded(FAR, MIB, 1e-9 * MIB, ordered=1.5)
        assert costs.load_seconds(FAR, MIB) == pytest.approx(1e-9 * MIB)

    def test_a_stall_right_after_one_that_was_over_is_another_one(self) -> None:
        """What a try had ordered came while the pause was a long one."""
        clock = Clock()
        costs = known(far=1e-9, clock=clock)
        costs.given_up(FAR, 0, 1.0, least=MIB)
        for pause in (1, 2, 4, 8):
            clock.now += pause
            costs.given_up(FAR, 0, 1.0, least=MIB)
        costs.loaded(FAR, MIB, 1e-9 * MIB)
        costs.given_up(FAR, 0, 1.0, least=MIB)
        assert costs.load_seconds(FAR, MIB, hoped=True) == pytest.approx(1.0)
        clock.now += 32
        assert costs.load_seconds(FAR, MIB, hoped=True) == pytest.approx(1e-9 * MIB, rel=0.1)

    def test_a_wait_that_was_short_does_not_make_a_tier_fast(self) -> None:
        costs = known(far=1e-7)
        costs.given_up(FAR, MIB, 0.01)
        seconds = costs.load_seconds(FAR, MIB)
        assert seconds == pytest.approx((64 * 1e-7 * MIB + 0.01) / 65)

    def test_a_tier_is_hoped_to_be_faster_the_longer_it_was_not_measured(self) -> None:
        clock = Clock()
        costs = known(far=1e-8, clock=clock)
        clock.now = 3 * HALF_LIFE
        assert costs.load_seconds(FAR, MIB) == pytest.approx(1e-8 * MIB)
        assert costs.load_seconds(FAR, MIB, hoped=True) == pytest.approx(1e-8 * MIB / 8)
        assert costs.prefill_seconds(0, 1000) == pytest.approx(0.1)

    @settings(deadline=None)
    @given(
        st.dictionaries(st.integers(0, 16), st.floats(1e-6, 1e-2), min_size=1, max_size=6),
        st.tuples(*[st.integers(0, 1 << 17)] * 3),
    )
    def test_to_compute_more_never_takes_less(
        self, rates: dict[int, float], positions: tuple[int, int, int]
    ) -> None:
        """Whatever was measured, and each context has its own figure."""
        costs = Costs()
        costs.prefills.update({where: Rate(rate, 1) for where, rate in rates.items()})
        start, middle, end = sorted(positions)
        whole = costs.prefill_seconds(start, end)
        first, second = costs.prefill_seconds(start, middle), costs.prefill_seconds(middle, end)
        assert None not in (whole, first, second)
        assert whole == pytest.approx(first + second)  # type: ignore[operator]

    def test_a_step_that_is_half_empty_says_nothing_of_tokens(self) -> None:
        costs = Costs(least=64)
        costs.computed(0, 8, 1.0)
        assert costs.prefill_seconds(0, 1000) is None
        costs.computed(0, 128, 0.1, fill=10)
        assert costs.prefill_seconds(0, 1280) == pytest.approx(1), "the engine's steps are small"
        costs.computed(0, 2048, 0.2)
        assert costs.prefill_seconds(0, 2048) == pytest.approx(0.2), "a token took a tenth of that"
        costs.computed(0, 128, 0.1)
        costs.computed(2048, 2176, 0.1, fill=500)
        assert costs.prefill_seconds(0, 2048) == pytest.approx(0.2)
        costs.computed(2048, 2176, 0.02, fill=1500)
        assert costs.prefill_seconds(2048, 3072) == pytest.approx(0.16)


class TestDecisions:
    def test_the_simple_rule_holds_where_nothing_is_known(self) -> None:
        what = asked(HitPart(NEAR, 640, 100 * MIB))
        assert decide(what, Costs()).tokens == 640
        only_loads = Costs()
        only_loads.loaded(NEAR, 100 * MIB, SHORT_STALL)
        assert decide(what, only_loads).tokens == 640

    def test_what_is_dear_to_load_is_computed_until_it_is_known_what_that_takes(self) -> None:
        what = asked(HitPart(NEAR, 640, 100 * MIB), suffix=1)
        only_loads = Costs()
        only_loads.loaded(NEAR, 100 * MIB, 2 * PRESUMED * 640)
        offer = decide(what, only_loads)
        assert (offer.tokens, offer.reason) == (0, "computing_to_measure")
        assert decide(what, only_loads, when="always").tokens == 640

    def test_beside_no_load_in_a_step_it_is_measured_what_computing_takes(self) -> None:
        short = Costs()
        short.loaded(NEAR, 100 * MIB, SHORT_STALL / 2)
        hit = asked(HitPart(NEAR, 640, 100 * MIB), suffix=CHUNK)
        assert decide(hit, short).mode is LoadMode.PARKED
        assert decide(replace(hit, prompt=hit.prompt - 1), short).mode is LoadMode.LAYERWISE
        assert decide(hit, short, when="always").mode is LoadMode.LAYERWISE
        short.computed(0, 2 * CHUNK, 1.0)
        assert decide(hit, short).mode is LoadMode.LAYERWISE

    def test_the_end_of_a_hit_tells_what_computing_takes(self) -> None:
        only_loads = Costs()
        only_loads.loaded(NEAR, 100 * MIB, PRESUMED * 640 / 2)
        hit = HitPart(NEAR, 640, 100 * MIB)
        offer = decide(asked(hit, suffix=1), only_loads)
        assert (offer.tokens, offer.mode) == (640 - CHUNK, LoadMode.PARKED)
        assert offer.reason == "computing_to_measure"
        assert decide(asked(hit, suffix=CHUNK), only_loads).tokens == 640, "what follows tells"
        assert decide(asked(hit, suffix=1), only_loads, divisible=False).tokens == 0
        unaligned = decide(asked(HitPart(NEAR, 630, 100 * MIB), suffix=1, floor=16), only_loads)
        assert (16 + unaligned.tokens) % CHUNK == 0

    def test_a_tier_that_is_slower_than_computing_is_not_loaded_from(self) -> None:
        what = asked(HitPart(FAR, 640, 100 * MIB))
        slow = decide(what, known(far=1e-8, token=1e-4))
        assert (slow.tokens, slow.reason) == (0, "slower_than_computing")
        assert slow.predicted_load > slow.predicted_compute > 0
        assert decide(what, known(near=1e-10, far=1e-10, token=1e-4)).tokens == 640
        assert decide(what, known(far=1e-8), when="always").tokens == 640

    def test_only_the_part_in_the_fast_tier_is_loaded(self) -> None:
        what = asked(HitPart(NEAR, 640, 100 * MIB), HitPart(FAR, 640, 100 * MIB))
        half = decide(what, known(near=1e-10, far=1e-8, token=1e-4))
        assert (half.tokens, half.reason) == (640, "hit_in_part")
        assert (half.taken, half.found) == ({NEAR: 640}, {NEAR: 640, FAR: 640})

    def test_a_slow_part_is_loaded_if_what_is_behind_it_is_worth_it(self) -> None:
        fast = HitPart(NEAR, 6400, 100 * MIB)
        costs = known(near=1e-10, far=2e-8, token=1e-4)
        assert decide(asked(HitPart(FAR, 64, MIB), fast), costs).tokens == 6464
        assert decide(asked(HitPart(FAR, 64, 100 * MIB), fast), costs).tokens == 0

    def test_the_mode_is_that_of_what_is_loaded(self) -> None:
        """And not that of the whole hit, of which a slow tier has the end."""
        near, far = HitPart(NEAR, 640, 10 * MIB), HitPart(FAR, 640, 1000 * MIB)
        costs = known(near=5e-10, far=1e-7, token=1e-3)
        alone = replace(asked(near), others_active=True)
        assert decide(alone, costs).mode is LoadMode.LAYERWISE
        cut = decide(replace(asked(near, far), others_active=True), costs)
        assert (cut.tokens, cut.mode) == (640, LoadMode.LAYERWISE)

    def test_tiers_bring_near_at_the_same_time_and_the_load_comes_after_it(self) -> None:
        what = asked(HitPart(FAR, 640, 100 * MIB), HitPart(OTHER, 640, 100 * MIB))
        costs = known(near=1e-10, far=1e-9, token=1e-3)
        assert decide(what, costs).predicted_load == -1, "one was never measured"
        costs.loaded(OTHER, 64 * MIB, 64 * MIB * 2e-9)
        seconds = 100 * MIB * 2e-9 + 200 * MIB * 1e-10
        assert decide(what, costs).predicted_load == pytest.approx(seconds)

    def test_windows_and_states_in_another_tier_are_paid_for(self) -> None:
        what = asked(HitPart(NEAR, 640, 100 * MIB), HitPart(FAR, 0, 100 * MIB))
        offer = decide(what, known(near=1e-10, far=1e-8, token=1e-4), divisible=False)
        assert offer.tokens == 0
        assert offer.predicted_load > 1
        assert decide(what, known(near=1e-10, far=1e-10), divisible=False).tokens == 640

    def test_what_is_queued_goes_first(self) -> None:
        what = asked(HitPart(NEAR, 640, 100 * MIB))
        costs = known(near=1e-10, token=1e-4)
        assert decide(what, costs).tokens == 640
        assert decide(replace(what, ahead={NEAR: 10_000 * MIB}), costs).tokens == 0

    def test_what_cannot_be_cut_is_taken_whole_or_not_at_all(self) -> None:
        what = asked(HitPart(NEAR, 640, 100 * MIB), HitPart(FAR, 640, 100 * MIB))
        slow = decide(what, known(near=1e-10, far=1e-8, token=1e-4), divisible=False)
        assert slow.tokens == 0
        fast = decide(what, known(near=1e-10, far=1e-10, token=1e-4), divisible=False)
        assert fast.tokens == 1280

    @pytest.mark.parametrize("tier", [NEAR, FAR])
    def test_now_and_then_it_is_seen_whether_a_tier_is_still_slow(self, tier: TierName) -> None:
        clock = Clock()
        rates = {"near": 1e-8} if tier == NEAR else {"near": 1e-12, "far": 1e-8}
        costs = known(token=1e-4, clock=clock, **rates)  # type: ignore[arg-type]
        what = asked(HitPart(tier, 640, 10 * MIB), suffix=5760)
        assert 0.1 < decide(what, costs).predicted_load < 0.11
        clock.now = HALF_LIFE
        assert decide(what, costs).tokens == 640, "a little slower: it is tried soon"
        slower = asked(HitPart(tier, 640, 100 * MIB), suffix=5760)
        assert decide(slower, costs).tokens == 0
        clock.now = 5 * HALF_LIFE
        tried = decide(slower, costs, mode="layerwise")
        assert (tried.tokens, tried.mode) == (640, LoadMode.PARKED)
        assert tried.reason == "hit_to_measure"
        assert tried.timeout == pytest.approx(ALLOWANCE * 6400e-4)
        costs.given_up(tier, 0, tried.timeout)
        assert decide(slower, costs).tokens == 0

    def test_a_short_prompt_grants_such_a_load_enough_to_begin(self) -> None:
        clock = Clock()
        costs = known(near=1e-7, token=1e-4, clock=clock)
        clock.now = 10 * HALF_LIFE
        tried = decide(asked(HitPart(NEAR, 640, 10 * MIB)), costs)
        assert (tried.reason, tried.timeout) == ("hit_to_measure", SHORT_STALL)

    def test_a_load_has_the_time_that_computing_takes(self) -> None:
        what = asked(HitPart(FAR, 64_000, 100 * MIB))
        assert decide(what, known(token=1e-4)).timeout == pytest.approx(6.4)
        assert decide(asked(HitPart(FAR, 64, MIB)), known()).timeout == LEAST_TIMEOUT
        assert decide(what, Costs(), deadline=20).timeout == 20
        assert decide(what, known(token=1e-4), when="always", deadline=20).timeout == 20
        assert decide(what, known(token=1e-4), deadline=5).timeout == 5

    def test_a_load_that_may_take_any_time_is_one_that_can_be_given_up(self) -> None:
        what = asked(HitPart(NEAR, 64, MIB))
        costs = Costs()
        costs.computed(0, 1000, 0.1)
        first = decide(what, costs)
        assert (first.mode, first.timeout) == (LoadMode.PARKED, LEAST_TIMEOUT)
        assert decide(what, costs, when="always").mode is LoadMode.LAYERWISE
        assert decide(what, costs, mode="layerwise").mode is LoadMode.LAYERWISE

    def test_a_suffix_that_was_dear_does_not_cut_the_hit_before_it(self) -> None:
        """Short suffixes behind a hit are computed beside other requests' prompts, and so seem to
        take long. To compute some of the hit with them would not make them any shorter."""
        costs = known(near=1e-10, token=8e-4)
        for _ in range(10):
            costs.computed(0, 1152, 1152 * 8e-4)
            costs.computed(1024, 1152, 128 * 25e-4, fill=1000)
        what = asked(HitPart(NEAR, 1024, 64 * MIB), suffix=128)
        for others in (False, True):
            decision = decide(replace(what, others_active=others), costs)
            assert (decision.tokens, decision.reason) == (1024, "hit")

    @settings(deadline=None)
    @given(
        st.lists(
            st.tuples(st.sampled_from([NEAR, FAR]), st.integers(1, 50)), min_size=1, max_size=4
        ),
        st.floats(1e-12, 1e-6),
        st.floats(1e-12, 1e-6),
        st.floats(1e-6, 1e-2),
        st.sampled_from(["auto", "parked", "layerwise"]),
        st.integers(0, 5),
    )
    def test_nothing_is_predicted_to_take_longer_than_computing(
        self,
        parts: list[tuple[TierName, int]],
        near: float,
        far: float,
        token: float,
        mode: str,
        floor: int,
    ) -> None:
        what = asked(
            *(HitPart(tier, chunks * CHUNK, chunks * MIB) for tier, chunks in parts),
            floor=floor * CHUNK,
        )
        costs = known(near=near, far=far, token=token)
        offer = decide(what, costs, mode=mode)
        assert 0 <= offer.tokens <= what.tokens
        assert (what.floor + offer.tokens) % CHUNK == 0
        assert sum(offer.taken.values()) == offer.tokens
        if offer.tokens:
            chunks = {tier: tokens // CHUNK for tier, tokens in offer.taken.items()}
            load = sum(chunks.values()) * MIB * near + chunks.get(FAR, 0) * MIB * far
            assert load < offer.tokens * token * (1 + 1e-9)


class TestInThePlanner:
    def compute(self, engine: Engine, name: str, seconds: float) -> None:
        """Compute a prompt of 140 tokens in so long, and end."""
        view = View(name, prompt(140, seed=len(name)))
        engine.planner.lookup(view, 0)
        engine.planner.admitted(name, 0)
        engine.step((name, 140))
        engine.now += seconds
        engine.planner.finished(name, 140, [list(range(20))])

    def load(self, engine: Engine, name: str, seconds: float, **how: object) -> int:
        """Load what is offered of a prompt in so long; how many tokens that is."""
        view = View(name, prompt(140), first_block=60)
        tokens = engine.planner.lookup(view, 0).tokens
        engine.planner.admitted(name, tokens)
        for order in engine.step().loads:
            engine.answer(order.transfer, seconds=seconds, **how)  # type: ignore[arg-type]
        engine.planner.finished(name, tokens, [list(range(60, 80))])
        return tokens

    def test_a_prefill_is_measured_from_its_first_step_to_its_end(self) -> None:
        engine = Engine()
        self.compute(engine, "a", 0.5)
        assert engine.planner.costs.prefill_seconds(0, 140) == pytest.approx(0.5)

    @pytest.mark.parametrize("timed_out", [False, True])
    def test_a_load_is_measured_and_then_believed(self, timed_out: bool) -> None:
        engine = Engine({"load": {"mode": "parked"}})
        engine.save(View("a", prompt(140)))
        self.compute(engine, "fast", 0.01)
        slow = {"outcome": Outcome.FAILED, "reason": TIMED_OUT} if timed_out else {}
        seconds = 1e-4 if timed_out else 0.1
        assert self.load(engine, "b", seconds, **slow) == 128
        assert self.load(engine, "c", 0) == 0
        engine.wait(20 * HALF_LIFE)
        assert self.load(engine, "d", 0.1) == 128, "it is tried again"
        assert self.load(engine, "e", 0) == 0, "and is still slow"
        engine.wait(20 * HALF_LIFE)
        assert self.load(engine, "f", 1e-3) == 128
        assert self.load(engine, "g", 1e-3) == 128, "it has recovered"

    def far_engine(self, *, far: float = 0.0, prefill: float = 0.5) -> Engine:
        """An engine whose near tier has the first two chunks of a prompt, and whose far tier has
        four. Near is fast; of the far one it is known what two chunks take, if that is given."""
        stored = dict(enumerate(keys_of(prompt(140))))
        engine = Engine({"load": {"deadline": 20}}, far_slots=20, stored=stored)
        costs = engine.planner.costs
        costs.loaded(NEAR, 2 * CHUNK_BYTES, 1e-3)
        if far:
            costs.loaded(FAR, 2 * CHUNK_BYTES, far)
        costs.computed(0, 140, prefill)
        for key in keys_of(prompt(76)):
            engine.near.room(key)
            engine.near.filled(key)
        return engine

    def wait_for_moves(
        self, engine: Engine, seconds: float, name: str = "waits", **how: object
    ) -> Offer:
        """A request waits so long for the two chunks that are far; what it is offered then."""
        view = View(name, prompt(140), first_block=60)
        assert engine.planner.lookup(view, 0).ask_again
        moves = inward(engine.step())
        assert len(moves) == 2
        engine.now += seconds
        if how:
            ids = [move.transfer for move in moves]
            engine.answer(*ids, seconds=seconds, **how)  # type: ignore[arg-type]
        return engine.planner.lookup(view, 0)

    def test_a_request_that_prefetches_gets_all_however_slow_the_tier_is(self) -> None:
        """Others are computed sooner; a slow tier is waited for no longer than the deadline."""
        engine = self.far_engine(far=10.0)
        assert engine.planner.lookup(View("usual", prompt(140)), 0).tokens == 64
        view = View("waits", prompt(140), first_block=60, regard=Regard(prefetch=True))
        assert engine.planner.lookup(view, 0).ask_again
        moves = inward(engine.step())
        engine.now += 10
        engine.step()
        assert engine.planner.lookup(view, 0).ask_again
        engine.answer(*(move.transfer for move in moves), seconds=10)
        assert engine.planner.lookup(view, 0).tokens == 128

    def test_moves_that_overlap_are_what_the_tier_has_worked(self) -> None:
        engine = self.far_engine()
        assert self.wait_for_moves(engine, 0.25, outcome=Outcome.DONE).tokens == 128
        costs = engine.planner.costs
        assert costs.load_seconds(FAR, 2 * CHUNK_BYTES) == pytest.approx(0.25)
        assert costs.load_seconds(NEAR, 2 * CHUNK_BYTES) == pytest.approx(1e-3)

    def test_a_long_step_does_not_make_a_tier_slow(self) -> None:
        """Its ranks say how long it took; when control hears of it says nothing."""
        engine = self.far_engine()
        view = View("waits", prompt(140), first_block=60)
        assert engine.planner.lookup(view, 0).ask_again
        moves = inward(engine.step())
        engine.now += 5
        engine.answer(*(move.transfer for move in moves), seconds=0.01)
        seconds = engine.planner.costs.load_seconds(FAR, 2 * CHUNK_BYTES)
        assert seconds == pytest.approx(0.01)

    def test_moves_that_fail_at_once_do_not_make_a_tier_fast(self) -> None:
        engine = self.far_engine()
        assert self.wait_for_moves(engine, 1e-6, outcome=Outcome.FAILED).tokens == 64
        assert engine.planner.costs.load_seconds(FAR, 2 * CHUNK_BYTES) is None

    def test_a_wait_that_was_in_vain_makes_a_tier_slow_at_once(self) -> None:
        engine = self.far_engine()
        assert self.wait_for_moves(engine, 1.1).tokens == 64, "1 s, or what computing takes"
        seconds = engine.planner.costs.load_seconds(FAR, 2 * CHUNK_BYTES)
        assert seconds is not None
        assert seconds == pytest.approx(2.0), "a chunk takes longer than was waited for"
        assert engine.planner.lookup(View("next", prompt(140)), 0).tokens == 64

    @pytest.mark.parametrize("fast", [True, False])
    def test_a_tier_behind_a_prefix_that_is_near_is_tried_again(self, fast: bool) -> None:
        """Loads that stop where it begins say nothing of it."""
        engine = self.far_engine(far=10.0)
        view = View("first", prompt(140), first_block=60)
        assert engine.planner.lookup(view, 0).tokens == 64
        assert engine.planner.hit_sources("first") == {NEAR: 64}
        engine.planner.finished("first", 0, [()])
        engine.wait(6 * HALF_LIFE)
        took = {"outcome": Outcome.DONE} if fast else {}
        offer = self.wait_for_moves(engine, 0.02 if fast else 0.03, **took)
        assert offer.tokens == (128 if fast else 64), "5 % of computing is waited for, no more"
        engine.planner.finished("waits", 0, [()])
        later = View("later", prompt(140), first_block=80)
        for key in keys_of(prompt(140))[2:]:
            if key in engine.near.visible:
                engine.near.drop(key)
        assert engine.lookup(later).tokens == (128 if fast else 64)

    def test_who_would_wait_longer_for_others_moves_than_it_computes_does_not_wait(self) -> None:
        """What waits to be brought near for others goes first."""
        prompts = [prompt(140, seed=seed) for seed in range(6)]
        engine = self.stored(key for tokens in prompts for key in keys_of(tokens))
        answers = [
            engine.planner.lookup(View(f"request {seed}", tokens), 0).ask_again
            for seed, tokens in enumerate(prompts)
        ]
        assert answers == [True, True, True, False, False, False]
        same = engine.planner.lookup(View("same as the first", prompts[0]), 0)
        assert same.ask_again, "what it needs is on its way"

    def test_what_a_crowd_has_in_common_does_not_make_it_wait_for_itself(self) -> None:
        document = prompt(128)
        engine = self.stored(keys_of(document))
        views = [View(f"question {n}", [*document, *[n] * 12]) for n in range(20)]
        assert all(engine.planner.lookup(view, 0).ask_again for view in views)

    def stored(self, keys: object) -> Engine:
        """An engine whose far tier has chunks; four take 0.3 s, and a second to be computed."""
        engine = Engine(far_slots=50, stored=dict(enumerate(keys)))  # type: ignore[call-overload]
        costs = engine.planner.costs
        costs.loaded(NEAR, 4 * CHUNK_BYTES, 1e-3)
        costs.loaded(FAR, 4 * CHUNK_BYTES, 0.3)
        costs.computed(0, 140, 1.0)
        return engine


@pytest.mark.parametrize(("recomputes", "timeout"), [(True, LEAST_TIMEOUT), (False, 20.0)])
def test_an_engine_that_fails_requests_gives_no_load_up_early(
    recomputes: bool, timeout: float
) -> None:
    engine = Engine({"load": {"deadline": 20}}, recomputes=recomputes)
    tokens = prompt(4 * 16 + 1)
    engine.save(View("first", tokens))
    engine.planner.costs.computed(0, 1000, 0.1)
    offer = engine.lookup(View("second", tokens))
    engine.planner.admitted("second", offer.tokens)
    (load,) = engine.step().loads
    assert load.timeout == timeout
