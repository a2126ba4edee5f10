"""The wire over NIXL with UCX: RDMA where there is a network for it, else TCP, and between
processes of one machine a copy from memory to memory.

What NIXL 1.5 does, as measured, and what follows from it:

- Its progress thread takes a whole core while idle. It is off: things move in our calls.
- To release a request that moves detaches it, and UCX goes on to read the source; to remove the
  peer does not stop it either. Only the agent's end does. So an end is one agent, requests are
  released when they have ended or right before the agent is, and peers are never removed.
- It connects in the caller's thread, for minutes if nobody answers, and TCP tries for a quarter of
  an hour to send what nobody takes. Both are bounded here, below the user's ``UCX_*`` variables.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from lamina_kv.push.transports.base import (
    Notice,
    Peer,
    Region,
    Spans,
    Transport,
    TransportError,
    Write,
    WriteState,
)

logger = logging.getLogger(__name__)

BACKEND: Final = "UCX"
SETTINGS: Final = "TCP_CONN_NB=y,TCP_USER_TIMEOUT=10s"
"""UCX's configuration, where no ``UCX_*`` variable says otherwise: connect without waiting, and a
peer that takes no bytes for that long is gone."""

_INFINIBAND: Final = Path("/sys/class/infiniband")


class _Description(msgspec.Struct, frozen=True, array_like=True, tag="nixl-1"):
    """Another end, as :meth:`NixlTransport.describe` packs it. Regions are fields of
    :class:`Region`; the metadata is NIXL's."""

    agent: str
    regions: tuple[tuple[int, int, int], ...]
    metadata: bytes


class _Memory:
    """Which of an end's regions stretches are in."""

    def __init__(self, regions: Iterable[Region]) -> None:
        known = sorted(regions, key=lambda region: region.address)
        self._starts = np.array([region.address for region in known], np.uint64)
        self._ends = np.array([region.address + region.size for region in known], np.uint64)
        self._devices = np.array([region.device for region in known], np.int64)

    def descriptors(self, spans: Spans) -> tuple[str, npt.NDArray[np.uint64]]:
        """NIXL's kind of memory, and its rows of address, length and device.

        Raises:
            ValueError: if a stretch is not in one region, or they are of both kinds of memory.
        """
        index = np.searchsorted(self._starts, spans[:, 0], side="right") - 1
        inside = (index >= 0) & (spans[:, 0] + spans[:, 1] <= self._ends[index])
        if not inside.all():
            address, length = spans[np.argmin(inside)].tolist()
            raise ValueError(f"{length} bytes at {address:#x} are not in one registered region")
        devices = self._devices[index]
        if (devices.min() < 0) != (devices.max() < 0):
            raise ValueError(
                "one end of a write is in host memory or in device memory, not in both"
            )
        rows = np.column_stack((spans, devices.clip(0).astype(np.uint64)))
        return _kind(int(devices[0])), np.ascontiguousarray(rows)


def _kind(device: int) -> str:
    return "DRAM" if device < 0 else "VRAM"


class _Request(Write):
    """A write, and NIXL's request for it as long as it moves."""

    def __init__(self, transport: NixlTransport, peer: Peer, handle: Any) -> None:
        self._transport = transport
        self._peer = peer
        self._handle = handle
        self._state = WriteState.MOVING

    def state(self) -> WriteState:
        """See :meth:`Write.state`."""
        if self._state is WriteState.MOVING:
            self._transport.ask(self)
        return self._state


