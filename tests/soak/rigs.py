"""Real shared stores, and all that can be done to each while an engine uses it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any, Self

from servers.proxy import Proxy

HELD_BACK = 2.0
"""Seconds for which a proxy holds back answers."""


class Rig:
    """One store with its server, while a ``with`` block runs.

    Attributes:
        entry: what ``tiers`` holds for it.
        environment: variables that its client needs.
        random: what decides where it is left open.
        serves_here: whether this process has threads of its own for it.
        threads: how many its client library starts for good once its server has gone.
        files: how files are called that are the rig's, or its client library's for good.
    """

    entry: Mapping[str, Any]
    serves_here = False
    threads = 0
    files: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: dict[str, str] = {}
        self.random = Random(7)
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        try:
            self.open()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def open(self) -> None:
        """Start it."""
        raise NotImplementedError


class DirectoryRig(Rig):
    """A directory."""

    def open(self) -> None:
        self.root = self.folder / "shared"
        self.entry = {"kind": "directory", "path": str(self.root)}

    def _chunks(self) -> Iterator[Path]:
        for path in list(self.root.rglob("*.[0-9]")):
            if path.is_file():
                yield path

    def vanish(self) -> None:
        """It is not mounted any more."""
        self.root.rename(self.folder / "elsewhere")

    def come_back(self) -> None:
        """It is mounted again."""
        shutil.rmtree(self.root, ignore_errors=True)
        (self.folder / "elsewhere").rename(self.root)

    def empty(self) -> None:
        """All that is in it is deleted."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    def evict(self) -> None:
        """Half of the chunks are deleted."""
        for path in self._chunks():
            if self.random.random() < 0.5:
                path.unlink(missing_ok=True)

    def spoil(self) -> None:
        """A bit flips in half of the chunks."""
        for path in self._chunks():
            if self.random.random() < 0.5:
                with path.open("r+b") as file:
                    os.pwrite(file.fileno(), b"\x5a", self.random.randrange(400))

    def shorten(self) -> None:
        """Half of the chunks lose their end."""
        for path in self._chunks():
            if self.random.random() < 0.5:
                os.truncate(path, self.random.randrange(400))


class ValkeyRig(Rig):
    """A Valkey server behind a proxy."""

    serves_here, files = True, ("socket:",)

    def open(self) -> None:
        from servers.valkey import ValkeyServer

        self.server = self._exit.enter_context(ValkeyServer(tcp=True))
        self.proxy = self._exit.enter_context(Proxy(self.server.port))
        self.entry = {"kind": "valkey", "url": f"valkey://127.0.0.1:{self.proxy.port}"}

    def kill(self) -> None:
        """The server ends."""
        self.server.kill()

    def start(self) -> None:
        """It is there again, empty."""
        self.server.start()

    def restart(self) -> None:
        """It ends and comes back at once, empty."""
        self.server.restart()

    def stop(self) -> None:
        """It hangs."""
        self.server.stop()

    def go_on(self) -> None:
        """It goes on."""
        self.server.resume()

    def hold_back(self) -> None:
        """Answers come late."""
        self.proxy.delay = HELD_BACK

    def let_pass(self) -> None:
        """Answers come in time again."""
        self.proxy.delay = 0.0

    def fill(self) -> None:
        """It takes nothing more."""
        self.server("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", 1)

    def widen(self) -> None:
        """It has room again."""
        self.server("CONFIG", "SET", "maxmemory", "256mb", "maxmemory-policy", "allkeys-lru")

    def evict(self) -> None:
        """Half of the chunks are evicted."""
        for name in self._names():
            if self.random.random() < 0.5:
                self.server("DEL", name)

    def spoil(self) -> None:
        """A byte changes in half of the chunks."""
        for name in self._names():
            if self.random.random() < 0.5:
                self.server("SETRANGE", name, self.random.randrange(400), b"\x5a")

    def shorten(self) -> None:
        """Half of the chunks lose their end."""
        for name in self._names():
            if self.random.random() < 0.5:
                self.server("SET", name, b"\0" * self.random.randrange(400))

    def revoke(self) -> None:
        """The engine's credentials are worth nothing any more."""
        self.server("ACL", "SETUSER", "default", "-@all", "+acl", "+ping")

    def admit(self) -> None:
        """They are again."""
        self.server("ACL", "SETUSER", "default", "+@all")

    def _names(self) -> list[bytes]:
        return [name for name in self.server("KEYS", "*") if not name.endswith(b".json")]


