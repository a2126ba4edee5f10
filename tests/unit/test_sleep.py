"""Before vLLM's executor takes the cache's memory away, its workers' connectors are told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.executor.abstract import Executor

from lamina_kv.engines.vllm import sleep


class Connector:
    """Notes that it was told."""

    def __init__(self, said: list[str], *children: Connector) -> None:
        self.said = said
        self.sub_connectors = children

    def unregister_kv_caches(self) -> None:
        """What LaminaConnector has, whatever vLLM's version."""
        self.said.append("quiet")


@pytest.mark.parametrize("arguments", [("sleep", 1), ("discard", ("kv_cache",))])
def test_connectors_are_quiet_first(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, object]
) -> None:
    said: list[str] = []
    multi = SimpleNamespace(sub_connectors=(SimpleNamespace(), Connector(said)))
    monkeypatch.setattr(sleep, "SAYS_SO", False)
    monkeypatch.setattr(sleep, "has_kv_transfer_group", lambda: True)
    monkeypatch.setattr(sleep, "get_kv_transfer_group", lambda: multi)
    for method in ("sleep", "discard"):
        monkeypatch.setattr(Executor, method, lambda *_, m=method: said.append(m))
    sleep.be_quiet_before_sleep()
    sleep.be_quiet_before_sleep()
    executor: Any = SimpleNamespace(collective_rpc=lambda function: function(None))
    name, argument = arguments
    getattr(Executor, name)(executor, argument)
    assert said == ["quiet", name]


def test_vllm_that_tells_them_itself_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sleep, "SAYS_SO", True)
    monkeypatch.setattr(Executor, "sleep", before := lambda *_: None)
    sleep.be_quiet_before_sleep()
    assert Executor.sleep is before
