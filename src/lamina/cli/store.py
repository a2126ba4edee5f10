"""``lamina inspect``, ``verify`` and ``clear``: looking after a disk store."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
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

from lamina.data.tiers import disk_lock, disk_store
from lamina.data.tiers.disk_index import (
    DamagedIndex,
    DiskIndex,
    IndexSummary,
    UnreadableIndex,
    summarize,
)
from lamina.data.tiers.disk_lock import StoreError
from lamina.data.tiers.disk_shard import ShardReader
from lamina.data.tiers.disk_slab import Slab, aligned_memory
from lamina.data.tiers.disk_store import Shard

Store = Annotated[
    Path, typer.Argument(metavar="PATH", help="Directory of a disk store (`disk.path`).")
]

_BATCH_BYTES = 16 << 20
_SHOWN = 20
_DIFFERENCES = 8


def inspect(path: Store) -> None:
    """Say what is in a disk store: models, size, entries, age."""
    console = Console()
    with _errors(console):
        disk_store.require_store(path)
        _inspect(console, path)


def verify(path: Store) -> None:
    """Read a disk store back and check it against its checksums.

    Exits with 1 if anything is damaged. No server may be using the store.
    """
    console = Console()
    # What is damaged is said once, in full, after the progress bar.
    logging.getLogger("lamina").addHandler(logging.NullHandler())
    with _errors(console):
        disk_store.require_store(path)
        disk_store.check_format(path)
        shards = disk_store.shards(path)
        with disk_lock.hold(path, sorted({shard.rank for shard in shards})):
            damage = _verify_all(console, shards)
    for line in damage[:_SHOWN]:
        console.print(line, style="red", markup=False, soft_wrap=True, highlight=False)
    if len(damage) > _SHOWN:
        console.print(f"... and {len(damage) - _SHOWN} more", style="red")
    if damage:
        console.print(
            "A server takes what is damaged for a miss and computes it again; `lamina clear` "
            "empties the store.",
            soft_wrap=True,
        )
        raise typer.Exit(1)
    console.print("Everything reads back as it was written.", style="green")


def clear(
    path: Store,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Empty a disk store. Deletes only what is Lamina's; no server may be using the store."""
    console = Console()
    with _errors(console):
        disk_store.require_store(path)
        size = sum(shard.disk_bytes() for shard in disk_store.shards(path))
        if not yes:
            typer.confirm(f"Delete {_size(size)} of KV cache in {path}?", abort=True)
        left = disk_store.clear(path)
        console.print(f"Deleted {_size(size)} in {path}.", markup=False, soft_wrap=True)
        if left:
            names = ", ".join(file.name for file in left)
            console.print(f"Left alone, as not Lamina's: {names}", markup=False, soft_wrap=True)


@contextmanager
def _errors(console: Console) -> Iterator[None]:
    try:
        yield
    except (StoreError, OSError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error


def _inspect(console: Console, store: Path) -> None:
    disk_store.check_format(store)
    shards = disk_store.shards(store)
    size = _size(sum(shard.disk_bytes() for shard in shards))
    console.print(f"{store}: {size}", markup=False, soft_wrap=True)
    namespaces = [[*found] for _, found in groupby(shards, key=lambda shard: shard.directory)]
    said = [disk_store.description(ranks[0]) for ranks in namespaces]
    for ranks, description, different in zip(namespaces, said, _differences(said), strict=True):
        _inspect_namespace(console, store, ranks, description, different)


def _inspect_namespace(
    console: Console, store: Path, shards: list[Shard], said: dict[str, str], different: str
) -> None:
    console.print(f"\n{_model(said)}", style="bold", markup=False, soft_wrap=True)
    console.print(f"namespace {shards[0].directory.name}", soft_wrap=True)
    if different:
        console.print(
            f"differs from others in {different}", markup=False, soft_wrap=True, highlight=False
        )
    table = Table(box=box.SIMPLE)
    for title in ("rank", "chunks", "tokens", "KV cache", "on disk", "oldest", "newest", "server"):
        table.add_column(title, no_wrap=True)
    notes = []
    for shard in shards:
        pid = disk_lock.holder(store, shard.rank)
        server = f"pid {pid}" if pid else "-"
        on_disk = _size(shard.disk_bytes())
        try:
            found = summarize(shard.index)
        except (DamagedIndex, UnreadableIndex) as error:
            table.add_row(str(shard.rank), "?", "?", "?", on_disk, "?", "?", server)
            what = "is damaged" if isinstance(error, DamagedIndex) else "cannot be read here"
            notes.append(f"{shard.index} {what}: {error}")
            continue
        table.add_row(
            str(shard.rank),
            f"{found.entries} of {found.layout.slots}",
            _tokens(said, found),
            _size(found.entries * sum(found.layout.extent_bytes)),
            on_disk,
            _age(found.oldest),
            _age(found.newest),
            server,
        )
    console.print(table)
    for note in notes:
        console.print(note, style="red", markup=False, soft_wrap=True, highlight=False)


def _verify_all(console: Console, shards: list[Shard]) -> list[str]:
    damage = []
    summaries: dict[Shard, IndexSummary] = {}
    for shard in shards:
        try:
            summaries[shard] = summarize(shard.index)
        except DamagedIndex as error:
            damage.append(f"{shard.index}: the index is damaged: {error}")
        except UnreadableIndex as error:
            damage.append(f"{shard.index}: the index cannot be read here: {error}")
    total = sum(found.entries * sum(found.layout.extent_bytes) for found in summaries.values())
    bar = Progress(
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=total)
        for shard, found in summaries.items():
            try:
                for size, lines in _verify_shard(shard, found):
                    damage += lines
                    bar.advance(task, size)
            except (DamagedIndex, OSError) as error:
                damage.append(f"{shard.slab}: cannot be read: {error}")
    return damage


def _verify_shard(shard: Shard, found: IndexSummary) -> Iterator[tuple[int, list[str]]]:
    """Read a shard; yields bytes read and what was wrong with them."""
    layout = found.layout
    with (
        closing(DiskIndex(shard.index, layout)) as index,
        closing(Slab(shard.slab, layout.extent_bytes, layout.slots, direct=None)) as slab,
    ):
        reader, stored = ShardReader(layout, slab, index), index.stored()
        for row, extent in enumerate(layout.extent_bytes):
            batch = max(1, _BATCH_BYTES // extent)
            into = aligned_memory(batch * extent).reshape(batch, extent)
            for start in range(0, len(stored), batch):
                chunks = stored[start : start + batch]
                slots, keys = [chunk.slot for chunk in chunks], [chunk.key for chunk in chunks]
                good = reader.read_row(row, slots, keys, into[: len(chunks)]).good
                yield (
                    len(chunks) * extent,
                    [
                        f"{shard.slab}: row {row} of slot {slot} is damaged"
                        for slot, sound in zip(slots, good, strict=True)
                        if not sound
                    ],
                )


def _model(said: dict[str, str]) -> str:
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


def _differences(said: list[dict[str, str]]) -> list[str]:
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
            with suppress(ValueError, RecursionError):
                inner = json.loads(value)
        if isinstance(inner, dict):
            nested |= _flat(inner, f"{prefix}{name}.")
        else:
            plain[prefix + name] = str(value)
    return plain | nested


def _tokens(said: dict[str, str], found: IndexSummary) -> str:
    tokens = said.get("chunk_tokens", "")
    return str(found.entries * int(tokens)) if tokens.isdecimal() else "?"


def _age(moment: float) -> str:
    """How long ago a moment was; empty for none."""
    if not moment:
        return ""
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _size(size: int) -> str:
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.3g} {unit}"
    return f"{size} B"
