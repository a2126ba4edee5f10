"""A system's process, as the bench sees it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from lamina_kv.bench.engine import BenchError
from peers import protocol

_ANSWER_TIMEOUT = 900.0
_EXIT_TIMEOUT = 60.0
_LOG_TAIL = 25
_READ_BYTES = 1 << 16

A = TypeVar("A", protocol.Served, protocol.Done)


class PeerProcess:
    """Begins to start the system; :meth:`ready` waits until it can serve.

    Args:
        label: for messages, and for the name of its log.
        command: runs :mod:`peers.child` in the system's environment.
        environment: variables of the process.
        start: what to run.
        logs: directory for its log.
    """

    def __init__(
        self,
        label: str,
        command: tuple[str, ...],
        environment: Mapping[str, str],
        start: protocol.Start,
        logs: Path,
    ) -> None:
        self.label = label
        self._log = logs / f"{label.replace(' ', '-').replace('/', '-')}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(environment),
            )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("a process was started without its pipes")
        self._input = self._process.stdin
        self._output = self._process.stdout.fileno()
        self._unread = b""
        self._started = self._ended = False
        self._ask(start)

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._kill()

    def ready(self) -> None:
        """Wait until it serves.

        Raises:
            BenchError: if it cannot start.
        """
        if not self._started:
            self._answer(protocol.Done)
            self._started = True

    def call(
        self, question: protocol.Question, kind: type[A], timeout: float = _ANSWER_TIMEOUT
    ) -> A:
        """Ask, and wait for the answer.

        Args:
            question: what to ask.
            kind: what must be answered.
            timeout: seconds after which the system is silent.

        Raises:
            BenchError: if the system failed, ended or went silent.
        """
        self.ready()
        self._ask(question)
        return self._answer(kind, timeout)

    def end(self) -> None:
        """Kill it: it will not be asked again."""
        self._ended = True
        self._kill()

    @contextlib.contextmanager
    def awake(self) -> Iterator[PeerProcess]:
        """Run for a while, and be stopped again, with every thread."""
        self._signal(signal.SIGCONT)
        try:
            yield self
        finally:
            self._signal(signal.SIGSTOP)

    def pause(self) -> None:
        """Stop until the next :meth:`awake`."""
        self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Have it end: what it is saving comes to its end.

        Raises:
            BenchError: if it does not end.
        """
        if self._ended:
            return
        self._signal(signal.SIGCONT)
        try:
            self.call(protocol.Stop(), protocol.Done)
            self._process.wait(_EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{self.label} did not exit{self._account()}") from None
        finally:
            self._kill()

    def _ask(self, question: protocol.Question) -> None:
        # Of a process that has ended, the missing answer tells more.
        with contextlib.suppress(BrokenPipeError):
            self._input.write(protocol.line(question))
            self._input.flush()

    def _answer(self, kind: type[A], timeout: float = _ANSWER_TIMEOUT) -> A:
        answer = protocol.answer(self._line(timeout))
        if isinstance(answer, protocol.Failed):
            raise BenchError(f"{self.label} failed\n{answer.account}{self._account()}")
        if not isinstance(answer, kind):
            raise BenchError(f"{self.label} answered {answer!r}, which was not the question")
        return answer

    def _line(self, timeout: float) -> bytes:
        give_up = time.monotonic() + timeout
        while b"\n" not in self._unread:
            left = give_up - time.monotonic()
            if left <= 0 or not select.select([self._output], [], [], left)[0]:
                raise BenchError(
                    f"{self.label} gave no answer for {timeout:.0f} s; choose fewer tokens "
                    f"or a smaller model{self._account()}"
                )
            read = os.read(self._output, _READ_BYTES)
            if not read:
                raise BenchError(
                    f"{self.label} ended unexpectedly, exit code {self._process.wait()} "
                    f"(-9: probably out of memory){self._account()}"
                )
            self._unread += read
        text, _, self._unread = self._unread.partition(b"\n")
        return text

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _account(self) -> str:
        """The end of its log."""
        lines = self._log.read_text(errors="replace").splitlines()[-_LOG_TAIL:]
        return "\nthe end of its log:\n" + "\n".join(f"  {line}" for line in lines)
