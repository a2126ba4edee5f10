"""How two engines prove to each other that both have ``push.token``, which is never sent.

Each side sends a nonce, and an HMAC over both nonces whose key is the secret. What is signed names
the side, so that neither can hand the other's proof back. Whoever dials proves last: it may have
been sent to the address of a stranger. Neither says who it is before.

Whoever has no secret may still sit between two that have it, and hand on what they say. So all that
follows is sealed, with keys that come from the secret and both nonces.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

NONCE_BYTES = 32


class Side(Enum):
    """Who proves, or seals."""

    PREFILL = b"prefill"
    DECODE = b"decode"


class BrokenSealError(Exception):
    """What has come was not sealed by the peer, or not now."""


class NoCipherError(ValueError):
    """The library that seals is not installed."""


@dataclass(frozen=True, slots=True)
class Nonces:
    """A number of each side that nobody has used before."""

    decode: bytes
    prefill: bytes


def nonce() -> bytes:
    """A number that nobody has used before."""
    return secrets.token_bytes(NONCE_BYTES)


def prove(secret: bytes, side: Side, nonces: Nonces) -> bytes:
    """What only a side that has the secret can say to these nonces."""
    return _derive(secret, b"proof", side, nonces)


def proves(proof: bytes, secret: bytes, side: Side, nonces: Nonces) -> bool:
    """Whether that is what a side has said."""
    return hmac.compare_digest(proof, prove(secret, side, nonces))


class Cipher(Protocol):
    """Authenticated encryption, as the ``cryptography`` package has it."""

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None, /) -> bytes:
        """Encrypt and sign."""

    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None, /) -> bytes:
        """Check and decrypt."""


class Seal:
    """What one side says after the proofs, encrypted and signed. Messages are numbered: one that is
    repeated, left out or changed on its way breaks the seal.

    Args:
        secret: what both sides have.
        side: who seals.
        nonces: of the connection.

    Raises:
        NoCipherError: if the library for it is not installed.
    """

    def __init__(self, secret: bytes, side: Side, nonces: Nonces) -> None:
        self._cipher = _cipher(_derive(secret, b"seal", side, nonces))
        self._count = 0

    def close(self, data: bytes) -> bytes:
        """A message, sealed."""
        return self._cipher.encrypt(self._number(), data, None)

    def open(self, data: bytes) -> bytes:
        """The message that was sealed.

        Raises:
            BrokenSealError: if this is not the next one.
        """
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(self._number(), data, None)
        except InvalidTag:
            raise BrokenSealError("what it says is not what it has sealed") from None

    def _number(self) -> bytes:
        self._count += 1
        return self._count.to_bytes(12, "little")


def check_cipher() -> None:
    """Whether messages can be sealed here.

    Raises:
        NoCipherError: if not; says what is missing.
    """
    _cipher(bytes(32))


def _cipher(key: bytes) -> Cipher:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    except ImportError as error:
        raise NoCipherError(
            f"push.token: needs the package cryptography ({error}); pip install 'lamina-kv[push]'"
        ) from error
    return ChaCha20Poly1305(key)


def _derive(secret: bytes, use: bytes, side: Side, nonces: Nonces) -> bytes:
    label = b"lamina push 2, " + use + b" of " + side.value + b": "
    return hmac.digest(secret, label + nonces.decode + nonces.prefill, "sha256")
