"""An index of hints asks once, believes for a while, remembers what was gone, and stays bounded."""

from __future__ import annotations

import pytest

from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.contract import Answer
from lamina_kv.tiers.hints import (
    ABSENT_SECONDS,
    BELIEVED_SECONDS,
    GONE_SECONDS,
    UNANSWERED_SECONDS,
    HintIndex,
)
from lamina_kv.tiers.reuse import Use

ONE, TWO = ChunkKey(bytes([1] * 20)), ChunkKey(bytes([2] * 20))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def index(clock: Clock) -> HintIndex:
    return HintIndex(clock)


def test_what_nobody_has_asked_for_is_unknown_and_will_be_asked(index: HintIndex) -> None:
    assert [index.find(ONE), index.find(TWO), index.find(ONE)] == [Answer.UNKNOWN] * 3
    assert (index.pending, index.asks()) == (True, (ONE, TWO))
    assert (index.pending, index.asks()) == (False, ())


def test_a_question_is_asked_once_until_it_is_answered(index: HintIndex) -> None:
    index.find(ONE)
    index.asks()
    assert index.find(ONE) is Answer.UNKNOWN
    assert index.asks() == ()


def test_an_answer_is_believed_for_a_while(index: HintIndex, clock: Clock) -> None:
    index.find(ONE)
    index.find(TWO)
    index.told(index.asks(), [True, False])
    assert (index.find(ONE), index.find(TWO)) == (Answer.HERE, Answer.ABSENT)
    assert (index.used, index.asks()) == (1, ())
    clock.now += ABSENT_SECONDS
    assert (index.find(ONE), index.find(TWO)) == (Answer.HERE, Answer.UNKNOWN)
    assert index.asks() == (TWO,)
    clock.now += BELIEVED_SECONDS
    assert index.find(ONE) is Answer.UNKNOWN
    assert index.asks() == (ONE,)


def test_an_answer_is_noticed_and_takes_nothing_back(index: HintIndex) -> None:
    index.told([ONE, TWO], [True, False])
    assert (index.arrivals, index.version) == (1, 0)
    index.told([ONE], [False])
    assert (index.arrivals, index.version) == (2, 1), "what was here is not"


def test_what_was_promised_and_is_gone_is_absent_whatever_the_store_says(
    index: HintIndex, clock: Clock
) -> None:
    index.told([ONE], [True])
    index.lost(ONE, 0)
    assert (index.find(ONE), index.version) == (Answer.ABSENT, 1)
    clock.now += GONE_SECONDS - 1
    index.told([ONE], [True])  # a question that was on its way
    assert index.find(ONE) is Answer.ABSENT
    clock.now += 1
    assert index.find(ONE) is Answer.UNKNOWN


def test_no_answer_in_time_counts_as_absent_for_a_moment(index: HintIndex, clock: Clock) -> None:
    index.find(ONE)
    index.told(index.asks(), None)
    assert index.find(ONE) is Answer.ABSENT
    clock.now += UNANSWERED_SECONDS
    assert index.find(ONE) is Answer.UNKNOWN
    assert index.asks() == (ONE,)


def test_no_answer_takes_nothing_back(index: HintIndex) -> None:
    index.told([ONE], [True])
    index.told([ONE], None)
    assert index.find(ONE) is Answer.HERE


def test_what_was_written_is_here(index: HintIndex) -> None:
    assert index.room(ONE) == 0
    assert index.holds(ONE)
    assert index.find(ONE) is Answer.UNKNOWN, "and not before"
    assert index.used == 1
    index.filled(ONE)
    assert (index.find(ONE), index.used) == (Answer.HERE, 1)


def test_what_is_held_is_not_written_twice(index: HintIndex) -> None:
    index.room(ONE)
    index.told([TWO], [True])
    for key in ONE, TWO:
        with pytest.raises(ValueError, match="already holds"):
            index.room(key)


def test_what_was_not_written_may_be_written_again(index: HintIndex) -> None:
    index.room(ONE)
    index.abandoned(ONE)
    assert not index.holds(ONE)
    assert index.room(ONE) == 0


def test_whether_it_holds_something_asks_nobody(index: HintIndex) -> None:
    assert not index.holds(ONE)
    assert not index.pending


def test_a_hold_is_a_word_only(index: HintIndex) -> None:
    index.told([ONE], [True])
    index.release(index.hold(ONE))
    assert index.find(ONE) is Answer.HERE


def test_the_least_recently_used_hint_is_forgotten(clock: Clock) -> None:
    index = HintIndex(clock, bound=3)
    keys = [ChunkKey(bytes([n] * 20)) for n in range(4)]
    index.told(keys[:3], [True, True, False])
    assert sum(1 for _ in index.use_prefix(keys[:1], Use())) == 1
    index.told(keys[3:], [True])
    assert [index.find(key) for key in keys] == [
        Answer.HERE,
        Answer.UNKNOWN,
        Answer.ABSENT,
        Answer.HERE,
    ]
    assert index.used == 2


def test_questions_are_bounded(clock: Clock) -> None:
    index = HintIndex(clock, bound=3)
    for number in range(10):
        assert index.find(ChunkKey(bytes([number] * 20))) is Answer.UNKNOWN
    assert len(index.asks()) == 3