class NixlTransport(Transport):
    """See the module.

    Args:
        regions: memory of this end, disjoint; it must stay where it is until :meth:`close`.
            To register host memory takes a millisecond and neither pins nor touches it; an RDMA
            device would pin it.

    Raises:
        TransportError: if NIXL is not installed, or cannot be started or take the regions.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self._memory = _Memory(regions)
        self._peers: dict[Peer, _Memory] = {}
        self._moving: set[_Request] = set()
        self._broken: set[Peer] = set()
        name = uuid.uuid4().hex
        nixl = library()
        # The bindings raise exceptions of their own that have no common base but this.
        self._errors: tuple[type[Exception], ...] = tuple(
            kind
            for kind in vars(nixl._bindings).values()
            if isinstance(kind, type) and issubclass(kind, Exception)
        )
        try:
            agent = nixl.nixl_agent(
                name, nixl.nixl_agent_config(enable_prog_thread=False, backends=[])
            )
            agent.create_backend(BACKEND, {"engine_config": SETTINGS})
            for kind in ("DRAM", "VRAM"):
                rows = [
                    (region.address, region.size, max(region.device, 0), "")
                    for region in regions
                    if _kind(region.device) == kind
                ]
                if rows:
                    agent.register_memory(rows, kind)
            metadata = agent.get_agent_metadata()
        except self._errors as error:
            raise TransportError(f"NIXL cannot be started: {error}") from error
        self._agent: Any = agent
        self._name = Peer(name)
        fields = tuple((region.address, region.size, region.device) for region in regions)
        self._description = msgspec.msgpack.encode(_Description(name, fields, metadata))

    @property
    def name(self) -> Peer:
        """See :attr:`Transport.name`."""
        return self._name

    def describe(self) -> bytes:
        """See :meth:`Transport.describe`."""
        return self._description

    def connect(self, description: bytes) -> Peer:
        """See :meth:`Transport.connect`."""
        self._check_open()
        try:
            end = msgspec.msgpack.decode(description, type=_Description)
        except msgspec.DecodeError as error:
            raise TransportError(
                f"what describes the peer is of another transport or version of Lamina: {error}"
            ) from error
        peer = Peer(end.agent)
        if peer in self._broken:
            self._disconnect(peer)
        if peer not in self._peers:
            try:
                self._agent.add_remote_agent(end.metadata)
            except self._errors as error:
                raise TransportError(f"cannot connect to peer {peer}: {error}") from error
            self._peers[peer] = _Memory(Region(*fields) for fields in end.regions)
        return peer

    def write(self, peer: Peer, local: Spans, remote: Spans) -> Write:
        """See :meth:`Transport.write`."""
        there = self._memory_of(peer)
        if not len(local) or not np.array_equal(local[:, 1], remote[:, 1]):
            raise ValueError(
                f"a write needs stretches, of equal lengths at both ends: {len(local)} here, "
                f"{len(remote)} there"
            )
        agent = self._agent
        source = _transfer_list(agent, *self._memory.descriptors(local))
        target = _transfer_list(agent, *there.descriptors(remote))
        try:
            handle = agent.initialize_xfer("WRITE", source, target, peer, backends=[BACKEND])
        except self._errors as error:
            raise TransportError(f"cannot write to peer {peer}: {error}") from error
        request = _Request(self, peer, handle)
        self._moving.add(request)
        self._judge(request, agent.transfer)
        return request

    def notify(self, peer: Peer, body: bytes) -> None:
        """See :meth:`Transport.notify`."""
        self._memory_of(peer)
        try:
            self._agent.send_notif(peer, body)
        except self._errors as error:
            raise TransportError(f"peer {peer} is gone: {error}") from error

    def notices(self) -> list[Notice]:
        """See :meth:`Transport.notices`."""
        self._check_open()
        try:
            new = self._agent.get_new_notifs(backends=[BACKEND])
        except self._errors as error:
            raise TransportError(f"NIXL has failed: {error}") from error
        return [Notice(Peer(name), body) for name, bodies in new.items() for body in bodies]

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        for request in list(self._moving):
            self._end(request, WriteState.FAILED)
        self._peers.clear()
        # Nothing else refers to the agent now: this ends it.
        self._agent = None

    def ask(self, request: _Request) -> None:
        """Bring the state of a request that moves up to date."""
        self._judge(request, self._agent.check_xfer_state)

    def _disconnect(self, peer: Peer) -> None:
        """UCX never mends a connection that has failed; the next one is another."""
        if any(request._peer == peer for request in self._moving):
            raise TransportError(f"what was sent to peer {peer} has not ended yet")
        self._broken.discard(peer)
        del self._peers[peer]
        with suppress(*self._errors):
            self._agent.remove_remote_agent(peer)

    def _judge(self, request: _Request, call: Callable[[Any], str]) -> None:
        try:
            answer = call(request._handle)
        except self._errors as error:
            logger.warning("a write to peer %s has failed: %s", request._peer, error)
            answer = "ERR"
        if answer not in ("PROC", "DONE"):
            self._broken.add(request._peer)
        if answer != "PROC":
            self._end(request, WriteState.DONE if answer == "DONE" else WriteState.FAILED)

    def _end(self, request: _Request, state: WriteState) -> None:
        request._state = state
        handle, request._handle = request._handle, None
        self._moving.discard(request)
        with suppress(*self._errors):
            handle.release()

    def _memory_of(self, peer: Peer) -> _Memory:
        self._check_open()
        try:
            return self._peers[peer]
        except KeyError:
            raise TransportError(f"peer {peer} is not connected") from None

    def _check_open(self) -> None:
        if self._agent is None:
            raise TransportError("this end is closed")


def _transfer_list(agent: Any, kind: str, rows: npt.NDArray[np.uint64]) -> Any:
    return agent.get_xfer_descs(rows, kind)


def library() -> Any:
    """NIXL's Python module, which has no types.

    Raises:
        TransportError: if it is not installed, or cannot be loaded.
    """
    # Both are read when the library is loaded.
    if not _INFINIBAND.exists():
        # UCX's InfiniBand module has nothing to do here, and what it links crashes at the exit of
        # the interpreter.
        os.environ.setdefault("UCX_MODULES", "^ib")
    # Otherwise it writes to the standard output.
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    try:
        import nixl
    except ImportError as error:
        raise TransportError(
            f"pushing needs NIXL ({error}): install lamina-kv with the extra 'push'"
        ) from error
    return nixl
