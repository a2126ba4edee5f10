"""The scenarios of stores that engines share: one engine computes and saves, a second one hits.

::

    first engines: compute, save, end ──▶ store ──▶ second engines: hit ── store stopped: hit?

Every system has its store to itself, and what goes over the wire is counted by the machine's
loopback device, so that nothing else may use that meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lamina_kv.bench.engine import BenchError
from lamina_kv.bench.progress import Progress
from lamina_kv.bench.report import duration
from lamina_kv.bench.samples import Samples, Target, Unit
from lamina_kv.bench.settings import PromptSource, TokenIds
from peers import protocol
from peers.arena import Arena, Contender, Seat
from peers.hits import SLACK, Turns
from peers.protocol import Arrival, Response
from peers.results import Outcome, best_peer
from peers.servers import SERVERS, SharedServer
from peers.settings import PeersSettings, Scenario
from peers.systems import SharedKind, Store, System

BEST_PEER = 0.8
"""Of the best peer's time to first token, Lamina may take so much."""

PROMPTS = 3
"""Asked for in turn, where host memory holds two: each has been driven out when it comes again."""

PATIENCE = 120.0
"""Seconds after which an engine hangs whose store is stopped."""

_LOOPBACK = Path("/sys/class/net/lo/statistics/rx_bytes")
_QUIET = 1.0
"""Seconds in which nothing goes over the wire, when a prompt is saved."""
_QUIET_BYTES = 100_000
_QUIET_TIMEOUT = 60.0


class SharedHits:
    """Runs these scenarios.

    Args:
        settings: the bench's options.
        arena: starts systems.
        contenders: who takes part; those that cannot use a store sit it out.
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
        source = PromptSource(seed=17)
        self._prompts = [[*source.prompt(settings.tokens), 1] for _ in range(PROMPTS)]

    def play(self, scenario: Scenario, work: Path) -> Outcome:
        """One scenario.

        Args:
            scenario: of which store.
            work: where the store may put a directory.

        Raises:
            BenchError: if a server or a system does not start, or fails while all is well.
        """
        kind = SharedKind(scenario.value)
        folder = work / f"shared-{kind}"
        folder.mkdir()
        playing = [
            each
            for each in self._contenders
            if each.system is System.RECOMPUTE or each.system.shares(kind)
        ]
        with SERVERS[kind](folder) as server:
            store = self._stores(server)
            self._fill([each for each in playing if each.system.shares(kind)], store)
            turns, wire, notes = Turns(), dict[str, list[int]](), list[str]()
            with self._arena.seats(playing, store, self._cache_tokens) as seats:
                for i in range(-1, self._settings.repeat):
                    for seat in seats:
                        self._progress.say(f"hit in {kind}, {seat.label}, {i + 1}")
                        before = _wire_bytes()
                        response = seat.ask(self._prompts[i % PROMPTS])
                        if i >= 0:
                            turns.add(seat, response)
                            wire.setdefault(seat.label, []).append(_wire_bytes() - before)
                if server.can_stop:
                    notes += [self._stopped(server, seat) for seat in seats if _shares(seat, kind)]
                self._progress.say("shutting down")
            return self._outcome(scenario, turns, seats, wire, notes)

    def _stores(self, server: SharedServer) -> Callable[[Contender], Store]:
        size = int(SLACK * (PROMPTS - 1) * self._settings.hit_bytes)
        return lambda contender: Store(size, shared=server.place(contender.label))

    def _fill(self, contenders: Sequence[Contender], store: Callable[[Contender], Store]) -> None:
        """First engines compute and save, and end."""
        for contender in contenders:
            with self._arena.seats([contender], store, self._cache_tokens) as (seat,):
                self._progress.say(f"{seat.label}: computing and saving {PROMPTS} prompts")
                for prompt in self._prompts:
                    seat.ask(prompt)
                    with seat.process.awake():
                        _await_quiet()
                self._progress.say("shutting down")

    def _stopped(self, server: SharedServer, seat: Seat) -> str:
        """What an engine does while its store hangs, and when that goes on."""
        self._progress.say(f"{server.kind} is stopped, {seat.label}")
        server.stop()
        try:
            hung = self._try(seat, self._prompts[self._settings.repeat % PROMPTS])
        finally:
            server.go_on()
        said = f"{seat.label} while {server.kind} was stopped: {_said(hung)}"
        if isinstance(hung, str):
            seat.process.end()
            return f"{said}."
        after = self._try(seat, self._prompts[(self._settings.repeat + 1) % PROMPTS])
        if isinstance(after, str):
            seat.process.end()
        return f"{said}; when it went on: {_said(after)}."

    def _try(self, seat: Seat, prompt: TokenIds) -> Response | str:
        """Ask; what was answered, or what went wrong."""
        arrivals = [Arrival(0.0, prompt, self._settings.generated)]
        began = time.monotonic()
        try:
            with seat.process.awake() as process:
                process.call(protocol.Forget(), protocol.Done, PATIENCE)
                served = process.call(protocol.Serve(arrivals), protocol.Served, PATIENCE)
        except BenchError as error:
            what = str(error).partition("\n")[0]
            return f"after {time.monotonic() - began:.0f} s: {what}"
        return served.responses[0]

    def _outcome(
        self,
        scenario: Scenario,
        turns: Turns,
        seats: Sequence[Seat],
        wire: dict[str, list[int]],
        notes: Sequence[str],
    ) -> Outcome:
        rows = turns.rows(seats)
        best, targets = best_peer(rows), []
        for row in rows:
            if row.samples.name == System.LAMINA and best is not None:
                name = f"{row.samples.name} ÷ {best.samples.name}, the best peer"
                ratio = row.samples.median / best.samples.median
                targets.append(Target(Samples(name, (ratio,)), Unit.RATIO, BEST_PEER))
        moved = ", ".join(
            f"{label} {sorted(each)[len(each) // 2] / 1e6:.0f} MB" for label, each in wire.items()
        )
        return Outcome(
            scenario,
            f"Hit of {self._settings.tokens} tokens ({self._settings.hit_bytes / 1e6:.0f} MB) of a "
            f"second engine in a shared store: {scenario.value}",
            rows,
            targets=tuple(targets),
            notes=(f"Over the loopback device: {moved}.", *notes, *turns.differing()),
        )

    @property
    def _cache_tokens(self) -> int:
        settings = self._settings
        return settings.tokens + settings.generated + 2 * settings.shape.block_size


def _shares(seat: Seat, kind: SharedKind) -> bool:
    return seat.contender.system.shares(kind)


def _said(response: Response | str) -> str:
    if isinstance(response, str):
        return response
    return f"first token after {duration(response.first)}, {response.cached} tokens hit"


def _wire_bytes() -> int:
    return int(_LOOPBACK.read_text())


def _await_quiet() -> None:
    give_up = time.monotonic() + _QUIET_TIMEOUT
    before = -_QUIET_BYTES
    while (now := _wire_bytes()) - before >= _QUIET_BYTES and time.monotonic() < give_up:
        before = now
        time.sleep(_QUIET)
