"""Guards what is published: all of the package and nothing else, with metadata that is true."""

from __future__ import annotations

import re
import tarfile
import tomllib
import zipfile
from importlib.metadata import Distribution, PathDistribution

import pytest

import lamina_kv
from packaged import ROOT, Built, build

SOURCES = ROOT / "src"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def distribution(built: Built) -> Distribution:
    """The wheel's metadata, as an installer reads them."""
    (metadata,) = (
        path for path in zipfile.Path(built.wheel).iterdir() if path.name.endswith(".dist-info")
    )
    return PathDistribution(metadata)  # type: ignore[arg-type]


def package() -> set[str]:
    """Every file of the package in the checkout, by its path below ``src``."""
    return {
        str(path.relative_to(SOURCES))
        for path in (SOURCES / "lamina_kv").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_the_wheel_is_the_package_and_nothing_else(built: Built) -> None:
    """No tests, and nothing of the comparison with other systems (``bench/peers``)."""
    with zipfile.ZipFile(built.wheel) as wheel:
        files = set(wheel.namelist())
        licences = [name for name in files if name.endswith("/licenses/LICENSE")]
        assert [wheel.read(name).decode() for name in licences] == [(ROOT / "LICENSE").read_text()]
    metadata = {name for name in files if ".dist-info/" in name}
    assert files - metadata == package()
    assert {"lamina_kv/py.typed", "lamina_kv/cli/demo_document.txt"} <= files


def test_the_source_distribution_has_the_package_and_no_tests(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        files = {each.name.partition("/")[2] for each in archive.getmembers() if each.isfile()}
    by_setuptools = {name for name in files if name.startswith("src/lamina_kv.egg-info/")}
    assert files - by_setuptools == {f"src/{name}" for name in package()} | {
        "LICENSE",
        "PKG-INFO",
        "README.md",
        "pyproject.toml",
        "setup.cfg",
    }


def test_the_metadata(distribution: Distribution) -> None:
    metadata = distribution.metadata
    assert metadata["Name"] == "lamina-kv"
    assert metadata["Version"] == lamina_kv.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    classifiers = metadata.get_all("Classifier") or []
    for classifier in ("Operating System :: POSIX :: Linux", "Typing :: Typed"):
        assert classifier in classifiers
    versions = [
        classifier.rpartition(" ")[2]
        for classifier in classifiers
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", classifier)
    ]
    assert versions == ["3.11", "3.12", "3.13"]


def test_what_is_installed_can_be_called(distribution: Distribution) -> None:
    """The command, and the plugin by which vLLM finds the connector."""
    points = {(point.group, point.name): point for point in distribution.entry_points}
    assert sorted(points) == [("console_scripts", "lamina-kv"), ("vllm.general_plugins", "lamina")]
    assert all(callable(point.load()) for point in points.values())


def test_extras(distribution: Distribution) -> None:
    """All that messages and pages tell people to install exist."""
    extras = set(distribution.metadata.get_all("Provides-Extra") or [])
    assert extras == set(PROJECT["optional-dependencies"])
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *SOURCES.rglob("*.py")]
    named = {
        extra.strip()
        for page in pages
        for extras_of in re.findall(r"lamina-kv\[([\w, -]+)\]", page.read_text())
        for extra in extras_of.split(",")
    }
    assert {"push", "valkey", "transformers"} <= named
    assert named <= extras
