"""vLLM's SimpleCPUOffloadConnector on a CPU, with host memory or with its disk.

Replaces CUDA streams and events by ones that have always passed, and the driver's batched copy by
:func:`~peers.adapters.batch_copy.batch_copy`. Its threads, queues and disk are its
own. It favours the connector: no copy waits for another, and none has to be looked after.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.simple_cpu_offload_connector import (
    SimpleCPUOffloadConnector,
)
from vllm.v1.simple_kv_offload import copy_backend, cuda_mem_ops, disk_backend, worker

from peers.adapters.batch_copy import batch_copy


class _Passed:
    """A stream or an event of a device that is always done."""

    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> _Passed:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record(self, *_: object) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait(self, *_: object) -> None:
        pass

    wait_event = wait_stream = wait

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


class _Cuda:
    """In the place of ``torch.cuda``."""

    Stream = Event = _Passed

    @staticmethod
    def current_stream(*_: object) -> _Passed:
        return _Passed()

    @staticmethod
    def stream(stream: _Passed) -> _Passed:
        return stream

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Torch:
    """In the place of ``torch``, in the connector's modules only."""

    cuda = _Cuda()
    Event = _Passed

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _copy_blocks(source_blocks: list[int], target_blocks: list[int], parameters: Any) -> None:
    def addresses(bases: Any, blocks: list[int]) -> Any:
        offsets = np.array(blocks, np.uint64)[None, :] * parameters.bpb[:, None]
        return (bases[:, None] + offsets).ravel()

    batch_copy(
        addresses(parameters.src_bases, source_blocks),
        addresses(parameters.dst_bases, target_blocks),
        np.repeat(parameters.bpb, len(source_blocks)),
        load=parameters.attrs.srcAccessOrder == cuda_mem_ops.CU_MEMCPY_SRC_ACCESS_ORDER_ANY,
    )


def _replace_device() -> None:
    for module in (worker, copy_backend, disk_backend):
        module.torch = _Torch()
    for module in (copy_backend, disk_backend):
        module.copy_blocks = _copy_blocks
    disk_backend.pin_tensor = lambda _: None
    cuda_mem_ops._resolve_batch_memcpy = lambda: (None, 0)


_replace_device()


class SimpleCPUOffloadOnCpu(SimpleCPUOffloadConnector):
    """The connector as it is, in a process in which its device is replaced."""