class SeaweedRig(Rig):
    """A bucket of SeaweedFS behind a proxy."""

    serves_here, files = True, ("socket:",)

    def open(self) -> None:
        from servers.seaweed import Seaweed

        self.server = self._exit.enter_context(Seaweed())
        self.proxy = self._exit.enter_context(Proxy(self.server.port))
        options = {"endpoint": f"http://127.0.0.1:{self.proxy.port}", "region": "us-east-1"}
        url = f"s3://{self.server.bucket('shared')}"
        self.entry = {"kind": "s3", "url": url, "options": options}
        self.environment = self.server.environment()

    def kill(self) -> None:
        """The server ends."""
        self.server.kill()

    def start(self) -> None:
        """It is there again, with what it had."""
        self.server.start()

    def stop(self) -> None:
        """It hangs."""
        self.server.stop()

    def go_on(self) -> None:
        """It goes on."""
        self.server.cont()

    def hold_back(self) -> None:
        """Answers come late."""
        self.proxy.delay = HELD_BACK

    def let_pass(self) -> None:
        """Answers come in time again."""
        self.proxy.delay = 0.0


class ScriptedS3Rig(Rig):
    """A scripted S3."""

    serves_here, files = True, ("socket:",)

    def open(self) -> None:
        from servers.scripted_s3 import ScriptedS3

        self.server = self._exit.enter_context(ScriptedS3())
        options = {"endpoint": self.server.endpoint, "region": "us-east-1"}
        self.entry = {"kind": "s3", "url": f"s3://{self.server.bucket}/soak", "options": options}
        self.environment = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}

    def _all(self, **fault: Any) -> None:
        from servers.scripted_s3 import Fault

        for method in ("GET", "HEAD", "PUT", "LIST"):
            self.server.faults[method] = Fault(**fault)

    def refuse(self) -> None:
        """It is overloaded."""
        self._all(status=503, code="SlowDown")

    def revoke(self) -> None:
        """The engine's credentials are worth nothing any more."""
        self._all(status=403, code="AccessDenied")

    def admit(self) -> None:
        """All is well again."""
        self.server.faults.clear()

    def fill(self) -> None:
        """It takes nothing more."""
        from servers.scripted_s3 import Fault

        self.server.faults["PUT"] = Fault(status=507, code="InsufficientStorage")

    def cut(self) -> None:
        """Connections end in the middle of an object."""
        from servers.scripted_s3 import Fault

        self.server.faults["GET"] = Fault(cut=200)

    def empty(self) -> None:
        """All that is in it is deleted."""
        self.server.objects.clear()

    def evict(self) -> None:
        """Half of the chunks are deleted."""
        for name in self._names():
            self.server.objects.pop(name, None)

    def spoil(self) -> None:
        """A byte changes in half of the chunks."""
        for name in self._names():
            content = bytearray(self.server.objects[name])
            content[self.random.randrange(400)] ^= 1
            self.server.objects[name] = bytes(content)

    def shorten(self) -> None:
        """Half of the chunks lose their end."""
        for name in self._names():
            self.server.objects[name] = self.server.objects[name][: self.random.randrange(400)]

    def _names(self) -> list[str]:
        names = [name for name in list(self.server.objects) if not name.endswith(".json")]
        return [name for name in names if self.random.random() < 0.5]


class MooncakeRig(Rig):
    """A Mooncake master, and a process that donates memory to it. A client that has lost its master
    leaves an event loop behind."""

    threads, files = 1, ("anon_inode:",)

    def open(self) -> None:
        from servers.mooncake import Donor, Master, require

        require()
        self.master = self._exit.enter_context(Master(self.folder))
        self.donor = self._exit.enter_context(Donor(self.master, self.folder))
        self.entry = {"kind": "mooncake", "master": self.master.address}

    def kill(self) -> None:
        """The master ends."""
        self.master.kill()

    def start(self) -> None:
        """It is there again, empty."""
        self.master.start()

    def stop(self) -> None:
        """The master hangs."""
        self.master.stop()

    def go_on(self) -> None:
        """It goes on."""
        self.master.go_on()

    def lose(self) -> None:
        """The process that has the chunks ends."""
        self.donor.kill()

    def find(self) -> None:
        """Another one takes its place."""
        self.donor.start()


RIGS: Mapping[str, Callable[[Path], Rig]] = {
    "directory": DirectoryRig,
    "valkey": ValkeyRig,
    "seaweed": SeaweedRig,
    "scripted-s3": ScriptedS3Rig,
    "mooncake": MooncakeRig,
}
"""By name."""
