"""A: what the machine is. B: how fast one large copy of pinned memory is on it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

import torch

from gpu.lab import CudaLab
from gpu.plan import Bench
from gpu.report import Bound, Row
from lamina_kv.data import numa
from lamina_kv.data.movers.driver import Driver
from lamina_kv.data.movers.host_memory import HostMemory
from lamina_kv.data.shared_memory import MemoryFile

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
    device, pinner = bench.lab.device, bench.lab.pinner()
    there = torch.empty(CEILING_BYTES, dtype=torch.uint8, device=device)
    allocators = torch.empty(CEILING_BYTES, dtype=torch.uint8).pin_memory()
    for direction, rate in _rates(there, allocators):
        bench.ceilings[direction] = rate
        yield Row(f"{direction}, memory of torch's allocator", rate, "GB/s")
    for name, file in (("Lamina", None), ("Lamina, shared", MemoryFile.create())):
        memory = HostMemory(
            CEILING_BYTES, file=file, pinner=pinner, node=pinner.numa_node, enter=pinner.choose
        )
        try:
            memory.wait()
            for direction, rate in _rates(there, memory.tensor):
                share = rate / bench.ceilings[direction]
                yield Row(f"{direction}, memory of {name}", rate, "GB/s")
                yield Row(
                    f"{direction}, memory of {name}, share of torch's",
                    share,
                    "",
                    Bound(0.97, at_least=True),
                )
        finally:
            torch.cuda.synchronize(device)
            memory.close()
            if file is not None:
                file.close()


def _rates(there: torch.Tensor, here: torch.Tensor) -> Iterator[tuple[str, float]]:
    """GB/s of one large copy, by direction."""
    for direction, target, source in (("H2D", there, here), ("D2H", here, there)):
        copy = partial(target.copy_, source, non_blocking=True)
        yield direction, gigabytes_per_second(CEILING_BYTES, copy)


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
