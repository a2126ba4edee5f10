"""Drives real vLLM engines, each in a process of its own, from a test.

vLLM keeps state per process, so an :class:`Engine` here is a child process with one ``vllm.LLM``
in it, spoken to over a pipe. Children are forked from a server process that has imported vLLM
once: an engine then starts in a second or two instead of ten. ``fresh=True`` starts a new
interpreter instead, for tests of what differs from one interpreter to the next.

The engine steps only while it is told to, so a test decides what is outstanding when::

    with Engine(EngineSpec(model, lamina={}), log) as engine:
        first, second = engine.generate([Ask(tokens), Ask(other)])   # runs, then settles
        engine.forget()                        # vLLM's own prefix cache; Lamina's tiers stay
        names = engine.submit([Ask(tokens)])   # step by step
        answers = engine.step()
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from engine import processors
from engine.runners import Runner

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = TESTS.parent / "src"

START_SECONDS = 400.0
"""Until an engine has started."""
CALL_SECONDS = 300.0
"""For one call. A test that needs longer hangs."""

TOLERANCE = 1e-3
"""Largest difference between log probabilities of equal answers. Rounding makes less than a
hundredth of it in float32, one wrong token in the prompt more than ten times as much."""

OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "block_size": 32,
    "max_model_len": 2048,
    "max_num_batched_tokens": 2048,
    "num_gpu_blocks_override": 640,
    "disable_log_stats": False,
    "seed": 0,
}
"""What :class:`EngineSpec` gives to ``vllm.LLM`` unless a test says otherwise."""


SMALL: dict[str, Any] = {"host": {"capacity": "64MiB"}}
"""Lamina with a host tier that costs little to make. Left to itself it takes gigabytes."""


def loading_always(lamina: Mapping[str, object]) -> dict[str, object]:
    """A configuration under which every hit is loaded, unless it says otherwise: models this small
    are computed sooner than loaded."""
    load = lamina.get("load", {})
    if not isinstance(load, Mapping):
        return dict(lamina)
    return {**lamina, "load": {"when": "always", **load}}


@dataclass(frozen=True)
class EngineSpec:
    """One way to start an engine.

    Attributes:
        model: the checkpoint.
        lamina: ``kv_connector_extra_config``; None runs vLLM without a connector.
        options: arguments of ``vllm.LLM``, over :data:`OPTIONS`.
        transfer: fields of vLLM's ``KVTransferConfig``, over the usual ones.
        environment: variables of the child.
        faults: what is wrong with the child's machine, see :mod:`engine.faults`.
        runner: on what it runs; None takes what this process would import.
        processor: an older processor to run on, see :mod:`engine.processors`; this machine's if
            empty. Such an engine always has a fresh interpreter.
        asynchronous: whether the next step is planned before the last one has ended, which is what
            vLLM does on a GPU wherever it can and never on a CPU.
    """

    model: Path
    lamina: Mapping[str, object] | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    transfer: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[str, float] = field(default_factory=dict)
    runner: Runner | None = None
    processor: str = ""
    asynchronous: bool = True

    @property
    def key(self) -> str:
        """Equal for equal specs."""
        return json.dumps(vars(self), sort_keys=True, default=str)

    def transfer_config(self) -> dict[str, Any] | None:
        """vLLM's ``kv_transfer_config``, as on its command line."""
        if self.lamina is None:
            return None
        return {
            "kv_connector": "LaminaConnector",
            "kv_connector_module_path": "lamina_kv.engines.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": loading_always(self.lamina),
            **self.transfer,
        }

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``vllm.LLM``, but for the connector."""
        return {"model": str(self.model), **OPTIONS, **self.options}


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        tokens: the prompt.
        max_tokens: tokens to generate; generation never ends earlier.
        salt: ``cache_salt``.
        adapter: a LoRA adapter.
        n: samples; with ``seed`` drawn at temperature 1, else greedy.
        seed: of the samples.
        priority: the lower, the sooner, where the scheduler looks at it.
        push: the push that it is part of, as a router would say.
        transfer: other ``kv_transfer_params``.
    """

    tokens: tuple[int, ...]
    max_tokens: int = 8
    salt: str | None = None
    adapter: Path | None = None
    n: int = 1
    seed: int | None = None
    priority: int = 0
    push: Mapping[str, str] | None = None
    transfer: Mapping[str, Any] | None = None

    @property
    def transfer_params(self) -> dict[str, Any] | None:
        """vLLM's ``kv_transfer_params``."""
        push = {} if self.push is None else {"lamina_push": self.push}
        return {**push, **(self.transfer or {})} or None


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes:
        name: the request's name.
        samples: the tokens of each sample.
        logprobs: their log probabilities, which tell more about the cache than the tokens do.
        cached: prompt tokens that vLLM took from any cache.
        finish: why it ended: ``length``, ``abort`` or ``error``.
        transfer: ``kv_transfer_params`` for whoever goes on with it.
    """

    name: str
    samples: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    cached: int
    finish: str
    transfer: Mapping[str, Any] | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of the only sample."""
        (tokens,) = self.samples
        return tokens

    def distance(self, other: Answer) -> float:
        """The largest difference between log probabilities; infinite if a token differs."""
        if self.samples != other.samples:
            return float("inf")
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        return max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))


