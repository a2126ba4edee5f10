"""Guards the command line's root: its verbs, its help, and that a mistake is told, not traced."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner, Result

import lamina_kv.config
from lamina_kv.cli.main import app

VERBS = ("demo", "doctor", "config", "inspect", "verify", "clear", "top", "push-proxy", "bench")


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
    assert f"lamina-kv {verb}" in result.output or f"root {verb}" in result.output


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"lamina-kv {lamina_kv.__version__}\n")


@pytest.mark.parametrize(
    "arguments", [("destroy",), ("inspect",), ("demo", "--fast"), ("config", "load", "surplus")]
)
def test_a_wrong_command_line_exits_with_2_and_says_so(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.output


def test_config_prints_every_key() -> None:
    result = invoke("config")
    assert result.exit_code == 0
    for key in ("chunk_tokens", "load.load_ahead", "save.max_inflight", "tiers[].path"):
        assert f"`{key}`" in result.output


def test_config_explains_one_key_or_those_below_it() -> None:
    result = invoke("config", "load.when")
    assert result.exit_code == 0
    assert result.output.startswith("load.when\n")
    assert 'by default "auto"' in result.output
    assert "load.mode" not in result.output.splitlines()
    below = invoke("config", "tiers[0]").output.splitlines()
    assert any(line.startswith("tiers[].path") for line in below)
    assert not any(line.startswith("load") for line in below)
    unknown = invoke("config", "hots")
    assert unknown.exit_code == 1
    assert "there is no key hots" in unknown.output


def test_config_prints_a_file_to_begin_with() -> None:
    result = invoke("config", "--example")
    assert (result.exit_code, result.output) == (0, lamina_kv.config.example())
    assert invoke("config", "load", "--example").exit_code == 2


def test_config_prints_a_schema() -> None:
    result = invoke("config", "--json-schema")
    assert (result.exit_code, json.loads(result.output)) == (0, lamina_kv.config.json_schema())
    assert invoke("config", "--json-schema", "--example").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (
            ("inspect", "cold", "--config", "/etc/lamina.yaml"),
            {
                "path": "cold",
                "config": Path("/etc/lamina.yaml"),
                "kv_transfer_config": None,
                "as_json": False,
            },
        ),
        (
            ("inspect", "/store", "--json"),
            {"path": "/store", "config": None, "kv_transfer_config": None, "as_json": True},
        ),
        (
            ("verify", "/store", "--kv-transfer-config", "{}"),
            {"path": "/store", "config": None, "kv_transfer_config": "{}"},
        ),
        (("clear", "/store"), {"path": "/store", "yes": False}),
        (("clear", "/store", "--yes"), {"path": "/store", "yes": True}),
    ],
)
def test_store_verbs_hand_on_what_they_are_given(
    arguments: tuple[str, ...], given: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, object]] = []

    def verb(path: str, **options: object) -> None:
        calls.append({"path": path, **options})

    monkeypatch.setattr(f"lamina_kv.cli.store.{arguments[0]}", verb)
    assert invoke(*arguments).exit_code == 0
    assert calls == [given]


def test_bench_hands_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    bench = ModuleType("lamina_kv.bench")
    bench.__dict__["app"] = lambda arguments, prog_name: given.append([prog_name, *arguments])
    monkeypatch.setitem(sys.modules, "lamina_kv.bench", bench)
    assert invoke("bench", "ttft", "--tokens", "8192", "--help").exit_code == 0
    assert given == [["lamina-kv bench", "ttft", "--tokens", "8192", "--help"]]
