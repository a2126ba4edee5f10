"""``lamina-kv bench push``: what of a transfer between two engines is left when the prefill ends.

One engine prefills, another decodes. Lamina's prefill engine pushes each row as soon as it is
computed; for comparison it sends each step's rows in one write when the step is over, and vLLM's
own connector has the decode engine pull everything once the prefill engine has answered. Requests
are sent as a router would send them: a push to both engines at once, a pull to one after the
other.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast

from lamina_kv.bench.engine import BenchError, Engine
from lamina_kv.bench.network import DEVICE, NetworkError, PacedNetwork
from lamina_kv.bench.picture import Panel, draw_timeline
from lamina_kv.bench.plots import Curve, draw_push
from lamina_kv.bench.ports import free_port
from lamina_kv.bench.progress import Progress
from lamina_kv.bench.report import Machine, Report, duration
from lamina_kv.bench.room import require_room
from lamina_kv.bench.samples import Samples, Target, Unit, ratio
from lamina_kv.bench.serving import Part, Serving
from lamina_kv.bench.settings import (
    REMOTE_DECODE,
    Connector,
    EngineSpec,
    PromptSource,
    TokenIds,
)
from lamina_kv.bench.shapes import ModelShape, require_positive
from lamina_kv.config.tree import PushConfig
from lamina_kv.observe.timeline import read_trace

_LOCAL = "127.0.0.1"
_HOST_CHUNKS = 4
"""What a host tier has room for: it is there, and of no use."""
_ENDLESS = 1 << 50
"""A ``push.batch`` that no step fills, so that a step's rows leave when it is over."""


class Way(Enum):
    """How a prompt comes to the engine that decodes."""

    LAYERWISE = "push, row by row"
    AT_END = "push, at the end"
    PULL = "NixlConnector"
    RECOMPUTE = "recompute"


_HANDED_OVER = (Way.LAYERWISE, Way.AT_END, Way.PULL)


