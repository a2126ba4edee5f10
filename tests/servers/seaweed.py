"""SeaweedFS, a real server that speaks S3, as a context manager."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Self

import obstore
from obstore.store import S3Store

from peers import seaweed

PATIENCE = 60.0
"""Seconds after which a server that has not started never will. Usually it takes four."""

KEY_ID, SECRET = "lamina", "lamina-secret"
"""Credentials of a user who may do everything."""

READER_ID, READER_SECRET = "reader", "reader-secret"
"""Credentials of a user who may read and list, and not write."""


class Seaweed:
    """One server, its data in a directory of its own, both gone when the block is left.

    Attributes:
        port: where it listens for S3.
        endpoint: the same as a URL.
    """

    def __init__(self) -> None:
        self._ports = seaweed.free_ports()
        self.port = self._ports["s3.port"]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._folder = Path(tempfile.mkdtemp(prefix="seaweed-"))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it, and wait until it answers."""
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Kill it and remove its data."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Start it with the data that it has.

        Raises:
            RuntimeError: if it ends or does not answer; with the end of its log.
        """
        folder = self._folder
        users = [
            seaweed.User(KEY_ID, SECRET),
            seaweed.User(READER_ID, READER_SECRET, ("Read", "List")),
        ]
        command = seaweed.command(
            folder,
            self._ports,
            users,
            s3_autoCreateBucket="false",
            master_electionTimeout="1s",
            master_volumeSizeLimitMB=256,
            volume_max=200,
        )
        with (folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        due = time.monotonic() + PATIENCE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > due:
                raise RuntimeError(f"weed has not started:\n{self.log()[-4000:]}")
            time.sleep(0.05)

    def log(self) -> str:
        """What it has said so far."""
        return (self._folder / "log").read_text(errors="replace")

    def stop(self) -> None:
        """Stop it as it is: connections stay, and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def cont(self) -> None:
        """Let it go on after :meth:`stop`."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill it. Its data stays, for :meth:`start`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE)
            self._process = None

    @staticmethod
    def environment(key_id: str = KEY_ID, secret: str = SECRET) -> dict[str, str]:
        """Variables from which a client takes the credentials of a user."""
        return {"AWS_ACCESS_KEY_ID": key_id, "AWS_SECRET_ACCESS_KEY": secret}

    def bucket(self, name: str) -> str:
        """Make a bucket, if there is none of that name; at least three letters, all small."""
        store = S3Store(
            name,
            config={
                "endpoint": self.endpoint,
                "access_key_id": KEY_ID,
                "secret_access_key": SECRET,
            },
            client_options={"allow_http": True},
        )
        url = obstore.sign(store, "PUT", "", timedelta(minutes=5))
        due = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=10)
            except urllib.error.HTTPError as error:
                if error.code == HTTPStatus.CONFLICT:  # it is there
                    return name
                if time.monotonic() > due:
                    raise
                time.sleep(0.1)
            else:
                return name

    def _answers(self) -> bool:
        """Whether the gateway is up, and there is a place for data."""
        place = f"http://127.0.0.1:{self._ports['master.port']}/dir/assign"
        try:
            with urllib.request.urlopen(f"{self.endpoint}/status", timeout=1):
                pass
            with urllib.request.urlopen(place, timeout=5) as answer:
                return "fid" in json.load(answer)
        except OSError:
            return False

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "the server does not run"
        self._process.send_signal(number)
