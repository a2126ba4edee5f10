"""Guards the command line's root: its verbs, its help, and that a mistake is told, not traced."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner, Result

import lamina
from lamina.cli.main import app

VERBS = ("demo", "doctor", "config", "explain", "inspect", "verify", "clear", "push-proxy", "bench")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


def test_help_names_every_verb() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for verb in VERBS:
        assert f" {verb} " in result.output


@pytest.mark.parametrize("verb", VERBS[:-1])
def test_every_verb_explains_itself(verb: str) -> None:
    result = invoke(verb, "--help")
    assert result.exit_code == 0
    assert f"lamina {verb}" in result.output or f"root {verb}" in result.output


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"lamina {lamina.__version__}\n")


@pytest.mark.parametrize(
    "arguments", [("destroy",), ("inspect",), ("demo", "--fast"), ("config", "surplus")]
)
def test_a_wrong_command_line_exits_with_2_and_says_so(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.output


def test_config_prints_every_key() -> None:
    result = invoke("config")
    assert result.exit_code == 0
    for key in ("chunk_tokens", "load.load_ahead", "save.max_inflight", "disk.path"):
        assert f"`{key}`" in result.output


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (("inspect", "/store"), {"path": Path("/store")}),
        (("verify", "/store"), {"path": Path("/store")}),
        (("clear", "/store"), {"path": Path("/store"), "yes": False}),
        (("clear", "/store", "--yes"), {"path": Path("/store"), "yes": True}),
    ],
)
def test_store_verbs_hand_on_what_they_are_given(
    arguments: tuple[str, ...], given: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, object]] = []

    def verb(path: Path, **options: object) -> None:
        calls.append({"path": path, **options})

    monkeypatch.setattr(f"lamina.cli.store.{arguments[0]}", verb)
    assert invoke(*arguments).exit_code == 0
    assert calls == [given]


def test_bench_hands_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    bench = ModuleType("lamina.bench")
    bench.__dict__["app"] = lambda arguments, prog_name: given.append([prog_name, *arguments])
    monkeypatch.setitem(sys.modules, "lamina.bench", bench)
    assert invoke("bench", "ttft", "--tokens", "8192", "--help").exit_code == 0
    assert given == [["lamina bench", "ttft", "--tokens", "8192", "--help"]]
