"""The wheel, installed in an environment of its own. Takes its dependencies from the package index,
some 30 MB of them: that is why it stands here and takes no part in ``make test``."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import lamina_kv
from packaged import Built, build

pytestmark = pytest.mark.soak

PYTHONS = ("python3.11", "python3.12", "python3.13")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("package"))


def _runs(python: str) -> bool:
    """Whether there is such an interpreter: a name in PATH may be a stub that finds none."""
    if shutil.which(python) is None:
        return False
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("python", PYTHONS)
def test_the_command_runs_in_a_clean_environment(python: str, built: Built, tmp_path: Path) -> None:
    """Without an engine, and with nothing but what the wheel asks for."""
    if not _runs(python):
        pytest.skip(f"there is no {python} here")
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def said(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said(python, "-m", "venv", tmp_path / "venv")
    programs = tmp_path / "venv/bin"
    said(programs / "pip", "install", "--quiet", "--disable-pip-version-check", built.wheel)
    said(programs / "pip", "check")
    assert said(programs / "lamina-kv", "--version").split()[-1] == lamina_kv.__version__
    assert "--kv-transfer-config" in said(programs / "lamina-kv", "doctor", "--help")
    assert "`host.capacity`" in said(programs / "lamina-kv", "config")
    typed = "from importlib.resources import files; print(files('lamina_kv') / 'py.typed')"
    assert Path(said(programs / "python", "-c", typed).strip()).is_file()
