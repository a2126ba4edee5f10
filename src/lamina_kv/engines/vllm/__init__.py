"""Lamina for vLLM.

Installed, the connector is known to vLLM by name (``"kv_connector": "LaminaConnector"``) through
its plugin entry point; it is also reachable with
``"kv_connector_module_path": "lamina_kv.engines.vllm"``.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from lamina_kv.engines.vllm.former_name import explain_former_name
from lamina_kv.engines.vllm.version import UnsupportedVersion, is_supported

if TYPE_CHECKING:
    from lamina_kv.engines.vllm.connector import LaminaConnector

__all__ = ["LaminaConnector", "register"]

CONNECTOR_NAME = "LaminaConnector"

log = logging.getLogger("lamina_kv.engines.vllm")


def register() -> None:
    """Make the connector known to vLLM; the entry point of its plugin. Safe to call again.

    Every vLLM beside which Lamina is installed calls this when it starts, also to serve without
    it. So a version that is not supported is refused when the connector is asked for, and here only
    said, where that version has no place any more to register it.
    """
    explain_former_name()
    import vllm

    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    except ImportError:
        if is_supported(vllm.__version__):
            raise
        log.warning("%s", UnsupportedVersion(vllm.__version__))
        return
    with contextlib.suppress(ValueError):  # it is registered already
        KVConnectorFactory.register_connector(CONNECTOR_NAME, __name__, CONNECTOR_NAME)
    if is_supported(vllm.__version__):  # another one is refused, by name, when it is asked for
        from lamina_kv.engines.vllm.early import check_early

        check_early(CONNECTOR_NAME)


def __getattr__(name: str) -> type[LaminaConnector]:
    if name == CONNECTOR_NAME:
        from lamina_kv.engines.vllm.connector import LaminaConnector

        return LaminaConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
