"""Lamina for vLLM.

Installed, the connector is known to vLLM by name (``"kv_connector": "LaminaConnector"``) through
its plugin entry point; it is also reachable with
``"kv_connector_module_path": "lamina.engines.vllm"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.engines.vllm.connector import LaminaConnector

__all__ = ["LaminaConnector", "register"]

CONNECTOR_NAME = "LaminaConnector"


def register() -> None:
    """Make the connector known to vLLM; the entry point of its plugin. Safe to call again."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        KVConnectorFactory.get_connector_class_by_name(CONNECTOR_NAME)
    except ValueError:
        KVConnectorFactory.register_connector(
            CONNECTOR_NAME, "lamina.engines.vllm.connector", CONNECTOR_NAME
        )


def __getattr__(name: str) -> type[LaminaConnector]:
    if name == CONNECTOR_NAME:
        from lamina.engines.vllm.connector import LaminaConnector

        return LaminaConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
