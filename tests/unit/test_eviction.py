"""Runs of chunks: their structure whatever happens, and which chunk goes first."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.contract import NoRoom
from lamina_kv.tiers.eviction import SHORTEST_LESSON, Runs
from lamina_kv.tiers.regard import USUAL, Regard
from lamina_kv.tiers.reuse import GHOSTS_PER_SLOT, Ghosts, Standing, Use, Worth, kind_of, uses_of
from lamina_kv.tiers.slots import SlotIndex

NEVER = 1 << 20
"""Chunks that no test adds: a tier that learns after so many learns nothing."""


def key(*path: int) -> ChunkKey:
    """The key of the last chunk of a prefix."""
    return ChunkKey(b"".join(part.to_bytes(2, "big") for part in path).ljust(20, b"\xff"))


def keys_of(path: Sequence[int]) -> list[ChunkKey]:
    return [key(*path[: end + 1]) for end in range(len(path))]


class Tier:
    """A tier that requests use one after another; each knows its prefix as a path."""

    def __init__(self, slots: int) -> None:
        self.now = 1000.0
        self.index = SlotIndex(slots, stored=False, clock=lambda: self.now)

    def found(self, path: Sequence[int]) -> int:
        keys = keys_of(path)
        missing = (n for n, each in enumerate(keys) if each not in self.index.visible)
        return next(missing, len(keys))

    def begin(self, path: Sequence[int], regard: Regard = USUAL) -> Use:
        use = Use(self.found(path), len(path), regard)
        for _ in self.index.use_prefix(keys_of(path)[: use.found], use):
            pass
        return use

    def save(self, path: Sequence[int], place: int, use: Use) -> bool:
        """Save one chunk, if the one in front of it is there."""
        keys = keys_of(path)
        behind = keys[place - 1] if place else None
        if self.index.holds(keys[place]):
            return True
        if behind is not None and not self.index.holds(behind):
            return False
        last = place == len(path) - 1
        if isinstance(self.index.room(keys[place], Standing(behind, use, last)), NoRoom):
            return False
        self.index.filled(keys[place])
        return True

    def end(self, path: Sequence[int], use: Use) -> None:
        for _ in self.index.use_prefix(keys_of(path), use, over=True):
            pass

    def ask(self, path: Sequence[int], regard: Regard = USUAL) -> int:
        """One request from its beginning to its end; returns what it found."""
        use = self.begin(path, regard)
        self.run(path, use)
        self.end(path, use)
        return use.found

    def run(self, path: Sequence[int], use: Use) -> None:
        for place in range(use.found, len(path)):
            if not self.save(path, place, use):
                break


def check(runs: Runs, slots: int) -> None:
    """Runs, their chunks and their families agree, and no more is pinned than may be."""
    seen: set[int] = set()
    heads = []
    pins = runs._heads[-1]
    for head in runs._heads:
        each = runs._younger[head]
        while each != head:
            assert runs._older[runs._younger[each]] == each
            shelf = runs._shelf[each]
            assert head in (slots + shelf, pins)
            assert shelf in runs._shelves
            assert (runs._until[each] > 0) == (head == pins)
            heads.append(each)
            each = runs._younger[each]
    assert len(heads) == len(runs)
    for run in heads:
        slot, chunks = runs._tail[run], []
        for _ in range(runs._length[run]):
            assert runs._run[slot] == run
            chunks.append(slot)
            slot = runs._front[slot]
        assert chunks[-1] == run, "a run is named by its first chunk"
        assert not seen & set(chunks)
        seen.update(chunks)
        children = list(family(runs, run))
        assert all(runs._front[child] == runs._tail[run] for child in children)
        if slot >= 0:
            parent = runs._run[slot]
            assert run in family(runs, parent)
            if runs._until[run] > runs._moment():
                assert runs._until[parent] >= runs._until[run]
                assert parent in younger_than(runs, run)
    assert seen == {slot for slot in range(slots) if runs._run[slot] >= 0}
    assert sorted(runs) == sorted(seen)
    pinned = sum(runs._length[run] for run in heads if runs._until[run] > 0)
    assert runs.pinned == pinned <= slots // 4


def younger_than(runs: Runs, run: int) -> Iterator[int]:
    while (run := runs._younger[run]) not in runs._heads:
        yield run


def family(runs: Runs, run: int) -> Iterator[int]:
    child = first = runs._child[run]
    while child >= 0:
        yield child
        assert runs._previous[runs._next[child]] == child
        child = runs._next[child]
        if child == first:
            return


PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=6)
SAID = Regard(5.0), Regard(50.0, 1), Regard(0.0, 3), Regard(0.0, -3), Regard(session=True)
REGARDS = st.sampled_from([*[USUAL] * 3, *SAID])
STEPS = st.tuples(st.sampled_from("aaabseludt"), PATHS, st.integers(0, 7), REGARDS)


@settings(deadline=None, max_examples=200)
@given(st.lists(STEPS, max_size=60))
def test_whatever_happens_no_chunk_goes_that_is_in_front_of_another(
    history: list[tuple[str, list[int], int, Regard]],
) -> None:
    tier = Tier(16)
    index, leases = tier.index, list[int]()
    for what, path, number, regard in history:
        name = keys_of(path)[-1]
        fronts = {
            index._keys[slot]: index._keys[front]
            for slot in index.visible.values()
            if (front := index._runs._front[slot]) >= 0
        }
        if what == "a":
            tier.ask(path, regard)
        elif what == "b":
            tier.run(path, tier.begin(path, regard))
        elif what == "s" and not index.holds(name):  # nobody knows what is in front of it
            if isinstance(index.room(name), int):
                index.filled(name)
        elif what == "e":
            tier.end(path, Use(0, len(path), regard))
        elif what == "l" and name in index.visible:
            leases.append(index.hold(name))
        elif what == "u" and leases:
            index.release(leases.pop(number % len(leases)))
        elif what == "d":
            index.drop(name)
        elif what == "t":
            tier.now += 3 * number
        check(index._runs, 16)
        if what == "a" and not leases:
            kept = [front for each, front in fronts.items() if each in index.visible]
            assert set(kept) <= index.visible.keys()


@settings(deadline=None, max_examples=100)
@given(st.lists(PATHS, max_size=40))
def test_without_evidence_no_leaf_goes_while_there_is_an_older_one_of_no_more_uses(
    asked: list[list[int]],
) -> None:
    """What nobody has gone on behind yet counts for half a use."""
    with patch("lamina_kv.tiers.eviction.SHORTEST_LESSON", NEVER):
        tier, ages, added = Tier(6), dict[ChunkKey, int](), 0

    def uses(each: ChunkKey) -> float:
        return tier.index.uses(each) if each.rstrip(b"\xff")[-1] < 10 else 0.5

    for number, known in enumerate(asked):
        path = [*known, 10 + number]  # something new, so that no two are of one age
        keys, use = keys_of(path), tier.begin(path)
        ages.update(dict.fromkeys(keys[: use.found], added))
        for place in range(use.found, len(path)):
            before = set(tier.index.visible)
            leaves = {k: uses(k) for k in before if not any(is_in_front(k, o) for o in before)}
            if not tier.save(path, place, use):
                break
            added += 1
            for gone in before - tier.index.visible.keys():
                older = [k for k in leaves.keys() - keys if ages[k] < ages[gone]]
                assert all(leaves[each] > leaves[gone] for each in older)
            ages.update(dict.fromkeys(keys[: place + 1], added))
        tier.end(path, use)


def test_a_small_tier_learns_before_it_was_filled_often() -> None:
    """Documents come again, some more often than others, beside as many prompts that do not."""
    assert found_of_documents() > 1.1 * found_of_documents(lesson=256)


def found_of_documents(lesson: int = SHORTEST_LESSON) -> int:
    with patch("lamina_kv.tiers.eviction.SHORTEST_LESSON", lesson):
        tier = Tier(100)
    chance, found = random.Random(2), 0
    for number in range(600):
        document = chance.choices(range(20), [1 / (n + 1) for n in range(20)])[0]
        path = [document if chance.random() < 0.6 else 100 + number, *range(1, 8), 1000 + number]
        found += tier.found(path)
        tier.ask(path)
    return found


def is_in_front(one: ChunkKey, other: ChunkKey) -> bool:
    return one != other and other.rstrip(b"\xff").startswith(one.rstrip(b"\xff"))


def test_a_prompt_that_is_one_chunk_too_long_is_found_again_but_for_its_end() -> None:
    tier, path = Tier(100), list(range(101))
    tier.ask(path)
    assert [tier.ask(path) for _ in range(3)] == [100, 100, 100]


def test_prompts_at_once_that_do_not_quite_fit_are_found_again_but_for_their_ends() -> None:
    """Sixteen of 40 chunks each, saved in turn, in 600 slots."""
    tier = Tier(600)
    paths = [[1000 + n, *range(39)] for n in range(16)]
    uses = [tier.begin(path) for path in paths]
    for place in range(40):
        for path, use in zip(paths, uses, strict=True):
            tier.save(path, place, use)
    for path, use in zip(paths, uses, strict=True):
        tier.end(path, use)
    assert sum(tier.found(path) for path in paths) >= 590


def least_recently_used(size: int, asked: Sequence[Sequence[int]]) -> int:
    """Chunks found by the plain order, that ages a prompt's end first."""
    held, found = OrderedDict[ChunkKey, None](), 0
    for path in asked:
        keys = keys_of(path)
        found += next((n for n, each in enumerate(keys) if each not in held), len(keys))
        for each in reversed(keys):
            held[each] = None
            held.move_to_end(each)
        while len(held) > size:
            held.popitem(last=False)
    return found


