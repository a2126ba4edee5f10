"""Who is the one that sweeps a directory: a lease in a file.

Only the server's clock is looked at: the time of the lease's file, and that of a file made now. So
clocks of machines may differ. A lease that has not been renewed for long is taken over. If two take
it over in the same moment both may sweep for a while: they choose the same files, and the one whose
lease it is not notices when it renews it.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from contextlib import suppress

from lamina_kv.tiers.directory.files import read_whole
from lamina_kv.tiers.directory.layout import FILE_MODE, LEASE, temporary_beside

LEASE_SECONDS = 120.0
"""Without renewal, a lease is its holder's for so long. Renewed every :data:`RENEW_SECONDS`."""

RENEW_SECONDS = 20.0

SETTLE_SECONDS = 1.0
"""After a takeover, for another one that was as fast to show."""


class LeaseLost(Exception):
    """Somebody else sweeps now."""


class Lease:
    """See the module. Every call takes a descriptor of the directory.

    Attributes:
        holder: who had it when :meth:`take` failed, for people.
    """

    def __init__(self) -> None:
        self.holder = ""
        self._id = secrets.token_hex(8)
        self._renewed = 0.0

    def take(self, root: int) -> bool:
        """Take the lease, or take it over, or have it already; whether it is ours now.

        Raises:
            OSError: if there can be none.
        """
        if self._is_mine(root):
            return True
        content = json.dumps({"holder": f"{socket.gethostname()}, process {os.getpid()}",
                              "id": self._id}).encode()  # fmt: skip
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with suppress(FileExistsError):
            _write(os.open(LEASE, flags, FILE_MODE, dir_fd=root), content)
            return True
        mine = temporary_beside(LEASE)
        try:
            _write(os.open(mine, flags, FILE_MODE, dir_fd=root), content)
            now = _changed(root, mine)
            with suppress(FileNotFoundError):  # given back meanwhile
                if now - _changed(root, LEASE) <= LEASE_SECONDS:
                    self.holder = str(_read(root).get("holder", "somebody"))
                    return False
            os.rename(mine, LEASE, src_dir_fd=root, dst_dir_fd=root)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(mine, dir_fd=root)
        time.sleep(SETTLE_SECONDS)
        self.holder = str(_read(root).get("holder", "somebody"))
        return self._is_mine(root)

    def now(self, root: int) -> float:
        """Renew it; returns the server's time, in seconds since the epoch.

        Raises:
            LeaseLost: if it is somebody else's.
            OSError: if it cannot be renewed.
        """
        if not self._is_mine(root):
            raise LeaseLost
        try:
            os.utime(LEASE, dir_fd=root, follow_symlinks=False)
            self._renewed = time.monotonic()
            return _changed(root, LEASE)
        except FileNotFoundError:
            raise LeaseLost from None

    def keep(self, root: int) -> None:
        """Renew it if that is due. Raises what :meth:`now` does."""
        if time.monotonic() >= self._renewed + RENEW_SECONDS:
            self.now(root)

    def release(self, root: int) -> None:
        """Give it back, if it is ours."""
        with suppress(OSError):
            if self._is_mine(root):
                os.unlink(LEASE, dir_fd=root)

    def _is_mine(self, root: int) -> bool:
        return _read(root).get("id") == self._id


def _read(root: int) -> dict[str, object]:
    try:
        said = json.loads(read_whole(root, LEASE))
    except (FileNotFoundError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _changed(root: int, path: str) -> float:
    return os.stat(path, dir_fd=root, follow_symlinks=False).st_mtime


def _write(file: int, content: bytes) -> None:
    try:
        os.write(file, content)
    finally:
        os.close(file)
