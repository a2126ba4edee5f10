"""Servers on one store, one after another, each killed at some moment without warning.

On half of the stores they kill themselves, in virtual time, at a moment that the seed decides: such
a life can be repeated. On the others they have real threads and are killed from outside, whatever
they are doing.
Between two of them the power may have failed (what was written and not synced is anything now),
or a file of the store may have been damaged.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import time
from collections import Counter
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from lamina_kv.geometry import OBJECT_HEADER_BYTES
from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.disk.layout import BLOCK, GROUP, HEAD_BYTES, TABLE_BYTES, USED_BYTES
from simulator.content import Stamps, Violation
from simulator.faults import Weather
from simulator.options import Far, Options, Sort
from soak.damage import Damage, Write, damage_store, tear
from soak.doomed import DISK, Fate, serve
from soak.memory import Memory

LONGEST = 0.7
"""Seconds that a server with real threads lives at most."""
POINTS = 3.2
"""Decimal logarithm of the most points that one in virtual time lives to see."""
PATIENCE = 120.0
"""Seconds after which one that should have ended by itself hangs."""
DAMAGED = 0.25
"""Of restarts."""
POWER_FAILURES = 0.8
"""Of kills."""

STORE_FILE = "lamina-store.json"


class Life:
    """The life of one store.

    Args:
        seed: decides everything; for servers with real threads, as far as anything can.
        store: its directory.

    Attributes:
        counts: what has happened how often.
    """

    def __init__(self, seed: int, store: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._seed = seed
        self._random = Random(seed)
        self._store = store
        self._virtual = seed % 2 == 0
        self._memory = Memory()
        self._damage: Damage | None = None
        self._unsynced: dict[Path, list[Write]] = {}
        self._fair = True
        self._end = ""
        self._starts = 0
        self._servers = 0
        self._slots = self._random.choice((8, 48))
        self._layout = Options.draw(self._random)

    def run(self, cycles: int) -> None:
        """Start that many servers and end them, then one that looks at what is left.

        Raises:
            Violation: if a promise was broken; its notes say when.
        """
        for _ in range(cycles):
            self._cycle(self._draw_fate())
            self._misfortune()
        last = replace(self._draw_fate(), virtual=True, points=0, weather=Weather())
        self._cycle(last)
        if self._end == "refused":
            self._cycle(last)
        if self._end != "ended":
            raise Violation(f"the last server was {self._end}")

    def _draw_fate(self) -> Fate:
        random = self._random
        other = Options.draw(random)
        virtual = self._virtual
        options = replace(
            self._layout,
            budget=other.budget,
            drafts=other.drafts,
            asynchronous=other.asynchronous,
            prefix_caching=other.prefix_caching,
            host_slots=random.choice((12, 60)),
            mode=other.mode,
            load_ahead=other.load_ahead,
            tiers=(replace(Far.draw(random, 0, Sort.DISK), name=DISK, room=self._slots),),
            deadline=other.deadline if virtual else 0.4,
        )
        return Fate(
            seed=random.randrange(1 << 32),
            options=options,
            documents=(self._seed, random.randrange(1 << 32)),
            weather=Weather() if random.random() < 0.7 else Weather.draw(random),
            virtual=virtual,
            points=int(10 ** random.uniform(0, POINTS)) if virtual else 0,
        )

    # -- a server ------------------------------------------------------------------------------

    def _cycle(self, fate: Fate) -> None:
        self._servers += 1
        try:
            self._serve(fate)
        except Violation as violation:
            violation.add_note(f"store {self._seed}, server {self._servers}: {fate}")
            violation.add_note(f"before that: {self._damage}")
            raise
        self.counts[f"servers {self._end}"] += 1

    def _serve(self, fate: Fate) -> None:
        patience = PATIENCE if fate.virtual else self._random.uniform(0, LONGEST)
        self._fair = fate.weather == Weather()
        self._unsynced.clear()
        self._end = "killed"
        self._starts += 1
        fork = multiprocessing.get_context("fork")
        pipe, theirs = fork.Pipe(duplex=False)
        server = fork.Process(target=serve, args=(theirs, fate, self._store, self._memory))
        server.start()
        theirs.close()
        try:
            in_time = self._listen(pipe, time.monotonic() + patience)
            server.kill()
            self._listen(pipe, math.inf)
        finally:
            server.kill()
            server.join()
            pipe.close()
        if server.exitcode not in (0, -signal.SIGKILL):
            raise Violation(f"a server ended with {server.exitcode}")
        if fate.virtual and not in_time:
            raise Violation(f"a server hung for {patience:.0f} s")

    def _listen(self, pipe: Connection, until: float) -> bool:
        """Hear what a server says; returns whether it has ended by then."""
        while True:
            left = until - time.monotonic()
            if not pipe.poll(None if left == math.inf else max(0.0, left)):
                return False
            try:
                kind, *what = pipe.recv()
            except (EOFError, OSError):  # the latter in the middle of a message
                return True
            getattr(self, f"_hear_{kind}")(*what)

    def _hear_opened(
        self, unreadable: set[int], visible: dict[ChunkKey, int], warnings: list[str]
    ) -> None:
        damage, memory = self._damage, self._memory
        lost = {key for key, slot in memory.durable.items() if visible.get(key, slot) in unreadable}
        lost |= memory.durable.keys() - visible.keys()
        self.counts["durable chunks found again"] += len(memory.durable) - len(lost)
        self.counts["durable chunks lost to damage"] += len(lost)
        # A server that was killed as it opened the store may have said it already, and an erased
        # head is that of a free slot.
        first = self._starts == 1 and damage is not None and damage.kind in ("flip", "garbage")
        if memory.durable.keys() - visible.keys() and first and not warnings:
            raise Violation(f"{len(lost)} chunks were lost to {damage} without a warning")
        memory.opened(unreadable, visible)
        self._damage = None

    def _hear_ordered(
        self, writes: list[tuple[ChunkKey, int, Stamps]], dropped: tuple[int, ...]
    ) -> None:
        durable = set(self._memory.durable.values())
        if self._fair and not self._memory.unreadable and durable.intersection(dropped):
            raise Violation(f"of the durable chunks in {durable} control drops {dropped}")
        self._memory.ordered(writes, dropped)

    def _hear_reported(self, key: ChunkKey) -> None:
        self._memory.reported(key)
        self.counts["chunks reported durable"] += 1

    def _hear_writing(self, file: str, writes: list[Write]) -> None:
        self._unsynced.setdefault(Path(file), []).extend(writes)

    def _hear_synced(self, file: str) -> None:
        self._unsynced.pop(Path(file), None)

    def _hear_ended(self) -> None:
        self._end = "ended"

    def _hear_refused(self, text: str) -> None:
        """Only one thing keeps a store from being opened, and the text says which."""
        damage = self._damage
        said = STORE_FILE in text or "format version" in text
        if damage is None or damage.file.name != STORE_FILE or not said:
            raise Violation(f"a server refused its store after {damage}: {text}")
        damage.file.unlink()
        self._end = "refused"

    def _hear_failed(self, text: str) -> None:
        raise Violation(f"a server failed:\n{text}")

    # -- between two servers -------------------------------------------------------------------

    def _misfortune(self) -> None:
        random = self._random
        if self._unsynced and random.random() < POWER_FAILURES:
            for file, writes in self._unsynced.items():
                tear(file, random, writes)
            self._memory.torn = True
            self.counts["power failures"] += 1
        there = any(self._store.rglob("rank-*.slab"))
        if there and self._damage is None and random.random() < DAMAGED:
            self._damage = damage_store(self._store, random, self._offset_in_use)
            self._memory.damage(self._broken_by(self._damage))
            self._starts = 0
            self.counts[f"damage: {self._damage.name}"] += 1

    def _offset_in_use(self) -> int:
        """A byte of a slab that means something."""
        random, slot = self._random, self._random.randrange(self._slots)
        dice = random.random()
        if dice < 0.1:
            return random.randrange(64)
        if dice < 0.2:
            return BLOCK + slot * USED_BYTES + random.randrange(USED_BYTES)
        if dice < 0.5:
            return _HEADS + slot * HEAD_BYTES + random.randrange(HEAD_BYTES)
        whole = OBJECT_HEADER_BYTES + self._layout.chunk_bytes
        return _OBJECTS + slot * self._layout.geometry().object_bytes + random.randrange(whole)

    def _broken_by(self, damage: Damage) -> set[int] | None:
        """The slots that a damage may have cost; None for all."""
        if not damage.file.name.endswith(".slab"):
            return set()
        if damage.ranges is None:
            return None
        broken: set[int] = set()
        for start, end in damage.ranges:
            for position in range(start, end):
                if position >= _OBJECTS:
                    size = self._layout.geometry().object_bytes
                    broken.add((position - _OBJECTS) // size)
                elif position >= _HEADS:
                    broken.add((position - _HEADS) // HEAD_BYTES)
                elif position >= BLOCK:
                    return None  # of a chunk in two slots, ranks may come to prefer another one
        return broken


_HEADS = BLOCK + GROUP * USED_BYTES
_OBJECTS = BLOCK + TABLE_BYTES