@dataclass(frozen=True, slots=True)
class PushSettings:
    """Options of the bench.

    Attributes:
        shape: the model.
        tokens: lengths of the prompts.
        step_tokens: tokens that one step computes at most.
        repeat: repetitions of each measurement.
        rate: bits per second of the wire between the engines; None: what the machine can do.

    Raises:
        ValueError: if an option makes no sense; the message names it.
    """

    shape: ModelShape
    tokens: tuple[int, ...]
    step_tokens: int
    repeat: int
    rate: float | None = None

    def __post_init__(self) -> None:
        require_positive("--repeat", self.repeat)
        require_positive("--step-tokens", self.step_tokens)
        if not self.tokens:
            raise ValueError("--tokens must name at least one length")
        for tokens in self.tokens:
            if tokens < 2:
                raise ValueError(f"--tokens must be at least 2, got {tokens}: the last is computed")

    @property
    def engine_tokens(self) -> int:
        """Tokens that each engine's cache holds. Lamina lets half of a cache wait for pushes whose
        requests have ended, so that a prompt and a little more fits into either half."""
        return 2 * (max(self.tokens) + 2 * self.shape.block_size)

    def last_write(self, way: Way, tokens: int) -> int:
        """Bytes that leave with the last write of a prompt, and so hardly before it is computed.

        Args:
            way: how it is sent.
            tokens: its length.
        """
        step = tokens if way is Way.PULL else (tokens - 1) % self.step_tokens + 1
        row = self._page_tokens(tokens, step) * self.shape.row_token_bytes
        if way is not Way.LAYERWISE:
            return self.shape.rows * row
        rows = -(-PushConfig().batch // row)
        return ((self.shape.rows - 1) % rows + 1) * row

    def _page_tokens(self, tokens: int, step: int) -> int:
        """Tokens of the pages that the last ``step`` tokens are in."""
        block = self.shape.block_size
        return (-(-tokens // block) - (tokens - step) // block) * block


@dataclass(frozen=True, slots=True)
class Passage:
    """One prompt, from one engine to the other.

    Attributes:
        began: when a router would have had it, on the machine's monotonic clock.
        prefill: the prefill engine's part; None if there was none.
        decode: the decode engine's.
    """

    began: float
    prefill: Part | None
    decode: Part

    @property
    def first_token(self) -> float:
        """Seconds until the decode engine had its first token."""
        return self.decode.token - self.began

    @property
    def tail(self) -> float:
        """Seconds from the end of the prefill engine's last forward pass to the beginning of the
        decode engine's first.

        Raises:
            ValueError: if there was no prefill engine.
        """
        if self.prefill is None:
            raise ValueError("one engine alone has no tail")
        return self.decode.forward_began - self.prefill.forward_ended


@dataclass(frozen=True, slots=True)
class Pair:
    """Two engines and how a prompt comes from one to the other.

    Attributes:
        way: how.
        prefill: the prefill engine; with ``RECOMPUTE`` the only one.
        decode: the decode engine.
        address: where the prefill engine is reached by a push.
    """

    way: Way
    prefill: Engine
    decode: Engine
    address: str = ""

    def pause(self) -> None:
        """Give the machine to the others, if this pair takes some of it while it has nothing to do:
        NIXL's progress threads, which vLLM's connector runs, take a core each."""
        if self.way is Way.PULL:
            self.prefill.pause()
            self.decode.pause()

    def serve(self, prompt: TokenIds) -> Passage:
        """One token of ``prompt``.

        Raises:
            BenchError: if the decode engine has computed it itself, or an engine fails.
        """
        self.prefill.resume()
        if self.way is not Way.PULL:  # it is asked later, and until then would be in the way here
            self.decode.resume()
        # What vLLM's connector holds for the other engine it lets go in the next step.
        self.prefill.call(Serving.warm_up)
        began = time.perf_counter()
        if self.way is Way.RECOMPUTE:
            return Passage(began, None, self.decode.call(Serving.serve_part, prompt, None))
        if self.way is Way.PULL:
            prefill = self.prefill.call(Serving.serve_part, prompt, REMOTE_DECODE)
            self.decode.resume()
            self.decode.begin(Serving.serve_part, prompt, prefill.parameters)
        else:
            push = {"id": uuid.uuid4().hex}
            there = {"lamina_push": {**push, "prefill": self.address}}
            self.decode.begin(Serving.serve_part, prompt, there)
            prefill = self.prefill.call(Serving.serve_part, prompt, {"lamina_push": push})
        self.prefill.begin(Serving.drain)
        decode = cast(Part, self.decode.answer())
        self.prefill.answer()
        self.decode.call(Serving.drain)
        if (prefill.computed, decode.computed) != (len(prompt), 1):
            raise BenchError(
                f"{self.way.value}: the prefill engine was to compute {len(prompt)} tokens and the "
                f"decode engine one, but they computed {prefill.computed} and {decode.computed}: "
                "this measurement would not be what it says"
            )
        return Passage(began, prefill, decode)


@dataclass(slots=True)
class _Measured:
    """Repetitions as they come in, by way and length."""

    passages: dict[tuple[Way, int], list[Passage]] = field(default_factory=dict)

    def first_token(self, way: Way, tokens: int) -> Samples:
        values = tuple(one.first_token for one in self.passages[way, tokens])
        return Samples(f"{tokens} tokens, {way.value}", values)

    def tail(self, way: Way, tokens: int, floor: float | None = None) -> Samples:
        values = tuple(one.tail for one in self.passages[way, tokens])
        return Samples(f"{tokens} tokens, {way.value}: tail", values, floor)


def measure(
    settings: PushSettings,
    progress: Progress,
    plot: Path | None = None,
    timeline: Path | None = None,
) -> Report:
    """Run the bench.

    Args:
        settings: its options.
        progress: where it says what it is doing.
        plot: where to draw times by length, if anywhere.
        timeline: where to draw the longest prompt row by row, pushed in both ways, if anywhere.

    Raises:
        BenchError: if an engine fails, a prompt is not handed over, or there is no room.
    """
    machine = Machine.here()
    shape = settings.shape
    longest = max(settings.tokens)
    require_room(
        memory=5 * (shape.weight_bytes + shape.kv_bytes(settings.engine_tokens)),
        disk=0,
        directory=Path.cwd(),
    )
    measured = _Measured()
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as directory:
        work = Path(directory)
        shape.write_config(work)
        with ExitStack() as stack:
            try:
                network = (
                    stack.enter_context(PacedNetwork(settings.rate)) if settings.rate else None
                )
            except NetworkError as error:
                raise BenchError(str(error)) from error
            progress.say("starting five engines: three that prefill, two that decode")
            pairs = _pairs(settings, work, network, stack)
            prompts = PromptSource()
            for pair in pairs:
                for engine in (pair.prefill, pair.decode):
                    engine.ready()
                    engine.call(Serving.touch_cache)
            for pair in pairs:
                progress.say(f"{pair.way.value}: the first time")
                pair.serve(prompts.prompt(2 * shape.block_size))
                pair.pause()
            for i in range(settings.repeat):
                for tokens in settings.tokens:
                    progress.say(f"{tokens} tokens: {i + 1} of {settings.repeat}")
                    for pair in pairs:
                        one = pair.serve(prompts.prompt(tokens))
                        pair.pause()
                        measured.passages.setdefault((pair.way, tokens), []).append(one)
            progress.say("shutting down")
        if timeline is not None:
            panels = [
                _panel(work, measured.passages[way, longest], way)
                for way in (Way.LAYERWISE, Way.AT_END)
            ]
            draw_timeline(panels, timeline, shape.rows_are)
    if plot is not None:
        draw_push(_curves(settings, measured), plot)
    return _report(settings, machine, measured)


def _pairs(
    settings: PushSettings, work: Path, network: PacedNetwork | None, stack: ExitStack
) -> list[Pair]:
    addresses = network.addresses if network else (_LOCAL, _LOCAL)
    names = network.names if network else ("", "")
    host = {"capacity": _HOST_CHUNKS * settings.shape.kv_bytes(settings.shape.chunk_tokens)}

    def start(name: str, end: int, connector: Connector, **lamina: Any) -> Engine:
        environment = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": addresses[end],
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        }
        if network is not None:
            environment |= {"UCX_TLS": "tcp", "UCX_NET_DEVICES": DEVICE}
        spec = EngineSpec(
            name=name,
            shape=settings.shape,
            model=work,
            tokens=settings.engine_tokens,
            step_tokens=settings.step_tokens,
            connector=connector,
            lamina=lamina,
            role="kv_consumer" if end else "kv_producer",
            environment=environment,
            network=names[end],
        )
        return stack.enter_context(Engine(spec, work))

    def pusher(way: Way, push: Mapping[str, Any]) -> tuple[Engine, str]:
        address = f"{addresses[0]}:{free_port()}"
        return (
            start(
                way.name.lower(),
                0,
                Connector.LAMINA,
                host=host,
                push={**push, "listen": address},
                observe={"timeline": str(_trace(work, way))},
            ),
            address,
        )

    layerwise, first = pusher(Way.LAYERWISE, {})
    at_end, second = pusher(Way.AT_END, {"batch": _ENDLESS})
    taker = start("decode", 1, Connector.LAMINA, host=host, push={"min_tokens": 0})
    giver, puller = start("pulled", 0, Connector.NIXL), start("pulls", 1, Connector.NIXL)
    return [
        Pair(Way.LAYERWISE, layerwise, taker, first),
        Pair(Way.AT_END, at_end, taker, second),
        Pair(Way.PULL, giver, puller),
        Pair(Way.RECOMPUTE, taker, taker),
    ]


def _trace(work: Path, way: Way) -> Path:
    return work / f"trace-{way.name.lower()}.json"


def _panel(work: Path, passages: list[Passage], way: Way) -> Panel:
    """The repetition that took the median time, as it is in the prefill engine's trace."""
    ordered = sorted(passages, key=lambda one: one.first_token)
    one = ordered[(len(ordered) - 1) // 2]
    assert one.prefill is not None
    return Panel(
        title=way.value,
        spans=tuple(
            span
            for span in read_trace(_trace(work, way))
            if one.began <= span.start <= one.decode.token
        ),
        began=one.began,
        forward_ended=one.prefill.forward_ended,
        ended=one.decode.token,
    )


def _curves(settings: PushSettings, measured: _Measured) -> tuple[list[Curve], list[Curve]]:
    lengths = sorted(settings.tokens)
    return (
        [
            Curve(way.value, {tokens: measured.first_token(way, tokens) for tokens in lengths})
            for way in Way
        ],
        [
            Curve(way.value, {tokens: measured.tail(way, tokens) for tokens in lengths})
            for way in _HANDED_OVER
        ],
    )


def _report(settings: PushSettings, machine: Machine, measured: _Measured) -> Report:
    samples, targets = [], []

    def last_write(way: Way, tokens: int) -> float | None:
        rate = settings.rate
        return 8 * settings.last_write(way, tokens) / rate if rate else None

    for tokens in settings.tokens:
        samples += [measured.first_token(way, tokens) for way in Way]
        # What is sent row by row has one layer left to hide its last write behind: no floor.
        samples += [
            measured.tail(way, tokens, None if way is Way.LAYERWISE else last_write(way, tokens))
            for way in _HANDED_OVER
        ]
        for other in (Way.AT_END, Way.PULL):
            for what, figure in (("tail", _Measured.tail), ("first token", _Measured.first_token)):
                over = ratio(
                    f"{tokens} tokens, {what} ÷ {other.value}",
                    figure(measured, Way.LAYERWISE, tokens),
                    figure(measured, other, tokens),
                )
                targets.append(Target(over, Unit.RATIO, None))
    wire = "one machine" if settings.rate is None else f"{settings.rate / 1e9:g} Gbit/s"
    return Report(
        bench="push",
        title=(
            f"From one engine to another over {wire}, {settings.shape.kv_bytes(1) / 1e3:.1f} kB a "
            f"token, steps of up to {settings.step_tokens} tokens"
        ),
        machine=machine,
        settings={
            **settings.shape.options(),
            "tokens": ",".join(map(str, settings.tokens)),
            "step_tokens": settings.step_tokens,
            "repeat": settings.repeat,
            "link": settings.rate or "none",
        },
        samples=tuple(samples),
        compared="Push, row by row, against the other ways",
        targets=tuple(targets),
        notes=(
            "Time to first token is the decode engine's, from the moment a router has the prompt. "
            "Tail: from the end of the prefill engine's last forward pass to the beginning of the "
            "decode engine's first, which computes one token.",
            "At the end: one write at the end of each step. NixlConnector: the decode engine is "
            "asked once the prefill engine has answered; on few cores that takes long, because "
            "NIXL's progress thread takes one. Ratios are taken repetition by repetition.",
            *(
                f"{tokens} tokens: the last row takes {duration(seconds)} of the link, and leaves "
                "before the last layer has ended. Floor: as much for one write, or a pull."
                for tokens in settings.tokens
                if (seconds := last_write(Way.LAYERWISE, tokens)) is not None
            ),
        ),
    )
