"""``lamina-kv config``: every key of the configuration, or those below one; a file; a schema."""

from __future__ import annotations

import json
import re

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lamina_kv import config
from lamina_kv.config.table import Row, rows


def example() -> int:
    """Print a file with every key as a comment; returns the exit status."""
    typer.echo(config.example(), nl=False)
    return 0


def schema() -> int:
    """Print the JSON Schema of such a file; returns the exit status."""
    typer.echo(json.dumps(config.json_schema(), indent=2))
    return 0


def show(key: str | None) -> int:
    """Print keys, drawn on a terminal and as Markdown elsewhere; returns the exit status.

    Args:
        key: one of them, or what some begin with; None for all.
    """
    console = Console()
    if key is None and not console.is_terminal:
        typer.echo(config.table(), nl=False)
        return 0
    found = [row for row in rows() if key is None or _is_below(row, key)]
    if not found:
        typer.echo(f"there is no key {key}; `lamina-kv config` prints all", err=True)
        return 1
    if key is not None:
        for row in found:
            console.print(row.key.replace("`", ""), style="bold", markup=False, highlight=False)
            text = f"  {row.words}; by default {row.default}\n  {row.meaning}"
            console.print(text.replace("`", ""), markup=False, highlight=False, soft_wrap=True)
        return 0
    drawn = Table("key", "value", "default", "meaning", box=box.SIMPLE)
    for row in found:
        cells = (row.key, row.words, row.default, row.meaning)
        drawn.add_row(*(escape(cell.replace("`", "")) for cell in cells))
    console.print(drawn)
    return 0


def _is_below(row: Row, key: str) -> bool:
    """Whether a row is that of a key, or of one below it; numbers of entries do not matter."""
    wanted = re.sub(r"\[\d*\]", "[]", key).rstrip(".")
    return row.name == wanted or row.name.startswith((f"{wanted}.", f"{wanted}[]"))
