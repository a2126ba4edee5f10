"""Guards that whatever a person can get wrong is answered with the key, flag, variable or path that
is wrong, and never with a traceback."""

from __future__ import annotations

import ast
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
from typer.testing import CliRunner

from lamina_kv.cli.main import app, push_proxy
from lamina_kv.config import ConfigError, load_config, table
from lamina_kv.data.assembly import open_timeline
from lamina_kv.plan import NEAR
from lamina_kv.tiers import KINDS

ROWS = [line.strip("| ").split(" | ") for line in table().splitlines()[2:]]
WORDS: dict[str, list[str]] = {}
"""What each key must be; of one that several kinds of tier have, what it must be for each."""
for row in ROWS:
    if row[1] != "null or the keys below":
        WORDS.setdefault(row[0].split("`")[1], []).append(row[1])
LEAVES = list(WORDS)
KIND_OF = {
    key: next((name for name, kind in KINDS.items() if leaf in kind.config.model_fields), "disk")
    for key in LEAVES
    for leaf in [key.rpartition(".")[2]]
}
"""A kind of tier that has a key; the first one of those that do."""
SECTIONS = sorted({key.rpartition(".")[0] for key in LEAVES})
WRONG: list[object] = [[[]], {"a": 1}, -1, math.nan, "", "  ", 10**400, object(), b"x", ["a b"]]


def problems(key: str, value: object) -> tuple[str, ...]:
    """What is wrong with a tree in which only this is given."""
    tree: object = value
    for part in reversed(key.split(".")):
        if part == "tiers[]":
            assert isinstance(tree, dict)
            tree = {"tiers": [{"kind": KIND_OF.get(key, "disk"), **tree}]}
        else:
            tree = {part: tree}
    assert isinstance(tree, dict)
    try:
        load_config(tree, {})
    except ConfigError as error:
        return error.problems
    return ()


def named(key: str) -> str:
    """How messages name a key; those of an entry of ``tiers`` say what that is called, too."""
    entry = re.escape(key).replace(re.escape("[]"), r"\[0\]")
    return rf"{entry}( \(.*\))?: " if "[]" in key else rf"{entry}(\[0\])?: "


@pytest.mark.parametrize("key", LEAVES)
def test_every_key_is_named_with_what_would_be_right(key: str) -> None:
    for value in WRONG:
        (problem, *others) = problems(key, value)
        if others:  # what its section also needs
            (problem,) = [line for line in (problem, *others) if "is required" not in line]
        assert re.match(named(key) + "must be ", problem)
        right = (*WORDS[key], "at most", "below 2^63", "a section with the keys", "a URL that")
        assert any(words in problem for words in right)
        assert "\n" not in problem
        assert len(problem) < 400


@pytest.mark.parametrize("section", SECTIONS)
def test_every_unknown_key_is_named_with_those_that_are_meant(section: str) -> None:
    key = f"{section}.nonsense" if section else "nonsense"
    (problem,) = [line for line in problems(key, 1) if "is required" not in line]
    assert re.match(named(key) + "unknown key; ", problem)
    assert any(leaf in problem for leaf in LEAVES)


# -- the command ---------------------------------------------------------------------------------


def odd_paths(directory: Path) -> dict[str, Path]:
    """Paths that people give by mistake."""
    paths = {
        "missing": directory / "missing",
        "directory": directory / "there",
        "binary": directory / "binary",
        "empty": directory / "empty",
        "markup": directory / "[" / "b] [bold]",
        "loop": directory / "loop",
        "dangling": directory / "dangling",
        "long": Path("/" + "x" * 5000),
        "device": Path("/dev/null"),
        "below a file": directory / "empty" / "store",
    }
    paths["directory"].mkdir()
    paths["markup"].mkdir(parents=True)
    paths["binary"].write_bytes(bytes(range(256)))
    paths["empty"].touch()
    paths["loop"].symlink_to(paths["loop"])
    paths["dangling"].symlink_to(directory / "nowhere")
    return paths


@pytest.mark.parametrize(
    "command",
    [
        ("inspect",),
        ("verify",),
        ("clear", "--yes"),
        ("doctor", "--path"),
        ("doctor", "--config"),
    ],
    ids=" ".join,
)
def test_no_path_makes_a_command_stumble(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamina_kv.cli.checks.software", lambda: iter(()))
    for name, path in odd_paths(tmp_path).items():
        result = CliRunner().invoke(app, [*command, str(path)])
        assert isinstance(result.exception, SystemExit | None), name
        assert result.exit_code in {0, 1}, name
        if result.exit_code:
            assert path.name[:50] in result.output.replace("\n", ""), name


def test_a_store_of_another_user_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lamina-store.json").write_text("{}")

    def forbidden(*arguments: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "lamina-store.json"))

    monkeypatch.setattr(Path, "open", forbidden)
    for verb in ("inspect", "verify", "clear"):
        result = CliRunner().invoke(app, [verb, str(tmp_path)])
        assert result.exit_code == 1
        assert "may not be read by this user" in result.output


