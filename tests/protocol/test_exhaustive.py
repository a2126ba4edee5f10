"""Every history of a small world keeps the promises of ``docs/push.md``: a block is not used again
while a write reads it or may still land in it, a request runs on its own prompt's pages or none,
``fenced`` is true, and whatever goes wrong, everything ends and nothing is left.

One push has two or three blocks; so many faults may happen, of any kind that is named, at any
moment, and everything else in any order.
"""

from __future__ import annotations

import pytest

from lamina.geometry import Group, GroupKind
from protocol.engine import BLOCK, Options, PushCase
from protocol.explore import explore
from protocol.world import FAULTS

FULL = Group(GroupKind.FULL, BLOCK)
WINDOW = Group(GroupKind.WINDOW, BLOCK, window=BLOCK + 1)
STATE = Group(GroupKind.STATE, BLOCK)
SHORT, LONG = PushCase(tokens=2), PushCase(tokens=5)
FROM_A_TIER = tuple(
    PushCase(tokens=5, hit=hit, hit_tokens=4) for hit in ("engine", "parked", "layerwise")
)


def everything(options: Options) -> None:
    found = explore(options, limit=2_000_000)
    assert found.complete


def faults(text: str) -> frozenset[str]:
    kinds = frozenset(text.split())
    assert kinds <= FAULTS
    return kinds


def test_nothing_goes_wrong() -> None:
    everything(Options((LONG,), groups=(FULL, WINDOW, STATE)))
    everything(Options((LONG,), 2, 2))


def test_one_thing_goes_wrong() -> None:
    everything(Options(faults=FAULTS, budget=1))


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2), (2, 2)])
def test_ranks(prefill: int, decode: int) -> None:
    kinds = faults("write_fails abort_decode break_prefill")
    everything(Options((SHORT,), prefill, decode, faults=kinds, budget=1))


@pytest.mark.parametrize("case", FROM_A_TIER, ids=lambda case: case.hit)
def test_what_was_computed_before(case: PushCase) -> None:
    everything(Options((case,), faults=faults("abort_prefill preempt crash_decode"), budget=1))


def test_states_and_windows() -> None:
    kinds = faults("write_fails abort_decode")
    everything(Options((LONG,), groups=(FULL, STATE), faults=kinds, budget=1))
    everything(Options((LONG,), groups=(FULL, WINDOW), faults=faults("preempt"), budget=1))


def test_little_may_be_on_its_way() -> None:
    kinds = faults("abort_prefill preempt write_fails")
    everything(Options(faults=kinds, budget=1, narrow=True))


def test_different_prompts() -> None:
    everything(Options((PushCase(misled=True),), faults=faults("abort_decode"), budget=1))


def test_a_prefix_that_the_decode_engine_has() -> None:
    everything(Options((PushCase(floor=2),), faults=faults("deadline abort_prefill"), budget=1))
    everything(Options((PushCase(tokens=3, floor=2),), faults=faults("never_prefill"), budget=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds",
    [
        "crash_prefill break_decode second",
        "crash_prefill silent write_fails",
        "break_prefill break_decode abort_decode",
        "write_fails deadline second",
        "preempt abort_prefill patience",
        "crash_decode break_decode break_prefill",
        "crash_prefill abort_decode preempt",
    ],
)
def test_two_things_go_wrong(kinds: str) -> None:
    everything(Options(faults=faults(kinds), budget=2))


@pytest.mark.slow
def test_two_pushes() -> None:
    everything(Options((SHORT, SHORT)))


@pytest.mark.soak
@pytest.mark.parametrize(
    "kinds", ["crash_prefill break_decode", "abort_prefill silent", "write_fails preempt"]
)
def test_two_pushes_of_which_one_goes_wrong(kinds: str) -> None:
    """As much of it as minutes show: all of it had not been seen after twenty."""
    found = explore(Options((SHORT, SHORT), faults=faults(kinds), budget=1), limit=50_000)
    assert found.states >= 50_000


@pytest.mark.slow
@pytest.mark.parametrize("groups", [(FULL, STATE), (FULL, WINDOW)], ids=["state", "window"])
def test_one_thing_goes_wrong_with_groups(groups: tuple[Group, ...]) -> None:
    everything(Options((LONG,), groups=groups, faults=FAULTS, budget=1))


@pytest.mark.slow
@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2), (2, 2)])
def test_one_thing_goes_wrong_with_ranks(prefill: int, decode: int) -> None:
    everything(Options((SHORT,), prefill, decode, faults=FAULTS, budget=1))


@pytest.mark.slow
def test_one_rank_is_stopped_while_a_write_of_the_other_fails() -> None:
    everything(Options((SHORT,), 2, 2, faults=faults("write_fails deadline"), budget=2))
