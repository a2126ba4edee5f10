"""What vLLM's clients and routers say of how long a request's chunks are worth keeping.

Three of vLLM's own words are understood (``docs/requests.md``). ``kv_transfer_params`` has an
object of Lamina's, :data:`PARAMETER`. ``kv_hints`` has actions, of which ``kv.retain``,
``kv.evict`` and ``kv.fetch`` may speak of the request itself. A ``session_id`` says that more
requests may come.

Whatever is said, the engine serves the request. What is wrong is not followed, and told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope
from vllm.v1.request import Request

from lamina_kv.engines.vllm.requests import shown
from lamina_kv.tiers.regard import MOST_PIN_SECONDS, MOST_PRIORITY, USUAL, Regard

PARAMETER = "lamina"
"""The key of ``kv_transfer_params`` that has an object of :data:`WORDS`."""

WORDS = ("pin_seconds", "priority", "keep", "share", "prefetch")

MOST_ACTIONS = 16
"""Actions of an envelope that are looked at. Its length is a router's choice, and the scheduler's
thread waits."""


def regard_of(request: Request) -> tuple[Regard, str | None]:
    """What is said of a request's chunks, and what of that is wrong, if anything is.

    A wrong object is ignored whole, and so is a wrong action; the rest is followed. Where the
    object and an action say the same word, the object has it.
    """
    said: dict[str, Any] = {"session": True} if request.session_id else {}
    problem: str | None = None
    if request.kv_hints is not None:
        for action in _actions(request.kv_hints):
            try:
                said |= _hinted(action)
            except ValueError as error:
                problem = problem or f"kv_hints: {action.action_type}: {error}"
    parameters = request.kv_transfer_params
    # Parameters that are no object are complained of with those of pushes.
    if isinstance(parameters, dict) and (given := parameters.get(PARAMETER)) is not None:
        try:
            said |= _words(given)
        except ValueError as error:
            problem = problem or f"kv_transfer_params: {PARAMETER}: {error}"
    return Regard(**said) if said else USUAL, problem


def _words(given: object) -> Mapping[str, Any]:
    """Those of Lamina's object."""
    match given:
        case dict():
            pairs = given.items()
        case other:
            words = ", ".join(WORDS)
            raise ValueError(f"must be an object with some of {words}, got {shown(other)}")
    for name, value in pairs:
        match name:
            case "pin_seconds":
                right = _is_number(value) and 0 <= value <= MOST_PIN_SECONDS
                wanted = f"a number of seconds from 0 to {MOST_PIN_SECONDS:g}"
            case "priority":
                right = _is_integer(value) and -MOST_PRIORITY <= value <= MOST_PRIORITY
                wanted = f"an integer from {-MOST_PRIORITY} to {MOST_PRIORITY}"
            case "keep" | "share" | "prefetch":
                right, wanted = isinstance(value, bool), "true or false"
            case _:
                raise ValueError(f"knows {', '.join(WORDS)}, got {shown(name)}")
        if not right:
            raise ValueError(f"{name} must be {wanted}, got {shown(value)}")
    return given


def _actions(hints: KvHintsEnvelope) -> Iterator[KvHintAction]:
    """Actions that speak of the chunks of the request itself, of versions that are known. Those of
    other kinds are for somebody else, and blocks are named there by vLLM's hashes, not by keys."""
    for action in islice(hints.actions, MOST_ACTIONS):
        match action:
            case KvHintAction(
                action_type="kv.retain" | "kv.evict" | "kv.fetch",
                action_version=str(version),
                payload={"include_current_request": True},
            ) if version.partition(".")[0] == "1":
                yield action


def _hinted(action: KvHintAction) -> Mapping[str, Any]:
    """The words that an action amounts to. A hint bounds nothing, so what is beyond our bounds is
    cut down to them."""
    if action.action_type == "kv.evict":
        return {"priority": -MOST_PRIORITY}
    if action.action_type == "kv.fetch":
        return {"prefetch": True}  # wherever it is: the source is another connector's affair
    seconds, priority = action.payload.get("ttl_seconds", 0), action.payload.get("priority", 0)
    if not (_is_number(seconds) and seconds >= 0):
        raise ValueError(f"ttl_seconds must be a number of at least 0, got {shown(seconds)}")
    if not (_is_integer(priority) and priority >= 0):
        raise ValueError(f"priority must be an integer of at least 0, got {shown(priority)}")
    return {
        "pin_seconds": min(seconds, MOST_PIN_SECONDS),
        "priority": min(priority, MOST_PRIORITY),
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
