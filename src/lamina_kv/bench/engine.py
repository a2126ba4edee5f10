"""An engine in a process of its own, as a bench sees it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Concatenate, ParamSpec, TypeVar, cast

from lamina_kv.bench.network import join_network
from lamina_kv.bench.serving import FirstToken, Serving
from lamina_kv.bench.settings import EngineSpec, TokenIds

_ANSWER_TIMEOUT = 600.0
_EXIT_TIMEOUT = 60.0
_LOG_TAIL = 25

P = ParamSpec("P")
T = TypeVar("T")


class BenchError(Exception):
    """A bench cannot go on; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """What an engine's process says instead of an answer."""

    account: str


class Engine:
    """Starts the process; :meth:`ready` waits until it can serve.

    Args:
        spec: what to run.
        logs: directory for the engine's log.
    """

    def __init__(self, spec: EngineSpec, logs: Path) -> None:
        self.spec = spec
        self._log = logs / f"{spec.name}.log"
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec, self._log))
        self._process.start()
        theirs.close()
        self._ready = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._kill()

    def ready(self) -> None:
        """Wait until the engine serves, and warm it up.

        Raises:
            BenchError: if it cannot start.
        """
        if not self._ready:
            self.answer()
            self._ready = True
            self.call(Serving.warm_up)

    def call(
        self, method: Callable[Concatenate[Serving, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a method of :class:`~lamina_kv.bench.serving.Serving` in the engine's process.

        Raises:
            BenchError: if it raised there, or the process ended or went silent.
        """
        self.begin(method, *args, **kwargs)
        return cast(T, self.answer())

    def begin(
        self, method: Callable[Concatenate[Serving, P], object], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """As :meth:`call`, without waiting; :meth:`answer` must follow."""
        self.ready()
        self._pipe.send((method, args, kwargs))

    def first_token(self, prompt: TokenIds, *, hit: int, place: str = "") -> FirstToken:
        """Time to the first token of ``prompt``, once it is certain where it was hit.

        Args:
            prompt: what to send.
            hit: tokens that must be hit, no more and no fewer.
            place: where: ``engine``, ``host`` or ``disk``.

        Raises:
            BenchError: if it was hit elsewhere, or as :meth:`call`.
        """
        token = self.call(Serving.first_token, prompt)
        if token.cached != hit or (hit and token.hits.get(place) != hit):
            raise BenchError(
                f"engine {self.spec.name!r}: {hit} tokens were to be hit in {place or 'no place'}, "
                f"but {token.cached} were not computed, found in {token.hits}: this measurement "
                "would not be what it says"
            )
        return token

    def pause(self) -> None:
        """Stop the process, with every thread that it has, until :meth:`resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Shut the engine down: what it is saving and writing comes to its end.

        Raises:
            BenchError: as :meth:`call`, or if the process does not end.
        """
        if self._process.is_alive():
            self.resume()
            self.call(Serving.close)
            self._pipe.close()
            self._process.join(_EXIT_TIMEOUT)
        if self._process.is_alive():
            self._kill()
            raise BenchError(f"engine {self.spec.name!r} did not exit{self._account()}")

    def answer(self) -> object:
        """What the method that was begun has returned.

        Raises:
            BenchError: as :meth:`call`.
        """
        try:
            if not self._pipe.poll(_ANSWER_TIMEOUT):
                self._kill()
                raise BenchError(
                    f"engine {self.spec.name!r} gave no answer for {_ANSWER_TIMEOUT:.0f} s; "
                    f"choose fewer tokens or a smaller model{self._account()}"
                )
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(_EXIT_TIMEOUT)
            raise BenchError(
                f"engine {self.spec.name!r} ended unexpectedly, exit code "
                f"{self._process.exitcode} (-9: probably out of memory){self._account()}"
            ) from None
        if isinstance(answer, _Failure):
            self._kill()
            raise BenchError(f"engine {self.spec.name!r} failed\n{answer.account}{self._account()}")
        return answer

    def _signal(self, number: signal.Signals) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _account(self) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError):
            lines = self._log.read_text(errors="replace").splitlines()[-_LOG_TAIL:]
            if lines:
                return "\nthe end of its log:\n" + "\n".join(f"  {line}" for line in lines)
        return ""


def _serve(pipe: Connection, spec: EngineSpec, log: Path) -> None:
    """The life of an engine's process: one answer for each call, until its parent is gone."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    serving: Serving | None = None
    try:
        if spec.network:
            join_network(spec.network)
        serving = Serving(spec)
        pipe.send(None)
        while True:
            method, args, kwargs = pipe.recv()
            pipe.send(method(serving, *args, **kwargs))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except Exception:
        pipe.send(_Failure(traceback.format_exc()))
