"""Every history of a small world keeps the promises of ``docs/push.md``: a block is not used again
while a write reads it or may still land in it, a request runs on its own prompt's pages or none,
``fenced`` is true, and whatever goes wrong, everything ends in time and nothing is left.

One push has two or three blocks; so many faults may happen, of any kind that is named, at any
moment, and everything else in any order. ``test_broken_rules`` shows what the model sees.
"""

from __future__ import annotations

import os

import pytest

from lamina_kv.geometry import Group, GroupKind
from protocol.engine import BLOCK, Options, PushCase
from protocol.explore import explore
from protocol.world import FAULTS, HURRIES

FULL = Group(GroupKind.FULL, BLOCK)
WINDOW = Group(GroupKind.WINDOW, BLOCK, window=BLOCK + 1)
STATE = Group(GroupKind.STATE, BLOCK)
SHORT, CASE, LONG = PushCase(tokens=2), PushCase(tokens=4), PushCase(tokens=5)
FROM_A_TIER = tuple(
    PushCase(tokens=5, hit=hit, hit_tokens=4) for hit in ("engine", "parked", "layerwise")
)
QUICK = (
    *("preempt", "abort_prefill", "withdraw"),
    *("write_fails", "lag", "tarry", "never_prefill", "never_decode"),
)
SOME = 800
"""States of a search that has no time for all."""
MORE = int(os.environ.get("LAMINA_PROTOCOL_STATES", "2000"))
"""States, after something has gone wrong, of a search that has more time."""


def everything(options: Options) -> None:
    found = explore(options, limit=2_000_000)
    assert found.complete


def some(options: Options) -> None:
    """Some of a world, with what goes wrong at every moment of it."""
    found = explore(options, limit=20 * SOME, wrong_later=SOME, seed=1)
    assert found.wrong_later >= SOME
    assert max(found.depths) >= 8


def more(options: Options) -> None:
    """As :func:`some`, with more of it."""
    assert explore(options, limit=10 * MORE, wrong_later=MORE, seed=1).wrong_later >= MORE


def faults(text: str) -> frozenset[str]:
    kinds = frozenset(text.split())
    assert kinds <= FAULTS | HURRIES
    return kinds


def test_nothing_goes_wrong() -> None:
    everything(Options((CASE,), groups=(FULL, WINDOW, STATE)))
    everything(Options((SHORT,), 2, 2))


@pytest.mark.parametrize(
    "kind", [*QUICK[:3], *(pytest.param(kind, marks=pytest.mark.slow) for kind in QUICK[3:])]
)
def test_one_thing_goes_wrong(kind: str) -> None:
    everything(Options((SHORT,), faults=faults(kind), budget=1))


def test_one_thing_goes_wrong_of_all_that_can() -> None:
    some(Options((CASE,), faults=FAULTS | HURRIES, budget=1, hurries=1))


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        pytest.param(2, 1, marks=pytest.mark.slow),
        (1, 2),
        pytest.param(2, 2, marks=pytest.mark.slow),
    ],
)
def test_ranks(prefill: int, decode: int) -> None:
    kinds = faults("write_fails abort_decode break_prefill lag")
    some(Options((SHORT,), prefill, decode, faults=kinds, budget=1))


@pytest.mark.parametrize("case", FROM_A_TIER, ids=lambda case: case.hit)
def test_what_was_computed_before(case: PushCase) -> None:
    some(Options((case,), faults=faults("abort_prefill preempt crash_decode"), budget=1))


