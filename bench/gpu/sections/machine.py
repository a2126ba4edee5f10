"""A: what the machine is. B: how fast one large copy of pinned memory is on it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path

import torch

from gpu.lab import CudaLab
from gpu.plan import Bench
from gpu.report import Bound, Row
from lamina_kv.data import numa
from lamina_kv.data.movers.device import TorchDevice
from lamina_kv.data.movers.driver import Driver
from lamina_kv.data.movers.host_memory import HostMemory

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")

CEILING_BYTES = 1 << 30
ROUNDS = 3


def describe(bench: Bench[CudaLab]) -> Generator[Row, None, None]:
    """A."""
    properties = torch.cuda.get_device_properties(bench.lab.device)
    yield Row("card", properties.name)
    yield Row("multiprocessors", properties.multi_processor_count)
    yield Row("torch, CUDA", f"{torch.__version__}, {torch.version.cuda}")
    for name in ("enabled", "shmem_enabled"):
        try:
            yield Row(f"huge pages: {name}", (_HUGE_PAGES / name).read_text().strip())
        except OSError as error:
            yield Row(f"huge pages: {name}", str(error))
    driver = Driver(bench.lab.device.index or 0)
    try:
        yield Row("NUMA node", str(numa.node_of(driver.pci_address)))
    except RuntimeError as error:
        yield Row("NUMA node", str(error))
    yield Row("kernels reach pinned memory", int(driver.shares_addresses), "", Bound(1, True))
    query = "driver_version,pcie.link.gen.max,pcie.link.width.max,pcie.link.gen.current"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        yield Row(query, answer.stdout.strip() or answer.stderr.strip())
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Row("nvidia-smi", str(error))


def ceilings(bench: Bench[CudaLab]) -> Generator[Row, None, None]:
    """B."""
    device = bench.lab.device
    there = torch.empty(CEILING_BYTES, dtype=torch.uint8, device=device)
    allocators = torch.empty(CEILING_BYTES, dtype=torch.uint8).pin_memory()
    pinner = TorchDevice(device)
    memory = HostMemory(CEILING_BYTES, pinner=pinner, node=pinner.numa_node, enter=pinner.choose)
    try:
        memory.wait()
        own = memory.tensor
        for name, target, source in (
            ("H2D", there, allocators),
            ("D2H", allocators, there),
        ):
            rate = gigabytes_per_second(
                CEILING_BYTES, partial(target.copy_, source, non_blocking=True)
            )
            bench.ceilings[name] = rate
            yield Row(f"{name}, memory of torch's allocator", rate, "GB/s")
        for name, target, source in (("H2D", there, own), ("D2H", own, there)):
            rate = gigabytes_per_second(
                CEILING_BYTES, partial(target.copy_, source, non_blocking=True)
            )
            share = rate / bench.ceilings[name]
            yield Row(f"{name}, host memory of Lamina", rate, "GB/s")
            yield Row(f"{name}, share of torch's", share, "", Bound(0.97, at_least=True))
    finally:
        torch.cuda.synchronize(device)
        memory.close()


def gigabytes_per_second(size: int, copy: Callable[[], object]) -> float:
    """The best of some rounds of ``copy``, which copies ``size`` bytes on the current stream."""
    best = 0.0
    copy()
    for _ in range(ROUNDS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        copy()
        ended.record()
        ended.synchronize()
        best = max(best, size / (began.elapsed_time(ended) * 1e-3) / 1e9)
    return best
