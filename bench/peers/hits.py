"""The scenarios in which one prompt is hit: in host memory, on disk, and behind a slow link."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lamina_kv.bench.plain_read import PlainFile, drop_page_cache
from lamina_kv.bench.progress import Progress
from lamina_kv.bench.report import duration
from lamina_kv.bench.samples import Samples, Target, Unit
from lamina_kv.bench.settings import PromptSource, TokenIds
from peers.arena import Arena, Contender, Seat
from peers.protocol import Response
from peers.results import Outcome, Row, best_peer
from peers.settings import PeersSettings, Scenario
from peers.systems import Store, System

SLACK = 1.1
"""What systems keep a prompt in is larger by this: none is to fail for a page."""
_SLOWER = 10
_QUIET = 1.0
"""Seconds in which a store does not grow, when it is written."""
_QUIET_TIMEOUT = 60.0


@dataclass(slots=True)
class Turns:
    """Repetitions of one scenario, by system."""

    responses: dict[str, list[Response]] = field(default_factory=dict)
    floors: dict[str, list[float]] = field(default_factory=dict)

    def add(self, seat: Seat, response: Response) -> None:
        """A request was served."""
        self.responses.setdefault(seat.label, []).append(response)

    def floor(self, name: str, seconds: float) -> None:
        """What a floor is made of was measured."""
        self.floors.setdefault(name, []).append(seconds)

    def rows(self, seats: Sequence[Seat]) -> tuple[Row, ...]:
        """Time to first token, by system."""
        rows = []
        for seat in seats:
            if (responses := self.responses.get(seat.label)) is None:
                continue
            rows.append(
                Row(
                    Samples(seat.label, tuple(response.first for response in responses)),
                    seat.contender.system.is_peer,
                    tuple(response.cached for response in responses),
                    statistics.median(response.per_token for response in responses),
                )
            )
        return tuple(rows)

    def differing(self) -> tuple[str, ...]:
        """A note for each system whose answers are not those of the first."""
        (first, expected), *others = self.responses.items()
        notes = []
        for label, responses in others:
            pairs = list(zip(expected, responses, strict=True))
            different = sum(one.tokens != other.tokens for one, other in pairs)
            if different:
                notes.append(
                    f"{label} gave other tokens than {first} in {different} of {len(pairs)}."
                )
        return tuple(notes) or ("All systems generated the same tokens.",)


class Hits:
    """Runs these scenarios.

    Args:
        settings: the bench's options.
        arena: starts systems.
        contenders: who takes part; one without a connector first, if there is one.
        progress: where it says what it is doing.
    """

    def __init__(
        self,
        settings: PeersSettings,
        arena: Arena,
        contenders: Sequence[Contender],
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._arena = arena
        self._contenders = tuple(contenders)
        self._progress = progress
        self._prefix = PromptSource().prompt(settings.tokens)
        self._unseen = PromptSource(seed=6)

    # -- scenarios -----------------------------------------------------------------------------

    def in_memory(self, wanted: Sequence[Scenario]) -> list[Outcome]:
        """:attr:`Scenario.HOST` and :attr:`Scenario.SUFFIX`, of which those that are wanted."""
        outcomes = []
        with self._arena.seats(self._contenders, self._host_store, self._cache_tokens) as seats:
            self._keep(seats, [*self._prefix, 1])
            if Scenario.HOST in wanted:
                outcomes.append(self._host(seats))
            if Scenario.SUFFIX in wanted:
                outcomes.append(self._suffix(seats))
            self._progress.say("shutting down")
        return outcomes

    def behind_link(self, wanted: Sequence[Scenario]) -> list[Outcome]:
        """:attr:`Scenario.SLOW` and :attr:`Scenario.SLOWER`, of which those that are wanted."""

        def store(contender: Contender) -> Store:
            plain = self._host_store(contender)
            return Store(plain.host, paced=True)

        outcomes = []
        # Behind a link slower than computing, peers are not measured.
        playing = [
            each for each in self._contenders if Scenario.SLOW in wanted or not each.system.is_peer
        ]
        with self._arena.seats(playing, store, self._cache_tokens) as seats:
            self._keep(seats, [*self._prefix, 1])
            if Scenario.SLOW in wanted:
                outcomes.append(self._slow(seats))
            if Scenario.SLOWER in wanted:
                outcomes.append(self._slower(seats))
            self._progress.say("shutting down")
        return outcomes

    def on_disk(self, stores: Path) -> Outcome:
        """:attr:`Scenario.DISK`.

        Two prompts are on disk, and host memory holds one: each drives the other out.

        Args:
            stores: directory that each system gets a directory of its own in.
        """
        prompts = [[*self._prefix, 1], [*PromptSource(seed=2).prompt(self._settings.tokens), 1]]

        def store(contender: Contender) -> Store:
            directory = stores / contender.label
            directory.mkdir(exist_ok=True)
            size = int(SLACK * self._settings.hit_bytes)
            return Store(size, str(directory), 4 * size)

        lasting = [each for each in self._contenders if each.system.survives_restart]
        with self._arena.seats(lasting, store, self._cache_tokens) as seats:
            for seat in seats:
                self._write(seat, prompts, stores)
            self._progress.say("shutting down: what is not yet on disk is written")
        self._progress.say("writing a file for plain reads")
        plain = PlainFile(stores, self._settings.hit_bytes)
        turns, cold = Turns(), {}
        with self._arena.seats(self._contenders, store, self._cache_tokens) as seats:
            for seat in seats:
                system = seat.contender.system
                if system is not System.RECOMPUTE and not system.survives_restart:
                    self._write(seat, prompts, stores)
            for i in range(-1, self._settings.repeat):
                for seat in seats:
                    self._say("hit on disk", seat, i)
                    drop_page_cache(stores)
                    response = seat.ask(prompts[i % 2])
                    if i < 0:
                        cold[seat.label] = response.first
                        continue
                    turns.add(seat, response)
                    if seat.contender.system is System.RECOMPUTE:
                        turns.floor("step", seat.ask(prompts[i % 2], forget=False).first)
                if i >= 0:
                    plain.read()
            self._progress.say("shutting down")
        way, reads = plain.fastest()
        read = Samples("reads", tuple(reads))
        step = _samples(turns, "step")
        floor = () if step is None else (_paired("max(reads, step)", max, read, step), read, step)
        again = [
            each.label
            for each in self._contenders
            if each.system.is_peer and not each.system.survives_restart
        ]
        notes = [
            f"Plain reads: {way}. The page cache was made to forget every file before each.",
            "The first hit after the start: "
            + ", ".join(f"{label} {duration(seconds)}" for label, seconds in cold.items())
            + ".",
        ]
        if again:
            notes.append(f"{' and '.join(again)} forget at a restart: measured without one.")
        return self._outcome(
            Scenario.DISK,
            f"Hit on disk after a restart, {self._settings.tokens} tokens",
            turns,
            seats,
            floor,
            (0.7, 1.25),
            notes,
        )

    # -- what they are made of -----------------------------------------------------------------

    def _host(self, seats: Sequence[Seat]) -> Outcome:
        turns = Turns()
        prompt = [*self._prefix, 1]
        for i in range(self._settings.repeat):
            for seat in seats:
                self._say("hit in host memory", seat, i)
                turns.add(seat, seat.ask(prompt))
                if seat.contender.system is System.RECOMPUTE:
                    turns.floor("step", seat.ask(prompt, forget=False).first)
                    turns.floor("copy", seat.copy(self._settings.hit_bytes))
        copy, step = _samples(turns, "copy"), _samples(turns, "step")
        floor: tuple[Samples, ...] = ()
        if copy is not None and step is not None:
            floor = (_paired("copy + step", lambda a, b: a + b, copy, step), copy, step)
        return self._outcome(
            Scenario.HOST,
            f"Hit in host memory, {self._settings.tokens} tokens",
            turns,
            seats,
            floor,
            (0.9, 1.25),
        )

    def _suffix(self, seats: Sequence[Seat]) -> Outcome:
        turns = Turns()
        for i, prompt in enumerate(self._suffixed(3)):
            for seat in seats:
                self._say("hit and suffix", seat, i)
                turns.add(seat, seat.ask(prompt))
                if seat.contender.system is System.RECOMPUTE:
                    turns.floor("compute", self._compute(seat))
        compute = _samples(turns, "compute")
        return self._outcome(
            Scenario.SUFFIX,
            f"Hit of {self._settings.tokens} tokens in host memory, "
            f"{self._settings.new_tokens} to compute",
            turns,
            seats,
            () if compute is None else (compute,),
            (None, None),
        )

    def _slow(self, seats: Sequence[Seat]) -> Outcome:
        """Each repetition is paced to the suffix's prefill as it was right before."""
        turns, load = Turns(), []
        for i, prompt in enumerate(self._suffixed(4, extra=1), start=-1):
            compute = self._compute(seats[0])
            for seat in seats:
                self._say("hit behind a slow link and suffix", seat, i)
                if seat.contender.system is not System.RECOMPUTE:
                    seat.pace(self._settings.hit_bytes / compute)
                response = seat.ask(prompt)
                if i >= 0:
                    turns.add(seat, response)
            if i >= 0:
                load.append(compute)
        return self._outcome(
            Scenario.SLOW,
            f"Hit of {self._settings.tokens} tokens behind a link that needs as long as "
            f"{self._settings.new_tokens} tokens to compute",
            turns,
            seats,
            (Samples("max(load, compute)", tuple(load)),),
            (0.6, 1.10),
        )

    def _slower(self, seats: Sequence[Seat]) -> Outcome:
        """Peers load whatever they find, and so take as long as the link does: they sit this one
        out."""
        turns, first = Turns(), {}
        prompt = [*self._prefix, 1]
        playing = [seat for seat in seats if not seat.contender.system.is_peer]
        recompute = seats[0].ask(prompt).first
        for seat in playing[1:]:
            seat.pace(self._settings.hit_bytes / (_SLOWER * recompute))
        for i in range(-1, self._settings.repeat):
            for seat in playing:
                self._say("hit behind a link slower than computing", seat, i)
                response = seat.ask(prompt)
                if i < 0:
                    first[seat.label] = response.first
                else:
                    turns.add(seat, response)
        rows = turns.rows(playing)
        target = [
            _target(f"{row.samples.name} ÷ recompute", row, rows[0].samples, 1.03)
            for row in rows[1:]
        ]
        began = ", ".join(f"{label} {duration(seconds)}" for label, seconds in first.items())
        return Outcome(
            Scenario.SLOWER,
            f"Hit of {self._settings.tokens} tokens behind a link that needs {_SLOWER} times as "
            "long as computing them",
            rows,
            targets=tuple(target),
            notes=(f"The first request behind that link: {began}.", *turns.differing()),
        )

    def _compute(self, seat: Seat) -> float:
        """Seconds to the first token of a new suffix behind the prefix, which the engine has."""
        seat.ask([*self._prefix, 1], forget=False)
        suffix = self._unseen.prompt(self._settings.new_tokens)
        return seat.ask(self._prefix + suffix, forget=False).first

    def _suffixed(self, seed: int, extra: int = 0) -> list[TokenIds]:
        source = PromptSource(seed=seed)
        count = self._settings.repeat + extra
        return [self._prefix + source.prompt(self._settings.new_tokens) for _ in range(count)]

    def _keep(self, seats: Sequence[Seat], prompt: TokenIds) -> None:
        for seat in seats:
            self._progress.say(f"{seat.label}: computing and saving a prompt")
            seat.keep(prompt, self._settings.tokens)

    def _write(self, seat: Seat, prompts: Sequence[TokenIds], stores: Path) -> None:
        """Have prompts on disk."""
        self._progress.say(f"{seat.label}: computing and writing {len(prompts)} prompts")
        for prompt in prompts:
            seat.keep(prompt, self._settings.tokens)
        directory = stores / seat.label
        with seat.process.awake():
            give_up = time.monotonic() + _QUIET_TIMEOUT
            before = -1
            while (size := _disk_bytes(directory)) != before and time.monotonic() < give_up:
                before = size
                time.sleep(_QUIET)

    def _host_store(self, _: Contender) -> Store:
        """Of suffixes, which are not asked for again, there is room for two: an older one is driven
        out, because the prefix was used after it."""
        tokens = self._settings.tokens + 2 * self._settings.new_tokens
        return Store(int(SLACK * self._settings.shape.kv_bytes(tokens)))

    @property
    def _cache_tokens(self) -> int:
        """The prompt and its suffix, and what is generated."""
        return (
            self._settings.tokens
            + self._settings.new_tokens
            + self._settings.generated
            + 2 * self._settings.shape.block_size
        )

    def _say(self, what: str, seat: Seat, turn: int) -> None:
        which = f"{turn + 1} of {self._settings.repeat}" if turn >= 0 else "warming up"
        self._progress.say(f"{what}, {seat.label}, {which}")

    def _outcome(
        self,
        scenario: Scenario,
        title: str,
        turns: Turns,
        seats: Sequence[Seat],
        floors: tuple[Samples, ...],
        limits: tuple[float | None, float | None],
        notes: Sequence[str] = (),
    ) -> Outcome:
        """Lamina held against the best peer and against the floor."""
        rows = turns.rows(seats)
        best = best_peer(rows)
        targets = []
        for seat in seats:
            if seat.contender.system is not System.LAMINA:
                continue
            (row,) = (row for row in rows if row.samples.name == seat.label)
            if best is not None:
                name = f"{seat.label} ÷ {best.samples.name}, the best peer"
                targets.append(_target(name, row, best.samples, limits[0]))
            if floors:
                name = f"{seat.label} ÷ {floors[0].name}, the floor"
                targets.append(_target(name, row, floors[0], limits[1]))
        return Outcome(scenario, title, rows, floors, tuple(targets), (*notes, *turns.differing()))


def _target(name: str, row: Row, against: Samples, limit: float | None) -> Target:
    """A ratio of medians."""
    figure = Samples(name, (row.samples.median / against.median,))
    return Target(figure, Unit.RATIO, limit)


def _samples(turns: Turns, name: str) -> Samples | None:
    values = turns.floors.get(name)
    return None if values is None else Samples(name, tuple(values))


def _paired(
    name: str, combine: Callable[[float, float], float], one: Samples, other: Samples
) -> Samples:
    pairs = zip(one.values, other.values, strict=True)
    return Samples(name, tuple(combine(a, b) for a, b in pairs))


def _disk_bytes(directory: Path) -> int:
    return sum(file.stat().st_blocks for file in directory.rglob("*") if file.is_file())
