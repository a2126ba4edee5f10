"""SeaweedFS, a real server that speaks S3, as a context manager."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import obstore
from obstore.store import S3Store

from lamina_kv.bench.ports import free_port

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
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._folder = Path(tempfile.mkdtemp(prefix="seaweed-"))
        self._ports = {
            name: free_port()
            for service in ("master", "volume", "filer", "s3")
            for name in (f"{service}.port", f"{service}.port.grpc")
        }
        self._ports["s3.port"] = self.port
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
        (folder / "data").mkdir(exist_ok=True)
        users = folder / "users.json"
        users.write_text(
            json.dumps(
                {
                    "identities": [
                        _user(KEY_ID, SECRET, "Admin"),
                        _user(READER_ID, READER_SECRET, "Read", "List"),
                    ]
                }
            )
        )
        options = {
            **self._ports,
            "ip": "127.0.0.1",
            "dir": folder / "data",
            "filer.localSocket": folder / "filer.sock",
            "s3.localSocket": folder / "s3.sock",
            "s3.config": users,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.autoCreateBucket": "false",
            "master.telemetry": "false",
            "master.electionTimeout": "1s",
            "master.volumeSizeLimitMB": 256,
            "volume.max": 200,
            "volume.minFreeSpacePercent": 0,
        }
        command = [Path(sys.prefix, "bin", "weed"), "server", "-s3", "-filer"]
        command += [f"-{name}={value}" for name, value in options.items()]
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


def _user(key_id: str, secret: str, *actions: str) -> dict[str, Any]:
    credentials = [{"accessKey": key_id, "secretKey": secret}]
    return {"name": key_id, "credentials": credentials, "actions": actions}
