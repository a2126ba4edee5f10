"""Every token of a prompt has one source, whatever becomes of its request. That this holds in every
history is seen by ``tests/simulator``; here are the sources that it does not have."""

from __future__ import annotations

import pytest
from driven_planner import Engine, View, prompt


def sources(engine: Engine) -> dict[str, float]:
    """What was counted since the last call, by source."""
    counters = engine.readings().counters
    found = {labels[0]: n for (name, labels), n in counters.items() if name == "hit_tokens"}
    for name in ("computed", "unfinished"):
        found[name] = counters.get((f"{name}_tokens", ()), 0)
    assert sum(found.values()) == counters.get(("prompt_tokens", ()), 0)
    return {name: n for name, n in found.items() if n}


def test_a_hit_is_counted_when_it_has_arrived_and_not_when_it_is_ordered() -> None:
    engine = Engine({"load": {"mode": "parked"}})
    engine.save(View("a", prompt(70)))
    engine.readings()
    view = View("b", prompt(70))
    assert engine.planner.lookup(view, 0).tokens == 64
    engine.planner.admitted("b", 64)
    (order,) = engine.step().loads
    assert sources(engine) == {}
    engine.answer(order.transfer)
    assert sources(engine) == {}
    engine.planner.plan_step([("b", 64, 70)], forward=True)
    view.token_ids.append(5)
    engine.planner.plan_step([("b", 70, 71)], forward=True)
    assert sources(engine) == {"host": 64, "computed": 6}
    engine.planner.finished("b", 71, [()])
    assert sources(engine) == {}, "once"


def test_what_another_connector_brings_is_not_computed() -> None:
    engine = Engine()
    view = View("a", prompt(70))
    engine.planner.lookup(view, 16)
    engine.planner.admitted("a", 0)
    engine.planner.plan_step([("a", 69, 70)], forward=True)
    engine.planner.finished("a", 70, [()])
    assert sources(engine) == {"engine": 16, "other": 53, "computed": 1}


def test_a_part_of_a_block_is_the_engines_own() -> None:
    engine = Engine()
    engine.planner.lookup(View("a", prompt(70)), 16)
    engine.planner.admitted("a", 0)
    engine.planner.plan_step([("a", 20, 70)], forward=True)
    engine.planner.finished("a", 70, [()])
    assert sources(engine) == {"engine": 20, "computed": 50}


def test_a_prompt_that_never_ran_is_unfinished() -> None:
    engine = Engine()
    engine.planner.lookup(View("a", prompt(70)), 16)
    engine.planner.admitted("a", 0)
    engine.planner.finished("a", 64, [()])
    assert sources(engine) == {"unfinished": 70}


@pytest.mark.parametrize("declined", ["", "kv_role"])
def test_what_may_not_hit_is_no_lookup(declined: str) -> None:
    engine = Engine()
    engine.planner.lookup(View("a", prompt(70)), 0, declined=declined)
    engine.planner.admitted("a", 0)
    engine.step(("a", 70))
    engine.planner.finished("a", 70, [()])
    counters = engine.readings().counters
    assert counters.get(("lookups", ()), 0) == (not declined)
    assert counters.get(("lookup_tokens", ()), 0) == (0 if declined else 70)
    assert counters["computed_tokens", ()] == 70
