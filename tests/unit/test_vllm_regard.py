"""vLLM's words for how long a request's chunks are worth keeping are understood, and what is wrong
of them costs the client its wish, never the engine.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope
from vllm.v1.request import Request

from lamina_kv.engines.vllm.regard import MOST_ACTIONS, regard_of
from lamina_kv.engines.vllm.scheduler_side import SchedulerSide
from lamina_kv.push.complaints import MAX_WARNINGS, Complaints
from lamina_kv.tiers.regard import MOST_PIN_SECONDS, MOST_PRIORITY, USUAL, Regard


def request(lamina: object = None, *actions: KvHintAction, session: str | None = None) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        sampling_params=SamplingParams(extra_args={"kv_transfer_params": {"lamina": lamina}}),
        pooling_params=None,
        session_id=session,
        kv_hints=KvHintsEnvelope("0.1", "message", list(actions)) if actions else None,
    )


def action(kind: str, version: str = "1.0", *, own: object = True, **payload: Any) -> KvHintAction:
    return KvHintAction("a", kind, version, {"include_current_request": own, **payload})


# -- kv_transfer_params --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "regard"),
    [
        (None, USUAL),
        ({}, USUAL),
        ({"pin_seconds": 600}, Regard(pin_seconds=600)),
        ({"pin_seconds": 0.5, "priority": -3}, Regard(pin_seconds=0.5, priority=-3)),
        ({"priority": 3, "keep": True}, Regard(priority=3)),
        ({"keep": False}, Regard(keep=False)),
        ({"share": True, "prefetch": True}, Regard(share=True, prefetch=True)),
    ],
)
def test_the_words_of_a_request(said: object, regard: Regard) -> None:
    assert regard_of(request(said)) == (regard, None)


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("pin", "must be an object"),
        (["pin_seconds"], "must be an object"),
        ({"pin": 5}, "knows pin_seconds, priority, keep"),
        ({"session": True}, "knows pin_seconds, priority, keep"),
        ({5: 5}, "knows pin_seconds, priority, keep"),
        ({"pin_seconds": -1}, "from 0 to 86400"),
        ({"pin_seconds": 86401}, "from 0 to 86400"),
        ({"pin_seconds": float("nan")}, "from 0 to 86400"),
        ({"pin_seconds": 2**63}, "from 0 to 86400"),
        ({"pin_seconds": True}, "from 0 to 86400"),
        ({"pin_seconds": "600"}, "from 0 to 86400"),
        ({"pin_seconds": None}, "from 0 to 86400"),
        ({"priority": 4}, "an integer from -3 to 3"),
        ({"priority": 1.0}, "an integer from -3 to 3"),
        ({"priority": True}, "an integer from -3 to 3"),
        ({"keep": 0}, "true or false"),
        ({"share": 1}, "share must be true or false"),
        ({"prefetch": "all"}, "prefetch must be true or false"),
        ({"keep": "nothing"}, "true or false"),
        ({"pin_seconds": 600, "priority": "high"}, "an integer from -3 to 3"),
    ],
)
def test_a_wrong_word_costs_the_whole_object(said: object, names: str) -> None:
    regard, problem = regard_of(request(said))
    assert regard == USUAL
    assert problem is not None
    assert problem.startswith("kv_transfer_params: lamina: ")
    assert names in problem


@pytest.mark.parametrize("parameters", ["lamina", ["lamina"], 3])
def test_parameters_that_are_no_object_say_nothing(parameters: object) -> None:
    asked = request()
    asked.kv_transfer_params = parameters  # type: ignore[assignment]
    assert regard_of(asked) == (USUAL, None)


@pytest.mark.parametrize(
    "said",
    [
        {f"{number}": [number] for number in range(500_000)},
        {"keep": {f"{number}": number for number in range(500_000)}},
        {"priority": ["x" * 10] * 1_000_000},
        ["x" * 100_000] * 1000,
        "x" * 12_000_000,
    ],
    ids=["object", "nested", "list", "long", "text"],
)
def test_of_a_wrong_wish_little_is_said(said: object) -> None:
    _, problem = regard_of(request(said))
    assert problem is not None
    assert len(problem) < 400


# -- kv_hints ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "regard"),
    [
        (action("kv.retain", ttl_seconds=30, priority=2), Regard(pin_seconds=30, priority=2)),
        (action("kv.retain", "1.4", ttl_seconds=2.5), Regard(pin_seconds=2.5)),
        (action("kv.retain", priority=1), Regard(priority=1)),
        (
            action("kv.retain", ttl_seconds=10**9, priority=100),
            Regard(pin_seconds=MOST_PIN_SECONDS, priority=MOST_PRIORITY),
        ),
        (action("kv.evict", block_hashes=["11"]), Regard(priority=-MOST_PRIORITY)),
        (action("kv.fetch", source="a", block_hashes=["11"]), Regard(prefetch=True)),
        # For somebody else, or of blocks that are not this request's.
        (action("kv.fetch", own=False, source="a", block_hashes=["11"]), USUAL),
        (action("kv.move", source="a"), USUAL),
        (action("kv.retain", "2.0", ttl_seconds=30), USUAL),
        (action("kv.retain", own=False, ttl_seconds=30, block_hashes=["11"]), USUAL),
        (KvHintAction("a", "kv.evict", "1.0", {"block_hashes": ["11"]}), USUAL),
    ],
)
def test_what_a_hint_amounts_to(hint: KvHintAction, regard: Regard) -> None:
    assert regard_of(request(None, hint)) == (regard, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ttl_seconds": -1},
        {"ttl_seconds": "30"},
        {"ttl_seconds": float("nan")},
        {"priority": -1},
        {"priority": 1.5},
        {"priority": True},
    ],
)
def test_a_wrong_hint_costs_that_hint(wrong: dict[str, Any]) -> None:
    right = action("kv.retain", ttl_seconds=30)
    regard, problem = regard_of(request(None, action("kv.retain", **wrong), right))
    assert regard == Regard(pin_seconds=30)
    assert problem is not None
    assert problem.startswith("kv_hints: kv.retain: ")
    assert next(iter(wrong)) in problem


def test_hints_that_vllm_has_not_checked_say_nothing() -> None:
    """A program that calls the engine itself may hand over anything."""
    strange = [
        KvHintAction("a", "kv.retain", 1, {"include_current_request": True}),  # type: ignore[arg-type]
        KvHintAction("a", "kv.retain", "1.0", None),  # type: ignore[arg-type]
        "kv.retain",
    ]
    assert regard_of(request(None, *strange)) == (USUAL, None)  # type: ignore[arg-type]


def test_of_many_hints_few_are_looked_at() -> None:
    idle = [action("kv.move")] * MOST_ACTIONS
    assert regard_of(request(None, *idle, action("kv.evict"))) == (USUAL, None)
    assert regard_of(request(None, *idle[1:], action("kv.evict")))[0] != USUAL


def test_the_object_is_above_a_hint() -> None:
    hint = action("kv.retain", ttl_seconds=30, priority=2)
    assert regard_of(request({"priority": 1}, hint))[0] == Regard(pin_seconds=30, priority=1)


# -- sessions ------------------------------------------------------------------------------------


def test_a_session_is_told() -> None:
    assert regard_of(request(session="s"))[0] == Regard(session=True)
    assert regard_of(request({"priority": 9}, session="s"))[0] == Regard(session=True)


# -- complaints ----------------------------------------------------------------------------------


def test_a_wrong_wish_is_told_of_once_and_the_engine_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    side: Any = object.__new__(SchedulerSide)
    seen: list[Regard] = []
    side._planner = SimpleNamespace(arrived=lambda view, loads: seen.append(view.regard))
    side._manager = SimpleNamespace()
    side._shape = SimpleNamespace(groups=())
    side._adapters = SimpleNamespace(identity=lambda *_: "", look_anew=lambda: None)
    side._counted, side._recompute, side._link = False, 1, None
    side._disregards = Complaints(logging.getLogger())
    side._spans = None
    for wrong in [{"priority": 9}] * 3 + [{"priority": 10 + n} for n in range(2 * MAX_WARNINGS)]:
        side.arrived(request(wrong))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == MAX_WARNINGS
    assert said[0].startswith("request r: kv_transfer_params: lamina: priority must be")
    assert seen == [USUAL] * (3 + 2 * MAX_WARNINGS)
    side.arrived(request({"priority": 2}))
    assert seen[-1] == Regard(priority=2)
