"""What two engines say to each other about pushes, on the link and on the wire.

``docs/push.md`` says what each message means. All are immutable, tagged and versioned; on the link
each stands behind its length, on the wire a notice is one message.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec

from lamina_kv.push.cards import EngineCard, SenderCard

VERSION = 2
"""Version of the protocol; both sides must have the same."""

LENGTH_BYTES = 4
"""Width of the length before each message on the link, little endian."""

MAX_MESSAGE = 16 << 20
"""Bytes; a longer message is not one of ours."""

MAX_GREETING = 4 << 10
"""The same for a peer that has not proved to be one of ours."""

MAX_WELCOME = 128 << 10
"""The same for a ``welcome``: its ends take 66 KiB at most."""

MAX_ANSWER = 4 << 10
"""The same for what a prefill engine says after it: all is short, and a decode engine has many."""

MAX_CLAIMED = 1024
"""Pushes of one ``claim``; a longer one is no message of ours."""

MAX_ID = 128
"""Characters of a push's id; engines keep and send it many times."""

MAX_UNCLEAN = 256
"""Attempts that a ``goodbye`` names."""

MAX_DIGEST = 64
"""Bytes of a prompt's digest."""

NO_EPOCH = 0
"""Epoch of a push that was not announced. In a ``cancel``: nothing is needed of it; elsewhere: it
was claimed."""

NO_BLOCK = -1
"""In a table: the decode engine needs nothing of this block."""


LONGEST_PATIENCE = 600.0
"""Seconds for which a claim holds at most, if it is not made again. An announcement does as well,
or for the prefill engine's own ``push.deadline``, if that is longer."""

TOO_LATE = "too_late"
"""Why something was not sent, or not all of it: nobody waits for it any more."""


class MalformedMessageError(ValueError):
    """What arrived is not a message of this version."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Anything that is said."""


PushId = Annotated[str, msgspec.Meta(max_length=MAX_ID)]


class Attempt(msgspec.Struct, frozen=True, array_like=True):
    """One attempt at one push.

    Attributes:
        push: the router's id of the push.
        epoch: the decode engine's transfer; never used twice by one incarnation.
    """

    push: PushId
    epoch: int


class Hello(Message, frozen=True, tag="hello"):
    """The decode engine's first word, to somebody who may be a stranger.

    Attributes:
        version: :data:`VERSION`.
        nonce: for the proofs, see :mod:`lamina_kv.push.handshake`.
    """

    version: int
    nonce: bytes


class Challenge(Message, frozen=True, tag="challenge"):
    """The prefill engine's first word.

    Attributes:
        version: :data:`VERSION`.
        nonce: for the proofs.
        proof: that it has the secret.
    """

    version: int
    nonce: bytes
    proof: bytes


class Proof(Message, frozen=True, tag="proof"):
    """The decode engine has the secret.

    Attributes:
        proof: of that.
    """

    proof: bytes


class Introduction(Message, frozen=True, tag="introduction"):
    """Who the decode engine is.

    Attributes:
        card: all that its peer must know of it.
    """

    card: EngineCard


class Welcome(Message, frozen=True, tag="welcome"):
    """Who the prefill engine is.

    Attributes:
        card: all that its peer must know of it.
    """

    card: SenderCard


class Refused(Message, frozen=True, tag="refused"):
    """One side's last word.

    Attributes:
        reason: why it does not talk to the other.
    """

    reason: str


class BlockTable(msgspec.Struct, frozen=True, array_like=True):
    """Where the pages of one cache group go.

    Attributes:
        first: index in the prompt of the first block; of a recurrent group that of the block whose
            last token the state stands behind.
        blocks: the decode engine's block ids from there on; -1 where it needs nothing.
    """

    first: int
    blocks: tuple[int, ...]


class Announce(Message, frozen=True, tag="announce"):
    """Where a prompt's pages go.

    Attributes:
        attempt: which.
        digest: the prompt, as :func:`lamina_kv.keys.prompt_digest` has it.
        start: tokens at the beginning that the decode engine has.
        end: tokens that it will have when all is delivered.
        patience: seconds that it will wait.
        tables: one for each cache group.
    """

    attempt: Attempt
    digest: Annotated[bytes, msgspec.Meta(max_length=MAX_DIGEST)]
    start: int
    end: int
    patience: float
    tables: tuple[BlockTable, ...]


