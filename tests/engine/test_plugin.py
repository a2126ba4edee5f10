"""The connector is found by its name alone once the package is installed, and by its module
where it is not.
"""

from __future__ import annotations

import logging
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import vllm
from vllm.config import KVTransferConfig

import lamina_kv.engines.vllm
from engine.driver import Ask, Engine, EngineSpec, EngineStartError, Fleet, Start
from engine.workload import CHUNK, prompt
from lamina_kv.engines.vllm import register
from lamina_kv.engines.vllm.connector import LaminaConnector
from lamina_kv.engines.vllm.version import UnsupportedVersion

pytestmark = pytest.mark.engine


def test_vllm_is_told_of_the_plugin() -> None:
    (plugin,) = entry_points(group="vllm.general_plugins", name="lamina")
    assert plugin.value == "lamina_kv.engines.vllm:register"


@pytest.mark.parametrize("path", ["lamina.engines.vllm", "lamina.engines.vllm.connector"])
def test_former_module_path_is_an_error_that_says_the_new_one(
    llama: Path, fleet: Fleet, path: str
) -> None:
    spec = EngineSpec(llama, {}, transfer={"kv_connector_module_path": path})
    with pytest.raises(EngineStartError) as error:
        Engine(spec, fleet.next_log())
    said = str(error.value)
    assert 'set "kv_connector_module_path": "lamina_kv.engines.vllm", or leave it out' in said


@pytest.mark.parametrize(
    "path", [None, "lamina_kv.engines.vllm", "lamina_kv.engines.vllm.connector"]
)
def test_found(llama: Path, start: Start, path: str | None) -> None:
    """And without any other configuration it serves."""
    spec = EngineSpec(llama, {}, transfer={"kv_connector_module_path": path})
    engine = start(spec)
    ask = Ask(prompt(3, CHUNK + 1))
    engine.ask(ask)
    engine.forget()
    assert engine.ask(ask).cached == CHUNK


def test_every_process_may_register_again() -> None:
    register()
    register()


FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory"
MOVED = "vllm.v1.metrics.cache_hit_source"
"""A private module of vLLM's that the connector needs."""


@pytest.fixture
def another_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that nobody has seen, in which names have moved."""
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    monkeypatch.setitem(sys.modules, MOVED, None)
    monkeypatch.delitem(sys.modules, "lamina_kv.engines.vllm.connector", raising=False)
    monkeypatch.delattr(lamina_kv.engines.vllm, "connector", raising=False)


@pytest.mark.usefixtures("another_vllm")
def test_another_version_is_refused_by_a_sentence_and_not_by_a_name_that_it_lacks() -> None:
    with pytest.raises(UnsupportedVersion, match=r"pip install 'vllm>=0\.32,<0\.34'"):
        _ = lamina_kv.engines.vllm.LaminaConnector


@pytest.mark.usefixtures("another_vllm")
def test_another_version_still_serves_without_lamina(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM calls the plugin whoever it serves."""
    register()
    monkeypatch.setitem(sys.modules, FACTORY, None)
    with caplog.at_level(logging.WARNING):
        register()
    assert "0.34.0" in caplog.text


@pytest.mark.parametrize(("sections", "sleeps"), [({}, True), ({"push": {}}, False)])
def test_a_cache_that_the_network_knows_of_does_not_sleep(
    sections: dict[str, object], sleeps: bool
) -> None:
    """vLLM 0.33 asks, and takes a connector that says nothing to support it."""
    config = KVTransferConfig(
        kv_connector="LaminaConnector", kv_role="kv_both", kv_connector_extra_config=sections
    )
    assert LaminaConnector.supports_sleep_mode(config) is sleeps


def test_a_supported_version_without_its_factory_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, FACTORY, None)
    with pytest.raises(ImportError):
        register()