def proxy_numbers() -> list[str]:
    """Options of the proxy that take a number."""
    hints = get_type_hints(push_proxy)
    return [f"--{name.replace('_', '-')}" for name, kind in hints.items() if kind in {int, float}]


@pytest.mark.parametrize("option", proxy_numbers())
@pytest.mark.parametrize("value", ["-1", "nan", "many", "99999999999999999999"])
def test_every_number_of_the_proxy_is_named(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamina_kv.cli.push_proxy.run", lambda *given: None)
    engines = ("--prefill", "http://p:1,p:7000", "--decode", "http://d:1")
    result = CliRunner().invoke(app, ["push-proxy", *engines, f"{option}={value}"])
    if value.startswith("9") and result.exit_code == 0:
        return  # a long time, or many requests
    assert result.exit_code == 2
    assert option in result.output


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("--prefill", "p,p:7", "--decode", "http://d"), "--prefill:"),
        (("--prefill", "http://p,x", "--decode", "http://d"), "--prefill:"),
        (("--prefill", "http://p,p:7", "--decode", "d"), "--decode:"),
        (("--prefill", "http://p,p:7", "--decode", "http://d", "--token", ""), "--token"),
        (("--prefill", "http://p,p:7", "--decode", "http://d", "--engine-key", "\n"), "--engine-k"),
    ],
)
def test_every_text_of_the_proxy_is_named(arguments: tuple[str, ...], flag: str) -> None:
    result = CliRunner().invoke(app, ["push-proxy", *arguments])
    assert result.exit_code == 2
    assert flag in result.output


# -- what is written down ------------------------------------------------------------------------


def test_a_trace_that_cannot_be_written_is_said_and_takes_nobody_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert open_timeline(tmp_path, 0) is None
        assert open_timeline(tmp_path / "gone" / "t.json", 0) is None
    assert caplog.text.count("observe.timeline: nothing is recorded") == 2
    assert os.strerror(21) in caplog.text
    assert os.strerror(2) in caplog.text


# -- what engines and tiers refuse ---------------------------------------------------------------

SOURCE = Path(__file__).parents[2] / "src" / "lamina_kv"
REFUSING = [
    "control/catalog.py",
    "control/planner.py",
    "data/assembly.py",
    "data/movers/host_memory.py",
    "data/near.py",
    "engines/standalone.py",
    "engines/transformers/layout.py",
    "engines/vllm/layout.py",
    "engines/vllm/scheduler_side.py",
    "engines/vllm/wire.py",
    "tiers/disk/store.py",
]
"""Modules whose errors stop a start. What other modules of a tier raise, its store gives a key."""

NOBODYS = (
    "a copy from host memory failed under",
    "already holds chunk",
    "no rank has reported its tiers",
    "a namespace's fingerprint is hexadecimal",
    "host memory of ",
    "host memory was closed",
    "the checkpoint changed while the engine was starting",
)
"""What no setting is at fault for: mistakes in the code, and events."""

NAMED = re.compile(
    r"--[a-z][a-z-]+|\b[A-Z]+(?:_[A-Z]+)+\b|attach\(|page_size|MultiConnector|\b(?:"
    + "|".join(map(re.escape, [*LEAVES, "push"]))
    + r")\b"
)


def words(argument: ast.AST) -> str:
    """What is written in an expression; what is put in by a key's name counts as that."""
    match argument:
        case ast.Constant(value=str(text)):
            return text
        case ast.FormattedValue(
            value=ast.Name(id="key") | ast.Call(func=ast.Attribute(attr="key"))
        ):
            return LEAVES[0]
        case ast.FormattedValue(value=ast.Name(id="NEAR")):
            return NEAR
    return "".join(map(words, ast.iter_child_nodes(argument)))


def refusals() -> Iterator[tuple[str, str]]:
    """Where each error is raised, and the text that it is raised with, without what is put in."""
    for module in REFUSING:
        for node in ast.walk(ast.parse((SOURCE / module).read_text())):
            match node:
                case ast.Raise(exc=ast.Call(func=ast.Name(), args=arguments)):
                    text = "".join(map(words, arguments))
                case _:
                    continue
            if text and not any(known in text for known in NOBODYS):
                yield f"{module}:{node.lineno}", text


def test_every_refusal_names_what_a_person_can_change() -> None:
    found = dict(refusals())
    assert len(found) > 25
    assert {where: text for where, text in found.items() if not NAMED.search(text)} == {}
