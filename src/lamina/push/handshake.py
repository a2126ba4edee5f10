"""How two engines prove to each other that both have ``push.token``, which is never sent.

Each side sends a nonce, and an HMAC over both nonces whose key is the secret. What is signed names
the side, so that neither can hand the other's proof back. Whoever dials proves last: it may have
been sent to the address of a stranger. Neither says who it is before.
"""

from __future__ import annotations

import hmac
import secrets
from enum import Enum

NONCE_BYTES = 32


class Side(Enum):
    """Who proves."""

    PREFILL = b"lamina push 2: prefill"
    DECODE = b"lamina push 2: decode"


def nonce() -> bytes:
    """A number that nobody has used before."""
    return secrets.token_bytes(NONCE_BYTES)


def prove(secret: bytes, side: Side, decode_nonce: bytes, prefill_nonce: bytes) -> bytes:
    """What only a side that has the secret can say to these nonces."""
    return hmac.digest(secret, side.value + decode_nonce + prefill_nonce, "sha256")


def proves(
    proof: bytes, secret: bytes, side: Side, decode_nonce: bytes, prefill_nonce: bytes
) -> bool:
    """Whether that is what a side has said."""
    return hmac.compare_digest(proof, prove(secret, side, decode_nonce, prefill_nonce))
