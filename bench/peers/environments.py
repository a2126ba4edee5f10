"""The environments of the systems: made once, and used again while nothing about them changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import lamina_kv
from lamina_kv.bench.engine import BenchError
from lamina_kv.bench.progress import Progress
from peers.systems import Environment

_OWN = "lamina-kv"
_ADAPTERS = Path(__file__).parent / "adapters"


class Environments:
    """Where systems are installed.

    Args:
        directory: has a folder for each environment; made if it is not there.
        progress: where it says what it is doing.
    """

    def __init__(self, directory: Path, progress: Progress) -> None:
        self._directory = directory
        self._progress = progress

    def make(self, environments: Iterable[Environment]) -> None:
        """Make those that are not there.

        Raises:
            BenchError: if one cannot be made; says why.
        """
        for environment in environments:
            if environment is not Environment.OWN:
                self._make(environment)

    def command(self, environment: Environment) -> tuple[tuple[str, ...], dict[str, str]]:
        """What runs a system's process: the command and its variables. The environment must have
        been made."""
        package, peers = Path(lamina_kv.__file__).parent, Path(__file__).parent
        if environment is Environment.OWN:
            python, path = sys.executable, f"{package.parent}:{peers.parent}"
        else:
            home = self._directory / environment
            python, code = str(home / "bin" / "python"), home / "code"
            # Lamina is not installed there: the bench's own code, and nothing else, is on the path.
            code.mkdir(exist_ok=True)
            for folder in (package, peers):
                link = code / folder.name
                link.unlink(missing_ok=True)
                link.symlink_to(folder)
            path = str(code)
        # By it peers name what they keep, and what one process has kept another one is to find.
        variables = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
        return (python, "-m", "peers.child", str(os.getpid())), variables

    def _make(self, environment: Environment) -> None:
        folder = self._directory / environment
        requirements = "".join(f"{line}\n" for line in (*_installed(), *environment.requirements))
        made = folder / "requirements.txt"
        if made.is_file() and made.read_text() == requirements:
            return
        self._progress.say(f"making the environment {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        uv = _uv()
        _run([*uv, "venv", "--quiet", "--python", sys.executable, str(folder)])
        wanted = folder / "wanted.txt"
        wanted.write_text(requirements)
        install = ["pip", "install", "--quiet", "--no-deps", "--python", str(folder)]
        _run([*uv, *install, "--requirements", str(wanted)])
        library = ["-O3", "-shared", "-fPIC", "-o", str(folder / "batch_copy.so")]
        _run(["cc", *library, str(_ADAPTERS / "batch_copy.c")])
        wanted.rename(made)


def _installed() -> list[str]:
    """The packages of this environment but Lamina, as requirements."""
    packages = {each.name: each.version for each in metadata.distributions()}
    return sorted(f"{name}=={packages[name]}" for name in packages if name != _OWN)


def _uv() -> list[str]:
    """uv; in a checkout with the package sources that pip knows."""
    wrapper = Path(lamina_kv.__file__).parents[2] / "requirements" / "uv"
    if wrapper.is_file():
        return ["env", f"LAMINA_BIN={Path(sys.executable).parent}", str(wrapper)]
    return [shutil.which("uv") or str(Path(sys.executable).parent / "uv")]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BenchError(f"{command[0]} is needed to install peers, and is not there") from None
    if done.returncode:
        raise BenchError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
