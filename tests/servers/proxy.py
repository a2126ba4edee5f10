"""A proxy before a server: what passes is delayed, or nothing passes."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self


class Proxy:
    """Passes bytes on between clients and a port of this machine, while a ``with`` block runs.

    Args:
        port: where the server listens.

    Attributes:
        port: where it listens itself.
        delay: seconds that each piece of an answer is held back; may be changed at any time.
    """

    def __init__(self, port: int) -> None:
        self.delay = 0.0
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each in (self._listener, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        address = "127.0.0.1", self._server
        with suppress(OSError), client, socket.create_connection(address) as server:
            self._open |= {client, server}
            answers = threading.Thread(target=self._pass, args=[server, client, True])
            answers.start()
            self._pass(client, server, False)
            answers.join()
            self._open -= {client, server}

    def _pass(self, source: socket.socket, sink: socket.socket, held: bool) -> None:
        with suppress(OSError):
            while some := source.recv(1 << 16):
                if held and self.delay:
                    time.sleep(self.delay)
                sink.sendall(some)
        for end in (source, sink):  # who has lost one side has lost the other
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
