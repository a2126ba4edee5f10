"""``lamina explain``: why requests were loaded or computed, and whether they would be again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer

from lamina.control.decisions import DecisionRecord, decode_decision


def run(path: Path, request_id: str | None) -> int:
    """Explain the decisions of a file; answers the exit code.

    Args:
        path: what ``observe.decisions`` has written.
        request_id: only those of requests whose name contains this.
    """
    try:
        records = [r for r in _read(path) if request_id is None or request_id in r.request_id]
    except (OSError, ValueError) as error:
        typer.echo(f"{path}: {error}", err=True)
        return 1
    if not records:
        typer.echo(f"{path} has no decision about {request_id or 'anything'}", err=True)
        return 1
    for record in records:
        typer.echo(record.explain())
        if (now := record.replay()) != record.decision:
            typer.echo(f"  this version of Lamina would load {now.tokens} tokens ({now.reason})")
    return 0


def _read(path: Path) -> Iterator[DecisionRecord]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            yield decode_decision(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