def test_questions_that_nobody_repeats_do_not_push_documents_out() -> None:
    """Every third request is about one of 40 documents of four chunks, the others about nothing
    again; there is room for 50 documents."""
    chance = random.Random(1)
    asked = [
        [chance.randrange(40), 1, 2, 3] if chance.random() < 1 / 3 else [100 + n, 1, 2, 3]
        for n in range(10_000)
    ]
    tier = Tier(200)
    found = sum(tier.ask(path) for path in asked)
    assert found > 1.2 * least_recently_used(200, asked)


@pytest.mark.parametrize("documents", [55, 65, 100, 200])
@pytest.mark.parametrize("common", [0, 4], ids=["", "behind a common prompt"])
@pytest.mark.parametrize("questions", [0, 1 / 3], ids=["", "beside questions"])
def test_of_documents_asked_for_in_turn_as_many_are_found_as_fit(
    documents: int, common: int, questions: float
) -> None:
    """Of eight chunks each, while there is room for 50. By the order of use none is ever found."""
    chance, rounds, asked = random.Random(3), 14, list[list[int]]()
    for number in range(rounds * documents):
        asked.append([*range(common), 1000 + number % documents, *range(7)])
        if chance.random() < questions:
            asked.append([10_000 + number, *range(7)])
    size, late = 400 + common, len(asked) // 2
    assert least_recently_used(size, asked) <= common * len(asked), "a loop"
    tier = Tier(size)
    found = [max(0, tier.ask(path) - common * (path[0] == 0)) for path in asked]
    best = 8 * 49 / (documents - 1) * documents * rounds / 2
    assert sum(found[late:]) > 0.8 * best


