"""``lamina-kv inspect``, ``verify`` and ``clear``: looking after a store."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from lamina_kv.cli.arguments import ConfigFile, Json, Place, StorePlace, TransferConfig
from lamina_kv.cli.configured import configured
from lamina_kv.config import ConfigError
from lamina_kv.quantities import duration, size_of
from lamina_kv.tiers import open_audit
from lamina_kv.tiers.audit import Audit, Part
from lamina_kv.tiers.contract import StoreError
from lamina_kv.tiers.disk import directory

_SHOWN = 20
_DIFFERENCES = 8


def inspect(
    place: StorePlace,
    config: ConfigFile = None,
    kv_transfer_config: TransferConfig = None,
    as_json: Json = False,
) -> None:
    """Say what is in a store: models, size, entries, age."""
    console = Console()
    with (
        _errors(Console(stderr=as_json)),
        closing(open_audit(place, configured(config, kv_transfer_config).tiers)) as audit,
    ):
        if as_json:
            console.out(json.dumps(_document(audit), indent=2), highlight=False)
        else:
            _inspect(console, audit)


def verify(
    place: StorePlace, config: ConfigFile = None, kv_transfer_config: TransferConfig = None
) -> None:
    """Read a store back and check it against its checksums.

    Exits with 1 if anything is damaged. No server may be using a disk store; a shared one may be in
    use.
    """
    console = Console()
    # What is damaged is said once, in full, after the progress bar.
    logging.getLogger("lamina_kv").addHandler(logging.NullHandler())
    with (
        _errors(console),
        closing(open_audit(place, configured(config, kv_transfer_config).tiers)) as audit,
    ):
        nothing = not any(part.size for part in audit.parts())
        damage = _verify_all(console, audit)
        damage_means = audit.damage_means
    for line in damage[:_SHOWN]:
        console.print(line, style="red", markup=False, soft_wrap=True, highlight=False)
    if len(damage) > _SHOWN:
        console.print(f"... and {len(damage) - _SHOWN} more", style="red")
    if damage:
        console.print(damage_means, markup=False, soft_wrap=True)
        raise typer.Exit(1)
    if nothing:
        console.print("There is nothing in it.")
    else:
        console.print("Everything reads back as it was written.", style="green")


def clear(
    place: Place,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Empty a disk store. Deletes only what is Lamina's; no server may be using the store."""
    console = Console()
    with _errors(console):
        path = Path(place)
        directory.require_access(path)
        if not directory.is_store(path):
            with closing(open_audit(place)) as audit:
                raise StoreError(audit.clearing)
        size = sum(shard.disk_bytes() for shard in directory.shards(path))
        if not yes:
            typer.confirm(f"Delete {size_of(size)} of KV cache in {path}?", abort=True)
        left = directory.clear(path)
        console.print(f"Deleted {size_of(size)} in {path}.", markup=False, soft_wrap=True)
        if left:
            names = ", ".join(file.name for file in left)
            console.print(f"Left alone, as not Lamina's: {names}", markup=False, soft_wrap=True)