def differences(answers: Sequence[Answer], expected: Sequence[Answer]) -> list[str]:
    """One line for each answer that is not the expected one; none if all are."""
    return [
        f"{index}: {answer.samples} at {distance:.1e} from {wanted.samples}"
        for index, (answer, wanted) in enumerate(zip(answers, expected, strict=True))
        if (distance := answer.distance(wanted)) > TOLERANCE
    ]


@dataclass(frozen=True)
class CacheEvent:
    """What vLLM publishes of its prefix cache, and of Lamina's tiers, with ``kv_events_config``.

    Attributes:
        kind: ``BlockStored``, ``BlockRemoved`` or ``AllBlocksCleared``.
        medium: where the blocks are; ``GPU`` is vLLM's own cache, also on a CPU.
        group: their cache group.
        blocks: hashes of the blocks.
        parent: of stored blocks, the hash of the one before them.
        tokens: of stored blocks, their tokens.
        block_tokens: of stored blocks, tokens of each.
        extra: of stored blocks, all else that a router may need to know them.
    """

    kind: str
    medium: str | None
    group: int | None
    blocks: tuple[object, ...]
    parent: object
    tokens: tuple[int, ...]
    block_tokens: int
    extra: tuple[object, ...]


@dataclass(frozen=True)
class Sample:
    """One value of one published metric."""

    name: str
    labels: Mapping[str, str]
    value: float


class Metrics:
    """What is published at one moment.

    Args:
        samples: all of it.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = tuple(samples)

    def total(self, name: str, **labels: str) -> float:
        """Sum over all samples of that name that have those labels; 0 without any."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def since(self, before: Metrics, name: str, **labels: str) -> float:
        """How much :meth:`total` has grown."""
        return self.total(name, **labels) - before.total(name, **labels)


class EngineError(Exception):
    """The child raised; the message is its traceback."""


class EngineStartError(EngineError):
    """The engine did not start, and its process has ended.

    Attributes:
        code: the exit status of the process.
    """

    def __init__(self, message: str, code: int | None) -> None:
        super().__init__(message)
        self.code = code


