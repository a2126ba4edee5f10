"""Until every rank has reported its tiers nothing is answered that would be lost."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lamina_kv.engines.vllm.layout import UnsupportedModel, check_supported
from lamina_kv.engines.vllm.messages import LaminaReport, LaminaWords
from lamina_kv.engines.vllm.opening import PLANS, Opening
from lamina_kv.keys import CHECKPOINT, Epoch
from lamina_kv.plan import RankReport


def report(rank: int, namespace: str = "") -> LaminaReport:
    return LaminaReport(RankReport(rank, 4, 0, 100), namespace, "")


def test_the_first_plan_asks_and_no_other() -> None:
    opening = Opening(1)
    assert [opening.asks() for _ in range(4)] == [True, False, False, False]


def test_ranks_that_never_report_are_an_error_that_names_them() -> None:
    opening = Opening(3)
    opening.heard([report(1)])
    for _ in range(PLANS):
        opening.asks()
    with pytest.raises(RuntimeError, match=r"ranks \[0, 2\] have not reported their tiers"):
        opening.asks()


def test_reports_are_complete_when_every_rank_has_said_so_in_any_order() -> None:
    opening = Opening(3)
    assert opening.heard([report(2)]) is None
    words = LaminaWords(reports=(report(1),)).aggregate(LaminaWords(reports=(report(0),)))
    assert isinstance(words, LaminaWords)
    assert opening.heard(words.reports) == [report(0), report(1), report(2)]


def test_ranks_of_different_checkpoints_are_an_error() -> None:
    with pytest.raises(ValueError, match="disagree about what they serve"):
        Opening(2).heard([report(0, "a"), report(1, "b")])


def test_a_reset_before_the_reports_is_remembered() -> None:
    opening = Opening(1)
    assert opening.epoch is CHECKPOINT
    opening.reset()
    first = opening.epoch
    opening.reset()
    assert len({CHECKPOINT, first, opening.epoch}) == 3
    assert not opening.epoch.lasting
    opening.begin(Epoch("step 7"))
    assert opening.epoch == Epoch("step 7")


def test_requests_that_ended_before_the_reports_do_not_wait() -> None:
    opening = Opening(1)
    stays, goes = (SimpleNamespace(request_id=name) for name in "ab")
    requests: list[Any] = [stays, goes]
    for request in requests:
        opening.arrived(request)
    opening.finished(requests[1])
    assert list(opening.hand_over()) == [stays]


def test_when_it_is_over_nothing_of_it_is_kept() -> None:
    """Reports name every chunk that is stored, and requests hold their tokens."""
    opening = Opening(1)
    request: Any = SimpleNamespace(request_id="a")
    reported = report(0)
    before = [sys.getrefcount(kept) for kept in (request, reported)]
    opening.arrived(request)
    opening.heard([reported])
    opening.hand_over()
    assert [sys.getrefcount(kept) for kept in (request, reported)] == before


def test_a_scheduler_on_every_rank_is_refused() -> None:
    parallel = SimpleNamespace(distributed_executor_backend="external_launcher", world_size=2)
    config: Any = SimpleNamespace(parallel_config=parallel, speculative_config=None)
    cache: Any = SimpleNamespace(kv_cache_groups=(), kv_cache_layout=None)
    with pytest.raises(UnsupportedModel, match="distributed_executor_backend external_launcher"):
        check_supported(config, cache)
    parallel.world_size = 1
    check_supported(config, cache)
