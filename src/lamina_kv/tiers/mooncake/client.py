"""Mooncake's client library, made ready for a tier.

Facts of 0.3.13 that decide how it is used, each found by trying:

- Its calls block, and no argument bounds them. Environment variables do, which it reads when a
  client is set up. They are this process's, and an operator's own values win.
- Its calls for objects release the GIL. ``setup`` and ``close`` do not: a ``setup`` whose master
  does not answer would stop the engine for seconds. So the master is probed before.
- A call after ``close`` crashes the process.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol, cast

from lamina_kv.tiers.contract import StoreError
from lamina_kv.tiers.mooncake.config import MooncakeConfig


class Client(Protocol):
    """What a store uses of ``mooncake.store.MooncakeDistributedStore``. Addresses and sizes are in
    bytes, and an answer below zero is one of :class:`~lamina_kv.tiers.mooncake.codes.Code`."""

    def batch_is_exist(self, keys: Sequence[str]) -> list[int]:
        """For each object 1 if it is there, 0 if not."""

    def batch_get_into(
        self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        """Read objects; the length of each."""

    def batch_put_from(
        self,
        keys: Sequence[str],
        buffer_ptrs: Sequence[int],
        sizes: Sequence[int],
        config: Any,
    ) -> list[int]:
        """Write objects that are not there yet; 0 for each that is there now."""

    def register_buffer(self, buffer_ptr: int, size: int) -> int:
        """Let the network reach memory."""

    def close(self) -> int:
        """Leave the cluster."""


class Unreachable(Exception):
    """The master does not answer; the text says how that was noticed."""


class Library:
    """The library as one tier uses it.

    Args:
        config: the tier.

    Attributes:
        replication: what to write objects with.

    Raises:
        StoreError: if it is not installed.
    """

    def __init__(self, config: MooncakeConfig) -> None:
        self._config = config
        for name, value in _bounds(config.timeout).items():
            os.environ.setdefault(name, value)
        try:
            self._module = cast(Any, import_module("mooncake.store"))
        except ImportError as error:
            raise StoreError(
                f"{config.key('kind')}: Mooncake cannot be loaded ({error}): install it with "
                "pip install 'lamina-kv[mooncake]', on a machine without CUDA "
                "mooncake-transfer-engine-non-cuda instead, and the libraries libibverbs1, "
                "libnl-3-200 and libnl-route-3-200 of the system"
            ) from error
        self.replication = self._module.ReplicateConfig()
        self.replication.replica_num = config.replicas

    def connect(self) -> Client:
        """A client that is a member of the cluster. Holds the GIL for some 50 ms over TCP.

        Raises:
            Unreachable: if the master does not answer.
            StoreError: if it does, and Mooncake cannot be set up as it is configured.
        """
        config = self._config
        here = _probe(config)
        client = self._module.MooncakeDistributedStore()
        began = time.monotonic()
        code = client.setup(
            here if config.hostname == "auto" else config.hostname,
            config.metadata,
            config.segment or 0,
            0,  # its own buffers: the store has some
            config.protocol,
            config.devices or "",
            config.master,
        )
        if not code:
            return cast(Client, client)
        if time.monotonic() - began >= config.timeout:
            raise Unreachable(
                f"{config.master} takes connections and does not answer as a master does"
            )
        raise StoreError(
            f"{config.key('master')}: Mooncake cannot be set up ({code}), and the master is there: "
            f"look at protocol, devices, hostname, metadata and segment of {config.key('kind')}. "
            "Its own messages on stderr say which"
        )


def _bounds(timeout: float) -> dict[str, str]:
    """Environment variables that make calls end, given the seconds that one should take."""
    milliseconds, seconds = str(math.ceil(timeout * 1000)), str(math.ceil(timeout))
    return {
        # What a master that is stopped costs a call.
        "MC_RPC_TIMEOUT_MS": milliseconds,
        "MC_RPC_CONNECT_TIMEOUT_MS": milliseconds,
        # What a donor that is stopped costs each of its connections. With the default of 30 s a
        # call gives up after 60, while its transfers go on waiting, and deliver hours later.
        "MC_TCP_PROGRESS_TIMEOUT_SEC": seconds,
        "MC_TCP_STATUS_TIMEOUT_SEC": seconds,
        # 20 by default, which takes 90 s.
        "MC_STORE_CLIENT_SETUP_RETRIES": "1",
        "MC_LOG_LEVEL": "ERROR",
    }


def _probe(config: MooncakeConfig) -> str:
    """Try whether the master takes connections; returns the address from which it is reached."""
    if "://" in config.master:
        return socket.gethostname()  # whoever is master now is the library's to find out
    host, _, port = config.master.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), config.timeout) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise Unreachable(f"{config.master} takes no connection: {error}") from error