class Claim(Message, frozen=True, tag="claim"):
    """The decode engine has no blocks yet for these prompts and will have them: what is computed
    for them is to be held. Said again and again while they wait.

    Attributes:
        pushes: which.
        patience: seconds that they are to be held, if it is not said again.
    """

    pushes: Annotated[tuple[PushId, ...], msgspec.Meta(max_length=MAX_CLAIMED)]
    patience: float


class Cancel(Message, frozen=True, tag="cancel"):
    """The decode engine has given up, or needs nothing."""

    attempt: Attempt


class Queued(Message, frozen=True, tag="queued"):
    """The prefill engine has the request, which may wait for its turn there.

    Attributes:
        attempt: which; of a push that was claimed and not announced, without an epoch.
    """

    attempt: Attempt


class Absent(Message, frozen=True, tag="absent"):
    """The prefill engine has seen a claim or an announcement, and has no such request yet.

    Attributes:
        attempt: which, as in ``queued``.
    """

    attempt: Attempt


class Bound(Message, frozen=True, tag="bound"):
    """The prefill engine has the prompt, and it fits."""

    attempt: Attempt


class Failed(Message, frozen=True, tag="failed"):
    """The push will not be complete.

    Attributes:
        attempt: which.
        reason: why, in a few words.
    """

    attempt: Attempt
    reason: str


class Fenced(Message, frozen=True, tag="fenced"):
    """Nothing of the attempt will be sent any more.

    Attributes:
        attempt: which.
        clean: whether all that was sent has arrived, so that nothing is on its way. If not, a write
            has failed, and what of it is in the network may still arrive.
    """

    attempt: Attempt
    clean: bool


class Goodbye(Message, frozen=True, tag="goodbye"):
    """The prefill engine's last word: it ends. It fences every attempt that the decode engine has
    announced on this connection, or to this run before, whether it has heard of it or not, but for
    those that it names.

    Attributes:
        oldest: epoch of the oldest attempt that it speaks for: of those before it nothing is known.
        unclean: epochs of attempts of which something may be on its way.
    """

    oldest: int
    unclean: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_UNCLEAN)]

    @classmethod
    def but_for(cls, oldest: int, unclean: Iterable[int]) -> Goodbye:
        """One that names these attempts, or if they are too many the newest, and speaks for none
        before those."""
        known = sorted(epoch for epoch in unclean if epoch >= oldest)
        rest, named = known[:-MAX_UNCLEAN], known[-MAX_UNCLEAN:]
        return cls(rest[-1] + 1 if rest else oldest, tuple(named))

    def fences(self, epoch: int) -> bool:
        """Whether nothing of an attempt is on its way, or will be."""
        return epoch >= self.oldest and epoch not in self.unclean


class Ping(Message, frozen=True, tag="ping"):
    """The sender is alive."""


class Delivered(Message, frozen=True, tag="delivered"):
    """A prefill rank's notice to a decode rank: all that it owes it has arrived.

    Attributes:
        incarnation: the decode engine that is meant.
        epoch: its transfer.
    """

    incarnation: str
    epoch: int


LinkMessage = (
    Hello
    | Challenge
    | Proof
    | Introduction
    | Welcome
    | Refused
    | Claim
    | Announce
    | Cancel
    | Queued
    | Absent
    | Bound
    | Failed
    | Fenced
    | Goodbye
    | Ping
    | Delivered
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(LinkMessage)


def encode(message: LinkMessage) -> bytes:
    """A message as bytes, without its length."""
    return _encoder.encode(message)


def decode(data: bytes) -> LinkMessage:
    """The message that ``data`` is.

    Raises:
        MalformedMessageError: if it is none.
    """
    try:
        message: LinkMessage = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MalformedMessageError(f"not a message of push version {VERSION}: {error}") from error
    return message