class Engine:
    """One engine in a child process. See the module.

    Args:
        spec: how to start it.
        log: file that receives what the child writes to its standard streams.
        fresh: a new interpreter, whose ``PYTHONHASHSEED`` may come from the environment.

    Raises:
        EngineStartError: with the child's traceback; the child has ended.
    """

    def __init__(self, spec: EngineSpec, log: Path, *, fresh: bool = False) -> None:
        self.spec = spec
        self._log = log
        self._pipe, theirs = multiprocessing.Pipe()
        self.process: BaseProcess
        if fresh or spec.processor:
            context = multiprocessing.get_context("spawn")
            arguments = theirs, spec, log
            self.process = context.Process(target=_run_child, args=arguments, name="engine")
            with child_environment(spec.environment, spec.runner):
                self.process.start()
        else:
            self.process = fork(_run_child, theirs, spec, log, runner=spec.runner)
        theirs.close()
        try:
            self._receive("start", START_SECONDS)
        except EngineError as error:
            self.process.join(CALL_SECONDS)
            code = self.process.exitcode
            self.kill()
            raise EngineStartError(str(error), code) from None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- requests --------------------------------------------------------------------------

    def generate(self, asks: Sequence[Ask]) -> list[Answer]:
        """Run ``asks`` together, then settle; answers are in their order."""
        names = self.submit(asks)
        answers = {answer.name: answer for answer in self.drain()}
        return [answers[name] for name in names]

    def ask(self, ask: Ask) -> Answer:
        """Run one request, then settle."""
        return self.generate([ask])[0]

    def submit(self, asks: Sequence[Ask]) -> list[str]:
        """Hand over requests without stepping; returns their names."""
        return self._call("submit", list(asks))

    def step(self) -> list[Answer]:
        """One step of the engine; returns the requests that ended in it."""
        return self._call("step")

    def drain(self) -> list[Answer]:
        """Step until every request has ended and every transfer is over."""
        return self._call("drain")

    def abort(self, names: Sequence[str]) -> None:
        """Abort requests."""
        self._call("abort", list(names))

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """What a pooling model makes of prompts."""
        return self._call("embed", prompts)

    def converse(
        self,
        turns: Sequence[Sequence[int]],
        stops: Sequence[Sequence[int]],
        longest: int,
    ) -> list[list[int]]:
        """A streaming session, from its begin to its end.

        Args:
            turns: what is said in each turn.
            stops: per turn, tokens that end the answer; vLLM takes the one that does back.
            longest: tokens of an answer at most.

        Returns:
            The answers.
        """
        return self._call("converse", turns, stops, longest)

    def progress(self) -> dict[str, int]:
        """Tokens generated so far by each request that has not ended."""
        return self._call("progress")

    # -- state -----------------------------------------------------------------------------

    def forget(self) -> None:
        """Empty vLLM's own prefix cache and overwrite its memory, so that what is right
        afterwards was brought back. The engine must have settled."""
        assert self.reset(everywhere=False), "vLLM did not reset its prefix cache"
        self._call("scribble")

    def forget_all(self) -> None:
        """Empty every tier of Lamina, too."""
        assert self.reset(everywhere=True), "vLLM did not reset its caches"
        self.drain()
        self._call("scribble")

    def reset(self, *, everywhere: bool, running: bool = False) -> bool:
        """vLLM's own call, with or without the connector's tiers; whether it succeeded.

        Args:
            everywhere: the connector's tiers, too.
            running: although requests run; they begin anew.
        """
        return self._call("reset", everywhere, running)

    def pause(self, mode: str) -> None:
        """vLLM's own call, with cleared caches."""
        self._call("pause", mode)

    def resume(self) -> None:
        """The end of a pause."""
        self._call("resume")

    def core(self, method: str, *arguments: object) -> Any:
        """Call a method of vLLM's ``EngineCore``, as its utilities do."""
        return self._call("core", method, arguments)

    def in_core(self, function: Callable[..., Any]) -> Any:
        """What ``function`` says of vLLM's ``EngineCore``."""
        return self._call("in_core", function)

    def pages(self, name: str) -> list[str]:
        """A digest of the cache content of each block that a running request has, over all
        layers and ranks, read through vLLM's own view of its cache."""
        return self._call("pages", name)

    def in_workers(self, function: Callable[..., Any], *arguments: object) -> list[Any]:
        """What ``function(worker, *arguments)`` returns in each worker of vLLM."""
        return self._call("in_workers", function, arguments)

    def metrics(self) -> Metrics:
        """What the engine publishes now."""
        return Metrics(self._call("metrics"))

    def events(self) -> list[CacheEvent]:
        """What vLLM has published since the last call."""
        return self._call("events")

    def free_blocks(self) -> int:
        """Blocks in vLLM's pool that nobody holds."""
        return self._call("free_blocks")

    def hash_of(self, text: str) -> int:
        """What the child's interpreter makes of a text."""
        return self._call("hash_of", text)

    def log(self) -> str:
        """What the child has written so far."""
        return self._log.read_text(errors="replace")

    # -- ends ------------------------------------------------------------------------------

    def close(self) -> None:
        """Shut the engine down in order."""
        if self.process.is_alive():
            self._call("close")
            self.process.join(CALL_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the child, and what it has started, at once."""
        if self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it was just about to make its group
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.join()
        self._pipe.close()

    def _call(self, method: str, *arguments: object) -> Any:
        self._pipe.send((method, arguments))
        return self._receive(method, CALL_SECONDS)

    def _receive(self, method: str, seconds: float) -> Any:
        ready = connection.wait([self._pipe, self.process.sentinel], seconds)
        if not ready:
            self.kill()
            raise EngineError(f"{method} hung for {seconds:.0f} s:\n{self.log()[-4000:]}")
        try:
            good, result = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise EngineError(f"the child died in {method}:\n{self.log()[-4000:]}") from None
        if not good:
            raise EngineError(result)
        return result


Start = Callable[..., Engine]
"""Starts an engine that only the asking test uses: ``start(spec, fresh=False)``."""


class Fleet:
    """Engines that tests share: one for each spec, the least recently used ended first.

    A test that gets an engine finds all its caches empty.

    Args:
        folder: where logs go.
        limit: engines alive at a time.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._started = 0
        self._engines: dict[str, Engine] = {}
        self._answers: dict[tuple[str, tuple[Ask, ...]], list[Answer]] = {}

    def get(self, spec: EngineSpec) -> Engine:
        """The engine for ``spec``, started if need be."""
        engine = self._engines.pop(spec.key, None)
        if engine is None or not engine.process.is_alive():
            while len(self._engines) >= self._limit:
                self._engines.pop(next(iter(self._engines))).kill()
            engine = Engine(spec, self.next_log())
        else:  # To Lamina its weights are others afterwards, of which nobody outside knows a name.
            engine.drain()
            engine.forget_all()
        self._engines[spec.key] = engine
        return engine

    def answers(self, spec: EngineSpec, asks: Sequence[Ask]) -> list[Answer]:
        """What the engine for ``spec`` answers, from empty caches, to all of ``asks`` at once. It
        is asked once: an engine without Lamina, beside which others are held, answers the same
        every time."""
        key = spec.key, tuple(asks)
        if key not in self._answers:
            self._answers[key] = self.get(spec).generate(asks)
        return list(self._answers[key])

    def next_log(self) -> Path:
        """A log file for one more child."""
        self._started += 1
        return self._folder / f"engine-{self._started}.log"

    def close(self) -> None:
        """End every engine."""
        while self._engines:
            self._engines.popitem()[1].kill()


def _run_child(pipe: connection.Connection, spec: EngineSpec, log: Path) -> None:
    """The child's first function; vLLM is imported here in a fresh interpreter, and long
    before in a forked one."""
    enter_child(log)
    if spec.runner is not None:  # it has been given its parent's path
        sys.path[:0] = spec.runner.paths
    if spec.processor:
        processors.pretend(spec.processor)
    from engine import child

    child.run(pipe, spec)


def enter_child(log: Path) -> None:
    """Give a child a process group of its own, so that all of it can be ended, and a log."""
    os.setpgid(0, 0)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


_FORKING = threading.Lock()
_SERVERS: dict[Runner | None, forkserver.ForkServer] = {}


def fork(
    function: Callable[..., None], *arguments: object, runner: Runner | None = None
) -> BaseProcess:
    """A process that runs ``function``, started; forked from one that has imported this runner's
    vLLM (see :mod:`engine.preloaded`)."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=function, args=arguments, name="engine")
    with _FORKING, child_environment({}, runner), _server(runner):
        process.start()
    return process


@contextlib.contextmanager
def _server(runner: Runner | None) -> Iterator[None]:
    """Processes are forked from the server that has imported this runner's vLLM. Python knows of
    one server only, and asks for a process by this name."""
    server = _SERVERS.setdefault(runner, forkserver.ForkServer())
    server.set_forkserver_preload(["engine.preloaded"])
    usual = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = server.connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = usual


@contextlib.contextmanager
def child_environment(more: Mapping[str, str], runner: Runner | None = None) -> Iterator[None]:
    """The environment that an interpreter starts with: children find this package and Lamina
    whatever is installed, and compute on one thread, because two that wait for each other on a
    busy machine take many times as long."""
    first, variables = ([], {}) if runner is None else (runner.paths, runner.environment)
    paths = [*first, str(TESTS), str(PACKAGE), os.environ.get("PYTHONPATH", "")]
    ours = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        **variables,
        **more,
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
