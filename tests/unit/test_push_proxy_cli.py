"""Guards `lamina-kv push-proxy`: what it is told reaches the proxy, what cannot work is said at the
start, and no secret is ever shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lamina_kv.cli.main import app
from lamina_kv.cli.push_proxy import Listening
from lamina_kv.push.proxy.settings import EngineTls, PrefillAddress, Settings, SettingsError

ENGINES = ("--prefill", "http://p:1,p:7000", "--decode", "http://d:1")


def invoke(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, ["push-proxy", *arguments], env=env)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, Listening]]:
    """What was to be run."""
    calls: list[tuple[Settings, Listening]] = []
    monkeypatch.setattr("lamina_kv.cli.push_proxy.run", lambda *given: calls.append(given))
    return calls


def test_the_command_line_reaches_the_proxy(started: list[tuple[Settings, Listening]]) -> None:
    more = ("--prefill", "https://q/base, [::1]:7001", "--decode", "http://e:2")
    place = ("--host", "::", "--port", "9", "--drain-seconds", "5")
    limits = ("--total-timeout", "60", "--max-held-bytes", "7000", "--engine-key", "inner")
    result = invoke(*ENGINES, *more, *place, *limits, env={"LAMINA_PUSH_TOKEN": "sesame"})
    assert result.exit_code == 0, result.output
    ((settings, listening),) = started
    assert listening == Listening("::", 9, 5)
    assert settings == Settings(
        prefill=(
            PrefillAddress("http://p:1", "p:7000"),
            PrefillAddress("https://q/base", "[::1]:7001"),
        ),
        decode=("http://d:1", "http://e:2"),
        token="sesame",
        engine_key="inner",
        total_timeout=60,
        max_held_bytes=7000,
    )


def test_files_reach_the_proxy(started: list[tuple[Settings, Listening]]) -> None:
    tls = ("--tls-cert", "c", "--tls-key", "k", "--engines-ca", "ca", "--engines-cert", "ec")
    result = invoke(
        "--engines", "engines.yaml", *tls, "--engines-cert-key", "ek",
        env={"LAMINA_PUSH_ADMIN_TOKEN": "operator"},
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ((settings, listening),) = started
    assert settings == Settings(
        engines=Path("engines.yaml"),
        engine_tls=EngineTls(Path("ca"), Path("ec"), Path("ek")),
        admin_token="operator",
    )
    assert (listening.certificate, listening.key) == (Path("c"), Path("k"))
    assert "operator" not in repr(settings)


def test_a_file_of_engines_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    file = tmp_path / "engines.yaml"
    for text, said in (
        (None, "No such file"),
        ("decode: [nowhere]", "decode[0]: 'nowhere' is not"),
    ):
        if text is not None:
            file.write_text(text)
        result = invoke("--engines", str(file))
        assert result.exit_code == 2
        assert f"--engines: {file}: {said}" in result.output


def test_without_options_it_has_the_defaults(started: list[tuple[Settings, Listening]]) -> None:
    assert invoke(*ENGINES).exit_code == 0
    ((settings, listening),) = started
    prefill = (PrefillAddress("http://p:1", "p:7000"),)
    assert settings == Settings(prefill=prefill, decode=("http://d:1",))
    assert listening.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prefill", "http://p:1", "--decode", "http://d"), "'' is not a push address"),
        (("--prefill", "http://p,0.0.0.0:7", "--decode", "http://d"), "no place that a decode"),
        (("--prefill", "http://p,[::]:7", "--decode", "http://d"), "no place that a decode"),
        (("--prefill", "http://p,p", "--decode", "http://d"), "'p' is not a push address"),
        (("--prefill", "http://p,p:7/x", "--decode", "http://d"), "is not a push address"),
        (("--prefill", "http://p,p:777777", "--decode", "http://d"), "is not a push address"),
        (("--prefill", "p:1,p:7", "--decode", "http://d"), "'p:1' is not the URL"),
        (("--prefill", "http://p,p:7", "--decode", "ftp://d"), "'ftp://d' is not the URL"),
        (("--prefill", "http://p,p:7", "--decode", "http://d:x"), "is not a URL"),
        (("--prefill", "http://p,p:7", "--decode", "http://d?x"), "URL of d may have"),
        (("--prefill", "http://p,p:7", "--decode", "http://p"), "http://p is given twice"),
        ((*ENGINES, "--prefill", "http://q,p:7000"), "p:7000 is given twice"),
        ((*ENGINES, "--decode", "http://10.0.0.300:1"), "--decode: 'http://10.0.0.300:1' is not"),
        ((*ENGINES, "--prefill", "http://a\u2013b,p:1"), "--prefill: 'http://a\u2013b' is not a"),
        ((*ENGINES, "--total-timeout", "0"), "total_timeout is 0"),
        ((*ENGINES, "--engines", "e"), "--prefill: --engines says where the engines are"),
        (("--prefill", "http://p,p:7"), "there is no decode engine: give at least one --decode"),
        ((*ENGINES, "--admin-token", ""), "--admin-token or LAMINA_PUSH_ADMIN_TOKEN"),
        ((*ENGINES, "--token", "two\nlines"), "the token"),
    ],
)
def test_what_cannot_work_is_said(arguments: tuple[str, ...], said: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_secrets_are_never_shown() -> None:
    with pytest.raises(SettingsError) as wrong:
        Settings(prefill=(), decode=("http://user:pass@d",), token="sesame\n", engine_key="")
    assert len(wrong.value.problems) == 4
    assert not {"sesame", "pass"} & {*str(wrong.value).replace("@", " ").split()}
    assert "pass" not in str(wrong.value)
    good = Settings(
        prefill=(PrefillAddress("http://p", "p:1"),),
        decode=("http://d",),
        token="sesame",
        engine_key="inner",
    )
    assert "sesame" not in repr(good)
    assert "inner" not in repr(good)
    result = invoke("--help", env={"LAMINA_PUSH_TOKEN": "sesame"})
    assert "sesame" not in result.output


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = {"fastapi": None, "lamina_kv.push.proxy.app": None}
    monkeypatch.delitem(sys.modules, "lamina_kv.push.proxy.app", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", modules["fastapi"])
    result = invoke(*ENGINES)
    assert result.exit_code == 1
    assert "uvicorn" in result.output
    assert "pip install 'lamina-kv[proxy]'" in result.output


def test_it_may_open_as_many_files_as_the_system_lets_it() -> None:
    program = (
        "import resource as r\n"
        "from lamina_kv.cli.push_proxy import raise_file_limit\n"
        "_, most = r.getrlimit(r.RLIMIT_NOFILE)\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (256, most))\n"
        "raise_file_limit()\n"
        "assert r.getrlimit(r.RLIMIT_NOFILE) == (most, most)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)


def test_help_and_settings_need_nothing_of_what_is_optional() -> None:
    program = (
        "import sys\n"
        "for name in ('aiohttp', 'fastapi', 'msgspec', 'prometheus_client', 'uvicorn', 'torch'):\n"
        "    sys.modules[name] = None\n"
        "import lamina_kv.cli.push_proxy, lamina_kv.push.proxy.settings\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
