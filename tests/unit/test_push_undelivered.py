"""Blocks of prompts without a destination count once each, whoever needs them and however often it
is said."""

from __future__ import annotations

from lamina_kv.control.push.undelivered import Undelivered


def test_a_prompt_that_is_reserved_for_again_counts_once() -> None:
    undelivered = Undelivered()
    undelivered.reserve("a", 10)
    undelivered.reserve("a", 7)
    assert undelivered.with_prompt("b", 1) == 8
    undelivered.drop("a")
    undelivered.drop("a")
    assert undelivered.with_prompt("b", 1) == 1
    assert not undelivered.is_reserved("a")


def test_a_prompt_that_has_ended_takes_its_blocks_and_no_reservation() -> None:
    undelivered = Undelivered()
    undelivered.reserve("a", 10)
    undelivered.hold("a", (1, 2, 3))
    undelivered.hold("b", (2, 3, 4))
    assert undelivered.blocks == 4
    assert undelivered.with_prompt("c", 5) == 9
    assert undelivered.with_blocks((4, 5, 5)) == 5
    undelivered.hold("a", (1,))
    assert undelivered.blocks == 4
    undelivered.drop("b")
    assert undelivered.blocks == 1
