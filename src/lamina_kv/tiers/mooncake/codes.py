"""What the library's answers mean for a chunk. The numbers are those of ``ErrorCode`` in Mooncake's
``types.h``, 0.3.13."""

from __future__ import annotations

from enum import IntEnum

from lamina_kv.tiers.contract import Fate


class Code(IntEnum):
    """Answers that a message names. Every other one is told by its number."""

    SEGMENT_NOT_FOUND = -101
    NO_AVAILABLE_HANDLE = -200
    INVALID_PARAMS = -600
    INVALID_REPLICA = -702
    REPLICA_IS_NOT_READY = -703
    OBJECT_NOT_FOUND = -704
    OBJECT_ALREADY_EXISTS = -705
    LEASE_EXPIRED = -707
    REPLICA_NOT_FOUND = -710
    REPLICA_IS_GONE = -712
    TRANSFER_FAIL = -800
    CHECKSUM_MISMATCH = -801
    RPC_FAIL = -900
    RPC_TIMEOUT = -901
    FILE_NOT_FOUND = -1100
    TENANT_QUOTA_EXCEEDED = -1700
    TENANT_NOT_REGISTERED = -1701


NORMAL = frozenset({Code.OBJECT_NOT_FOUND, Code.REPLICA_IS_NOT_READY, Code.OBJECT_ALREADY_EXISTS})
"""Errors that say nothing against anybody."""

_READ: dict[int, Fate] = {
    Code.SEGMENT_NOT_FOUND: Fate.GONE,
    Code.INVALID_PARAMS: Fate.CORRUPT,  # the object is longer than the buffer
    Code.INVALID_REPLICA: Fate.GONE,
    Code.REPLICA_IS_NOT_READY: Fate.GONE,  # somebody is writing it
    Code.OBJECT_NOT_FOUND: Fate.GONE,
    # The read took longer than the lease, seconds: the chunk may well be there.
    Code.LEASE_EXPIRED: Fate.LATE,
    Code.REPLICA_NOT_FOUND: Fate.GONE,
    Code.REPLICA_IS_GONE: Fate.GONE,
    Code.TRANSFER_FAIL: Fate.GONE,  # who holds it is not there, whatever the master still thinks
    Code.CHECKSUM_MISMATCH: Fate.CORRUPT,
    Code.RPC_TIMEOUT: Fate.LATE,
    Code.FILE_NOT_FOUND: Fate.GONE,
}

_WRITE: dict[int, Fate] = {
    Code.NO_AVAILABLE_HANDLE: Fate.REFUSED,
    Code.INVALID_PARAMS: Fate.REFUSED,
    Code.OBJECT_ALREADY_EXISTS: Fate.DONE,
    Code.RPC_TIMEOUT: Fate.LATE,
    Code.TENANT_QUOTA_EXCEEDED: Fate.REFUSED,
    Code.TENANT_NOT_REGISTERED: Fate.REFUSED,
}

_ADVICE: dict[int, str] = {
    Code.NO_AVAILABLE_HANDLE: "there is no room in the donated memory: donate more, or let the "
    "master evict earlier (--eviction_high_watermark_ratio)",
    Code.LEASE_EXPIRED: "reading takes longer than the master lets it "
    "(--default_kv_lease_ttl): look at the network",
    Code.TRANSFER_FAIL: "a process that donated memory is gone, or cannot be reached from here; "
    "the master forgets it after --client_ttl",
    Code.RPC_FAIL: "the master does not answer: see that it runs",
    Code.RPC_TIMEOUT: "the master does not answer in time",
    Code.TENANT_QUOTA_EXCEEDED: "the master's quota for this tenant is used up",
    Code.TENANT_NOT_REGISTERED: "the master does not know this tenant",
}


def read_fate(code: int, size: int) -> Fate:
    """What became of a chunk that was to be read.

    Args:
        code: the answer: bytes of the object, or an error.
        size: bytes that every object has.
    """
    if code >= 0:
        return Fate.DONE if code == size else Fate.CORRUPT
    return _READ.get(code, Fate.DOWN)


def write_fate(code: int) -> Fate:
    """What became of a chunk that was to be written, whose answer is ``code``; 0 is success, also
    where the object was there before."""
    return _WRITE.get(code, Fate.DOWN) if code else Fate.DONE


def explain(code: int) -> str:
    """An error for a message: its name if it has one here, its number, and what to do."""
    name = Code(code).name if code in _NUMBERS else "error"
    return f"{name} {code}: {_ADVICE.get(code, 'see the messages of Mooncake on stderr')}"


_NUMBERS = frozenset(code.value for code in Code)
