"""What ``lamina-kv doctor`` looks at of the device, and of the host memory that it copies from."""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Iterator
from pathlib import Path

from lamina_kv.cli.checks import Finding, Verdict

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")

_SAMPLE = 64 << 20
"""Bytes to pin for a try."""


def device() -> Iterator[Finding]:
    """What torch computes on, and whether host memory can be pinned for it as Lamina does."""
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", Verdict.FAILED, f"cannot be imported: {error}", "it comes with vLLM")
        return
    version: str = torch.__version__
    if torch.version.cuda is None:
        yield Finding("torch", Verdict.GOOD, f"{version}, on the CPU")
        yield from torchvision()
    elif not torch.cuda.is_available():
        yield Finding(
            "torch",
            Verdict.FAILED,
            f"{version} is built for CUDA {torch.version.cuda} and finds no device",
            "look at nvidia-smi; in a container, pass the GPU in (docker run --gpus all)",
        )
    else:
        yield Finding("torch", Verdict.GOOD, f"{version}, on {torch.cuda.get_device_name()}")
        torch.cuda.init()
        yield pinned_memory()
        for ordinal in range(torch.cuda.device_count()):
            yield from bus(ordinal)


def torchvision() -> Iterator[Finding]:
    """Whether torchvision fits torch, if it is there.

    Transformers imports it where it is installed, and a package index may give a build for CUDA to
    go with a torch for CPUs.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except (ImportError, OSError, RuntimeError) as error:
        yield Finding(
            "torchvision",
            Verdict.FAILED,
            f"does not fit this torch, and vLLM will not start: {error}",
            "text models need none of them: pip uninstall torchvision torchaudio torchcodec",
        )


def pinned_memory() -> Finding:
    """Whether the driver pins memory that is mapped already."""
    import torch

    sample = mmap.mmap(-1, _SAMPLE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = torch.frombuffer(sample, dtype=torch.uint8).data_ptr()
    runtime = torch.cuda.cudart()
    try:
        torch.cuda.check_error(int(runtime.cudaHostRegister(address, _SAMPLE, 0)))
        torch.cuda.check_error(int(runtime.cudaHostUnregister(address)))
    except RuntimeError as error:
        return Finding(
            "pinned memory",
            Verdict.FAILED,
            f"the driver does not pin {_SAMPLE >> 20} MiB (cudaHostRegister): {error}",
            "the host tier would be off; raise the container's limit on memory, and on locked "
            "memory (docker run --ulimit memlock=-1)",
        )
    return Finding("pinned memory", Verdict.GOOD, "can be had (cudaHostRegister)")


def bus(ordinal: int) -> Iterator[Finding]:
    """What stands between one GPU and host memory.

    Args:
        ordinal: its number, as torch has it.
    """
    from lamina_kv.data import numa
    from lamina_kv.data.movers.driver import Driver
    from lamina_kv.data.threads import usable_cores

    try:
        driver = Driver(ordinal)
        address, shares, has_engines = (
            driver.pci_address, driver.shares_addresses, driver.batched_copy() is not None,
        )  # fmt: skip
    except (OSError, RuntimeError) as error:
        yield Finding(f"GPU {ordinal}", Verdict.WARNING, f"the driver does not say: {error}")
        return
    yield _reach(ordinal, shares=shares, has_engines=has_engines)
    node = numa.node_of(address)
    if node is None:
        return
    yield numa_node(ordinal, node, bool(usable_cores() & numa.cores_of(node)))


def _reach(ordinal: int, *, shares: bool, has_engines: bool) -> Finding:
    subject = f"GPU {ordinal}, host memory"
    if not shares:
        return Finding(
            subject,
            Verdict.FAILED,
            "kernels do not reach pinned memory at its address on the host, as under WSL",
            "the host tier would be off: use Linux itself",
        )
    if not has_engines:
        return Finding(
            subject,
            Verdict.WARNING,
            "the driver has no cuMemcpyBatchAsync: kernels make all copies, beside the model's",
            "a driver for CUDA 12.8 or later has it",
        )
    return Finding(subject, Verdict.GOOD, "reached by kernels and copy engines")


def numa_node(ordinal: int, node: int, reachable: bool) -> Finding:
    """Whether host memory can be had on the node of a GPU.

    Args:
        ordinal: the GPU's number.
        node: its node.
        reachable: whether this process may run on cores of it.
    """
    from lamina_kv.data import numa

    subject = f"GPU {ordinal}, NUMA"
    import torch

    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        view = torch.frombuffer(page, dtype=torch.uint8)
        try:
            numa.prefer(view.data_ptr(), mmap.PAGESIZE, node)
            refused = ""
        except OSError as error:
            refused = f"{error.strerror or error}"
        finally:
            del view
    if not refused:
        return Finding(subject, Verdict.GOOD, f"host memory comes from its node, {node}")
    found = f"memory cannot be bound to its node, {node} (mbind: {refused})"
    if reachable:
        return Finding(subject, Verdict.GOOD, f"{found}; threads on its cores touch it first")
    return Finding(
        subject,
        Verdict.WARNING,
        f"{found}, and no core of it is this process's: copies cross between sockets",
        "give the container CAP_SYS_NICE, or cores of that node",
    )


def nodes(directory: Path | None = None) -> Finding:
    """Whether memory is nearer to some cores than to others.

    Args:
        directory: where the kernel shows its nodes.
    """
    from lamina_kv.data import numa

    count = len([*(directory or numa.NODES).glob("node[0-9]*")])
    if count < 2:
        return Finding("NUMA", Verdict.GOOD, "one node")
    return Finding(
        "NUMA",
        Verdict.GOOD,
        f"{count} nodes",
        "without a GPU, keep each rank on one of them (VLLM_CPU_OMP_THREADS_BIND)",
    )


def huge_pages(settings: Path = HUGE_PAGES) -> Finding:
    """Whether host memory can be on huge pages, which are pinned and walked faster.

    Args:
        settings: where the kernel shows its settings.
    """
    subject = "huge pages"
    private, shared = _setting(settings / "enabled"), _setting(settings / "shmem_enabled")
    found = f"{private} for private memory, {shared} for what ranks of an MLA model share"
    if private not in ("always", "madvise"):
        return Finding(
            subject,
            Verdict.WARNING,
            found,
            f"host memory takes longer to pin: echo madvise > {settings / 'enabled'}",
        )
    advice = (
        ""
        if shared in ("always", "advise", "within_size", "force")
        else (f"for MLA models with tensor parallelism: echo advise > {settings / 'shmem_enabled'}")
    )
    return Finding(subject, Verdict.GOOD, found, advice)


def _setting(file: Path) -> str:
    """The one of a kernel's settings that is chosen: it stands in brackets."""
    try:
        words = file.read_text()
    except OSError:
        return "not known"
    return words.partition("[")[2].partition("]")[0] or "not known"