@pytest.mark.parametrize("documents", [65, 100])
def test_of_documents_asked_for_at_once_in_turn_as_many_are_found_as_fit(documents: int) -> None:
    """As above, while four requests run."""
    tier, running, found = Tier(400), deque[tuple[list[int], Use]](), 0
    for number in range(14 * documents):
        path = [1000 + number % documents, *range(7)]
        use = tier.begin(path)
        tier.run(path, use)
        running.append((path, use))
        if len(running) > 4:
            tier.end(*running.popleft())
        if number >= 7 * documents:
            found += use.found
    assert found > 0.8 * 8 * 49 * 7


def test_a_prompt_that_goes_on_does_not_give_itself_up_for_being_young() -> None:
    runs, names = Runs(8), keys_of(range(8))
    runs.add(5, names[5])
    runs.add(3, names[3])
    runs.add(0, names[0])
    runs.add(1, names[1], Standing(names[0]), front=0)
    with (
        patch.object(Worth, "of", lambda _, kind, age: age),
        patch.object(Worth, "least", lambda *_: 0.0),
    ):
        assert runs.victim(lambda slot: True) == 1, "the youngest"
        assert runs.victim(lambda slot: True, front=1) == 3, "the youngest of others"
        assert runs.victim(lambda slot: slot != 3, front=1) == 5


