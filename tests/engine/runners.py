"""On what an engine of a test runs: a version of vLLM and one of its two model runners.

Which version: the one that is installed, or a newer one over the compiled libraries of the
installed one, which ``make compat`` lays into :data:`OVERLAYS`. The newer one has no build for CPUs
and needs none, as long as it calls no kernel that the older one lacks.

Which runner: V1, or V2, which is the default on a GPU and is written in Triton. Triton's
interpreter runs it on a CPU, slowly.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
OVERLAYS = HERE.parents[1] / "build" / "engines"
"""Where newer versions lie."""

TRITON = HERE / "triton_on_cpu"


@dataclass(frozen=True)
class Runner:
    """See the module.

    Attributes:
        version: of vLLM, as its wheels have it.
        model_runner: 1 or 2.
        overlay: whether the version is laid over the installed one.
    """

    version: str
    model_runner: int
    overlay: bool = False

    def __str__(self) -> str:
        return f"{self.version.rpartition('.')[0]}-V{self.model_runner}"

    @property
    def folder(self) -> Path:
        """Where the version lies, if it is laid over another one."""
        return OVERLAYS / f"vllm-{self.version}"

    @property
    def paths(self) -> list[str]:
        """Folders that come first where Python looks for modules."""
        paths = [str(self.folder)] if self.overlay else []
        return [*paths, str(TRITON)] if self.model_runner == 2 else paths

    @property
    def environment(self) -> Mapping[str, str]:
        """What an interpreter must start with, but for :attr:`paths`."""
        variables = {"VLLM_USE_V2_MODEL_RUNNER": str(self.model_runner - 1)}
        return variables | ({"TRITON_INTERPRET": "1"} if self.model_runner == 2 else {})

    def missing(self) -> str:
        """Why engines cannot run on it here; empty if they can."""
        if self.overlay and not self.folder.exists():
            return f"vLLM {self.version} is not there: `make compat` fetches it"
        if self.model_runner == 2 and importlib.util.find_spec("triton") is None:
            return "the V2 model runner needs triton (requirements/test-extra.txt)"
        return ""


INSTALLED = "0.32.0"
NEWER = "0.33.0"
RUNNERS = tuple(
    Runner(version, model_runner, overlay=version != INSTALLED)
    for version in (INSTALLED, NEWER)
    for model_runner in (1, 2)
)
"""All that ``make compat`` runs."""


def lay_over(version: str, folder: Path) -> None:
    """Write that version of vLLM into ``folder``: its Python from the package index that pip is set
    up for, its compiled libraries from what is installed here.

    Args:
        version: of vLLM.
        folder: replaced if it is there; there afterwards whole, or not at all.

    Raises:
        RuntimeError: if no vLLM is installed.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise RuntimeError("no vLLM is installed, whose libraries the other version could use")
    installed = Path(spec.origin).parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch, "whole")
        _unpack(_download(version, Path(scratch)), whole)
        for library in installed.rglob("*.so"):
            place = whole / "vllm" / library.relative_to(installed)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(library)
        # By its name vLLM tells that it is to run on a CPU.
        about = whole / f"vllm-{version}+cpu.dist-info"
        about.mkdir()
        about.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        )
        shutil.rmtree(folder, ignore_errors=True)
        whole.rename(folder)


def _download(version: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    subprocess.run([*pip, "download", *options, f"vllm=={version}"], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("vllm/")]
        archive.extractall(folder, [name for name in names if not name.endswith(".so")])


def main() -> None:
    """Fetch what is missing, and write to the standard output where the newer version lies."""
    (folder,) = {runner.folder for runner in RUNNERS if runner.overlay}
    if not folder.exists():
        print(f"fetching vLLM {NEWER}, 336 MB ...", file=sys.stderr)
        lay_over(NEWER, folder)
    print(folder)


if __name__ == "__main__":
    main()
