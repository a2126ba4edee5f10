"""A system's process: answers questions on its standard input until that ends.

Run as ``python -m peers.child PARENT`` in the system's environment; ``PARENT`` is
the bench's process, with which it ends. Its standard error is the engine's log.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback

from peers import protocol
from peers.serving import PeerServing

_PR_SET_PDEATHSIG = 1


class _Child:
    """Holds the engine between questions."""

    def __init__(self) -> None:
        self._serving: PeerServing | None = None

    def answer(self, question: protocol.Question) -> protocol.Answer:
        """Do what is asked."""
        if isinstance(question, protocol.Start):
            self._serving = PeerServing(question)
            self._serving.warm_up()
            return protocol.Done()
        if self._serving is None:
            raise RuntimeError("the first question must be to start")
        match question:
            case protocol.Serve():
                return protocol.Served(self._serving.serve(question.arrivals))
            case protocol.Forget():
                began = time.perf_counter()
                self._serving.forget()
                return protocol.Done(time.perf_counter() - began)
            case protocol.Copy():
                return protocol.Done(self._serving.copy_memory(question.size))
            case protocol.Pace():
                self._serving.pace(question.bandwidth, question.latency)
                return protocol.Done()
            case protocol.Stop():
                self._serving.close()
                return protocol.Done()


def main() -> None:
    """Answer until there are no more questions."""
    # A bench that is killed cannot wake a process that it has stopped.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        return
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    child = _Child()
    for text in sys.stdin.buffer:
        question = protocol.question(text)
        try:
            answer = child.answer(question)
        except Exception:
            answer = protocol.Failed(traceback.format_exc())
        answers.write(protocol.line(answer))
        if isinstance(question, protocol.Stop):
            # Some systems leave threads behind that would keep the process.
            os._exit(0)


if __name__ == "__main__":
    main()
