"""Guards the map of the rooms: nothing imports upward, control and data name no engine, nothing but
the room of tiers names a kind of tier, and what needs neither torch nor vLLM works without them.
The contracts stand in pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

from lamina_kv.tiers import KINDS

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "lamina_kv"


def test_no_room_imports_what_it_may_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would disable every logger that there is, for all tests that follow.
    monkeypatch.setattr("logging.config.dictConfig", lambda _: None)
    broken = lint_imports(
        config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True, verbose=False
    )
    assert not broken, capsys.readouterr().out


def lines_with(name: str, files: Iterable[Path]) -> list[str]:
    """Lines of files in which an expression is found, prose included."""
    pattern = re.compile(name, re.IGNORECASE)
    return [
        f"{path.relative_to(SOURCE)}:{number}: {line.strip()}"
        for path in sorted(files)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]


@pytest.mark.parametrize("room", ["control", "data"])
def test_control_and_data_name_no_engine(room: str) -> None:
    engines = [path.name for path in (SOURCE / "engines").iterdir() if path.is_dir()]
    engines = [name for name in engines if not name.startswith("__")]
    assert {"transformers", "vllm"} <= set(engines)
    assert not lines_with(rf"\b({'|'.join(engines)})\b", (SOURCE / room).rglob("*.py"))


@pytest.mark.parametrize("room", ["control", "data", "engines", "plan.py"])
def test_nothing_but_the_room_of_tiers_names_a_kind_of_tier(room: str) -> None:
    """Another store is a folder there, and no line elsewhere."""
    # A directory is a word that others need, too.
    kinds = "|".join({*KINDS, "disk", "valkey", "mooncake"} - {"directory"})
    place = SOURCE / room
    files = [place] if place.is_file() else list(place.rglob("*.py"))
    assert files
    # Movers know devices, and may speak of what these are made of.
    files = [path for path in files if path.parent != SOURCE / "data" / "movers"]
    assert not lines_with(rf"{kinds}|[\"'`]directory[\"'`]|\b(redis|s3)\b", files)


@pytest.mark.parametrize(
    "module",
    [
        "lamina_kv.engines.hand_off",
        "lamina_kv.control.planner",
        "lamina_kv.plan",
        "lamina_kv.config",
        "lamina_kv.keys",
        "lamina_kv.cli.main",
        "lamina_kv.cli.demo",
    ],
)
def test_works_where_torch_and_vllm_are_not_installed(module: str) -> None:
    program = "import sys; sys.modules.update(torch=None, vllm=None); import importlib, sys; "
    program += f"importlib.import_module({module!r})"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)


def test_help_needs_nothing_that_is_slow_to_import() -> None:
    program = (
        "import sys\n"
        "from lamina_kv.cli.main import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "print('IMPORTED', *sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    imported = done.stdout.split("IMPORTED")[1].split()
    assert "lamina_kv.cli.main" in imported
    assert not {"torch", "vllm", "numpy", "pydantic", "lamina_kv.config"} & set(imported)
