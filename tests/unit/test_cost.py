"""Guards what is decided by measurement: what is predicted from what was measured, how much of a
hit is loaded, that nobody guesses where nothing is known, and that mistakes end."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from driven_planner import CHUNK_BYTES, Engine, View, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.config import LoadConfig
from lamina.control.cost import LARGEST_STEP, CostModel, Costs, Estimate
from lamina.control.policy import (
    LEAST_PATIENCE,
    RETRY_SECONDS,
    Decision,
    HitPart,
    LoadPolicy,
    Situation,
    predict_load,
)
from lamina.plan import FetchOrder, LoadMode, Outcome, Receipt, TierName, TransferReceipt

HOST, DISK = TierName.HOST, TierName.DISK
CHUNK = 64
MIB = 1 << 20


def situation(*parts: HitPart, suffix: int = 64, floor: int = 0) -> Situation:
    hit = sum(part.tokens for part in parts)
    return Situation(
        hit_tokens=hit,
        fallible=any(part.tier is DISK for part in parts),
        others_active=False,
        reports_blocks=False,
        floor=floor,
        prompt=floor + hit + suffix,
        parts=parts,
        chunk_tokens=CHUNK,
    )


def known(*, host: float = 1e-9, disk: float = 1e-9, token: float = 1e-4) -> Costs:
    """Seconds per byte of each tier, and per token."""
    model = CostModel()
    model.loaded(HOST, 64 * MIB, host * 64 * MIB)
    model.loaded(DISK, 64 * MIB, disk * 64 * MIB)
    model.computed(0, 1000, token * 1000)
    return model.costs


def decide(what: Situation, costs: Costs, **load: object) -> Decision:
    return LoadPolicy(LoadConfig.model_validate(load), CHUNK).decide(what, costs)


class TestEstimates:
    def test_nothing_is_known_at_first(self) -> None:
        assert Costs().load_seconds(HOST, 1000) is None
        assert Costs().prefill_seconds(0, 1000) is None

    def test_what_was_given_up_is_too_slow_at_once_and_for_every_size(self) -> None:
        model = CostModel(known(host=1e-10))
        for _ in range(100):
            model.loaded(HOST, 512 * MIB, 0.05)
        model.given_up(HOST, 512 * MIB, 100 * MIB, 20.0)
        assert model.costs.load_seconds(HOST, 512 * MIB) == pytest.approx(102.4)
        assert model.costs.load_seconds(HOST, MIB) == pytest.approx(0.2)
        model.loaded(HOST, MIB, 1e-4)
        assert model.costs.load_seconds(HOST, MIB) == pytest.approx(1e-4)
        seconds = model.costs.load_seconds(HOST, 512 * MIB)
        assert seconds == pytest.approx(0.0512), "it has recovered for every size"

    def test_what_was_measured_once_is_believed(self) -> None:
        costs = known(host=2e-9, token=3e-4)
        assert costs.load_seconds(HOST, 64 * MIB) == pytest.approx(64 * MIB * 2e-9)
        assert costs.prefill_seconds(0, 1000) == pytest.approx(0.3)

    def test_sizes_have_estimates_of_their_own(self) -> None:
        model = CostModel()
        for _ in range(20):
            model.loaded(HOST, 64 * 1024, 0.001)
            model.loaded(HOST, 256 * MIB, 0.05)
        small = model.costs.load_seconds(HOST, 64 * 1024)
        assert small is not None
        assert small > 10 * 64 * 1024 * 0.05 / (256 * MIB)

    def test_one_figure_that_is_far_off_changes_little(self) -> None:
        model = CostModel()
        for _ in range(10):
            model.computed(0, 1000, 1.0)
        model.computed(0, 1000, 1000.0)
        seconds = model.costs.prefill_seconds(0, 1000)
        assert seconds is not None
        assert 1.0 < seconds <= math.exp(0.2 * LARGEST_STEP) + 1e-9

    def test_what_has_changed_is_learnt(self) -> None:
        model = CostModel()
        for _ in range(100):
            model.loaded(DISK, 64 * MIB, 0.01)
        for _ in range(30):
            model.loaded(DISK, 64 * MIB, 1.0)
        seconds = model.costs.load_seconds(DISK, 64 * MIB)
        assert seconds is not None
        assert seconds > 0.7

    def test_a_slow_tier_is_slow_for_every_size(self) -> None:
        model = CostModel()
        model.loaded(DISK, 256 * MIB, 0.1)
        model.loaded(DISK, MIB, 0.001)
        for _ in range(40):
            model.loaded(DISK, MIB, 1.0)
        seconds = model.costs.load_seconds(DISK, 256 * MIB)
        assert seconds is not None
        assert seconds > 10

    @settings(deadline=None)
    @given(
        st.dictionaries(st.integers(0, 16), st.floats(1e-6, 1e-2), min_size=1, max_size=6),
        st.tuples(*[st.integers(0, 1 << 17)] * 3),
    )
    def test_to_compute_more_never_takes_less(
        self, rates: dict[int, float], positions: tuple[int, int, int]
    ) -> None:
        """Whatever was measured, and each context has its own figure."""
        costs = Costs(prefills={where: Estimate(math.log(r), 1) for where, r in rates.items()})
        start, middle, end = sorted(positions)
        whole = costs.prefill_seconds(start, end)
        first, second = costs.prefill_seconds(start, middle), costs.prefill_seconds(middle, end)
        assert None not in (whole, first, second)
        assert whole == pytest.approx(first + second)  # type: ignore[operator]

    def test_a_short_prefill_says_nothing(self) -> None:
        model = CostModel()
        model.computed(0, 8, 1.0)
        assert model.costs.prefill_seconds(0, 1000) is None

    @settings(deadline=None)
    @given(st.lists(st.floats(1e-12, 1e3), min_size=1, max_size=50))
    def test_an_estimate_stays_among_what_was_measured(self, rates: list[float]) -> None:
        estimate = Estimate(math.log(rates[0]), 1)
        for rate in rates[1:]:
            estimate = estimate.with_measured(rate)
        assert min(rates) * 0.999 <= estimate.rate <= max(rates) * 1.001


class TestDecisions:
    def test_the_simple_rule_holds_where_nothing_is_known(self) -> None:
        what = situation(HitPart(HOST, 640, 100 * MIB))
        assert decide(what, Costs()).tokens == 640
        only_loads = CostModel()
        only_loads.loaded(HOST, 100 * MIB, 1000.0)
        assert decide(what, only_loads.costs).tokens == 640

    def test_a_tier_that_is_slower_than_computing_is_not_loaded_from(self) -> None:
        what = situation(HitPart(DISK, 640, 100 * MIB))
        slow = decide(what, known(disk=1e-8, token=1e-4))
        assert (slow.tokens, slow.reason) == (0, "slower_than_computing")
        assert slow.load > slow.compute > 0
        assert decide(what, known(disk=1e-10, token=1e-4)).tokens == 640
        assert decide(what, known(disk=1e-8), when="always").tokens == 640

    def test_only_the_part_in_the_fast_tier_is_loaded(self) -> None:
        what = situation(HitPart(HOST, 640, 100 * MIB), HitPart(DISK, 640, 100 * MIB))
        half = decide(what, known(host=1e-10, disk=1e-8, token=1e-4))
        assert (half.tokens, half.reason) == (640, "hit_in_part")

    def test_layer_by_layer_the_far_end_is_computed_meanwhile(self) -> None:
        what = situation(HitPart(HOST, 6400, 1000 * MIB))
        # Both take a second; together half of it.
        part = decide(what, known(host=1 / (1000 * MIB), token=1 / 6400), mode="layerwise")
        assert 2000 < part.tokens < 4400
        assert part.tokens % CHUNK == 0

    def test_what_is_queued_goes_first(self) -> None:
        what = situation(HitPart(HOST, 640, 100 * MIB))
        costs = known(host=1e-10, token=1e-4)
        assert decide(what, costs).tokens == 640
        behind = replace(what, queued=((HOST, 10_000 * MIB),))
        assert decide(behind, costs, mode="parked").tokens == 0

    def test_what_cannot_be_cut_is_taken_whole_or_not_at_all(self) -> None:
        what = replace(
            situation(HitPart(HOST, 640, 100 * MIB), HitPart(DISK, 640, 100 * MIB)),
            divisible=False,
        )
        assert decide(what, known(host=1e-10, disk=1e-8, token=1e-4)).tokens == 0
        assert decide(what, known(host=1e-10, disk=1e-10, token=1e-4)).tokens == 1280

    def test_now_and_then_a_little_is_loaded_to_see(self) -> None:
        what = situation(HitPart(DISK, 640, 100 * MIB), floor=32)
        again = replace(what, retries=frozenset({DISK}))
        little = decide(again, known(disk=1e-8, token=1e-4))
        assert (little.tokens, little.mode) == (32, LoadMode.PARKED)
        assert little.reason == "hit_to_measure"

    def test_a_load_has_the_patience_of_what_computing_takes(self) -> None:
        what = situation(HitPart(DISK, 64_000, 100 * MIB))
        assert decide(what, known(token=1e-4)).patience == pytest.approx(12.8)
        assert decide(situation(HitPart(DISK, 64, MIB)), known()).patience == LEAST_PATIENCE
        assert decide(what, Costs()).patience == math.inf
        assert decide(what, known(token=1e-4), when="always").patience == math.inf

    def test_a_load_that_may_take_any_time_is_one_that_can_be_given_up(self) -> None:
        what = situation(HitPart(HOST, 64, MIB))
        nothing = CostModel()
        nothing.computed(0, 1000, 0.1)
        first = decide(what, nothing.costs)
        assert (first.mode, first.patience) == (LoadMode.PARKED, LEAST_PATIENCE)
        assert decide(replace(what, reports_blocks=True), nothing.costs).mode is LoadMode.LAYERWISE
        assert decide(what, nothing.costs, when="always").mode is LoadMode.LAYERWISE
        assert decide(what, nothing.costs, mode="layerwise").mode is LoadMode.LAYERWISE

    def test_a_copy_by_the_models_own_cores_comes_before_the_step(self) -> None:
        """On both at once they take longer than one after the other."""
        costs = known(host=1e-10, token=1e-3)
        model = CostModel(costs)
        model.worked(HOST, 64 * MIB, 1e-10 * 64 * MIB)
        what = situation(HitPart(HOST, 64 * CHUNK, 512 * MIB), suffix=1)
        assert decide(what, known(host=1e-10, token=1e-3)).mode is LoadMode.LAYERWISE
        assert decide(what, costs).mode is LoadMode.PARKED
        assert decide(what, costs, mode="layerwise").mode is LoadMode.LAYERWISE

    def test_a_load_hides_behind_one_step_and_not_behind_the_whole_prefill(self) -> None:
        what = situation(HitPart(HOST, 1280, 100 * MIB), suffix=10_000)
        costs = known(host=1e-8, token=1e-3)
        assert decide(what, costs).tokens == 1280
        assert decide(replace(what, step_tokens=2048), costs).tokens == 1280, "1 s beside 2 s"
        assert decide(replace(what, step_tokens=64), costs).tokens < 1280

    def test_what_saves_next_to_nothing_is_not_loaded(self) -> None:
        what = situation(HitPart(HOST, 128, MIB), suffix=10_000)
        assert decide(what, known(host=1e-12, token=1e-3)).tokens == 0
        assert decide(replace(what, prompt=1000), known(host=1e-12, token=1e-3)).tokens == 128

    def test_what_waits_for_a_link_goes_on_beside_the_step(self) -> None:
        costs = known(host=1e-8, token=1e-3)
        CostModel(costs).worked(HOST, 64 * MIB, 1e-10 * 64 * MIB)
        what = situation(HitPart(HOST, 64 * CHUNK, 512 * MIB), suffix=2048)
        assert decide(what, costs, when="always").mode is LoadMode.LAYERWISE

    def test_a_suffix_that_was_dear_does_not_cut_the_hit_before_it(self) -> None:
        """Short suffixes behind a hit are computed beside other requests' prompts, and so seem to
        take long. To compute some of the hit with them would not make them any shorter."""
        model = CostModel(known(host=1e-10, token=8e-4))
        for _ in range(10):
            model.computed(0, 1152, 1152 * 8e-4)
            model.computed(1024, 1152, 128 * 25e-4)
        what = situation(HitPart(HOST, 1024, 64 * MIB), suffix=128)
        for others in (False, True):
            decision = decide(replace(what, others_active=others), model.costs)
            assert (decision.tokens, decision.reason) == (1024, "hit")

    @settings(deadline=None)
    @given(
        st.lists(
            st.tuples(st.sampled_from([HOST, DISK]), st.integers(1, 50)), min_size=1, max_size=4
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
        host: float,
        disk: float,
        token: float,
        mode: str,
        floor: int,
    ) -> None:
        what = situation(
            *(HitPart(tier, chunks * CHUNK, chunks * MIB) for tier, chunks in parts),
            floor=floor * CHUNK,
        )
        costs = known(host=host, disk=disk, token=token)
        decision = decide(what, costs, mode=mode)
        assert 0 <= decision.tokens <= what.hit_tokens
        assert (what.floor + decision.tokens) % CHUNK == 0
        if decision.tokens:
            load = predict_load(what, decision.tokens, costs)
            rest = costs.prefill_seconds(what.floor + decision.tokens, what.prompt)
            all_of_it = costs.prefill_seconds(what.floor, what.prompt)
            assert load is not None
            assert rest is not None
            assert all_of_it is not None
            layerwise = decision.mode is LoadMode.LAYERWISE
            assert (max(load, rest) if layerwise else load + rest) < all_of_it


class TestInThePlanner:
    def compute(self, engine: Engine, name: str, seconds: float) -> None:
        """Compute a prompt of 140 tokens in so long, and end."""
        view = View(name, prompt(140, seed=len(name)))
        engine.planner.lookup(view, 0)
        engine.planner.admitted(name, 0)
        engine.step((name, 140))
        engine.now += seconds
        engine.planner.finished(name, 140, [list(range(20))])

    def test_a_prefill_is_measured_from_its_first_step_to_its_end(self) -> None:
        engine = Engine()
        self.compute(engine, "a", 0.5)
        assert engine.planner.costs.prefill_seconds(0, 140) == pytest.approx(0.5)

    def test_a_load_is_measured_and_then_believed(self) -> None:
        engine = Engine({"load": {"mode": "parked"}})
        engine.save(View("a", prompt(140)))
        self.compute(engine, "fast", 0.001)
        slow = View("b", prompt(140), first_block=60)
        assert engine.planner.lookup(slow, 0).tokens == 128
        engine.planner.admitted("b", 128)
        (order,) = engine.step().loads
        receipt = TransferReceipt(order.transfer, Outcome.DONE, 2 * CHUNK_BYTES, active=1.0)
        engine.planner.receive([Receipt(0, (receipt,))])
        engine.planner.finished("b", 128, [list(range(60, 80))])
        again = View("c", prompt(140), first_block=80)
        assert engine.planner.lookup(again, 0).tokens == 0
        assert engine.planner.lookup(again, 0).tokens == 0
        engine.wait(RETRY_SECONDS)
        assert engine.planner.lookup(again, 0).tokens == 32
        engine.planner.admitted("c", 32)
        (order,) = engine.step().loads
        receipt = TransferReceipt(order.transfer, Outcome.DONE, CHUNK_BYTES, active=1.0)
        engine.planner.receive([Receipt(0, (receipt,))])
        engine.wait(RETRY_SECONDS)
        later = View("d", prompt(140), first_block=100)
        assert engine.planner.lookup(later, 0).tokens == 0, "still slow: it is left alone longer"
        engine.wait(RETRY_SECONDS)
        assert engine.planner.lookup(later, 0).tokens == 32

    def cut_where_the_disk_begins(self, engine: Engine, name: str) -> tuple[FetchOrder, ...]:
        """A request loads the half of its prompt that is in the host, and computes what is on a
        disk that is thought to be slow; the fetches of its step."""
        view = View(name, prompt(4 * 32 + 12), first_block=60)
        assert engine.planner.lookup(view, 0).tokens == 64
        assert engine.planner.hit_sources(name) == {HOST: 64}
        engine.planner.admitted(name, 64)
        plan = engine.step()
        engine.answer(*(load.transfer for load in plan.loads))
        engine.planner.finished(name, 0, [list(range(60, 80))])
        return plan.fetches

    @pytest.mark.parametrize("fast", [True, False])
    def test_a_disk_behind_a_prefix_in_the_host_is_measured_again(self, fast: bool) -> None:
        """Loads that stop where the disk begins say nothing of the disk."""
        costs = CostModel()
        costs.loaded(HOST, 2 * CHUNK_BYTES, 1e-3)
        costs.loaded(DISK, 2 * CHUNK_BYTES, 10.0)
        costs.computed(0, 140, 0.5)
        engine = Engine(disk_slots=20, costs=costs.costs)
        engine.save(View("a", prompt(140)))
        while engine.planner.has_work:
            engine.settle_writes()
        host = engine.planner._catalog.host
        for key in list(host.visible)[2:]:
            host.drop(key)
        assert not self.cut_where_the_disk_begins(engine, "first")
        engine.wait(RETRY_SECONDS)
        (fetch,) = self.cut_where_the_disk_begins(engine, "second")
        seconds = 1e-3 if fast else 5.0
        receipt = TransferReceipt(fetch.transfer, Outcome.DONE, CHUNK_BYTES, seconds=seconds)
        engine.planner.receive([Receipt(0, (receipt,))])
        host.drop(fetch.key)
        later = View("later", prompt(140), first_block=80)
        found = engine.planner.lookup(later, 0).tokens
        assert found == (128 if fast else 64)
        if not fast:
            engine.wait(RETRY_SECONDS)
            assert not self.cut_where_the_disk_begins(engine, "third"), "left alone longer"
