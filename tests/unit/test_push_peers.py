"""Guards: an engine dials prefill engines that its operator lets requests name, and no others."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest

from lamina_kv.config import Config, PushConfig, load_config
from lamina_kv.control.requests import PushParameters
from lamina_kv.engines.vllm.requests import withdrawn_push
from lamina_kv.engines.vllm.scheduler_side import SchedulerSide
from lamina_kv.push import addresses
from lamina_kv.push.addresses import Peers, normalise
from lamina_kv.push.complaints import Complaints


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
        ("10.0.0.1:9300", [], True),
        ("10.0.0.1:9300", ["10.0.0.1:09300"], True),
        ("010.0.0.1:9300", ["8.0.0.1:9300"], True),
        ("[0:0::1]:9300", ["[::1]"], True),
    ],
)
def test_peers(address: str, peers: list[str], among: bool) -> None:
    assert Peers(peers).allow(normalise(address)) is among


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("10.0.0.1:09300", "10.0.0.1:9300"),
        ("[10.0.0.1]:9300", "10.0.0.1:9300"),
        ("10.1:9300", "10.0.0.1:9300"),
        ("Prefill.LOCAL:9300", "prefill.local:9300"),
        ("[::0:1]:9300", "[::1]:9300"),
        ("::1:9300", "[::1]:9300"),
        ("[FE80::A%eth0]:9300", "[fe80::a%eth0]:9300"),
    ],
)
def test_a_prefill_engine_has_one_name(alias: str, name: str) -> None:
    """Two connections to one engine are refused."""
    assert normalise(alias) == normalise(name) == name
    assert engine()._push(request(1, alias)) == PushParameters("push", name)


@pytest.mark.parametrize(
    "address",
    [
        "host:٩٣٠٠",
        "host:²",
        "hóst:9300",
        "a b:9300",
        "a\0b:9300",
        "a:b:9300",
        "host:",
        ":9300",
        "[]:9300",
        "host:65536",
        "host:" + "9" * 5000,
        "host",
    ],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match=r"(?i)host|at least 3 parts"):
        normalise(address)
    asked = request(1, address)
    assert engine()._push(asked) is None
    assert len(engine()._wish(asked)[1]) < 1000


@pytest.mark.parametrize("name", ["5b1c…", "a\nb", "", "x" * 129, "x" * (17 << 20), 5])
def test_what_is_no_id_of_a_push(name: object) -> None:
    asked = SimpleNamespace(request_id="r", kv_transfer_params={"lamina_push": {"id": name}})
    assert engine()._push(asked) is None
    assert "1 to 128 printable ASCII characters" in engine()._wish(asked)[1]
    assert len(engine()._wish(asked)[1]) < 1000


@pytest.mark.parametrize(
    ("given", "withdrawn", "problem"),
    [
        ({"id": "5b1c", "withdrawn": True}, "5b1c", False),
        ({"id": "5b1c"}, None, False),
        ({"id": "5b1c", "withdrawn": False}, None, True),
        ({"id": "", "withdrawn": True}, None, True),
        ({"id": "5b1c", "withdrawn": True, "prefill": "10.0.0.1:9300"}, None, True),
    ],
)
def test_a_push_that_is_withdrawn_is_none_of_the_request_that_says_so(
    given: dict[str, object], withdrawn: str | None, problem: bool
) -> None:
    asked: Any = SimpleNamespace(request_id="r", kv_transfer_params={"lamina_push": given})
    assert withdrawn_push(asked) == withdrawn
    push, said = engine()._wish(asked)
    assert (push is not None) == ("withdrawn" not in given)
    assert (said is not None) == problem


def test_the_longest_id_of_a_push() -> None:
    asked = SimpleNamespace(request_id="r", kv_transfer_params={"lamina_push": {"id": "x" * 128}})
    assert engine()._push(asked) == PushParameters("x" * 128, None)


def engine(*peers: str) -> Any:
    side: Any = object.__new__(SchedulerSide)
    side._config = Config(push=PushConfig(peers=peers))
    side._peers = Peers(peers)
    side._link, side._complaints = object(), Complaints(logging.getLogger())
    return side


def test_an_address_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands are kept, and a request may name whatever it likes."""
    longest = "a" * 255 + ":65535"
    assert normalise(longest) == longest
    kept = addresses._normalise.cache_info().currsize
    with pytest.raises(ValueError, match=r"too long: 261 are allowed") as refused:
        normalise("a" + longest)
    assert len(str(refused.value)) < 200
    assert engine()._push(request(1, "a" + longest)) is None
    assert addresses._normalise.cache_info().currsize == kept


@pytest.mark.parametrize("parameters", ["lamina_push", ["lamina_push"], 3, True])
def test_parameters_that_are_no_object(parameters: object) -> None:
    asked = SimpleNamespace(request_id="r", kv_transfer_params=parameters)
    push, problem = engine()._wish(asked)  # type: ignore[arg-type]
    assert push is None
    assert problem is not None
    assert problem.startswith("kv_transfer_params must be an object")


@pytest.mark.parametrize(
    "wish",
    [
        {"id": ["x" * 10] * 1_000_000},
        {f"{number}": [number] for number in range(500_000)},
        {"id": {f"{number}": number for number in range(500_000)}},
        ["x" * 100_000] * 1000,
        "x" * 12_000_000,
    ],
    ids=["list", "object", "nested", "long", "text"],
)
def test_of_a_malformed_wish_little_is_looked_at(wish: object) -> None:
    asked: Any = SimpleNamespace(request_id="r", kv_transfer_params={"lamina_push": wish})
    side = engine()
    before = time.thread_time()
    _, problem = side._wish(asked)
    assert time.thread_time() - before < 0.01
    assert problem is not None
    assert len(problem) < 400


def request(number: int, prefill: str | None) -> Any:
    push = {"id": "push"} if prefill is None else {"id": "push", "prefill": prefill}
    return SimpleNamespace(request_id=f"r{number}", kv_transfer_params={"lamina_push": push})


@pytest.mark.parametrize("prefill", [None, "10.0.0.1:9300"])
@pytest.mark.parametrize("peers", [(), ("10.0.0.1",)])
def test_who_may_be_named(prefill: str | None, peers: tuple[str, ...]) -> None:
    side, asked = engine(*peers), request(1, prefill)
    assert side._push(asked) == PushParameters("push", prefill)
    assert side._wish(asked)[1] is None


def test_who_may_not_be_named_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    side = engine("10.0.0.1")
    for number in range(3):
        asked = request(number, "10.0.0.2:9300")
        assert side._push(asked) is None
        side._complain(asked, side._wish(asked)[1])
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
