"""Systems side by side, of which one runs at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina_kv.bench.engine import BenchError
from lamina_kv.bench.progress import Progress
from lamina_kv.bench.room import require_room
from lamina_kv.bench.settings import TokenIds
from peers import protocol
from peers.environments import Environments
from peers.process import PeerProcess
from peers.protocol import Arrival, Response
from peers.settings import PeersSettings
from peers.systems import Store, System

_ATTEMPTS = 3
_PROCESS_BYTES = 512 << 20
"""About what a process takes before it holds anything."""


@dataclass(frozen=True, slots=True)
class Contender:
    """Who takes part.

    Attributes:
        label: its name in the results.
        system: what serves.
        lamina: Lamina's configuration beyond its tiers.
    """

    label: str
    system: System
    lamina: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, system: System) -> Contender:
        """A system with its defaults."""
        return cls(system.value, system)


class Seat:
    """A contender and its process, which runs only while it is asked.

    Args:
        contender: who.
        process: its process.
        generated: tokens that each request generates.
    """

    def __init__(self, contender: Contender, process: PeerProcess, generated: int) -> None:
        self.contender = contender
        self.process = process
        self._generated = generated

    @property
    def label(self) -> str:
        """Its name in the results."""
        return self.contender.label

    def ask(self, prompt: TokenIds, *, forget: bool = True) -> Response:
        """Serve one prompt alone.

        Args:
            prompt: what to send.
            forget: whether to empty the engine's own prefix cache before.
        """
        (response,) = self.serve([Arrival(0.0, prompt, self._generated)], forget=forget)
        return response

    def serve(self, arrivals: list[Arrival], *, forget: bool = True) -> list[Response]:
        """Serve requests as they come; see :meth:`ask`."""
        with self.process.awake() as process:
            if forget:
                process.call(protocol.Forget(), protocol.Done)
            return process.call(protocol.Serve(arrivals), protocol.Served).responses

    def forget(self) -> None:
        """Let what is being saved come to its end, and empty the engine's own prefix cache."""
        with self.process.awake() as process:
            process.call(protocol.Forget(), protocol.Done)

    def copy(self, size: int) -> float:
        """Seconds that one copy of memory takes."""
        with self.process.awake() as process:
            return process.call(protocol.Copy(size), protocol.Done).seconds

    def pace(self, bandwidth: float) -> None:
        """Put the link's bandwidth between what is kept outside and the engine, bytes a second."""
        with self.process.awake() as process:
            process.call(protocol.Pace(bandwidth, 0.0), protocol.Done)

    def keep(self, prompt: TokenIds, tokens: int) -> None:
        """Have it save a prompt, and see that it finds all of it again.

        Args:
            prompt: what to send.
            tokens: of the prompt, how many must be found.

        Raises:
            BenchError: if it does not find them.
        """
        if self.contender.system is System.RECOMPUTE:
            return
        found: list[int] = []
        for _ in range(1 + _ATTEMPTS):
            found.append(self.ask(prompt).cached)
            if found[-1] == tokens:
                return
        raise BenchError(
            f"{self.label} was to find {tokens} tokens of a prompt that it had computed, and found "
            f"{found}, one after the other: this measurement would not be what it says"
        )


class Arena:
    """Starts systems.

    Args:
        settings: the bench's options.
        environments: where the systems are installed.
        work: directory for the model and for logs.
        progress: where it says what it is doing.
    """

    def __init__(
        self, settings: PeersSettings, environments: Environments, work: Path, progress: Progress
    ) -> None:
        self._settings = settings
        self._environments = environments
        self._work = work
        self._progress = progress

    @contextlib.contextmanager
    def seats(
        self,
        contenders: Sequence[Contender],
        store: Callable[[Contender], Store],
        cache_tokens: int,
    ) -> Iterator[list[Seat]]:
        """Processes of contenders, stopped until they are asked.

        Args:
            contenders: who takes part.
            store: what each may keep outside the engine.
            cache_tokens: tokens that each engine's cache holds.

        Raises:
            BenchError: if there is no room, or one cannot start.
        """
        shape = self._settings.shape
        engine = _PROCESS_BYTES + shape.weight_bytes + shape.kv_bytes(cache_tokens)
        stores = [store(contender) for contender in contenders]
        kept = sum(each.host for each in stores)
        disk = sum(each.disk_bytes for each in stores)
        require_room(
            memory=len(contenders) * engine + kept, disk=disk, directory=self._settings.directory
        )
        with ExitStack() as stack:
            self._progress.say(f"starting {', '.join(each.label for each in contenders)}")
            seats = []
            for contender, kept_by in zip(contenders, stores, strict=True):
                command, variables = self._environments.command(contender.system.environment)
                start = protocol.Start(
                    system=contender.system,
                    shape=self._settings.shape,
                    model=str(self._work),
                    cache_tokens=cache_tokens,
                    step_tokens=self._settings.step_tokens,
                    store=kept_by,
                    lamina=dict(contender.lamina),
                )
                process = PeerProcess(contender.label, command, variables, start, self._work)
                stack.enter_context(process)
                seats.append(Seat(contender, process, self._settings.generated))
            for seat in seats:
                seat.process.ready()
                seat.process.pause()
            yield seats
