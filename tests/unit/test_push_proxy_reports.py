"""Guards what the proxy reads from an engine's page of metrics, and what it takes usage for."""

from __future__ import annotations

import json

import pytest

from lamina_kv.push.proxy.reports import EngineReport, RankReport, read_report
from lamina_kv.push.proxy.usage import Usage, read_usage

PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a {b} \\" c"} 3.0
vllm:num_requests_running{engine="1",model_name="a {b} \\" c"} 0.0
vllm:num_requests_waiting{engine="0",model_name="a {b} \\" c"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} NaN
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100",swap="None"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="None",swap="None"} 1.0
lamina_push_peer_in_use{engine="0",model_name="m",peer="10.0.0.1:9300"} 1.0
lamina_push_peer_in_use{engine="0",model_name="m",peer="010.0.0.2:9300"} 0.0
lamina_push_peer_in_use{engine="0",model_name="m",peer="nonsense"} 0.0
"""


def test_what_an_engine_publishes() -> None:
    assert read_report(PAGE) == EngineReport(
        {0: RankReport(3, 2, 0.25, 1600), 1: RankReport(0, 0, 0.0, None)},
        frozenset({"8.0.0.2:9300"}),
    )


def test_with_tiers_nobody_knows_how_much_it_holds() -> None:
    tier = 'lamina_tier_capacity_bytes{engine="0",tier="host"} 1e9\n'
    assert read_report(PAGE + tier).ranks[0].capacity is None


@pytest.mark.parametrize("page", ["", "nonsense", "vllm:num_requests_running 3", "\ufffd{} 4"])
def test_a_page_that_says_nothing(page: str) -> None:
    assert read_report(page) == EngineReport()


DETAILS = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (DETAILS, Usage(9, 4)),
        ({"prompt_tokens": 9, "completion_tokens": 1}, Usage(9, None)),
        ({"prompt_tokens": 9, "prompt_tokens_details": None}, Usage(9, None)),
        ({"prompt_tokens": "9"}, None),
        (None, None),
    ],
)
@pytest.mark.parametrize("events", [False, True])
def test_what_an_engine_says_of_an_answer(
    usage: object, expected: Usage | None, events: bool
) -> None:
    body = json.dumps({"choices": [{"text": '"prompt_tokens"'}], "usage": usage}).encode()
    if events:
        body = b'data: {"choices": []}\n\ndata: ' + body + b"\n\ndata: [DONE]\n\n"
    assert read_usage(body) == expected


def test_half_an_answer_says_nothing() -> None:
    assert read_usage(b'{"usage": {"prompt_tokens": 5, ') is None
    assert read_usage(b'data: {"usage": {"prompt_tokens": \xff\n\n') is None
