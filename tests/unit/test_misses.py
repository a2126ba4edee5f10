"""Why a prompt was not found is said in its line, and counted."""

from __future__ import annotations

import logging

import pytest
from driven_planner import CHUNK, FAR, Engine, View, prompt

from lamina_kv.control.reporting.misses import Miss, Misses, Reason
from lamina_kv.control.requests import RequestRecord
from lamina_kv.keys import ChunkChain, Epoch
from lamina_kv.plan import ChunkKey

LENGTH = 4 * CHUNK + 1


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, logger="lamina_kv.requests")
    return caplog


def line(engine: Engine, view: View, told: pytest.LogCaptureFixture, floor: int = 0) -> str:
    """What is said of a request when it gets its blocks."""
    told.clear()
    offer = engine.lookup(view, floor)
    engine.planner.admitted(view.request_id, offer.tokens)
    plan = engine.step((view.request_id, view.num_tokens))
    engine.answer(*(load.transfer for load in plan.loads))
    (message,) = [text for text in told.messages if f"request {view.request_id}:" in text]
    return message


def misses(engine: Engine) -> dict[str, float]:
    counters = engine.readings().counters
    return {labels[0]: n for (name, labels), n in counters.items() if name == "misses" and n}


def test_a_prompt_that_nobody_has_seen(told: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    said = line(engine, View("new", prompt(LENGTH)), told)
    assert f"loaded 0 (miss), recomputed {LENGTH} (never seen)" in said
    assert misses(engine) == {"never_seen": 1}


def test_a_prompt_whose_chunks_were_evicted(told: pytest.LogCaptureFixture) -> None:
    engine = Engine(near_slots=4)
    engine.save(View("first", prompt(LENGTH)))
    for seed in range(1, 9):
        engine.save(View(f"other {seed}", prompt(LENGTH, seed)))
    engine.now += 240
    engine.readings()
    said = line(engine, View("again", prompt(LENGTH)), told)
    assert "(evicted 240 s ago)" in said
    assert misses(engine) == {"evicted": 1}


def test_what_a_far_tier_still_has_is_no_miss(told: pytest.LogCaptureFixture) -> None:
    engine = Engine({"load": {"when": "always"}}, near_slots=8, far_slots=100)
    for seed in range(4):
        engine.save(View(f"{seed}", prompt(LENGTH, seed)))
        engine.write_all()
    engine.readings()
    said = line(engine, View("again", prompt(LENGTH)), told)
    assert f"{FAR} {4 * CHUNK}" in said
    assert misses(engine) == {}


@pytest.mark.parametrize("what", ["salt", "weights"])
def test_the_same_tokens_under_another_name(told: pytest.LogCaptureFixture, what: str) -> None:
    engine = Engine()
    engine.save(View("first", prompt(LENGTH)))
    engine.readings()
    if what == "weights":
        engine.planner.begin(Epoch(weights="step 2"))
    view = View("again", prompt(LENGTH), root_extra=b"salt" if what == "salt" else b"")
    said = line(engine, view, told)
    words = {"salt": "another cache_salt or adapter", "weights": "other weights"}
    assert f"(seen with {words[what]})" in said
    assert misses(engine) == {f"other_{what}": 1}


def test_what_the_last_request_lacked_and_nobody_has_saved(
    told: pytest.LogCaptureFixture,
) -> None:
    engine = Engine(saves=False)
    engine.save(View("first", prompt(LENGTH)))
    engine.readings()
    assert "(seen before, and not kept)" in line(engine, View("again", prompt(LENGTH)), told)
    assert misses(engine) == {"not_kept": 1}


@pytest.mark.parametrize("floor", [4 * CHUNK, 0])
def test_a_whole_hit_lacks_nothing(told: pytest.LogCaptureFixture, floor: int) -> None:
    """In the engine's own cache, or in a tier."""
    engine = Engine({"load": {"when": "always"}})
    engine.save(View("first", prompt(LENGTH)))
    engine.readings()
    said = line(engine, View("again", prompt(LENGTH)), told, floor)
    assert ("loaded 0 (nothing_lacked), recomputed 1" in said) == bool(floor)
    assert "miss" not in said
    assert misses(engine) == {}


def test_the_new_end_of_a_known_prompt(told: pytest.LogCaptureFixture) -> None:
    engine = Engine({"load": {"when": "always"}})
    engine.save(View("first", prompt(2 * CHUNK)))
    engine.readings()
    said = line(engine, View("next turn", prompt(LENGTH)), told)
    assert f"recomputed {2 * CHUNK + 1} (never seen)" in said


def test_what_is_remembered_is_bounded() -> None:
    misses = Misses(2, lambda: 0.0, most=3)
    keys = [ChunkKey(bytes([n]) * 20) for n in range(5)]
    for key in (*keys, keys[2]):
        misses.evicted(key)

    def why(key: ChunkKey) -> Miss | None:
        record = RequestRecord(View("a", [1, 2, 3]), ChunkChain(b"", 2))
        record.known_keys()
        return Misses.why(misses, record, [key])

    assert [why(key) for key in (keys[1], keys[2])] == [
        Miss(Reason.NEVER_SEEN),
        Miss(Reason.EVICTED),
    ]
