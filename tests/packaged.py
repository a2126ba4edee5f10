"""Builds what is published, as a release does, from a copy of the checkout without a network."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

_TOLD_TO_PYTHON = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # the backend has arguments of its own
build_meta.build_wheel(out)
build_meta.build_sdist(out)
"""


@dataclass(frozen=True)
class Built:
    """One wheel and one source distribution.

    Attributes:
        wheel: the wheel.
        sdist: the archive with the sources.
    """

    wheel: Path
    sdist: Path


def build(folder: Path) -> Built:
    """Build both with the backend that is installed.

    The copy has no ``build/``: setuptools would take files from there that the checkout has lost.

    Args:
        folder: an empty folder.
    """
    checkout, out = folder / "checkout", folder / "dist"
    out.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "tests", "bench", "docs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"):
        shutil.copy(ROOT / name, checkout / name)
    command = [sys.executable, "-c", _TOLD_TO_PYTHON, str(out)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(wheel, sdist)