@contextmanager
def _errors(console: Console) -> Iterator[None]:
    try:
        yield
    except (StoreError, ConfigError, OSError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error


def _inspect(console: Console, audit: Audit) -> None:
    parts = audit.parts()
    size = size_of(sum(part.taken for part in parts))
    console.print(f"{audit.place}: {size}", markup=False, soft_wrap=True)
    namespaces = _by_namespace(parts)
    said = [found[0].description for found in namespaces]
    for found, different in zip(namespaces, _differences(said), strict=True):
        _inspect_namespace(console, found, different)


def _by_namespace(parts: list[Part]) -> list[list[Part]]:
    return [[*found] for _, found in groupby(parts, key=lambda part: part.namespace)]


def _document(audit: Audit) -> dict[str, object]:
    """What :func:`_inspect` says, for a program. What cannot be told is null; sizes are bytes and
    moments seconds since the epoch."""
    parts = audit.parts()
    return {
        "place": audit.place,
        "bytes": sum(part.taken for part in parts),
        "namespaces": [
            {
                "namespace": found[0].namespace,
                "description": {name: _parsed(text) for name, text in found[0].description.items()},
                "parts": [
                    {
                        "rank": part.shard,
                        "chunks": part.chunks,
                        "capacity_chunks": part.slots or None,
                        "tokens": _tokens(part),
                        "kv_cache_bytes": part.row_bytes,
                        "bytes": part.taken,
                        "oldest": part.oldest or None,
                        "newest": part.newest or None,
                        "server": part.user or None,
                        "damage": part.damage,
                    }
                    for part in found
                ],
            }
            for found in _by_namespace(parts)
        ],
    }


def _inspect_namespace(console: Console, parts: list[Part], different: str) -> None:
    console.print(f"\n{_model(parts[0].description)}", style="bold", markup=False, soft_wrap=True)
    console.print(f"namespace {parts[0].namespace}", soft_wrap=True)
    if different:
        console.print(
            f"differs from others in {different}", markup=False, soft_wrap=True, highlight=False
        )
    table = Table(box=box.SIMPLE)
    columns = [[text(part) for part in parts] for _, text in _COLUMNS]
    shown = [number for number, column in enumerate(columns) if any(column)]
    for number in shown:
        table.add_column(_COLUMNS[number][0], no_wrap=True)
    for row in range(len(parts)):
        table.add_row(*(columns[number][row] for number in shown))
    console.print(table)
    for note in (line for part in parts for line in part.damage):
        console.print(note, style="red", markup=False, soft_wrap=True, highlight=False)


def _verify_all(console: Console, audit: Audit) -> list[str]:
    parts = audit.parts()
    damage = [line for part in parts for line in part.damage]
    bar = Progress(
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=sum(part.size for part in parts))
        for size, lines in audit.check():
            damage += lines
            bar.advance(task, size)
    return damage


def _chunks(part: Part) -> str:
    chunks = _or_unknown(part.chunks)
    return f"{chunks} of {part.slots}" if part.slots and part.chunks is not None else chunks


def _model(said: Mapping[str, str]) -> str:
    """One line for what a namespace stands for."""
    model = said.get("model", "unknown model")
    try:
        architectures = json.loads(model)["architectures"]
        model = ", ".join(architectures)
    except (ValueError, LookupError, TypeError):
        pass
    details = [
        f"{key} {said[key]}"
        for key in ("checkpoint", "model_dtype", "cache_dtype", "chunk_tokens")
        if said.get(key)
    ]
    return "; ".join([model[:80], *details])


def _differences(said: list[Mapping[str, str]]) -> list[str]:
    """For each of some namespaces what it has, where not all have the same; empty for only one."""
    fields = [_flat(description) for description in said]
    names = dict.fromkeys(name for each in fields for name in each)
    names = {name: None for name in names if len({each.get(name) for each in fields}) > 1}
    lines = []
    for each in fields:
        told = [f"{name}: {each.get(name, '-')[:60]}" for name in names]
        more = f"; and {len(told) - _DIFFERENCES} more" if len(told) > _DIFFERENCES else ""
        lines.append("; ".join(told[:_DIFFERENCES]) + more)
    return lines


def _flat(description: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """A description with what is nested in it, the nested last."""
    plain: dict[str, str] = {}
    nested: dict[str, str] = {}
    for name, value in description.items():
        inner = value
        if not prefix and isinstance(value, str):
            inner = _parsed(value)
        if isinstance(inner, dict):
            nested |= _flat(inner, f"{prefix}{name}.")
        else:
            plain[prefix + name] = str(value)
    return plain | nested


def _parsed(text: str) -> object:
    """A field of a description: what its JSON says, or the text if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _tokens(part: Part) -> int | None:
    """Tokens of a part's chunks; None if that cannot be told."""
    tokens = part.description.get("chunk_tokens", "")
    return part.chunks * int(tokens) if part.chunks is not None and tokens.isdecimal() else None


def _or_unknown(number: int | None) -> str:
    return "?" if number is None else str(number)


def _age(moment: float) -> str:
    """How long ago a moment was; empty for none."""
    return duration(max(0.0, time.time() - moment)) if moment else ""


_COLUMNS: tuple[tuple[str, Callable[[Part], str]], ...] = (
    ("rank", lambda part: str(part.shard)),
    ("chunks", _chunks),
    ("tokens", lambda part: _or_unknown(_tokens(part))),
    ("KV cache", lambda part: "" if part.row_bytes is None else size_of(part.row_bytes)),
    ("stored", lambda part: size_of(part.taken)),
    ("oldest", lambda part: _age(part.oldest)),
    ("newest", lambda part: _age(part.newest)),
    ("server", lambda part: part.user),
)
"""Columns of a table, and what each says; one that says nothing is left out."""
