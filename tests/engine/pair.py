"""A prefill and a decode engine, stepped in turn from one thread, so that a test decides how far
each of them is. What is on its way between them moves by itself.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.driver import SMALL, Answer, Ask, Engine, EngineSpec, Fleet, Metrics
from engine.runners import Runner
from lamina_kv.bench.ports import free_port

PATIENCE = 180.0
"""Seconds after which something hangs."""

QUICK: dict[str, Any] = {
    "deadline": 60.0,
    "silence": 4.0,
    "quarantine": 1.0,
    "batch": "64KiB",
    "min_tokens": 0,
}
"""The ``push`` section: batches of a few blocks, prompts of less than a chunk, and time enough for
two engines that have less than a core between them."""

HURRIED = {"least_quarantine": 0.0}
"""What is wrong with the machine of both engines, so that a quarantine may be as short."""

PORTS: dict[str, int] = {}


def address_of(name: str) -> str:
    """Where the prefill engine of that name listens; the same in the whole session."""
    return f"127.0.0.1:{PORTS.setdefault(name, free_port())}"


@dataclass(frozen=True)
class PairSpec:
    """How to start a pair.

    Attributes:
        model: the checkpoint of both.
        options: arguments of ``vllm.LLM``, of both.
        push: fields of the ``push`` section, over :data:`QUICK`.
        lamina: other sections, over a small host tier.
        tiers: sections of the prefill engine alone, over those.
        prefill: options of the prefill engine alone.
        decode: options of the decode engine alone.
        roles: vLLM's ``kv_role`` of the prefill engine and of the decode engine.
        environment: variables of both.
        faults: what is wrong with the prefill engine's machine.
        asynchronous: whether both plan a step ahead.
        runner: on what both run.
        processor: an older processor that both run on, see :mod:`engine.processors`.
    """

    model: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    push: Mapping[str, Any] = field(default_factory=dict)
    lamina: Mapping[str, Any] = field(default_factory=dict)
    tiers: Mapping[str, Any] = field(default_factory=dict)
    prefill: Mapping[str, Any] = field(default_factory=dict)
    decode: Mapping[str, Any] = field(default_factory=dict)
    roles: tuple[str, str] = ("kv_both", "kv_both")
    environment: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[str, float] = field(default_factory=dict)
    asynchronous: bool = True
    runner: Runner | None = None
    processor: str = ""

    @property
    def address(self) -> str:
        """Where the prefill engine listens."""
        return address_of(repr(self))

    def engines(self) -> tuple[EngineSpec, EngineSpec]:
        """The prefill engine and the decode engine."""
        push = {**QUICK, **self.push}
        sections = {**SMALL, **self.lamina}
        environment = dict(self.environment)
        return (
            EngineSpec(
                self.model,
                {**sections, **self.tiers, "push": {**push, "listen": self.address}},
                {**self.options, **self.prefill},
                {"kv_role": self.roles[0]},
                environment=environment,
                faults={**HURRIED, **self.faults},
                runner=self.runner,
                processor=self.processor,
                asynchronous=self.asynchronous,
            ),
            EngineSpec(
                self.model,
                {**sections, "push": push},
                {**self.options, **self.decode},
                {"kv_role": self.roles[1]},
                environment=environment,
                faults=HURRIED,
                runner=self.runner,
                processor=self.processor,
                asynchronous=self.asynchronous,
            ),
        )


def shared_pair(fleet: Fleet, spec: PairSpec) -> Pair:
    """A pair of shared engines, whose caches are empty."""
    prefill, decode = (fleet.get(engine) for engine in spec.engines())
    pair = Pair(prefill, decode, spec.address)
    pair.name_weights()
    return pair


class Pair:
    """See the module.

    Args:
        prefill: the prefill engine; idle.
        decode: the decode engine; idle.
        address: where the prefill engine listens.
    """

    def __init__(self, prefill: Engine, decode: Engine, address: str) -> None:
        self.prefill = prefill
        self.decode = decode
        self.address = address
        self.frozen: set[Engine] = set()
        self._free = {engine: engine.free_blocks() for engine in (prefill, decode)}
        self._before = self.metrics()
        self._running: dict[Engine, set[str]] = {prefill: set(), decode: set()}
        self._answers: dict[str, Answer] = {}

    def forget_all(self) -> None:
        """Empty every cache and tier of both."""
        for engine in (self.prefill, self.decode):
            engine.drain()
            engine.forget_all()
        self.name_weights()

    def name_weights(self) -> None:
        """To Lamina a reset says that an engine's weights are others now, and two whose weights
        differ push nothing. Those of both have the same name again, and a new one."""
        weights = uuid.uuid4().hex
        for engine in (self.prefill, self.decode):
            engine.core("set_weight_version", weights)

    # -- requests ----------------------------------------------------------------------------

    def name_push(self) -> str:
        """A push id that was never used."""
        return uuid.uuid4().hex

    def submit_prefill(self, asks: Sequence[Ask], pushes: Sequence[str]) -> list[str]:
        """The prefill engine's part of pushes."""
        parts = [
            replace(ask, max_tokens=1, push={"id": push})
            for ask, push in zip(asks, pushes, strict=True)
        ]
        return self._submit(self.prefill, parts)

    def submit_decode(self, asks: Sequence[Ask], pushes: Sequence[str]) -> list[str]:
        """The decode engine's part of pushes."""
        parts = [
            replace(ask, push={"id": push, "prefill": self.address})
            for ask, push in zip(asks, pushes, strict=True)
        ]
        return self._submit(self.decode, parts)

    def push(self, asks: Sequence[Ask], *, first: str = "decode", apart: int = 0) -> list[Answer]:
        """What the decode engine answers when both are asked.

        Args:
            asks: the requests.
            first: which engine is asked first.
            apart: steps of it until the other is asked.
        """
        pushes = [self.name_push() for _ in asks]
        if first == "prefill":
            self.submit_prefill(asks, pushes)
            for _ in range(apart):
                self.step(self.prefill)
            names = self.submit_decode(asks, pushes)
        else:
            names = self.submit_decode(asks, pushes)
            for _ in range(apart):
                self.step(self.decode)
            self.submit_prefill(asks, pushes)
        return self.finish(names)

    def finish(self, names: Sequence[str]) -> list[Answer]:
        """Step both until these requests of the decode engine, and all else, have ended."""
        self.step_until(lambda: not any(self._running.values()))
        return [self._answers.pop(name) for name in names]

    def abort(self, engine: Engine, names: Sequence[str]) -> None:
        """Abort requests of one of the two."""
        engine.abort(names)
        self._running[engine] -= set(names)

    def _submit(self, engine: Engine, asks: Sequence[Ask]) -> list[str]:
        names = engine.submit(asks)
        self._running[engine] |= set(names)
        return names

    # -- steps -------------------------------------------------------------------------------

    def step(self, *engines: Engine) -> None:
        """One step of each, by default of both, unless it is frozen."""
        for engine in engines or (self.prefill, self.decode):
            if engine in self.frozen:
                continue
            for answer in engine.step():
                self._running[engine].discard(answer.name)
                if engine is self.decode:
                    self._answers[answer.name] = answer

    def step_until(self, condition: Callable[[], bool], *engines: Engine) -> None:
        """Step until it holds.

        Raises:
            TimeoutError: if it does not.
        """
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"it has not happened: {self._running}")
            self.step(*engines)

    def freeze(self, engine: Engine) -> None:
        """It is not stepped, and whatever it runs is forgotten, because it is gone."""
        self.frozen.add(engine)
        self._running[engine].clear()

    # -- afterwards --------------------------------------------------------------------------

    def metrics(self) -> dict[Engine, Metrics]:
        """What both publish, if they can be asked."""
        return {
            engine: engine.metrics()
            for engine in (self.prefill, self.decode)
            if engine not in self.frozen
        }

    def pushes(self, engine: Engine, outcome: str) -> int:
        """How many pushes have ended so, since the pair was made."""
        now = self.metrics()[engine]
        return int(now.since(self._before[engine], "lamina_pushes_total", outcome=outcome))

    def skipped(self, reason: str) -> int:
        """How many pushes the decode engine did not ask for, since the pair was made."""
        now, before = self.metrics()[self.decode], self._before[self.decode]
        return int(now.since(before, "lamina_pushes_skipped_total", reason=reason))

    def served(self) -> int:
        """How many requests of the decode engine have had all that a push could bring them: by it,
        or because the engine had it already."""
        return self.pushes(self.decode, "received") + self.skipped("not_needed")

    def counts(self) -> dict[str, int]:
        """:meth:`pushes` of both engines, where there were any."""
        outcomes = {self.prefill: ("sent", "stopped"), self.decode: ("received", "given_up")}
        return {
            outcome: count
            for engine, names in outcomes.items()
            if engine not in self.frozen
            for outcome in names
            if (count := self.pushes(engine, outcome))
        }

    def settle(self) -> None:
        """Wait until both engines have all blocks and transfers back, while nobody asks them for
        anything.

        Raises:
            TimeoutError: if blocks do not come back.
        """
        deadline = time.monotonic() + PATIENCE
        while held := self._held():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not given back: {held}")
            time.sleep(0.05)

    def _held(self) -> dict[str, float]:
        held = {}
        for engine, name in ((self.prefill, "prefill"), (self.decode, "decode")):
            if engine in self.frozen:
                continue
            engine.drain()
            metrics = engine.metrics()
            held[f"blocks of {name}"] = self._free[engine] - engine.free_blocks()
            held[f"transfers of {name}"] = metrics.total("lamina_transfers")
            held[f"leases of {name}"] = metrics.total("lamina_leased_blocks")
        return {name: count for name, count in held.items() if count}
