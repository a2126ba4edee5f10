"""The configuration is checked before vLLM starts an engine.

vLLM makes a connector behind the weights: minutes after the start, in a process whose errors it
buries. But it looks up the connector's class while it puts its own configuration together, in the
process that the operator started. There Lamina's is read once, and what is wrong with it is the
last thing on the screen, and so is a tier for which this machine has no room. What needs the model,
or a store, is still checked where it is used.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from lamina_kv.config import ConfigError, load_config

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig


class WrongConfiguration(RuntimeError):
    """Lamina cannot be started with its configuration.

    Not a :class:`ValueError`: vLLM's configuration is made by pydantic, which puts a page about its
    own arguments behind those.
    """


def check_early(connector: str) -> None:
    """Have vLLM check the configuration of the connector with that name whenever it looks up its
    class. A second call does nothing.

    Args:
        connector: the name.
    """
    looked_up = KVConnectorFactory.get_connector_class
    if hasattr(looked_up, "__wrapped__"):
        return

    @functools.wraps(looked_up)
    def get_connector_class(kv_transfer_config: KVTransferConfig) -> Any:
        if kv_transfer_config.kv_connector == connector:
            check(kv_transfer_config)
        return looked_up(kv_transfer_config)

    KVConnectorFactory.get_connector_class = staticmethod(get_connector_class)


def check(transfer: KVTransferConfig) -> None:
    """Read the configuration.

    Args:
        transfer: vLLM's ``kv_transfer_config``.

    Raises:
        WrongConfiguration: with every mistake in it, or every tier that cannot be.
    """
    try:
        config = load_config(transfer.kv_connector_extra_config, os.environ)
    except ConfigError as error:
        raise WrongConfiguration(str(error)) from None
    problems = [*filter(None, (tier.impossible() for tier in config.tiers))]
    if problems:
        raise WrongConfiguration("\n".join(problems))
