"""What is wrong with the configuration is said while vLLM puts its own together."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from lamina_kv.config import CONFIG_VARIABLE
from lamina_kv.engines.vllm import CONNECTOR_NAME, register
from lamina_kv.engines.vllm.connector import LaminaConnector
from lamina_kv.engines.vllm.early import WrongConfiguration


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    looked_up = KVConnectorFactory.__dict__["get_connector_class"]
    monkeypatch.setattr(KVConnectorFactory, "get_connector_class", looked_up)  # and back
    register()
    register()


def transfer(connector: str = CONNECTOR_NAME, **extra: object) -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector=connector, kv_role="kv_both", kv_connector_extra_config=extra
    )


def test_a_right_configuration_gives_the_class() -> None:
    found = KVConnectorFactory.get_connector_class(transfer(host={"capacity": "1GiB"}))
    assert found is LaminaConnector
    assert KVConnectorFactory.supports_hma_config(transfer())


def test_every_mistake_is_said_and_nothing_behind_them() -> None:
    with pytest.raises(WrongConfiguration) as error:
        KVConnectorFactory.supports_hma_config(transfer(hots={}, host={"capacity": "4GB"}))
    assert not isinstance(error.value, ValueError), "pydantic would wrap it"
    lines = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["host.capacity", "hots"]


def test_a_file_is_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lamina.yaml"
    file.write_text("load: {mode: fast}\n")
    monkeypatch.setenv(CONFIG_VARIABLE, str(file))
    with pytest.raises(WrongConfiguration, match=r"load\.mode: must be"):
        KVConnectorFactory.get_connector_class(transfer())


def test_other_connectors_are_not_looked_at() -> None:
    found = KVConnectorFactory.get_connector_class(transfer("ExampleConnector", hots={}))
    assert found.__name__ == "ExampleConnector"
