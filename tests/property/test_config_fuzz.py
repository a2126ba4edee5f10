"""Guards: whatever stands in the configuration, the answer is a valid tree or one ConfigError,
and it does not matter which of the two places a key came from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_kv.config import Config, ConfigError, load_config

sizes = st.integers(1, 2**63 - 1) | st.builds(
    "{}{}".format, st.integers(1, 1000), st.sampled_from(["", "B", " KiB", "MiB", "GiB", "TiB"])
)
auto = st.just("auto")
valid_leaves = {
    "chunk_tokens": auto | st.integers(1, 4096),
    "identity": auto | st.text("abc@", min_size=1),
    "load.mode": st.sampled_from(["auto", "layerwise", "parked"]),
    "load.load_ahead": auto | st.integers(1, 999),
    "load.min_tokens": auto | st.integers(0, 99999),
    "load.deadline": st.floats(0.001, 86400) | st.integers(1, 86400),
    "load.staging": sizes,
    "save.tokens": st.sampled_from(["all", "prompt"]),
    "save.max_inflight": sizes,
    "host.capacity": auto | sizes,
    "tiers": st.lists(
        st.fixed_dictionaries(
            {"kind": st.just("disk"), "path": st.just("/var/lib/lamina"), "capacity": sizes},
            optional={
                "name": st.text("abc", min_size=1, max_size=5),
                "direct": auto | st.booleans(),
                "max_inflight": sizes,
            },
        ),
        max_size=3,
        unique_by=lambda tier: tier.get("name", "disk"),
    ),
    "observe.timeline": st.none() | st.just("trace.json"),
}

KEYS = sorted({part for key in valid_leaves for part in key.split(".")})
KEYS += ["disk", "kind", "path", "capacity", "name"]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["auto", "4GiB", "4GB", "layerwise", "all", "/d", "disk", 10**400])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
trees = st.dictionaries(
    st.sampled_from(KEYS) | st.text(max_size=8),
    values
    | st.dictionaries(st.sampled_from(KEYS), scalars, max_size=4)
    | st.lists(st.dictionaries(st.sampled_from(KEYS), scalars, max_size=4), max_size=3),
    max_size=5,
)


def as_tree(leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in leaves.items():
        *section, name = key.split(".")
        (tree.setdefault(section[0], {}) if section else tree)[name] = value
    return tree


def as_file(folder: Path, content: bytes) -> dict[str, str]:
    file = folder / "lamina.yaml"
    file.write_bytes(content)
    return {"LAMINA_CONFIG": str(file)}


def answer(extra: dict[str, Any] | None, environ: dict[str, str]) -> Config | None:
    """The configuration, or None when it was refused as a mistake should be."""
    try:
        return load_config(extra, environ)
    except ConfigError as caught:
        error = caught
    assert error.problems
    assert str(error).splitlines() == list(error.problems)
    assert all(": " in line and len(line) < 1000 for line in error.problems)
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(deadline=None)
@given(tree=trees)
def test_any_extra_config_is_valid_or_one_error(tree: dict[str, Any]) -> None:
    config = answer(tree, {})
    if config is not None:
        assert load_config(config.model_dump(), {}) == config
        assert config.load.load_ahead == "auto" or config.load.load_ahead >= 1
        assert math.isfinite(config.load.deadline)


@settings(deadline=None)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_file_is_valid_or_one_error(folder: Path, content: bytes) -> None:
    answer(None, as_file(folder, content))


@settings(deadline=None)
@given(tree=trees)
def test_any_tree_means_the_same_in_a_file(folder: Path, tree: dict[str, Any]) -> None:
    try:
        content = yaml.safe_dump(tree, allow_unicode=True).encode()
        again = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeEncodeError):
        return
    if again == tree:  # YAML has no NaN that equals itself, nor every control character
        assert answer(None, as_file(folder, content)) == answer(tree, {})


@settings(deadline=None)
@given(data=st.data(), leaves=st.fixed_dictionaries({}, optional=valid_leaves))
def test_a_valid_tree_may_be_split_between_both_places(
    folder: Path, data: st.DataObject, leaves: dict[str, Any]
) -> None:
    in_file = {key for key in sorted(leaves) if data.draw(st.booleans())}
    file = as_tree({key: leaves[key] for key in in_file})
    extra = as_tree({key: leaves[key] for key in leaves.keys() - in_file})
    environ = as_file(folder, yaml.safe_dump(file).encode())
    assert load_config(extra, environ) == load_config(as_tree(leaves), {})
    for key in in_file:
        with pytest.raises(ConfigError) as caught:
            load_config(as_tree({key: leaves[key]}), environ)
        assert any(line.startswith(f"{key}: given both") for line in caught.value.problems)
