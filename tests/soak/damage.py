"""Damage to the files of a store that nobody uses: torn writes, bad sectors, flipped bits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

SECTOR = 512

Range = tuple[int, int]
"""The first byte and the one after the last."""


@dataclass(frozen=True)
class Damage:
    """What was done.

    Attributes:
        file: to which file.
        kind: in a word.
        ranges: which bytes may have changed; None if it was cut short.
    """

    file: Path
    kind: str
    ranges: tuple[Range, ...] | None

    @property
    def name(self) -> str:
        """For a table."""
        suffix = self.file.name.removeprefix("rank-0.").removeprefix("rank-1.")
        return f"{self.kind} {suffix}"


def overwrite(file: Path, position: int, content: bytes) -> Range:
    """Replace bytes that are there."""
    with file.open("r+b") as out:
        out.seek(position)
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    return position, position + len(content)


def flip(file: Path, random: Random, at: Callable[[], int]) -> tuple[Range, ...]:
    """Flip up to 20 bits."""
    ranges = []
    for _ in range(random.choice((1, 1, 3, 20))):
        position = at()
        with file.open("rb") as before:
            before.seek(position)
            (byte,) = before.read(1)
        ranges.append(overwrite(file, position, bytes([byte ^ 1 << random.randrange(8)])))
    return tuple(ranges)


def sectors(file: Path, random: Random, at: Callable[[], int], *, zero: bool) -> tuple[Range, ...]:
    """Overwrite up to 16 sectors in a row, with zeros or with anything."""
    start = at() // SECTOR * SECTOR
    length = min(random.choice((1, 2, 16)) * SECTOR, file.stat().st_size - start)
    return (overwrite(file, start, bytes(length) if zero else random.randbytes(length)),)


@dataclass(frozen=True)
class Write:
    """What was written to a file and not synced.

    Attributes:
        start: where.
        size: bytes.
        before: what was there, where a disk must not damage the neighbours of what is changed: a
            sector holds the one or the other then. None where it may hold anything.
    """

    start: int
    size: int
    before: bytes | None = None


def tear(file: Path, random: Random, writes: Sequence[Write]) -> None:
    """The power fails: of what was written and not synced, any sector may not have arrived."""
    size = file.stat().st_size
    for write in reversed(writes):
        for position in range(write.start, min(write.start + write.size, size), SECTOR):
            dice = random.random()
            if dice < 0.5 and write.before is not None:
                at = position - write.start
                overwrite(file, position, write.before[at : at + SECTOR])
            elif dice < 0.25:
                overwrite(file, position, bytes(SECTOR))
            elif dice < 0.5:
                overwrite(file, position, random.randbytes(SECTOR))


def damage_store(store: Path, random: Random, position_in_slab: Callable[[], int]) -> Damage:
    """Damage one file of a store.

    Args:
        store: its directory.
        random: chooses.
        position_in_slab: a byte of a slab that means something; most do not.
    """
    files = sorted(path for path in store.rglob("*") if path.is_file() and path.stat().st_size)
    wanted = random.choices(("slab", "json", ""), (80, 10, 10))[0]
    file = random.choice([path for path in files if path.name.endswith(wanted)] or files)
    size = file.stat().st_size

    def at() -> int:
        return position_in_slab() if file.suffix == ".slab" else random.randrange(size)

    kind = random.choice(("flip", "flip", "zero", "garbage", "cut"))
    if kind == "cut":
        os.truncate(file, random.randrange(size))
        return Damage(file, kind, None)
    ranges = (
        flip(file, random, at) if kind == "flip" else sectors(file, random, at, zero=kind == "zero")
    )
    return Damage(file, kind, ranges)