def test_states_and_windows() -> None:
    kinds = faults("write_fails abort_decode preempt")
    some(Options((LONG,), groups=(FULL, STATE), faults=kinds, budget=1))
    some(Options((LONG,), groups=(FULL, WINDOW), faults=kinds, budget=1))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_destinations_that_are_known_while_a_step_runs(ranks: int) -> None:
    everything(Options((SHORT,), ranks, beside=True))
    everything(Options((SHORT,), ranks, faults=faults("deaf"), budget=1, beside=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_goes_wrong_while_destinations_become_known(ranks: int) -> None:
    kinds = faults(
        "abort_decode abort_prefill preempt withdraw write_fails break_prefill deaf moment"
    )
    some(Options((CASE,), ranks, faults=kinds, budget=2, hurries=1, beside=True))


@pytest.mark.slow
def test_states_and_windows_that_leave_while_a_step_runs() -> None:
    kinds = faults("abort_decode preempt crash_decode")
    some(Options((LONG,), groups=(FULL, STATE), faults=kinds, budget=1, beside=True))
    some(Options((LONG,), groups=(FULL, WINDOW), faults=kinds, budget=1, beside=True))


def test_little_may_be_on_its_way() -> None:
    kinds = faults("abort_prefill preempt write_fails")
    some(Options((CASE,), faults=kinds, budget=1, narrow=True))


def test_different_prompts() -> None:
    some(Options((PushCase(misled=True),), faults=faults("abort_decode deadline"), budget=1))


@pytest.mark.slow
def test_a_prefix_that_the_decode_engine_has() -> None:
    everything(Options((PushCase(floor=2),), faults=faults("abort_prefill preempt"), budget=1))
    everything(Options((PushCase(tokens=3, floor=2),), faults=faults("never_prefill"), budget=1))


@pytest.mark.parametrize(
    "kinds",
    [
        "stop_prefill",
        pytest.param("hang_prefill", marks=pytest.mark.slow),
        pytest.param("crash_prefill", marks=pytest.mark.slow),
    ],
)
def test_there_is_room_for_everybody(kinds: str) -> None:
    """Two prompts of which a decode engine can hold both, and nothing beside them."""
    case = PushCase(tokens=8)
    some(Options((case, case), faults=faults(kinds), budget=1, scarce=True))


@pytest.mark.parametrize("misled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_router_uses_an_id_again(misled: bool) -> None:
    first = PushCase(tokens=4, push="a", prompt="p")
    again = PushCase(decode=1, tokens=4, push="a", prompt="p", part="decode", misled=misled)
    has_it = PushCase(tokens=3, push="a", prompt="q", part="decode", floor=2)
    some(Options((first, again, has_it), faults=faults("preempt abort_decode"), budget=1))


# -- what takes minutes --------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("kind", sorted(FAULTS.difference(QUICK)))
def test_one_thing_goes_wrong_at_length(kind: str) -> None:
    everything(Options((SHORT,), faults=faults(kind), budget=1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(FAULTS.difference(QUICK)))
def test_one_thing_goes_wrong_in_part(kind: str) -> None:
    found = explore(
        Options((SHORT,), faults=faults(kind), budget=1), limit=20 * SOME, wrong_later=SOME, seed=1
    )
    assert found.complete or found.wrong_later >= SOME


@pytest.mark.soak
@pytest.mark.parametrize("kind", QUICK)
def test_one_thing_goes_wrong_in_one_of_two_chunks(kind: str) -> None:
    everything(Options((CASE,), faults=faults(kind), budget=1))


@pytest.mark.slow
@pytest.mark.scaled
@pytest.mark.parametrize(
    "kinds",
    [
        "crash_prefill silent write_fails",
        *(
            pytest.param(kinds, marks=pytest.mark.soak)
            for kinds in (
                "stop_prefill abort_decode lag",
                "crash_decode break_decode break_prefill",
                "crash_prefill break_decode",
                "break_prefill break_decode abort_decode",
                "preempt abort_prefill",
                "crash_prefill abort_decode preempt",
            )
        ),
    ],
)
def test_two_things_go_wrong(kinds: str) -> None:
    """And time passes early once; a part of it."""
    more(Options((CASE,), faults=faults(kinds) | HURRIES, budget=2, hurries=1))


@pytest.mark.slow
@pytest.mark.scaled
def test_two_pushes() -> None:
    found = explore(Options((SHORT, SHORT)), limit=2 * MORE, seed=1)
    assert found.states >= 2 * MORE


@pytest.mark.soak
@pytest.mark.parametrize(
    "kinds", ["crash_prefill break_decode", "abort_prefill silent", "write_fails preempt"]
)
def test_two_pushes_of_which_one_goes_wrong(kinds: str) -> None:
    """50,000 states in which something has gone wrong, and was not the first thing to happen; no
    moment of the history has more than its share of them."""
    options = Options((SHORT, SHORT), faults=faults(kinds), budget=1)
    found = explore(options, limit=1_000_000, wrong_later=50_000, seed=1)
    assert found.wrong_later >= 50_000
    assert sum(count for depth, count in found.depths.items() if depth > 0) >= 50_000
    assert max(found.depths.values()) <= found.wrong / 8
    assert sum(count for depth, count in found.depths.items() if depth >= 10) >= 10_000


@pytest.mark.slow
@pytest.mark.scaled
@pytest.mark.parametrize(
    "groups",
    [
        pytest.param((FULL, STATE), id="state"),
        pytest.param((FULL, WINDOW), marks=pytest.mark.soak, id="window"),
    ],
)
def test_one_thing_goes_wrong_with_groups(groups: tuple[Group, ...]) -> None:
    more(Options((LONG,), groups=groups, faults=FAULTS, budget=1))


@pytest.mark.slow
@pytest.mark.scaled
@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (2, 2),
        pytest.param(2, 1, marks=pytest.mark.soak),
        pytest.param(1, 2, marks=pytest.mark.soak),
    ],
)
def test_one_thing_goes_wrong_with_ranks(prefill: int, decode: int) -> None:
    more(Options((SHORT,), prefill, decode, faults=FAULTS, budget=1))


@pytest.mark.soak
@pytest.mark.scaled
def test_one_rank_is_stopped_while_a_write_of_the_other_fails() -> None:
    more(Options((SHORT,), 2, 2, faults=faults("write_fails deadline"), budget=2))
