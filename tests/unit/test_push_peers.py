"""Guards: an engine dials prefill engines that its operator lets requests name, and no others."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from lamina.config import Config, PushConfig, load_config
from lamina.control.requests import PushParameters
from lamina.engines.vllm.scheduler_side import SchedulerSide
from lamina.push.addresses import is_among


@pytest.mark.parametrize(
    ("address", "peers", "among"),
    [
        ("10.0.0.1:9300", ["10.0.0.2:9300", "10.0.0.1:9300"], True),
        ("10.0.0.1:9301", ["10.0.0.1:9300"], False),
        ("10.0.0.1:9301", ["10.0.0.1"], True),
        ("10.0.0.11:9300", ["10.0.0.1"], False),
        ("Prefill.local:9300", ["prefill.LOCAL"], True),
        ("[::1]:9300", ["[::1]"], True),
        ("[::1]:9300", ["[::1]:9300"], True),
        ("[::2]:9300", ["[::1]"], False),
        ("10.0.0.1:9300", [], False),
    ],
)
def test_peers(address: str, peers: list[str], among: bool) -> None:
    assert is_among(address, peers) is among


def engine(*peers: str) -> Any:
    side: Any = object.__new__(SchedulerSide)
    side._config = Config(push=PushConfig(peers=peers))
    side._link, side._complaints = object(), set()
    return side


def request(number: int, prefill: str | None) -> Any:
    push = {"id": "push"} if prefill is None else {"id": "push", "prefill": prefill}
    return SimpleNamespace(request_id=f"r{number}", kv_transfer_params={"lamina_push": push})


@pytest.mark.parametrize("prefill", [None, "10.0.0.1:9300"])
@pytest.mark.parametrize("peers", [(), ("10.0.0.1",)])
def test_who_may_be_named(prefill: str | None, peers: tuple[str, ...]) -> None:
    side, asked = engine(*peers), request(1, prefill)
    assert side._push(asked) == PushParameters("push", prefill)
    assert side._why_not_pushed(asked) is None


def test_who_may_not_be_named_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    side = engine("10.0.0.1")
    for number in range(3):
        asked = request(number, "10.0.0.2:9300")
        assert side._push(asked) is None
        side._complain(asked, side._why_not_pushed(asked))
    (said,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "push.peers does not list '10.0.0.2:9300'" in said.getMessage()


@pytest.mark.parametrize("peers", ["10.0.0.1", [1], ["a b"], ["10.0.0.1:9300/"], ["::1"]])
def test_what_is_no_list_of_peers(peers: object) -> None:
    with pytest.raises(ValueError, match=r"push\.peers: must be a list of addresses or hosts"):
        load_config({"push": {"peers": peers}}, {})


def test_a_list_of_peers() -> None:
    peers = ["10.0.0.1:9300", "prefill.local", "[::1]"]
    config = load_config({"push": {"peers": peers}}, {})
    assert config.push is not None
    assert config.push.peers == tuple(peers)
