"""Guards the map of the rooms: nothing imports upward, control and data know no engine, and what
needs neither torch nor vLLM works without them. The contracts stand in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[2]


def test_no_room_imports_what_it_may_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would disable every logger that there is, for all tests that follow.
    monkeypatch.setattr("logging.config.dictConfig", lambda _: None)
    broken = lint_imports(
        config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True, verbose=False
    )
    assert not broken, capsys.readouterr().out


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
