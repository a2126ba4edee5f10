"""The connector is found by its name alone once the package is installed, and by its module
where it is not.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest

from engine.driver import Ask, EngineSpec, Start
from engine.workload import CHUNK, prompt

pytestmark = pytest.mark.engine


def test_vllm_is_told_of_the_plugin() -> None:
    (plugin,) = entry_points(group="vllm.general_plugins", name="lamina")
    assert plugin.value == "lamina.engines.vllm:register"


@pytest.mark.parametrize("path", [None, "lamina.engines.vllm", "lamina.engines.vllm.connector"])
def test_found(llama: Path, start: Start, path: str | None) -> None:
    """And without any other configuration it serves."""
    spec = EngineSpec(llama, {}, transfer={"kv_connector_module_path": path})
    engine = start(spec)
    ask = Ask(prompt(3, CHUNK + 1))
    engine.ask(ask)
    engine.forget()
    assert engine.ask(ask).cached == CHUNK


def test_every_process_may_register_again() -> None:
    from lamina.engines.vllm import register

    register()
    register()
