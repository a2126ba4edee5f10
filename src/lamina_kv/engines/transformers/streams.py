"""The stream on which the library computes, and the order between it and the present one.

The library has a stream of its own for forwards, for copies of blocks and for graphs
(transformers 5.19, ``input_outputs.py``, ``model_runner.py``, ``offloading_manager.py``). Its
scheduler runs outside of that stream, and is not told of it; the layers of a forward run inside.
"""

from __future__ import annotations

import torch


class ComputeStream:
    """See the module. On a CPU there are no streams, and all of this does nothing.

    Args:
        device: where the library's cache is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._unknown = self._is_cuda = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None

    def note(self) -> None:
        """A layer of a forward runs: its stream is the one."""
        if self._unknown:
            self._stream = torch.cuda.current_stream(self._device)
            self._unknown = False

    @property
    def captures(self) -> bool:
        """Whether a graph is being captured, on the present stream."""
        return self._is_cuda and torch.cuda.is_current_stream_capturing()

    def precede(self) -> None:
        """What the library has submitted comes before what is submitted to the present stream next.
        Blocks of a request that moves to host memory (``cpu_offload_space``) or forks
        (``num_children``) are free, or taken, before they are copied. Before the first forward
        there is nothing."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def follow(self) -> None:
        """What the library submits next comes after what was submitted to the present stream. The
        host waits only if there was no forward yet."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        elif self._unknown:
            torch.cuda.current_stream(self._device).synchronize()
