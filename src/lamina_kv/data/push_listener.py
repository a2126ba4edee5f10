"""Where a rank hears destinations from its scheduler while a step runs."""

from __future__ import annotations

import logging
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from lamina_kv.data.threads import Threads
from lamina_kv.plan import Binding
from lamina_kv.push.ranks import STRANGER, RankPlace, answer

log = logging.getLogger("lamina_kv.data")


class PushListener:
    """See the module. Who calls first and has the key is the scheduler: then the socket is gone.

    Args:
        heard: called with each destination, on a thread of this.
        threads: how that begins.

    Attributes:
        place: where the scheduler calls.

    Raises:
        OSError: if there is no place for a socket.
    """

    def __init__(self, heard: Callable[[Binding], None], threads: Threads) -> None:
        self._heard = heard
        self._folder = Path(tempfile.mkdtemp(prefix="lamina-"))  # for this user alone
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address = str(self._folder / "rank")
        try:
            self._server.bind(address)
            self._server.listen()
        except OSError:
            self._unlink()
            raise
        self.place = RankPlace(address, secrets.token_bytes(32))
        threads.start("bindings", self._run, self._died)

    def close(self) -> None:
        """Nobody may call any more. Who has called ends it by closing its end."""
        with suppress(OSError):  # not listening any more
            self._server.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            bindings = self._await_scheduler()
        finally:
            self._unlink()
        for binding in bindings:
            self._heard(binding)

    def _await_scheduler(self) -> Iterable[Binding]:
        while True:
            try:
                connected, _ = self._server.accept()
            except OSError:
                return ()  # closed
            try:
                return answer(connected, self.place.key)
            except STRANGER as error:
                log.warning("somebody who is not the scheduler has called a rank: %r", error)

    def _unlink(self) -> None:
        self._server.close()
        with suppress(OSError):
            (self._folder / "rank").unlink()
        with suppress(OSError):
            self._folder.rmdir()

    def _died(self, error: BaseException) -> None:
        log.warning("destinations are heard in plans alone: %r", error)
