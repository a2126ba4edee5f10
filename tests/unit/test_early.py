"""What is wrong with the configuration is said while vLLM puts its own together."""

from __future__ import annotations

import os
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


def test_a_disk_that_is_too_small_is_said_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = os.statvfs(tmp_path)
    free = system.f_bavail * system.f_frsize
    monkeypatch.setattr(os, "statvfs", lambda _: system)

    def tier(capacity: int) -> KVTransferConfig:
        path = str(tmp_path / "not" / "there")
        return transfer(tiers=[{"kind": "disk", "path": path, "capacity": capacity}])

    KVConnectorFactory.get_connector_class(tier(free))
    with pytest.raises(WrongConfiguration, match=r"tiers\.disk\.capacity: .* has room for"):
        KVConnectorFactory.get_connector_class(tier(free + 1))
    store = tmp_path / "not" / "there"
    store.mkdir(parents=True)
    (store / "slab").write_bytes(bytes(8192))  # what it has already counts as its own
    KVConnectorFactory.get_connector_class(tier(free + 8192))
    assert list(tmp_path.rglob("*")) == [store.parent, store, store / "slab"], "nothing is made"


def test_other_connectors_are_not_looked_at() -> None:
    found = KVConnectorFactory.get_connector_class(transfer("ExampleConnector", hots={}))
    assert found.__name__ == "ExampleConnector"
