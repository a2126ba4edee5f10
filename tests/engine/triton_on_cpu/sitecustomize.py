"""Gives Triton a backend named ``cpu``, so that vLLM's V2 model runner starts on a CPU.

The runner asks Triton for a backend for its platform, and Triton's wheels have none for CPUs. With
``TRITON_INTERPRET=1`` every kernel is run by Triton's interpreter, on CPU tensors, and no backend
is asked for more than its name. Python imports this module when it starts with this folder on its
path.
"""

from __future__ import annotations

import os
from typing import Any


class InterpretedDriver:
    """What is asked of a driver before a kernel runs."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", 0, 1)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return device

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


class InterpretedBackend:
    """The only backend."""

    driver = InterpretedDriver
    compiler = None


def install() -> None:
    """Put the backend in the place of all others."""
    from triton.backends import backends

    backends.clear()
    backends["cpu"] = InterpretedBackend()


if os.environ.get("TRITON_INTERPRET") == "1":
    install()
