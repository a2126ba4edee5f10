"""Guards how a planner weighs a push against what the engine has, what its tiers bring and the room
that there is, and what it says of requests that wait."""

from __future__ import annotations

from driven_planner import BLOCK, CHUNK, Engine, View, prompt
from msgspec.structs import replace
from test_push_roles import PREFILL, card

from lamina_kv.control.requests import PushParameters
from lamina_kv.push.letters import Letter, Opened
from lamina_kv.push.messages import (
    NO_EPOCH,
    Absent,
    Announce,
    Attempt,
    Cancel,
    Claim,
    LinkMessage,
    Queued,
)


def engine(blocks: int = 1000, **push: object) -> Engine:
    me = card("me")
    ranks = tuple(replace(rank, num_blocks=blocks) for rank in me.ranks)
    return Engine({"push": push}, card=replace(me, ranks=ranks))


def view(name: str, tokens: list[int], *, prefill: str | None = PREFILL, first: int = 100) -> View:
    found = View(name, tokens, first_block=first)
    found.push = PushParameters(f"push of {name}", prefill)
    return found


def said(engine: Engine) -> list[LinkMessage]:
    return [letter.message for letter in engine.pushes.drain_letters()]


def test_what_a_tier_brings_is_not_waited_for_from_elsewhere() -> None:
    decode = engine()
    tokens = prompt(4 * CHUNK)
    decode.save(View("before", tokens))
    wanted = view("a", [*tokens, -1, -2])
    decode.planner.arrived(wanted)
    hit = decode.planner.lookup(wanted, 0)
    assert hit.tokens == len(tokens), "the last token but one is computed here"
    decode.planner.admitted("a", hit.tokens)
    claim, cancel = said(decode)
    assert isinstance(claim, Claim)
    assert cancel == Cancel(Attempt("push of a", NO_EPOCH))
    assert decode.count("pushes_skipped", "below_min_tokens") == 1


def test_a_chunk_more_than_a_tier_brings_is_pushed() -> None:
    decode = engine()
    tokens = prompt(4 * CHUNK)
    decode.save(View("before", tokens[: 2 * CHUNK]))
    wanted = view("a", tokens)
    hit = decode.planner.lookup(wanted, 0)
    assert hit.tokens == len(tokens) - 1
    decode.planner.admitted("a", hit.tokens)
    (announce,) = [message for message in said(decode) if isinstance(message, Announce)]
    assert (announce.start, announce.end) == (2 * CHUNK, len(tokens) - 1)


def test_the_floor_is_what_is_configured() -> None:
    assert engine(min_tokens=0).planner.lookup(view("a", prompt(2)), 0).tokens == 1
    above = engine(min_tokens=100)
    assert above.planner.lookup(view("a", prompt(100)), 0).tokens == 0
    assert above.planner.lookup(view("b", prompt(101)), 0).tokens == 100


def test_what_finds_no_room_is_asked_about_again_and_holds_up_no_other_request() -> None:
    """Of 16 blocks half may be parked: one prompt of 7."""
    decode = engine(blocks=16)
    first, second = (view(name, prompt(7 * BLOCK, seed)) for seed, name in enumerate("ab"))
    hit = decode.planner.lookup(first, 0)
    decode.planner.admitted("a", hit.tokens)
    (receive,) = decode.step().push.receives
    for _ in range(3):
        assert decode.planner.lookup(second, 0).ask_again
        decode.step()
    decode.answer(receive.transfer)
    assert decode.planner.lookup(second, 0).tokens == 7 * BLOCK - 1
    assert decode.planner.lookup(View("c", prompt(7 * BLOCK, 2)), 0).tokens == 0


def test_a_request_that_waits_is_claimed_until_it_ends() -> None:
    decode = engine(deadline=30.0)
    decode.planner.arrived(view("a", prompt(100)))
    assert said(decode) == [Claim(("push of a",), 30.0)]
    decode.wait(12)
    assert said(decode) == [Claim(("push of a",), 30.0)]
    decode.planner.finished("a", 0, [[]], push=PushParameters("push of a", PREFILL))
    assert said(decode) == [Cancel(Attempt("push of a", NO_EPOCH))]
    decode.wait(60)
    assert said(decode) == []


def test_what_may_not_be_brought_is_not_claimed() -> None:
    decode = engine()
    decode.planner.arrived(view("a", prompt(100)), loads=False)
    assert said(decode) == []


def test_a_prefill_engine_says_that_a_request_has_come() -> None:
    prefill = engine()
    prefill.pushes.take_news([Opened("decode", "decode", card("decode"))])
    claim = Claim(("push of a",), 60.0)
    prefill.pushes.take_news([Letter("decode", claim)])
    prefill.planner.arrived(view("a", prompt(100), prefill=None))
    attempt = Attempt("push of a", NO_EPOCH)
    assert said(prefill) == [Absent(attempt), Queued(attempt)]


def test_a_request_that_ends_while_its_prompt_is_pushed_gives_it_up_at_once() -> None:
    decode = engine()
    wanted = view("a", prompt(4 * CHUNK))
    hit = decode.planner.lookup(wanted, 0)
    decode.planner.admitted("a", hit.tokens)
    (receive,) = decode.step().push.receives
    said(decode)
    decode.planner.finished("a", 0, [list(wanted.blocks())], push=wanted.push)
    assert decode.step().push.give_ups == (receive.transfer,)
    assert [type(message) for message in said(decode)] == [Cancel]
    assert decode.pool.held, "until its writers are known to have ended"
