"""Guards what a prefill engine tells a router that asks it before the decode engine, as vLLM's
NixlConnector would: a push of its own name, once its prompt is computed, and nothing otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from lamina_kv.control.requests import PushParameters
from lamina_kv.engines.vllm.requests import handed_on, is_asked_first, push_parameters

FIRST: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False, "remote_host": None}
ADDRESS = "10.0.0.1:9300"


def request(
    parameters: object,
    name: str = "cmpl-1-0-a1b2",
    status: RequestStatus = RequestStatus.FINISHED_LENGTH_CAPPED,
) -> Any:
    return SimpleNamespace(kv_transfer_params=parameters, request_id=name, status=status)


def test_the_decode_engine_is_told_of_the_push_that_the_prefill_engine_has_named() -> None:
    asked = request(FIRST)
    named = push_parameters(asked)
    assert named == PushParameters("cmpl-1-0-a1b2", None)
    told = handed_on(asked, ADDRESS)
    assert told is not None
    assert push_parameters(request(told, "chatcmpl-another")) == PushParameters(named.id, ADDRESS)
    # vLLM's server reports the prefill engine's cached tokens by the first.
    assert (told["do_remote_prefill"], told["do_remote_decode"]) == (True, False)


@pytest.mark.parametrize("name", ["\u00fcber", "x" * 500, "new\nline"])
def test_a_request_with_an_odd_name_has_a_push_with_a_good_one(name: str) -> None:
    first, again = (push_parameters(request(FIRST, name)) for _ in range(2))
    assert first == again != push_parameters(request(FIRST, f"{name}2"))


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        {},
        {"do_remote_decode": False},
        {"do_remote_decode": "yes"},
        {"do_remote_prefill": True},
        {"lamina": {"keep": False}},
    ],
)
def test_nobody_is_told_who_does_not_ask(parameters: object) -> None:
    assert not is_asked_first(request(parameters))
    assert push_parameters(request(parameters)) is None


def test_a_router_that_names_the_push_itself_is_not_told_another() -> None:
    asked = request({**FIRST, "lamina_push": {"id": "5b1c0f"}})
    assert not is_asked_first(asked)
    assert push_parameters(asked) == PushParameters("5b1c0f", None)


@pytest.mark.parametrize("status", [RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR])
def test_of_a_prompt_that_is_not_computed_nothing_is_told(status: RequestStatus) -> None:
    assert handed_on(request(FIRST, status=status), ADDRESS) is None
