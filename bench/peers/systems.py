"""The systems that are compared, and how vLLM is told to run each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

_ADAPTERS = "peers.adapters"
_GIB = 1 << 30
_WEIGHTS = "peers.weights"


class System(StrEnum):
    """What serves."""

    RECOMPUTE = "recompute"
    OFFLOADING = "OffloadingConnector"
    SIMPLE = "SimpleCPUOffload"
    LMCACHE = "LMCache"
    LAMINA = "Lamina"

    @property
    def environment(self) -> Environment:
        """Where it is installed."""
        match self:
            case System.LAMINA | System.RECOMPUTE:
                return Environment.OWN
            case System.LMCACHE:
                return Environment.LMCACHE
            case System.OFFLOADING | System.SIMPLE:
                return Environment.VLLM

    @property
    def is_peer(self) -> bool:
        """Whether it is what Lamina is compared with, other than computing anew."""
        return self not in {System.RECOMPUTE, System.LAMINA}

    @property
    def survives_restart(self) -> bool:
        """Whether a process finds on disk what the one before it has left there."""
        return self in {System.OFFLOADING, System.LAMINA}

    def shares(self, kind: SharedKind) -> bool:
        """Whether it keeps its cache in such a store here. LMCache's S3 needs a library that is not
        installed with it."""
        match self:
            case System.LAMINA:
                return True
            case System.OFFLOADING:
                return kind in {SharedKind.DIRECTORY, SharedKind.S3}
            case System.LMCACHE:
                return kind is SharedKind.VALKEY
            case System.RECOMPUTE | System.SIMPLE:
                return False


class Environment(StrEnum):
    """A Python environment. All have the same packages but for the system itself."""

    OWN = "own"
    """The one that the bench runs in."""
    VLLM = "vllm"
    """vLLM, and no Lamina."""
    LMCACHE = "lmcache"

    @property
    def requirements(self) -> tuple[str, ...]:
        """What it has beyond the packages of the environment that the bench runs in. LMCache's own
        requirements are for GPUs; these are what its import needs without one."""
        if self is not Environment.LMCACHE:
            return ()
        return ("lmcache==0.5.6", "sortedcontainers==2.4.0", "aiofile==3.12.3", "caio==0.12.10")


class SharedKind(StrEnum):
    """A store that several engines share."""

    VALKEY = "valkey"
    DIRECTORY = "directory"
    S3 = "s3"


@dataclass(frozen=True, slots=True)
class Shared:
    """A shared store as one system is to use it.

    Attributes:
        kind: what it is.
        where: its URL; a path if it is a directory.
        bucket: of an object store.
        user: likewise.
        secret: likewise.
    """

    kind: SharedKind
    where: str
    bucket: str = ""
    user: str = ""
    secret: str = ""


@dataclass(frozen=True, slots=True)
class Store:
    """What a system may keep outside the engine.

    Attributes:
        host: bytes of host memory.
        disk: directory of its own; None for no disk.
        disk_bytes: how much of it.
        shared: a store of others; None for none.
        paced: whether what comes from host memory comes through a link, see
            :mod:`lamina_kv.bench.pacing`.
    """

    host: int
    disk: str | None = None
    disk_bytes: int = 0
    paced: bool = False
    shared: Shared | None = None


@dataclass(frozen=True, slots=True)
class Wiring:
    """How vLLM is made to run a system.

    Attributes:
        connector: name of the connector's class; None for none.
        module: where it is; None for one of vLLM's own.
        extra: its configuration.
        environment: variables of the process.
    """

    connector: str | None = None
    module: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def wiring(system: System, store: Store, lamina: Mapping[str, Any]) -> Wiring:
    """How a system is run with what it may keep. Defaults are left alone.

    Args:
        system: which.
        store: what it may keep.
        lamina: Lamina's configuration beyond its tiers.
    """
    match system:
        case System.RECOMPUTE:
            return Wiring()
        case System.OFFLOADING:
            # Its object tier reads telemetry, which is off by default and then an error.
            variables = {**_credentials(store.shared), "NIXL_TELEMETRY_ENABLE": "y"}
            return Wiring("OffloadingConnector", None, _offloading(store), variables)
        case System.SIMPLE:
            name = "SimpleCPUOffloadOnCpu"
            return Wiring(name, f"{_ADAPTERS}.simple", _simple(store))
        case System.LMCACHE:
            return Wiring("LMCacheOnCpu", f"{_ADAPTERS}.lmcache", {}, _lmcache(store))
        case System.LAMINA:
            module = "lamina_kv.bench.paced" if store.paced else "lamina_kv.engines.vllm"
            name = "PacedConnector" if store.paced else "LaminaConnector"
            # The weights are made, not read, so that there is no file that tells which they are.
            tiers: dict[str, Any] = {"identity": _WEIGHTS, "host": {"capacity": store.host}}
            if store.disk is not None:
                tiers["tiers"] = [
                    {"kind": "disk", "path": store.disk, "capacity": store.disk_bytes}
                ]
            if store.shared is not None:
                tiers["tiers"] = [_lamina_tier(store.shared)]
            return Wiring(name, module, {**tiers, **lamina}, _credentials(store.shared))


def _offloading(store: Store) -> dict[str, Any]:
    specification = {
        "spec_module_path": f"{_ADAPTERS}.offloading",
        "cpu_bytes_to_use": store.host,
    }
    if store.shared is not None:
        return {
            **specification,
            "spec_name": "HostTieringSpec",
            "secondary_tiers": [_offloading_tier(store.shared)],
        }
    if store.disk is None:
        return {**specification, "spec_name": "HostSpec"}
    tiers = [{"type": "fs", "root_dir": store.disk}]
    return {**specification, "spec_name": "HostTieringSpec", "secondary_tiers": tiers}


def _simple(store: Store) -> dict[str, Any]:
    if store.disk is None:
        return {"cpu_bytes_to_use": store.host}
    return {
        "kv_offload_backend": "disk",
        "disk_path": str(Path(store.disk) / "slots"),
        "disk_capacity_bytes": store.disk_bytes,
    }


def _lmcache(store: Store) -> dict[str, str]:
    variables = {
        "LMCACHE_LOCAL_CPU": str(store.disk is None),
        "LMCACHE_MAX_LOCAL_CPU_SIZE": str(store.host / _GIB),
    }
    if store.shared is not None:
        variables |= {
            "LMCACHE_LOCAL_CPU": "True",
            "LMCACHE_REMOTE_URL": store.shared.where,
            "LMCACHE_REMOTE_SERDE": "naive",
            "LMCACHE_SAVE_UNFULL_CHUNK": "False",
        }
    if store.disk is not None:
        variables["LMCACHE_LOCAL_DISK"] = f"file://{store.disk}/"
        variables["LMCACHE_MAX_LOCAL_DISK_SIZE"] = str(store.disk_bytes / _GIB)
    return variables


def _lamina_tier(shared: Shared) -> dict[str, Any]:
    match shared.kind:
        case SharedKind.VALKEY:
            return {"kind": "valkey", "url": shared.where, "keep": "all"}
        case SharedKind.DIRECTORY:
            return {"kind": "directory", "path": shared.where, "keep": "all"}
        case SharedKind.S3:
            options = {"endpoint": shared.where, "region": "us-east-1"}
            url = f"s3://{shared.bucket}/lamina"
            return {"kind": "s3", "url": url, "options": options, "keep": "all"}


def _offloading_tier(shared: Shared) -> dict[str, Any]:
    if shared.kind is SharedKind.DIRECTORY:
        return {"type": "fs", "root_dir": shared.where}
    scheme, _, address = shared.where.partition("://")
    config = {
        "bucket": shared.bucket,
        "endpoint_override": address,
        "scheme": scheme,
        "access_key": shared.user,
        "secret_key": shared.secret,
        "region": "us-east-1",
    }
    return {"type": "obj", "store_config": config, "prefix": "offloading"}


def _credentials(shared: Shared | None) -> dict[str, str]:
    if shared is None or not shared.user:
        return {}
    return {"AWS_ACCESS_KEY_ID": shared.user, "AWS_SECRET_ACCESS_KEY": shared.secret}