def test_young_runs_that_may_not_go_keep_nobody_from_looking_at_old_ones() -> None:
    runs = Runs(32)
    for slot, name in enumerate(keys_of(range(32))):
        runs.add(slot, name)
    with (
        patch.object(Worth, "of", lambda _, kind, age: age),
        patch.object(Worth, "least", lambda *_: 0.0),
    ):
        for _ in range(3):
            assert runs.victim(lambda slot: slot in (0, 5), 1) == 0


def test_documents_that_were_popular_once_make_room() -> None:
    tier = Tier(60)
    for number in list(range(50)) * 20:
        tier.ask([number])
    others = list(range(1000, 1050))
    for number in others * 40:
        tier.ask([number])
    assert sum(tier.ask([number]) for number in others) >= 45


# -- what is learnt -------------------------------------------------------------------------


def test_ghosts_are_remembered_for_fillings_of_the_tier() -> None:
    slots = 512
    ghosts = Ghosts(slots)
    for number in range(GHOSTS_PER_SLOT * slots // 2):
        ghosts.add(key(number), number % 13, number)
    kept = [ghosts.take(key(n)) == (n % 13, n) for n in range(GHOSTS_PER_SLOT * slots // 2)]
    assert sum(kept) > 0.95 * len(kept)
    assert ghosts.take(key(1)) is None, "each is taken once"
    for number in range(100_000):
        ghosts.add(key(number & 0xFFFF, 7, number >> 16), 1, number)
    assert ghosts.take(key(0, 7, 0)) is None


def test_kinds_say_how_often_a_chunk_was_used() -> None:
    for uses in range(1, 8):
        for branches in (False, True):
            kind = kind_of(uses, Use(1, 5), last=False, branches=branches)
            assert uses_of(kind) == min(uses, 4)
    assert len({kind_of(1, Use(0, new), last=False, branches=False) for new in (3, 4, 16)}) == 3


def test_without_evidence_worth_falls_with_age_and_rises_with_uses() -> None:
    worth, ages, use = Worth(1000), (0, 3, 50, 1000, 10**6), Use(1, 5)
    kinds = [kind_of(n, use, last=False, branches=n > 2) for n in (1, 2, 3, 4)]
    kinds = [kind_of(1, use, last=True, branches=False), *kinds]
    values = [[worth.of(kind, age) for age in ages] for kind in kinds]
    assert all(each == sorted(each, reverse=True) for each in values)
    first = [each[0] / values[1][0] for each in values]
    assert first == pytest.approx([0.5, 1, 2, 3, 4], rel=0.01)


def test_a_prompt_that_comes_again_whole_has_used_its_last_chunk_as_often_as_the_others() -> None:
    tier, path = Tier(20), [1, 2, 3]
    for _ in range(3):
        tier.ask(path)
    assert [tier.index.uses(each) for each in keys_of(path)] == [3, 3, 3]


@pytest.mark.parametrize("length", [2, 5, 9])
def test_what_is_used_in_parts_is_split_and_used_whole_is_one_run(length: int) -> None:
    tier, path = Tier(20), list(range(length))
    tier.ask(path)
    tier.ask([*path[: length // 2 + 1], 99])
    check(tier.index._runs, 20)
    for _ in range(5):  # used as often as counts
        tier.ask(path)
    runs = tier.index._runs
    heads = {runs.head(tier.index.visible[each]) for each in keys_of(path)}
    assert len(heads) <= 2, "the shared part, and the rest"


def test_an_end_that_goes_while_its_use_is_noted_is_used_no_more() -> None:
    """A use is noted piece by piece, and between two pieces anything may be lost."""
    index = SlotIndex(6, stored=False)
    front, chunk, *ends = (key(n) for n in range(4))
    for each, behind in ((front, None), (chunk, front), (ends[0], front), (ends[1], front)):
        index.room(each, Standing(behind))
        index.filled(each)
    use = index.use_prefix([front, chunk], Use(2, 4), [(end, front) for end in ends])
    next(use)
    index.drop(ends[0])
    assert sum(1 for _ in use) < 20
    assert [index.uses(each) for each in (front, chunk, *ends)] == [2, 2, 0, 2]
