"""Guards the map of the rooms: nothing imports upward, control and data name no engine, and what
needs neither torch nor vLLM works without them. The contracts stand in pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "lamina"


def test_no_room_imports_what_it_may_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would disable every logger that there is, for all tests that follow.
    monkeypatch.setattr("logging.config.dictConfig", lambda _: None)
    broken = lint_imports(
        config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True, verbose=False
    )
    assert not broken, capsys.readouterr().out


@pytest.mark.parametrize("room", ["control", "data"])
def test_control_and_data_name_no_engine(room: str) -> None:
    engines = [path.name for path in (SOURCE / "engines").iterdir() if path.is_dir()]
    engines = [name for name in engines if not name.startswith("__")]
    assert {"transformers", "vllm"} <= set(engines)
    name = re.compile(rf"\b({'|'.join(engines)})\b", re.IGNORECASE)
    said = [
        f"{path.relative_to(SOURCE)}:{number}: {line.strip()}"
        for path in sorted((SOURCE / room).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if name.search(line)
    ]
    assert not said


@pytest.mark.parametrize(
    "module",
    [
        "lamina.control.planner",
        "lamina.config",
        "lamina.keys",
        "lamina.cli.main",
        "lamina.cli.demo",
    ],
)
def test_works_where_torch_and_vllm_are_not_installed(module: str) -> None:
    program = "import sys; sys.modules.update(torch=None, vllm=None); import importlib, sys; "
    program += f"importlib.import_module({module!r})"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)


def test_help_needs_nothing_that_is_slow_to_import() -> None:
    program = (
        "import sys\n"
        "from lamina.cli.main import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "print('IMPORTED', *sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    imported = done.stdout.split("IMPORTED")[1].split()
    assert "lamina.cli.main" in imported
    assert not {"torch", "vllm", "numpy", "pydantic", "lamina.config"} & set(imported)
